package keyvault

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/pkcs12"
	"certctl-agent/internal/vendorapi"
)

// Tags of the versions that the agent imported. The target and the fingerprint identify the
// versions of this target.
const (
	managedTag     = ourTags + "managed-by"
	certificateTag = ourTags + "certificate-id"
	targetTag      = ourTags + "target-id"
	fingerprintTag = ourTags + "fingerprint"

	managedBy = "certctl-agent"
)

var marks = []string{managedTag, certificateTag, targetTag, fingerprintTag}

const (
	// settleFor is how long to wait for an import whose outcome is unknown. settlePause is the
	// pause between two checks.
	settleFor   = 10 * time.Second
	settlePause = time.Second
)

// change imports a certificate and its key as the current version.
type change struct {
	vault    *vault
	material *connector.Material
	key      keyProps // type and size of the key
	target   string
	tags     tags
	settle   time.Duration
	log      *slog.Logger

	hasRead bool        // Read has been called
	was     *oldVersion // found by Read; nil if there was no certificate
	sent    bool        // a request of this process may have changed something
}

// ID implements connector.Change.
func (c *change) ID() string {
	return "certificate " + strings.ToLower(c.vault.name) + " of " + c.vault.host()
}

// oldVersion is the version that a change replaces.
type oldVersion struct {
	Version string            `json:"version"`
	DER     []byte            `json:"certificate"`
	Enabled bool              `json:"enabled"`
	Tags    map[string]string `json:"tags"`
	Policy  certificatePolicy `json:"policy"`

	// Secret is the version as it was imported, with its private key. It is empty if the agent
	// cannot read it, for the reason in Lost.
	Secret string `json:"secret,omitempty"`
	Lost   string `json:"lost,omitempty"`
}

// Read implements connector.Change. It saves the old private key only if the agent may read it, and
// only if the version is about to be replaced.
func (c *change) Read(ctx context.Context) (was []byte, same bool, err error) {
	now, err := c.vault.get(ctx)
	if err == nil && now == nil {
		err = c.vault.checkName(ctx)
	}
	if err != nil {
		return nil, false, err
	}
	c.hasRead, c.was = true, nil
	if now == nil {
		return nil, false, nil
	}
	c.was = &oldVersion{Version: now.version(), DER: now.DER, Enabled: now.Attributes.Enabled, Tags: now.Tags, Policy: now.Policy}
	if same = c.upToDate(now); !same {
		if _, err := c.wantTags(now.Tags); err != nil {
			return nil, false, err
		}
	}
	if !same && !c.holds(now) && now.Attributes.Enabled {
		if err := c.readSecret(ctx); err != nil {
			return nil, false, err
		}
		if c.was.Lost != "" {
			c.log.Info("if this deployment fails after the import, the old version cannot be restored", "reason", c.was.Lost)
		}
	}
	was, err = json.Marshal(c.was)
	return was, same, err
}

// readSecret adds the secret of the old version to c.was.
func (c *change) readSecret(ctx context.Context) error {
	if !c.was.Policy.Key.Exportable {
		c.was.Lost = "its key cannot be exported"
		return nil
	}
	value, contentType, err := c.vault.secret(ctx, c.was.Version)
	switch {
	case vendorapi.StatusOf(err) == http.StatusForbidden: // the agent's role does not allow reading keys
		c.was.Lost = err.Error()
		return nil
	case err != nil:
		return err
	}
	c.was.Secret = value
	if contentType != "" {
		c.was.Policy.Secret.ContentType = contentType
	}
	return nil
}

// holds reports whether a version has the new certificate.
func (c *change) holds(b *bundle) bool { return bytes.Equal(b.DER, c.material.Leaf.Raw) }

// upToDate reports whether a version is as Write would make it.
func (c *change) upToDate(b *bundle) bool {
	if b == nil || !b.Attributes.Enabled || !c.holds(b) {
		return false
	}
	for key, value := range c.tags {
		if got, ok := b.Tags[key]; !ok || got != value {
			return false
		}
	}
	return true
}

// isOurs reports whether this target imported a version.
func (c *change) isOurs(b *bundle) bool {
	sum := sha256.Sum256(b.DER)
	return b.Tags[targetTag] == c.target && b.Tags[fingerprintTag] == hex.EncodeToString(sum[:])
}

// wantTags returns the tags of a new version, which include those of the old one.
func (c *change) wantTags(theirs map[string]string) (map[string]string, error) {
	want := maps.Clone(theirs)
	if want == nil {
		want = make(map[string]string)
	}
	maps.Copy(want, c.tags)
	want[managedTag] = managedBy
	want[certificateTag] = string(c.material.CertificateID)
	want[targetTag] = c.target
	want[fingerprintTag] = pemutil.Fingerprint(c.material.Leaf)
	if len(want) > maxTags {
		return nil, fmt.Errorf("together with its %d existing tags there would be %d, but Key Vault allows %d: remove some", len(theirs), len(want), maxTags)
	}
	return want, nil
}

var (
	errChanged = errors.New("someone else imported another version meanwhile; it was left alone")
	errTheirs  = errors.New("someone else has imported another version since; it was left alone")
)

// Write implements connector.Change. It does not import the certificate again if an interrupted
// deployment did, since versions cannot be deleted.
func (c *change) Write(ctx context.Context) error {
	now, err := c.vault.get(ctx)
	if err != nil || c.upToDate(now) {
		return err
	}
	if !c.unchanged(now) {
		return errChanged
	}
	var theirs map[string]string
	if now != nil {
		theirs = now.Tags
	}
	tags, err := c.wantTags(theirs)
	if err != nil {
		return err
	}
	if now != nil && c.holds(now) {
		c.sent = true
		if err := c.vault.update(ctx, now.version(), true, tags); err != nil {
			return err
		}
		return c.check(ctx, c.material.Leaf.Raw)
	}
	body, err := c.newImport(now)
	if err != nil {
		return err
	}
	body.Tags = tags
	c.sent = true
	return c.importAs(ctx, body, c.material.Leaf.Raw)
}

// unchanged reports whether the current version is still the one that Read found.
func (c *change) unchanged(now *bundle) bool {
	if now == nil || c.was == nil {
		return now == nil && c.was == nil
	}
	return now.version() == c.was.Version
}

// importAs imports a version and checks that it is the current one. If the outcome of the import is
// unknown, it waits for the version instead of importing it again.
func (c *change) importAs(ctx context.Context, body *importRequest, der []byte) error {
	err := c.vault.importVersion(ctx, body)
	if err == nil {
		return c.check(ctx, der)
	}
	_, lost := errors.AsType[*vendorapi.LostError](err)
	if status := vendorapi.StatusOf(err); lost || status >= 500 && status != http.StatusServiceUnavailable {
		return c.waitForImport(ctx, der, err)
	}
	return err
}

func (c *change) waitForImport(ctx context.Context, der []byte, lost error) error {
	for start := time.Now(); ; {
		now, err := c.vault.get(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("%w; cannot find out whether it was imported: %w", lost, err)
		case now != nil && bytes.Equal(now.DER, der):
			return nil
		case time.Since(start) >= c.settle:
			return lost
		}
		select {
		case <-time.After(min(settlePause, c.settle)):
		case <-ctx.Done():
			return fmt.Errorf("%w; %w", lost, context.Cause(ctx))
		}
	}
}

// check reads the current version back and compares it with the certificate.
func (c *change) check(ctx context.Context, der []byte) error {
	now, err := c.vault.get(ctx)
	if err != nil {
		return fmt.Errorf("read it back: %w", err)
	}
	if now == nil || !bytes.Equal(now.DER, der) || !now.Attributes.Enabled {
		return errors.New("read it back: the current version is not the imported one: someone else changes this certificate too")
	}
	return nil
}

// newImport returns the import of the certificate. It keeps the format of the current version,
// since clients that read the secret rely on it.
func (c *change) newImport(now *bundle) (*importRequest, error) {
	i := &importRequest{Policy: certificatePolicy{Key: c.key, Secret: secretProps{typePFX}}}
	i.Policy.Key.Exportable = true // the service's default
	if now != nil {
		i.Policy.Key.Exportable = now.Policy.Key.Exportable
		if strings.HasSuffix(now.Policy.Key.Type, "-HSM") {
			i.Policy.Key.Type += "-HSM"
		}
		if now.Policy.Secret.ContentType == typePEM {
			i.Policy.Secret.ContentType = typePEM
		}
	}
	key, err := pemutil.ParseKey(c.material.KeyPEM)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	chain := append([]*x509.Certificate{c.material.Leaf}, c.material.Chain...)
	if i.Policy.Secret.ContentType == typePEM {
		i.Value = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})) + string(pemutil.EncodeCertificates(chain...))
		return i, nil
	}
	i.Password = rand.Text()
	i.Value, err = encodePFX(pkcs8, chain, i.Password)
	return i, err
}

// encodePFX encodes the PKCS#12 to import, with SHA-1 and 3DES: Key Vault has refused AES, see
// https://github.com/MicrosoftDocs/azure-docs/issues/39861 and
// https://github.com/hashicorp/packer-plugin-azure/pull/571. The same request has the password, so TLS
// protects both.
func encodePFX(pkcs8 []byte, chain []*x509.Certificate, password string) (string, error) {
	store := pkcs12.NewOnce(password, true)
	if _, err := store.Put(keyentry.PrivateKey{Alias: "certificate", PKCS8: pkcs8, Chain: chain, Created: time.Now(), Password: password}, true); err != nil {
		return "", err
	}
	data, err := store.Encode()
	return base64.StdEncoding.EncodeToString(data), err
}

// Restore implements connector.Change. Versions cannot be deleted, so it imports the old one again.
// A first version is disabled: deleting the certificate would block its name for the next
// deployment.
func (c *change) Restore(ctx context.Context, saved []byte) error {
	var was *oldVersion
	if saved != nil {
		was = new(oldVersion)
		if err := json.Unmarshal(saved, was); err != nil {
			return fmt.Errorf("its backup cannot be read: %w", err)
		}
	}
	if c.untouched(was) {
		return nil
	}
	now, err := c.vault.get(ctx)
	switch {
	case err != nil:
		return err
	case now == nil && was == nil:
		return nil
	case now == nil:
		return errors.New("someone else has deleted it since")
	case was != nil && now.version() == was.Version:
		return c.restoreTags(ctx, now, was)
	case was != nil && was.Enabled && now.Attributes.Enabled && bytes.Equal(now.DER, was.DER):
		return nil // an earlier undo imported it
	case !c.isOurs(now):
		return errTheirs
	case was == nil || !was.Enabled:
		return c.disable(ctx, now)
	case was.Secret == "":
		return c.irrevocable(now, was)
	}
	key := was.Policy.Key
	body := &importRequest{Value: was.Secret, Policy: certificatePolicy{Key: key, Secret: was.Policy.Secret}, Tags: was.Tags}
	c.sent = true
	if err := c.importAs(ctx, body, was.DER); err != nil {
		return fmt.Errorf("importing the old version %s again failed: %w", was.Version, err)
	}
	return nil
}

// untouched reports whether neither this process nor an earlier one can have changed anything.
func (c *change) untouched(was *oldVersion) bool {
	if !c.hasRead || c.sent {
		return false
	}
	return was == nil && c.was == nil || was != nil && c.was != nil && was.Version == c.was.Version && was.Enabled == c.was.Enabled && maps.Equal(was.Tags, c.was.Tags)
}

// restoreTags undoes an update of an existing version.
func (c *change) restoreTags(ctx context.Context, now *bundle, was *oldVersion) error {
	if now.Attributes.Enabled == was.Enabled && maps.Equal(now.Tags, was.Tags) {
		return nil
	}
	if !c.isOurs(now) {
		return errTheirs
	}
	c.sent = true
	return c.vault.update(ctx, was.Version, was.Enabled, was.Tags)
}

// disable undoes the import of a first version.
func (c *change) disable(ctx context.Context, now *bundle) error {
	if !now.Attributes.Enabled {
		return nil
	}
	c.sent = true
	if err := c.vault.update(ctx, now.version(), false, now.Tags); err != nil {
		return fmt.Errorf("disabling the version %s failed (%s --version %s --enabled false): %w", now.version(), c.vault.cli("set-attributes"), now.version(), err)
	}
	return nil
}

func (c *change) irrevocable(now *bundle, was *oldVersion) error {
	return fmt.Errorf("%w: the new version %s stays the current one, since the old version %s cannot be imported again (%s): to go back, import its certificate and key by hand (%s); "+
		"clients that name the old version still get it", connector.ErrIrrevocable, now.version(), was.Version, was.Lost, c.vault.cli("import")+" --file FILE")
}

// Finish implements connector.Change. Old versions stay, for clients that name them.
func (c *change) Finish(context.Context) error { return nil }
