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

// Tags by which the agent knows its versions again. The target and the fingerprint
// tell the versions of this target from those of others.
const (
	managedTag     = ourTags + "managed-by"
	certificateTag = ourTags + "certificate-id"
	targetTag      = ourTags + "target-id"
	fingerprintTag = ourTags + "fingerprint"

	managedBy = "certctl-agent"
)

var marks = []string{managedTag, certificateTag, targetTag, fingerprintTag}

const (
	// settleFor is how long an import is looked for that may have been carried out,
	// and settlePause is between two looks.
	settleFor   = 10 * time.Second
	settlePause = time.Second
)

// change makes a certificate and its key the current version.
type change struct {
	vault    *vault
	material *connector.Material
	key      keyProps // type and size of the key
	target   string
	tags     tags
	settle   time.Duration
	log      *slog.Logger

	looked bool    // Read has been called
	was    *former // what it saw; nil: there was no certificate
	sent   bool    // a request of this process may have changed something
}

// ID implements connector.Change.
func (c *change) ID() string {
	return "certificate " + strings.ToLower(c.vault.name) + " of " + c.vault.host()
}

// former is the version that a change replaces.
type former struct {
	Version string            `json:"version"`
	DER     []byte            `json:"certificate"`
	Enabled bool              `json:"enabled"`
	Tags    map[string]string `json:"tags"`
	Policy  certificatePolicy `json:"policy"`

	// Secret is what the version was imported from, with its private key. "": it
	// cannot be had, for the reason in Lost.
	Secret string `json:"secret,omitempty"`
	Lost   string `json:"lost,omitempty"`
}

// Read implements connector.Change. It saves the former private key only where that
// may be read, and only if the version is about to be replaced.
func (c *change) Read(ctx context.Context) (was []byte, same bool, err error) {
	now, err := c.vault.get(ctx)
	if err == nil && now == nil {
		err = c.vault.checkName(ctx)
	}
	if err != nil {
		return nil, false, err
	}
	c.looked, c.was = true, nil
	if now == nil {
		return nil, false, nil
	}
	c.was = &former{Version: now.version(), DER: now.DER, Enabled: now.Attributes.Enabled, Tags: now.Tags, Policy: now.Policy}
	if same = c.isIn(now); !same {
		if _, err := c.wantTags(now.Tags); err != nil {
			return nil, false, err
		}
	}
	if !same && !c.holds(now) && now.Attributes.Enabled {
		if err := c.readSecret(ctx); err != nil {
			return nil, false, err
		}
		if c.was.Lost != "" {
			c.log.Info("if this deployment fails after the import, it cannot go back to the former version", "reason", c.was.Lost)
		}
	}
	was, err = json.Marshal(c.was)
	return was, same, err
}

// readSecret adds what the former version was imported from.
func (c *change) readSecret(ctx context.Context) error {
	if !c.was.Policy.Key.Exportable {
		c.was.Lost = "its key cannot be exported"
		return nil
	}
	value, contentType, err := c.vault.secret(ctx, c.was.Version)
	switch {
	case vendorapi.StatusOf(err) == http.StatusForbidden: // least privilege: the agent may not read keys
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

// holds reports whether a version is of our certificate.
func (c *change) holds(b *bundle) bool { return bytes.Equal(b.DER, c.material.Leaf.Raw) }

// isIn reports whether a version is as Write would make it.
func (c *change) isIn(b *bundle) bool {
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

// isOurs reports whether this target has imported a version.
func (c *change) isOurs(b *bundle) bool {
	sum := sha256.Sum256(b.DER)
	return b.Tags[targetTag] == c.target && b.Tags[fingerprintTag] == hex.EncodeToString(sum[:])
}

// wantTags are those of a new version: those of the former one stay.
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
		return nil, fmt.Errorf("with the %d tags that it has there would be %d, and Key Vault allows %d: take some away", len(theirs), len(want), maxTags)
	}
	return want, nil
}

var (
	errChanged = errors.New("someone else imported another version just now; that was left alone")
	errTheirs  = errors.New("someone else has imported another version since, and that was left alone")
)

// Write implements connector.Change. An interrupted deployment may have imported the
// certificate already: then it is not imported once more, since versions stay for
// ever.
func (c *change) Write(ctx context.Context) error {
	now, err := c.vault.get(ctx)
	if err != nil || c.isIn(now) {
		return err
	}
	if !c.saw(now) {
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

// saw reports whether the current version is the one that Read saw.
func (c *change) saw(now *bundle) bool {
	if now == nil || c.was == nil {
		return now == nil && c.was == nil
	}
	return now.version() == c.was.Version
}

// importAs imports a version and sees to it that it is the current one. An import
// that may have been carried out, whatever the answer, is looked for and not made again.
func (c *change) importAs(ctx context.Context, body *importing, der []byte) error {
	err := c.vault.importVersion(ctx, body)
	if err == nil {
		return c.check(ctx, der)
	}
	_, lost := errors.AsType[*vendorapi.LostError](err)
	if status := vendorapi.StatusOf(err); lost || status >= 500 && status != http.StatusServiceUnavailable {
		return c.lookFor(ctx, der, err)
	}
	return err
}

func (c *change) lookFor(ctx context.Context, der []byte, lost error) error {
	for begun := time.Now(); ; {
		now, err := c.vault.get(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("%w; what came of it is not known: %w", lost, err)
		case now != nil && bytes.Equal(now.DER, der):
			return nil
		case time.Since(begun) >= c.settle:
			return lost
		}
		select {
		case <-time.After(min(settlePause, c.settle)):
		case <-ctx.Done():
			return fmt.Errorf("%w; %w", lost, context.Cause(ctx))
		}
	}
}

// check reads the current version back: it has to be the certificate.
func (c *change) check(ctx context.Context, der []byte) error {
	now, err := c.vault.get(ctx)
	if err != nil {
		return fmt.Errorf("read it back: %w", err)
	}
	if now == nil || !bytes.Equal(now.DER, der) || !now.Attributes.Enabled {
		return errors.New("read it back: the current version is another one than was imported: someone else changes this certificate too")
	}
	return nil
}

// newImport is the import of the certificate in the form that the current version
// has, since those who read the secret rely on that.
func (c *change) newImport(now *bundle) (*importing, error) {
	i := &importing{Policy: certificatePolicy{Key: c.key, Secret: secretProps{typePFX}}}
	i.Policy.Key.Exportable = true // as the service itself does
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

// encodePFX makes the PKCS#12 that is imported, with SHA-1 and 3DES: Key Vault has
// refused AES, see https://github.com/MicrosoftDocs/azure-docs/issues/39861 and
// https://github.com/hashicorp/packer-plugin-azure/pull/571. The password goes beside
// it in the same request, so what protects both is TLS.
func encodePFX(pkcs8 []byte, chain []*x509.Certificate, password string) (string, error) {
	store := pkcs12.NewOnce(password, true)
	if _, err := store.Put(keyentry.PrivateKey{Alias: "certificate", PKCS8: pkcs8, Chain: chain, Created: time.Now(), Password: password}, true); err != nil {
		return "", err
	}
	data, err := store.Encode()
	return base64.StdEncoding.EncodeToString(data), err
}

// Restore implements connector.Change. No version can be taken away, so the former
// one is imported once more. Where there was none, ours is disabled: to delete it
// would take the name away from the next deployment.
func (c *change) Restore(ctx context.Context, saved []byte) error {
	var was *former
	if saved != nil {
		was = new(former)
		if err := json.Unmarshal(saved, was); err != nil {
			return fmt.Errorf("what would undo it cannot be read: %w", err)
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
	key := was.Policy.Key // of the former key: type and size are what they were
	body := &importing{Value: was.Secret, Policy: certificatePolicy{Key: key, Secret: was.Policy.Secret}, Tags: was.Tags}
	c.sent = true
	if err := c.importAs(ctx, body, was.DER); err != nil {
		return fmt.Errorf("the former version %s could not be imported again: %w", was.Version, err)
	}
	return nil
}

// untouched reports whether neither this process nor the one before it can have
// changed anything.
func (c *change) untouched(was *former) bool {
	if !c.looked || c.sent {
		return false
	}
	return was == nil && c.was == nil || was != nil && c.was != nil && was.Version == c.was.Version && was.Enabled == c.was.Enabled && maps.Equal(was.Tags, c.was.Tags)
}

// restoreTags undoes an update of a version that held the certificate before.
func (c *change) restoreTags(ctx context.Context, now *bundle, was *former) error {
	if now.Attributes.Enabled == was.Enabled && maps.Equal(now.Tags, was.Tags) {
		return nil
	}
	if !c.isOurs(now) {
		return errTheirs
	}
	c.sent = true
	return c.vault.update(ctx, was.Version, was.Enabled, was.Tags)
}

// disable takes back the first version of a certificate.
func (c *change) disable(ctx context.Context, now *bundle) error {
	if !now.Attributes.Enabled {
		return nil
	}
	c.sent = true
	if err := c.vault.update(ctx, now.version(), false, now.Tags); err != nil {
		return fmt.Errorf("the version %s could not be disabled (%s --version %s --enabled false): %w", now.version(), c.vault.cli("set-attributes"), now.version(), err)
	}
	return nil
}

func (c *change) irrevocable(now *bundle, was *former) error {
	return fmt.Errorf("%w: the new version %s stays the current one, since the former version %s cannot be imported again (%s): if it must come back, import its certificate and key by hand (%s); "+
		"clients that name the former version still get it", connector.ErrIrrevocable, now.version(), was.Version, was.Lost, c.vault.cli("import")+" --file FILE")
}

// Finish implements connector.Change. Former versions stay, for clients that name them.
func (c *change) Finish(context.Context) error { return nil }
