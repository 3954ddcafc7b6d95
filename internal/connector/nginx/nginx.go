// Package nginx installs certificates for nginx: a certificate file, a key
// file and perhaps a chain file, put in place together, tested with `nginx -t`
// and taken up by a graceful reload.
package nginx

import (
	"context"
	"slices"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type NGINX. cert_path and both
// commands are required.
type Config struct {
	connector.Pair
}

// Connector is one deployment to nginx.
type Connector struct {
	params   connector.Params
	files    *transaction.Store
	config   Config
	validate *policy.Command
	reload   *policy.Command
}

var _ connector.Connector = (*Connector)(nil)

// New checks the configuration.
func New(p connector.Params, files *transaction.Store) (*Connector, error) {
	c := &Connector{params: p, files: files}
	if err := p.Config.Decode(&c.config, "key_path"); err != nil {
		return nil, err
	}
	if err := c.config.Check("cert_path", "validate_command", "reload_command"); err != nil {
		return nil, err
	}
	var err error
	c.validate, c.reload, err = c.config.Commands(p)
	return c, err
}

// Deploy implements connector.Connector.
func (c *Connector) Deploy(ctx context.Context, m *connector.Material) (connector.Result, error) {
	pair := c.config.Pair
	found, err := c.askServer(ctx)
	asked, err := pair.Settle(c.params, m, "nginx", found, err)
	if err != nil {
		return connector.Result{}, err
	}
	files, warnings := pair.Files(m)
	tx := transaction.NewTransaction(c.params, m)
	tx.Files, tx.Validate, tx.Reload = files, c.validate, c.reload
	result, err := c.files.Deploy(ctx, tx)
	result.Warnings = slices.Concat(asked, warnings, result.Warnings)
	return result, err
}
