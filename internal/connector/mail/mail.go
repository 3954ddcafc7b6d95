// Package mail installs certificates for the mail servers Postfix and Dovecot: a certificate file,
// a key file and optionally a chain file, or one file with all of it, replaced together and loaded
// by a reload.
package mail

import (
	"context"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
)

// mail requires no configuration: every key has a default for each mode.
type mail struct {
	connector.QueriedPair
	mode string
}

// The modes.
const (
	postfix = "postfix"
	dovecot = "dovecot"
)

// Postfix returns the target type Postfix.
func Postfix() connector.Type { return connector.Type{Name: "Postfix", New: newConnector(postfix)} }

// Dovecot returns the target type Dovecot.
func Dovecot() connector.Type { return connector.Type{Name: "Dovecot", New: newConnector(dovecot)} }

func newConnector(mode string) func(*targetconf.Config, connector.Host) (connector.Connector, error) {
	return func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		s := &mail{QueriedPair: connector.QueriedPair{Config: c, Host: host}}
		var more struct {
			Mode string `json:"mode"` // postfix or dovecot; "": that of the type
		}
		if err := targetconf.Join(s.Decode(), c.Decode(&more)); err != nil {
			return nil, err
		}
		targetconf.Default(c, "mode", &more.Mode, mode)
		switch s.mode = more.Mode; s.mode {
		case postfix:
			targetconf.Default(c, "validate_command", &s.ValidateCommand, "postfix check")
			targetconf.Default(c, "reload_command", &s.ReloadCommand, "postfix reload")
		case dovecot:
			targetconf.Default(c, "validate_command", &s.ValidateCommand, "doveconf -n")
			targetconf.Default(c, "reload_command", &s.ReloadCommand, "doveadm reload")
		default:
			return nil, targetconf.Invalid("mode", "expected %s or %s", postfix, dovecot)
		}
		targetconf.Default(c, "cert_path", &s.CertPath, "/etc/"+s.mode+"/certs/cert.pem")
		if !c.Masked("key_path") {
			targetconf.Default(c, "key_path", &s.KeyPath, "/etc/"+s.mode+"/certs/key.pem")
		}
		return s, s.CheckAll()
	}
}

// askServer returns the key for CertPath in the mail server's own configuration.
func (s *mail) askServer(ctx context.Context) (serverconf.Pair, error) {
	if s.mode == postfix {
		return serverconf.Postfix(ctx, s.Host.Query, s.CertPath, s.KeyPath, *s.Validate, *s.Reload)
	}
	return serverconf.Dovecot(ctx, s.Host.Query, s.CertPath, *s.Validate, *s.Reload)
}

// Plan implements connector.Connector.
func (s *mail) Plan(ctx context.Context, m *connector.Material) (*connector.Plan, error) {
	// Neither server's configuration check compares a certificate with its key.
	found, err := s.askServer(ctx)
	return s.Propose(m, s.mode, found, err)
}
