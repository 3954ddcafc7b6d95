// Package mail installs certificates for the mail servers Postfix and Dovecot:
// a certificate file, a key file and perhaps a chain file, put in place
// together and taken up by a reload. One file can hold it all.
package mail

import (
	"cmp"
	"context"
	"slices"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type Postfix or Dovecot. Nothing
// is required: there are defaults for each mode.
type Config struct {
	connector.Pair
	Mode string `json:"mode"` // postfix or dovecot; "": the one of the type
}

// Connector is one deployment to a mail server.
type Connector struct {
	params   connector.Params
	files    *transaction.Store
	config   Config
	validate *policy.Command
	reload   *policy.Command

	// pairs asks the server which keys it uses with which certificates.
	pairs func(ctx context.Context) ([]serverconf.Pair, error)
}

var _ connector.Connector = (*Connector)(nil)

// The modes.
const (
	postfix = "postfix"
	dovecot = "dovecot"
)

// NewPostfix checks the configuration of a target of type Postfix.
func NewPostfix(p connector.Params, files *transaction.Store) (*Connector, error) {
	return build(p, files, postfix)
}

// NewDovecot checks the configuration of a target of type Dovecot.
func NewDovecot(p connector.Params, files *transaction.Store) (*Connector, error) {
	return build(p, files, dovecot)
}

func build(p connector.Params, files *transaction.Store, mode string) (*Connector, error) {
	c := &Connector{params: p, files: files}
	config := &c.config
	if err := p.Config.Decode(config, "key_path"); err != nil {
		return nil, err
	}
	config.Mode = cmp.Or(config.Mode, mode)
	switch config.Mode {
	case postfix:
		c.pairs = c.askPostfix
		config.ValidateCommand = cmp.Or(config.ValidateCommand, "postfix check")
		config.ReloadCommand = cmp.Or(config.ReloadCommand, "postfix reload")
	case dovecot:
		c.pairs = c.askDovecot
		config.ValidateCommand = cmp.Or(config.ValidateCommand, "doveconf -n")
		config.ReloadCommand = cmp.Or(config.ReloadCommand, "doveadm reload")
	default:
		return nil, targetconf.Invalid("mode", "expected %s or %s", postfix, dovecot)
	}
	config.CertPath = cmp.Or(config.CertPath, targetconf.Path("/etc/"+config.Mode+"/certs/cert.pem"))
	if !p.Config.Masked("key_path") {
		config.KeyPath = cmp.Or(config.KeyPath, targetconf.Path("/etc/"+config.Mode+"/certs/key.pem"))
	}
	if err := config.Check(); err != nil {
		return nil, err
	}
	var err error
	c.validate, c.reload, err = config.Commands(p)
	return c, err
}

// Deploy implements connector.Connector.
func (c *Connector) Deploy(ctx context.Context, m *connector.Material) (connector.Result, error) {
	config := c.config
	// Neither server's own check compares a certificate with its key.
	found, err := c.askServer(ctx)
	asked, err := config.Settle(c.params, m, config.Mode, found, err)
	if err != nil {
		return connector.Result{}, err
	}
	files, warnings := config.Files(m)
	tx := transaction.NewTransaction(c.params, m)
	tx.Files, tx.Validate, tx.Reload = files, c.validate, c.reload
	result, err := c.files.Deploy(ctx, tx)
	result.Warnings = slices.Concat(asked, warnings, result.Warnings)
	return result, err
}
