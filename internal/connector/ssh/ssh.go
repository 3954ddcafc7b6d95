// Package ssh installs certificates on a remote host with OpenSSH's client: it replaces a
// certificate file, a key file and optionally a chain file over SFTP, and runs commands in the
// account's shell.
package ssh

import (
	"context"
	"fmt"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/targetconf"
)

// Type returns the target type localhost.
func Type() connector.Type { return connector.Type{Name: "SSH", New: newConnector} }

// config is the target's configuration.
type config struct {
	Host string `json:"host" config:"required"`
	Port int    `json:"port" default:"22"`
	User string `json:"user" config:"required"`

	AuthMethod     string          `json:"auth_method" default:"key"` // key, password
	PrivateKeyPath targetconf.Path `json:"private_key_path"`
	PrivateKey     secret.String   `json:"private_key"` // the key itself, as PEM
	Passphrase     secret.String   `json:"passphrase"`
	Password       secret.String   `json:"password"`

	HostKey    string          `json:"host_key"`    // public key lines
	KnownHosts targetconf.Path `json:"known_hosts"` // known_hosts file; if both are empty, those of the agent's user
	SSHConfig  targetconf.Path `json:"ssh_config"`  // can make ssh run programs: overlays only

	CertPath  targetconf.Path        `json:"cert_path" config:"required"`
	KeyPath   targetconf.Path        `json:"key_path" config:"required"`
	ChainPath targetconf.Path        `json:"chain_path"` // "": the chain follows the leaf in CertPath
	Cert      targetconf.FileOptions `json:"cert_*"`
	Key       targetconf.FileOptions `json:"key_*" config:"secret"`
	Chain     targetconf.FileOptions `json:"chain_*"`

	ValidateCommand string             `json:"validate_command"`
	ReloadCommand   string             `json:"reload_command"`
	Sudo            bool               `json:"sudo"`                 // run the commands as sudo -n
	Timeout         targetconf.Seconds `json:"timeout" default:"30"` // of the login and of each request
}

const (
	byKey      = "key"
	byPassword = "password"
)

// target is the connector with its connection. It is used by one goroutine.
type target struct {
	config
	host    connector.Host
	at      *connector.Peer
	common  *targetconf.Common
	id      string          // of the target
	local   map[string]bool // paths that an overlay sets
	keys    []hostKey       // from HostKey
	connect func(context.Context) (*session, error)
	session *session // nil: none
	tested  bool     // the validate command has run
}

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	t := &target{host: host, common: &c.Common, id: string(c.Target())}
	t.connect = t.dial
	if err := c.Decode(&t.config); err != nil {
		return nil, err
	}
	if err := c.Common.MarkRemote(); err != nil {
		return nil, err
	}
	t.local = map[string]bool{string(t.CertPath): c.Local("cert_path"), string(t.KeyPath): c.Local("key_path"), string(t.ChainPath): c.Local("chain_path")}
	return t, targetconf.Join(t.checkPeer(c), t.checkLogin(c), t.checkHostKey(), t.checkFiles(), t.checkCommands(c))
}

// userName matches names that are safe as a word in ssh's configuration.
var userName = lazyregexp.New(`^[A-Za-z0-9_][A-Za-z0-9._@+-]{0,63}$`)

func (t *target) checkPeer(c *targetconf.Config) (err error) {
	t.Host = strings.ToLower(strings.Trim(t.Host, "[]")) // brackets of an IPv6 address
	// Check the zone like the host, since it is used in the same places.
	literal, zone, hasZone := strings.Cut(t.Host, "%")
	if !connector.IsHost(literal) || hasZone && !(strings.Contains(literal, ":") && connector.IsHost(zone)) {
		return targetconf.Invalid("host", "expected a host name or an address, got %s", printable.Quote(t.Host))
	}
	if !userName().MatchString(t.User) {
		return targetconf.Invalid("user", "expected the name of an account, got %s", printable.Quote(t.User))
	}
	if t.at, err = t.host.Peer(t.Host, t.Port, c.Local("host")); err != nil {
		return targetconf.Invalid("host", "%v", err)
	}
	return nil
}

func (t *target) checkLogin(c *targetconf.Config) error {
	if t.SSHConfig != "" && !c.Local("ssh_config") {
		return targetconf.Invalid("ssh_config", "it can make ssh run programs on this host, so only the target's overlay may set it")
	}
	// Other hosts may trust root's key or this host's key, so a control plane must not choose among
	// the keys of this host.
	if t.PrivateKeyPath != "" && !c.Local("private_key_path") {
		return targetconf.Invalid("private_key_path", "it makes the agent log in with a key of this host, so only the target's overlay may set it: %s.json in CERTCTL_TARGETS_DIR", t.id)
	}
	switch t.AuthMethod {
	case byPassword:
		if (c.Local("password") || c.Local("password_file")) && (t.HostKey != "" && !c.Local("host_key") || t.KnownHosts != "" && !c.Local("known_hosts")) {
			// A control plane could send the password to its own host.
			return targetconf.Invalid("password", "it is in the target's overlay, so host_key or known_hosts, which decide who gets it, must be there too")
		}
		if t.Password.IsZero() {
			return targetconf.Invalid("password", "is required when auth_method is password")
		}
		if strings.ContainsAny(t.Password.Reveal(), "\r\n\x00") {
			return targetconf.Invalid("password", "has more than one line")
		}
		if t.SSHConfig != "" && t.HostKey == "" {
			return targetconf.Invalid("host_key", "is required when auth_method is password and ssh_config is set: the password must not go to a jump host")
		}
		return nil
	case byKey:
	default:
		return targetconf.Invalid("auth_method", "expected %s or %s", byKey, byPassword)
	}
	switch {
	case t.PrivateKeyPath != "" && !t.PrivateKey.IsZero():
		return targetconf.Invalid("private_key", "private_key_path is set too: remove one of them")
	case t.PrivateKeyPath == "" && t.PrivateKey.IsZero() && t.SSHConfig == "":
		return targetconf.Invalid("private_key_path", "is required when auth_method is key: the file of the private key to log in with")
	case !t.PrivateKey.IsZero() && !strings.Contains(t.PrivateKey.Reveal(), "-----BEGIN "):
		return targetconf.Invalid("private_key", "expected a private key as PEM")
	case strings.ContainsAny(t.Passphrase.Reveal(), "\r\n\x00"):
		return targetconf.Invalid("passphrase", "has more than one line")
	}
	return nil
}

func (t *target) checkHostKey() (err error) {
	if t.HostKey == "" {
		return nil
	}
	if t.KnownHosts != "" {
		return targetconf.Invalid("host_key", "known_hosts is set too: remove one of them")
	}
	if t.keys, err = parseHostKeys(t.HostKey); err != nil {
		return targetconf.Invalid("host_key", "%v", err)
	}
	return nil
}

func (t *target) checkFiles() error {
	switch {
	case t.KeyPath == t.CertPath && t.KeyPath != "":
		return targetconf.Invalid("key_path", "is the same file as cert_path")
	case t.ChainPath != "" && (t.ChainPath == t.CertPath || t.ChainPath == t.KeyPath):
		return targetconf.Invalid("chain_path", "is the same file as cert_path or key_path: remove it, and the chain follows the certificate in cert_path")
	}
	return nil
}

// unsafeCharacter matches characters that are not allowed in a command, since the account may have
// any shell.
var unsafeCharacter = lazyregexp.New(`[^A-Za-z0-9 ._/@:=,+-]`)

func (t *target) checkCommands(c *targetconf.Config) error {
	var errs []error
	for _, command := range []struct{ key, line string }{{"validate_command", t.ValidateCommand}, {"reload_command", t.ReloadCommand}} {
		if at := unsafeCharacter().FindString(command.line); at != "" {
			errs = append(errs, targetconf.Invalid(command.key, "a shell on %s runs it, so only letters, digits, spaces and ._/@:=,+- are allowed, but not %q: put the command into a script there", t.Host, at))
			continue
		}
		_, err := t.host.Command(c, command.key, command.line)
		errs = append(errs, err)
	}
	return targetconf.Join(errs...)
}

// peer returns user, host and port of the target, for messages.
func (t *target) peer() string {
	return t.User + "@" + t.at.Address()
}

// Plan implements connector.Connector.
func (t *target) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	cert, chain := pemutil.EncodeCertificates(m.Leaf), pemutil.EncodeCertificates(m.Chain...)
	if t.ChainPath == "" {
		cert = append(cert, chain...)
	}
	c := &change{target: t, leaf: pemutil.Fingerprint(m.Leaf)}
	c.add(roleCert, t.CertPath, cert, t.Cert)
	plan := &connector.Plan{Changes: []connector.Change{c}, Serves: t.common.Endpoint()}
	switch {
	case t.ChainPath != "" && len(chain) > 0:
		c.add(roleChain, t.ChainPath, chain, t.Chain)
	case t.ChainPath != "":
		plan.Warnings = append(plan.Warnings, fmt.Sprintf("the certificate came without a chain, so %s on %s stays as it is", t.ChainPath, t.Host))
	}
	c.add(roleKey, t.KeyPath, m.Key(), t.Key)
	if t.ReloadCommand != "" {
		plan.Reload.Call, plan.Reload.Does = t.reload, fmt.Sprintf("%q on %s", t.ReloadCommand, t.peer())
	}
	return plan, nil
}

// validate runs the validate command, if there is one.
func (t *target) validate(ctx context.Context) error {
	t.tested = true
	if t.ValidateCommand == "" {
		return nil
	}
	if err := t.run(ctx, t.ValidateCommand); err != nil {
		return fmt.Errorf("validate failed: %w", err)
	}
	return nil
}

// reload runs the reload command. After a crash it runs the validate command first.
func (t *target) reload(ctx context.Context) error {
	if !t.tested {
		if err := t.validate(ctx); err != nil {
			return err
		}
	}
	return t.run(ctx, t.ReloadCommand)
}

func (t *target) run(ctx context.Context, line string) error {
	s, err := t.open(ctx)
	if err != nil {
		return err
	}
	if t.Sudo {
		line = "sudo -n " + line
	}
	if err := s.run(ctx, line, time.Duration(t.common.CommandTimeout)); err != nil {
		return fmt.Errorf("%q on %s: %w", line, t.peer(), err)
	}
	return nil
}

// open returns the connection of the deployment. It connects if there is none, or if it was lost.
func (t *target) open(ctx context.Context) (*session, error) {
	if t.session != nil && t.session.Err() == nil {
		return t.session, nil
	}
	t.Close()
	var err error
	t.session, err = t.connect(ctx)
	return t.session, err
}

// Close closes the connection.
func (t *target) Close() error {
	if t.session != nil {
		t.session.close()
		t.session = nil
	}
	return nil
}

// alias returns the host's name in known_hosts files: the configured one, regardless of its
// address.
func (t *target) alias() string {
	if t.Port == 22 {
		return t.Host
	}
	return fmt.Sprintf("[%s]:%d", t.Host, t.Port)
}

// timeout returns the limit of the login and of each request.
func (t *target) timeout() time.Duration { return time.Duration(t.Timeout) }
