// Package javakeystore installs certificates for Java servers: a private key with its chain under
// an alias of a key store file, in PKCS#12 or JKS format. The other entries of the store stay as
// they are.
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

// Type returns the target type JavaKeystore.
func Type() connector.Type { return connector.Type{Name: "JavaKeystore", New: newConnector} }

const (
	// maxStore bounds a key store, in bytes. It is the engine's limit for files.
	maxStore = 4 << 20

	// maxAlias bounds an alias, in bytes.
	maxAlias = 255
)

// config is the target's configuration. Control planes mask every key with key or password in its
// name.
type config struct {
	Path     targetconf.Path        `json:"keystore_path" config:"required"`
	File     targetconf.FileOptions `json:"keystore_*" config:"secret"`
	Password secret.String          `json:"keystore_password"`
	Type     string                 `json:"keystore_type"` // "": that of the existing store, else PKCS12
	Create   *bool                  `json:"create_keystore" default:"true"`

	Alias       string        `json:"alias" default:"server"`
	KeyPassword secret.String `json:"key_password"` // "": that of the store

	// LegacyCiphers is needed for Java 8 before 8u301.
	LegacyCiphers bool `json:"legacy_ciphers"`

	ValidateCommand string `json:"validate_command"`
	ReloadCommand   string `json:"reload_command"`

	// Settings of agents that run keytool.
	Keytool   ignored `json:"keytool_path"`
	BackupDir ignored `json:"backup_dir"`
}

// ignored is a setting that is accepted and ignored.
type ignored struct{}

func (*ignored) UnmarshalJSON([]byte) error { return nil }

type javaKeystore struct {
	config   config
	format   format // of a new store
	masked   error  // why the format of a new store is unknown; nil if it is known
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
		errs = append(errs, targetconf.Invalid("alias", "expected at most %d printable bytes, got %s", maxAlias, printable.Quote(alias)))
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
		plan.Caveats = append(plan.Caveats, fmt.Sprintf("reload_command is not set: a server that does not watch %s serves the old certificate until it restarts", k.config.Path))
	}
	return plan, nil
}

// read returns the existing store, and whether every user can read it. If there is none, data is
// empty but not nil.
func (k *javaKeystore) read() (data []byte, open bool, err error) {
	path := string(k.config.Path)
	// The path comes from the control plane: check it before reading, not only before writing.
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

// errASCII is returned for passwords that Java would reject as wrong.
var errASCII = errors.New("only passwords of printable ASCII characters open a PKCS12 store in Java: change keystore_password and key_password")

func notASCII(r rune) bool { return r < ' ' || r > '~' }

// errTrustStore protects trust stores such as the JDK's cacerts. A file with a private key does not
// stay readable for every user, so other programs would lose their trust store.
var errTrustStore = errors.New("it looks like a trust store: it holds certificates but no private key, and every user can read it. With a private key other users could not read it any more: " +
	"configure another path or, if only this server needs the file, run chmod o-r on it first")

// replace returns the store with m under the alias, or was itself if m is already there. Had is the
// old private key under the alias, if it can be read. Open says that every user can read was.
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

// open opens the existing store, which keeps its format, or makes a new one if data is empty.
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
