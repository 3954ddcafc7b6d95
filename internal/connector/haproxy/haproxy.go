// Package haproxy installs certificates for HAProxy: leaf, chain and key in
// one file, which a `bind ... crt` line names or finds in its directory.
package haproxy

import (
	"context"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type HAProxy.
type Config struct {
	PEMPath targetconf.Path        `json:"pem_path" config:"required"`
	PEMFile targetconf.FileOptions `json:"pem_file_*" config:"secret"`

	ValidateCommand string `json:"validate_command"`
	ReloadCommand   string `json:"reload_command" config:"required"`
}

// Connector is one deployment to HAProxy.
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
	err := p.Config.Decode(&c.config)
	if err != nil {
		return nil, err
	}
	if c.validate, err = p.Command("validate_command", c.config.ValidateCommand); err != nil {
		return nil, err
	}
	if c.reload, err = p.Command("reload_command", c.config.ReloadCommand); err != nil {
		return nil, err
	}
	return c, nil
}

// Deploy implements connector.Connector.
func (c *Connector) Deploy(ctx context.Context, m *connector.Material) (connector.Result, error) {
	data := append(pemutil.EncodeCertificates(m.Leaf), pemutil.EncodeCertificates(m.Chain...)...)
	data = append(data, m.Key()...)
	file := connector.NewFile(c.config.PEMPath, connector.KeyFile, data, c.config.PEMFile)
	// HAProxy finds each kind of block wherever it stands
	// (https://docs.haproxy.org/2.6/configuration.html#5.1-crt).
	file.KeepOthers = true
	tx := transaction.NewTransaction(c.params, m)
	tx.Files = []connector.File{file}
	tx.Validate, tx.Reload = c.validate, c.reload
	return c.files.Deploy(ctx, tx)
}
