// Package javakeystore installs certificates for servers that run on Java: a private key with its
// chain under an alias of a key store file, in PKCS#12 or in JKS. Whatever else the store holds stays
// as it is.
package javakeystore

import (
	"cmp"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/jks"
	"certctl-agent/internal/pkcs12"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/targetconf"
)

// Type is the kind of target.
func Type() connector.Type { return connector.Type{Name: "JavaKeystore", New: newConnector} }

const (
	// maxStore bounds a key store, in bytes. The engine replaces no larger file.
	maxStore = 4 << 20

	// maxAlias bounds an alias, in bytes.
	maxAlias = 255
)

// config is what can be set. Control planes mask every key with key or password in its name.
type config struct {
	Path     targetconf.Path        `json:"keystore_path" config:"required"`
	File     targetconf.FileOptions `json:"keystore_*" config:"secret"`
	Password secret.String          `json:"keystore_password"`
	Type     string                 `json:"keystore_type"` // none: that of the store that is there, else PKCS12
	Create   *bool                  `json:"create_keystore" default:"true"`

	Alias       string        `json:"alias" default:"server"`
	KeyPassword secret.String `json:"key_password"` // none: the store's

	// LegacyCiphers is for Java 8 before 8u301.
	LegacyCiphers bool `json:"legacy_ciphers"`

	ValidateCommand string `json:"validate_command"`
	ReloadCommand   string `json:"reload_command"`

	// Agents that run keytool have these.
	Keytool   ignored `json:"keytool_path"`
	BackupDir ignored `json:"backup_dir"`
}

// ignored is a setting that is accepted and has no meaning here.
type ignored struct{}

func (*ignored) UnmarshalJSON([]byte) error { return nil }

type javaKeystore struct {
	config   config
	format   format // of a new store
	masked   error  // why the format of a new store is unknown; nil: it is not
	common   targetconf.Common
	policy   *policy.Policy
	validate *policy.Command
	reload   *policy.Command
}

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	k := &javaKeystore{common: c.Common, policy: host.Policy}
	err := c.Decode(&k.config, "keystore_type", "keytool_path", "backup_dir")
	if err == nil {
		err = k.check(c)
	}
	if err != nil {
		return nil, err
	}
	k.validate, k.reload, err = host.Commands(c, k.config.ValidateCommand, k.config.ReloadCommand)
	return k, err
}

func (k *javaKeystore) check(c *targetconf.Config) error {
	var errs []error
	if k.config.Password.IsZero() {
		errs = append(errs, targetconf.Invalid("keystore_password", "is required"))
	}
	if alias := k.config.Alias; len(alias) > maxAlias || strings.ContainsFunc(alias, printable.IsControl) {
		errs = append(errs, targetconf.Invalid("alias", "expected at most %d bytes that print, got %s", maxAlias, printable.Quote(alias)))
	}
	switch strings.ToUpper(k.config.Type) {
	case "":
		if c.Masked("keystore_type") {
			k.masked = c.MaskedError("keystore_type", nil)
		}
		k.format = pkcs12Format
	case string(pkcs12Format):
		k.format = pkcs12Format
	case string(jksFormat):
		k.format = jksFormat
	default:
		errs = append(errs, targetconf.Invalid("keystore_type", "expected PKCS12 or JKS, got %s", printable.Quote(k.config.Type)))
	}
	return targetconf.Join(errs...)
}

// Plan implements connector.Connector.
func (k *javaKeystore) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	was, open, err := k.read()
	if err != nil {
		return nil, err
	}
	data, had, err := k.replace(was, open, m)
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", k.config.Path, err)
	}
	file := connector.NewFile(k.config.Path, connector.KeyFile, data, k.config.File)
	file.From = was
	if had != nil {
		file.HadKey = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: had})
	}
	plan := &connector.Plan{
		Files:    []connector.File{file},
		Validate: k.validate,
		Reload:   connector.Reload{Command: k.reload},
		Serves:   k.common.Endpoint(),
	}
	if k.reload == nil {
		plan.Caveats = append(plan.Caveats, fmt.Sprintf("reload_command is not set: a server that does not watch %s serves the certificate from before until it starts again", k.config.Path))
	}
	return plan, nil
}

// read reads the store that is there, and reports whether every user can; without one it returns no
// bytes, which are not nil.
func (k *javaKeystore) read() (data []byte, open bool, err error) {
	path := string(k.config.Path)
	// What may not be written is not read either: the path comes from elsewhere.
	if err := k.policy.CheckPath(hostfile.Real(path)); err != nil {
		return nil, false, err
	}
	data, info, err := hostfile.Read(path, maxStore)
	if errors.Is(err, fs.ErrNotExist) {
		return []byte{}, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read the key store: %w", err)
	}
	return append([]byte{}, data...), info.Mode().Perm()&0o004 != 0, nil
}

// errASCII: of anything else Java says that the password is wrong.
var errASCII = errors.New("a PKCS12 store opens in Java only with passwords of printable ASCII characters: take others for keystore_password and key_password")

func notASCII(r rune) bool { return r < ' ' || r > '~' }

// errTrustStore refuses what would take the trust store, such as the JDK's cacerts, from other programs:
// no file with a key in it stays readable for every user.
var errTrustStore = errors.New("it holds certificates and no private key, and every user can read it, as other programs read a trust store; they could not any more: " +
	"configure another path, or if only this server needs it, chmod o-r it first")

// replace returns the store with m under the alias, which is the old one if that has it already. Had
// is the private key under the alias before, if it can be read. Open says that every user can read was.
func (k *javaKeystore) replace(was []byte, open bool, m *connector.Material) (data, had []byte, err error) {
	password := k.config.Password.Reveal()
	entry, err := newEntry(m, k.config.Alias, cmp.Or(k.config.KeyPassword.Reveal(), password))
	if err != nil {
		return nil, nil, err
	}
	s, err := k.open(was, password)
	if err != nil {
		return nil, nil, explain(err)
	}
	if _, is := s.(pkcs12Store); is && strings.ContainsFunc(password+entry.Password, notASCII) {
		return nil, nil, errASCII
	}
	if open && s.IsTrustStore() {
		return nil, nil, errTrustStore
	}
	switch old, err := s.Find(entry.Alias, entry.Password); {
	case k.config.KeyPassword.IsZero() && (errors.Is(err, pkcs12.ErrPassword) || errors.Is(err, jks.ErrPassword)):
		return nil, nil, fmt.Errorf("alias %s: %w", printable.Quote(entry.Alias), errKeyPassword)
	case err == nil && old != nil:
		had = old.PKCS8
	}
	changed, err := s.Put(entry)
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("alias %s: %w", printable.Quote(entry.Alias), explain(err))
	case !changed:
		return was, had, nil
	}
	data, err = s.Encode()
	return data, had, err
}

// open opens the store that is there, which keeps its format, or else makes one.
func (k *javaKeystore) open(data []byte, password string) (store, error) {
	if len(data) == 0 {
		return k.create(password)
	}
	f, err := formatOf(data)
	if err != nil {
		return nil, err
	}
	if k.config.Type != "" && f != k.format {
		return nil, fmt.Errorf("it is of type %s, and keystore_type is %s: set keystore_type to %s, or remove the file", f, k.format, f)
	}
	return f.open(data, password, k.config.LegacyCiphers)
}

func (k *javaKeystore) create(password string) (store, error) {
	switch {
	case !*k.config.Create:
		return nil, errors.New("it does not exist, and create_keystore is false")
	case k.masked != nil:
		return nil, fmt.Errorf("it does not exist: %w", k.masked)
	}
	return k.format.create(password, k.config.LegacyCiphers), nil
}
