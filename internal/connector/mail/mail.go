// Package mail installs certificates for the mail servers Postfix and Dovecot:
// a certificate file, a key file and perhaps a chain file, put in place
// together and taken up by a reload. One file can hold it all.
package mail

import (
	"cmp"
	"context"
	"slices"

	"certctl-agent/internal/target"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type Postfix or Dovecot. Nothing
// is required: there are defaults for each mode.
type Config struct {
	target.Pair
	Mode string `json:"mode"` // postfix or dovecot; "": the one of the type
}

// Connector is one deployment to a mail server.
type Connector struct {
	params   target.Params
	files    *transaction.Store
	config   Config
	validate *target.Command
	reload   *target.Command

	// pairs asks the server which keys it uses with which certificates.
	pairs func(ctx context.Context) ([]target.ServerPair, error)
}

var _ target.Connector = (*Connector)(nil)

// The modes.
const (
	postfix = "postfix"
	dovecot = "dovecot"
)

// NewPostfix checks the configuration of a target of type Postfix.
func NewPostfix(p target.Params, files *transaction.Store) (*Connector, error) {
	return build(p, files, postfix)
}

// NewDovecot checks the configuration of a target of type Dovecot.
func NewDovecot(p target.Params, files *transaction.Store) (*Connector, error) {
	return build(p, files, dovecot)
}

func build(p target.Params, files *transaction.Store, mode string) (*Connector, error) {
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
		return nil, target.Invalid("mode", "expected %s or %s", postfix, dovecot)
	}
	config.CertPath = cmp.Or(config.CertPath, target.Path("/etc/"+config.Mode+"/certs/cert.pem"))
	if !p.Config.Masked("key_path") {
		config.KeyPath = cmp.Or(config.KeyPath, target.Path("/etc/"+config.Mode+"/certs/key.pem"))
	}
	if err := config.Check(); err != nil {
		return nil, err
	}
	var err error
	c.validate, c.reload, err = config.Commands(p)
	return c, err
}

// Deploy implements target.Connector.
func (c *Connector) Deploy(ctx context.Context, m *target.Material) (target.Result, error) {
	config := c.config
	// Neither server's own check compares a certificate with its key.
	found, err := c.askServer(ctx)
	asked, err := config.Settle(c.params, m, config.Mode, found, err)
	if err != nil {
		return target.Result{}, err
	}
	files, warnings := config.Files(m)
	tx := transaction.NewTransaction(c.params, m)
	tx.Files, tx.Validate, tx.Reload = files, c.validate, c.reload
	result, err := c.files.Deploy(ctx, tx)
	result.Warnings = slices.Concat(asked, warnings, result.Warnings)
	return result, err
}
