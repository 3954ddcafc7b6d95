// Package haproxy installs certificates for HAProxy: leaf, chain and key in
// one file, which a `bind ... crt` line names or finds in its directory.
package haproxy

import (
	"context"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/target"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type HAProxy.
type Config struct {
	PEMPath target.Path        `json:"pem_path" config:"required"`
	PEMFile target.FileOptions `json:"pem_file_*" config:"secret"`

	ValidateCommand string `json:"validate_command"`
	ReloadCommand   string `json:"reload_command" config:"required"`
}

// Connector is one deployment to HAProxy.
type Connector struct {
	params   target.Params
	files    *transaction.Store
	config   Config
	validate *target.Command
	reload   *target.Command
}

var _ target.Connector = (*Connector)(nil)

// New checks the configuration.
func New(p target.Params, files *transaction.Store) (*Connector, error) {
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

// Deploy implements target.Connector.
func (c *Connector) Deploy(ctx context.Context, m *target.Material) (target.Result, error) {
	data := append(pemutil.EncodeCertificates(m.Leaf), pemutil.EncodeCertificates(m.Chain...)...)
	data = append(data, m.Key()...)
	file := c.config.PEMFile.File(c.config.PEMPath, target.KeyFile, data)
	// HAProxy finds each kind of block wherever it stands
	// (https://docs.haproxy.org/2.6/configuration.html#5.1-crt).
	file.KeepOthers = true
	tx := transaction.NewTransaction(c.params, m)
	tx.Files = []target.File{file}
	tx.Validate, tx.Reload = c.validate, c.reload
	return c.files.Deploy(ctx, tx)
}
