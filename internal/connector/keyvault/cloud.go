package keyvault

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
)

// cloud is one of Azure's clouds, see
// https://learn.microsoft.com/azure/key-vault/general/about-keys-secrets-certificates#dns-suffixes-for-object-identifiers
// and https://learn.microsoft.com/entra/identity-platform/authentication-national-cloud.
type cloud struct {
	vaults      string   // domain of its vaults
	authorities []string // hosts of its token endpoint, the default first
}

func clouds() []cloud {
	return []cloud{
		{"vault.azure.net", []string{"login.microsoftonline.com", "login.windows.net", "login.microsoft.com"}},
		{"vault.usgovcloudapi.net", []string{"login.microsoftonline.us"}},
		{"vault.azure.cn", []string{"login.chinacloudapi.cn", "login.partner.microsoftonline.cn"}},
	}
}

// resource returns the resource for tokens of the cloud's vaults.
func (c cloud) resource() string { return "https://" + c.vaults }

// address is the address of a vault.
type address struct {
	cloud cloud
	vault string // name of the vault
}

func (a address) host() string { return a.vault + "." + a.cloud.vaults }
func (a address) url() string  { return "https://" + a.host() }

// vaultForm matches names of vaults, see
// https://learn.microsoft.com/azure/azure-resource-manager/management/resource-name-rules#microsoftkeyvault.
var vaultForm = lazyregexp.New(`^[a-z][a-z0-9-]{1,22}[a-z0-9]$`)

func parseVault(text string) (*address, error) {
	if strings.Contains(text, "@") {
		return nil, errors.New("expected the URL of a vault without a user or a password")
	}
	u, err := url.Parse(strings.TrimSpace(text))
	if err != nil || u.Scheme != "https" || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" || u.Port() != "" && u.Port() != "443" {
		return nil, fmt.Errorf("expected the URL of a vault such as https://example.vault.azure.net, got %s", printable.Quote(text))
	}
	host := strings.ToLower(u.Hostname())
	name, domain, _ := strings.Cut(host, ".")
	if i := slices.IndexFunc(clouds(), func(c cloud) bool { return c.vaults == domain }); i >= 0 {
		if !vaultForm().MatchString(name) {
			return nil, fmt.Errorf("%s is not the name of a vault: 3 to 24 letters, digits and dashes", printable.Quote(name))
		}
		return &address{clouds()[i], name}, nil
	}
	switch {
	case strings.Contains(host, ".managedhsm."):
		return nil, fmt.Errorf("%s is a managed HSM, which has no certificates: use a vault", printable.Quote(host))
	case strings.Contains(host, "vaultcore."):
		return nil, fmt.Errorf("%s is the DNS alias of a private endpoint: use the vault's own name, such as https://example.vault.azure.net, which resolves to it", printable.Quote(host))
	}
	var known []string
	for _, c := range clouds() {
		known = append(known, "*."+c.vaults)
	}
	return nil, fmt.Errorf("%s is not a vault: expected %s", printable.Quote(host), strings.Join(known, ", "))
}

// authority returns the host that issues tokens, the only one that gets credentials. A job can only
// choose among Microsoft's names for it. This host's overlay can choose any.
func (k *keyVault) authority(c cloud, host connector.Host) (string, error) {
	named, key, trusted := k.config.AuthorityHost, "authority_host", k.target.Local("authority_host")
	if named == "" {
		named, key, trusted = getenv(host, "AZURE_AUTHORITY_HOST"), "AZURE_AUTHORITY_HOST", true
	}
	if named == "" {
		return c.authorities[0], nil
	}
	text := named
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return "", targetconf.Invalid(key, "expected a host such as %s, got %s", c.authorities[0], printable.Quote(named))
	}
	if at := strings.ToLower(u.Host); trusted || slices.Contains(c.authorities, at) {
		return at, nil
	}
	return "", targetconf.Invalid(key, "%s is not a host that issues tokens for this vault (%s): credentials are sent to another one only if an overlay on this host sets it",
		printable.Quote(named), strings.Join(c.authorities, ", "))
}

// challenge is a vault's request for a token, see
// https://learn.microsoft.com/azure/key-vault/general/authentication-requests-and-responses#authentication.
type challenge struct {
	resource string // that the token must be for
	tenant   string // of the vault
	problem  string // why a token was not accepted; "": unknown
}

var parameterForm = lazyregexp.New(`([a-zA-Z_-]+)\s*=\s*"([^"]*)"`)

func parseChallenge(header string) (*challenge, error) {
	scheme, rest, _ := strings.Cut(strings.TrimSpace(header), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return nil, errors.New("it does not request a token like a vault")
	}
	parameters := make(map[string]string)
	for _, match := range parameterForm().FindAllStringSubmatch(rest, -1) {
		parameters[strings.ToLower(match[1])] = match[2]
	}
	c := &challenge{resource: strings.TrimSuffix(cmp.Or(parameters["resource"], strings.TrimSuffix(parameters["scope"], "/.default")), "/"), problem: parameters["error"]}
	at, err := url.Parse(cmp.Or(parameters["authorization"], parameters["authorization_uri"]))
	if err != nil || c.resource == "" {
		return nil, errors.New("it does not request a token like a vault")
	}
	c.tenant, _, _ = strings.Cut(strings.TrimPrefix(at.Path, "/"), "/")
	return c, nil
}

// check returns an error if no token must be sent in answer to this challenge.
func (c *challenge) check(want cloud, tenant string) error {
	if !strings.EqualFold(c.resource, want.resource()) {
		return fmt.Errorf("it requests a token for %s, but a vault of this cloud needs one for %s: no token was sent", printable.Quote(c.resource), want.resource())
	}
	if isUUID(tenant) && isUUID(c.tenant) && !strings.EqualFold(tenant, c.tenant) {
		return fmt.Errorf("the vault is in the tenant %s, but the credentials are for the tenant %s: no token was requested", c.tenant, tenant)
	}
	return nil
}

var uuidForm = lazyregexp.New(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

func isUUID(text string) bool { return uuidForm().MatchString(text) }

func getenv(host connector.Host, name string) string {
	if host.Getenv == nil {
		return ""
	}
	return strings.TrimSpace(host.Getenv(name))
}
