// Package mail installs certificates for the mail servers Postfix and Dovecot:
// a certificate file, a key file and perhaps a chain file, put in place
// together and taken up by a reload. One file can hold it all.
package mail

import (
	"context"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
)

// config is what can be set. Nothing is required: there are defaults for each
// mode.
type config struct {
	connector.Pair
	Mode string `json:"mode"` // postfix or dovecot; "": the one of the type
}

type mail struct {
	target   *targetconf.Config
	host     connector.Host
	config   config
	validate *policy.Command
	reload   *policy.Command
}

// The modes.
const (
	postfix = "postfix"
	dovecot = "dovecot"
)

// Postfix is the kind of target.
func Postfix() connector.Type { return connector.Type{Name: "Postfix", New: newConnector(postfix)} }

// Dovecot is the kind of target.
func Dovecot() connector.Type { return connector.Type{Name: "Dovecot", New: newConnector(dovecot)} }

func newConnector(mode string) func(*targetconf.Config, connector.Host) (connector.Connector, error) {
	return func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		s := &mail{target: c, host: host}
		config := &s.config
		if err := c.Decode(config, "key_path"); err != nil {
			return nil, err
		}
		targetconf.Default(c, "mode", &config.Mode, mode)
		switch config.Mode {
		case postfix:
			targetconf.Default(c, "validate_command", &config.ValidateCommand, "postfix check")
			targetconf.Default(c, "reload_command", &config.ReloadCommand, "postfix reload")
		case dovecot:
			targetconf.Default(c, "validate_command", &config.ValidateCommand, "doveconf -n")
			targetconf.Default(c, "reload_command", &config.ReloadCommand, "doveadm reload")
		default:
			return nil, targetconf.Invalid("mode", "expected %s or %s", postfix, dovecot)
		}
		targetconf.Default(c, "cert_path", &config.CertPath, "/etc/"+config.Mode+"/certs/cert.pem")
		if !c.Masked("key_path") {
			targetconf.Default(c, "key_path", &config.KeyPath, "/etc/"+config.Mode+"/certs/key.pem")
		}
		var err error
		s.validate, s.reload, err = config.Commands(c, host)
		return s, targetconf.Join(config.Check(), err)
	}
}

// askServer finds the key of cert_path in the mail server's own configuration.
func (s *mail) askServer(ctx context.Context) (serverconf.Pair, error) {
	if s.config.Mode == postfix {
		return serverconf.Postfix(ctx, s.host.Query, s.config.CertPath, s.config.KeyPath, *s.validate, *s.reload)
	}
	return serverconf.Dovecot(ctx, s.host.Query, s.config.CertPath, *s.validate, *s.reload)
}

// Plan implements connector.Connector.
func (s *mail) Plan(ctx context.Context, m *connector.Material) (*connector.Plan, error) {
	pair := s.config.Pair
	// Neither server's own check compares a certificate with its key.
	found, err := s.askServer(ctx)
	asked, err := pair.Match(s.target, s.host, m, s.config.Mode, found, err)
	if err != nil {
		return nil, err
	}
	plan := pair.Plan(m)
	plan.Validate, plan.Reload.Command, plan.Serves = s.validate, s.reload, s.target.Common.Endpoint()
	plan.Warnings = append(asked, plan.Warnings...)
	return plan, nil
}
