// Package keyvault installs certificates in Azure Key Vault, as versions of a certificate that
// applications, gateways and other Azure services read.
package keyvault

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/vendorapi"
)

// Type returns the target type AzureKeyVault.
func Type() connector.Type { return typeOf(waits{}) }

// waits are times that tests shorten. Zero values are the defaults.
type waits struct {
	patience time.Duration // how long a call is retried
	settle   time.Duration // how long to wait for an import whose outcome is unknown
}

func typeOf(w waits) connector.Type {
	return connector.Type{Name: "AzureKeyVault", New: func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		k, err := newConnector(c, host, w)
		if err != nil {
			return nil, err
		}
		return k, nil
	}}
}

// config is the target's configuration.
type config struct {
	VaultURL        string          `json:"vault_url" config:"required"`
	CertificateName string          `json:"certificate_name" config:"required"`
	Tags            tags            `json:"tags"`
	CredentialMode  string          `json:"credential_mode" default:"default"`
	ClientID        string          `json:"client_id"`     // of a user-assigned identity or an application; "": AZURE_CLIENT_ID
	ClientSecret    secret.String   `json:"client_secret"` // "": AZURE_CLIENT_SECRET
	TenantID        string          `json:"tenant_id"`     // "": AZURE_TENANT_ID
	AuthorityHost   string          `json:"authority_host"`
	CABundle        targetconf.Path `json:"ca_bundle"` // "": the system's authorities
}

type keyVault struct {
	target *targetconf.Config
	config config
	vault  *vault
	settle time.Duration
	log    *slog.Logger
}

func newConnector(c *targetconf.Config, host connector.Host, w waits) (*keyVault, error) {
	w.patience = cmp.Or(w.patience, host.Patience)
	k := &keyVault{target: c, settle: w.settle, log: host.Log}
	if k.settle == 0 {
		k.settle = settleFor
	}
	if err := targetconf.Join(c.Decode(&k.config), c.Common.MarkRemote()); err != nil {
		return nil, err
	}
	at, err := parseVault(k.config.VaultURL)
	if err != nil {
		return nil, targetconf.Invalid("vault_url", "%v", err)
	}
	if err := k.config.check(c); err != nil {
		return nil, err
	}
	authority, err := k.authority(at.cloud, host)
	if err != nil {
		return nil, err
	}
	trust := vendorapi.Trust{CAFile: string(k.config.CABundle)}
	methods := &tokenMethods{config: &k.config, host: host, authority: authority, trust: trust, timeout: time.Duration(c.Common.CommandTimeout), patience: w.patience}
	sources, err := methods.sources()
	if err != nil {
		return nil, err
	}
	k.vault = &vault{address: *at, name: k.config.CertificateName, tenant: methods.tenant(), credentials: &credentials{sources: sources, resource: at.cloud.resource()}}
	k.vault.api, err = newAPI(k.vault, c, host, trust, w.patience)
	return k, err
}

// nameForm matches names of certificates, see
// https://learn.microsoft.com/rest/api/keyvault/certificates/import-certificate/import-certificate?view=rest-keyvault-certificates-7.4#uri-parameters.
var nameForm = lazyregexp.New(`^[0-9a-zA-Z-]{1,127}$`)

// idForm matches client and tenant ids: a UUID, or a tenant's domain.
var idForm = lazyregexp.New(`^[0-9a-zA-Z][0-9a-zA-Z.-]{0,252}$`)

func (c *config) check(given *targetconf.Config) error {
	var errs []error
	bad := func(key, format string, args ...any) { errs = append(errs, targetconf.Invalid(key, format, args...)) }
	if !nameForm().MatchString(c.CertificateName) {
		bad("certificate_name", "%s is not a valid name: letters, digits and dashes, at most 127", printable.Quote(c.CertificateName))
	}
	if modes := []string{modeDefault, modeManaged, modeSecret, modeWorkload}; !slices.Contains(modes, c.CredentialMode) {
		bad("credential_mode", "expected one of %s, got %s", strings.Join(modes, ", "), printable.Quote(c.CredentialMode))
	}
	for key, value := range map[string]string{"client_id": c.ClientID, "tenant_id": c.TenantID} {
		if value != "" && !idForm().MatchString(value) {
			bad(key, "%s is not a valid id", printable.Quote(value))
		}
	}
	// These decide who gets credentials, and which server is trusted as the vault.
	for key, set := range map[string]bool{"tenant_id": c.TenantID != "", "ca_bundle": c.CABundle != ""} {
		if set && !given.Local(key) {
			bad(key, "is accepted only from an overlay on this host")
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return targetconf.Join(errs...)
}

// tags is a JSON object, or a string that contains one.
type tags map[string]string

// Limits of tags, see
// https://learn.microsoft.com/azure/key-vault/certificates/about-certificates#certificate-tags.
const (
	maxTags = 15
	maxTag  = 256 // characters of a name or a value

	// ourTags is the prefix of the agent's own tags.
	ourTags = "certctl-"
)

func (t *tags) UnmarshalJSON(raw []byte) error {
	read, err := targetconf.ParseStrings(raw)
	if err != nil {
		return err
	}
	for key, value := range read {
		switch {
		case key == "" || utf8.RuneCountInString(key) > maxTag || utf8.RuneCountInString(value) > maxTag:
			return fmt.Errorf("%s: names of tags must have 1 to %d characters, and values at most that many", printable.Quote(key), maxTag)
		case strings.HasPrefix(strings.ToLower(key), ourTags):
			return fmt.Errorf("%s: tags that start with %s are reserved for the agent", printable.Quote(key), ourTags)
		}
	}
	if most := maxTags - len(marks); len(read) > most {
		return fmt.Errorf("there are %d tags: Key Vault allows %d, and the agent needs %d of them", len(read), maxTags, len(marks))
	}
	*t = read
	return nil
}

// Plan implements connector.Connector.
func (k *keyVault) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	props, err := keyProperties(m.Leaf)
	if err != nil {
		return nil, err
	}
	return &connector.Plan{
		Changes: []connector.Change{&change{
			vault: k.vault, material: m, key: *props, target: string(k.target.Target()), tags: k.config.Tags, settle: k.settle, log: k.log,
		}},
		Serves: k.target.Common.Endpoint(),
	}, nil
}

// keyProperties returns the properties of a certificate's key, or an error if Key Vault does not
// accept it, see https://learn.microsoft.com/azure/key-vault/keys/about-keys-details.
func keyProperties(leaf *x509.Certificate) (*keyProps, error) {
	switch public := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		if size := public.N.BitLen(); slices.Contains([]int{2048, 3072, 4096}, size) {
			return &keyProps{Type: "RSA", Size: size}, nil
		}
		return nil, fmt.Errorf("the certificate has an RSA key of %d bits, but Key Vault accepts only 2048, 3072 and 4096: issue the certificate with a key of one of these sizes", public.N.BitLen())
	case *ecdsa.PublicKey:
		if slices.Contains([]elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()}, public.Curve) {
			return &keyProps{Type: "EC", Curve: public.Curve.Params().Name}, nil
		}
		return nil, fmt.Errorf("the certificate has an ECDSA key on %s, but Key Vault accepts only P-256, P-384 and P-521: issue the certificate with a key on one of these curves", public.Curve.Params().Name)
	}
	return nil, fmt.Errorf("the certificate has a key of type %v, but Key Vault accepts only RSA and ECDSA: issue the certificate with a key of one of these types", leaf.PublicKeyAlgorithm)
}
