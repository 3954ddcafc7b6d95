// Package caddy installs certificates for Caddy: through its admin API, as a
// pair that the running configuration holds, or as two files that Caddy is
// then made to load again.
package caddy

import (
	"cmp"
	"context"
	"fmt"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type Caddy.
type Config struct {
	Mode     string `json:"mode"`      // api, file; api
	AdminAPI string `json:"admin_api"` // http://host:port or unix//path; http://localhost:2019, which is 127.0.0.1
}

// FileConfig is what more can be set when the mode is file.
type FileConfig struct {
	connector.DirPair
	ReloadCommand string `json:"reload_command"` // none: the running configuration is loaded again through the admin API
}

const (
	modeAPI  = "api"
	modeFile = "file"

	defaultAdminAPI = "http://localhost:2019"
)

// Connector is one deployment to Caddy.
type Connector struct {
	params connector.Params
	files  *transaction.Store
	admin  *admin          // nil: not needed
	pair   *connector.Pair // nil: mode api
	reload *policy.Command // of mode file
}

var _ connector.Connector = (*Connector)(nil)

// New checks the configuration.
func New(p connector.Params, files *transaction.Store) (*Connector, error) {
	c := &Connector{params: p, files: files}
	var config Config
	if err := p.Config.Decode(&config); err != nil {
		return nil, err
	}
	switch config.Mode {
	case modeAPI, "":
	case modeFile:
		if err := c.decodeFiles(); err != nil || c.reload != nil {
			return c, err
		}
	default:
		return nil, targetconf.Invalid("mode", "expected %s or %s", modeAPI, modeFile)
	}
	var err error
	if c.admin, err = newAdmin(cmp.Or(config.AdminAPI, defaultAdminAPI), p.Config.Local("admin_api")); err != nil {
		return nil, targetconf.Invalid("admin_api", "%v", err)
	}
	c.admin.timeout = p.Common.CommandTimeout.Or(defaultTimeout)
	return c, nil
}

func (c *Connector) decodeFiles() error {
	var config FileConfig
	if err := c.params.Config.Decode(&config); err != nil {
		return err
	}
	pair, err := config.Pair()
	if err != nil {
		return err
	}
	c.pair = &pair
	c.reload, err = c.params.Command("reload_command", config.ReloadCommand)
	return err
}

// Deploy implements connector.Connector.
func (c *Connector) Deploy(ctx context.Context, m *connector.Material) (connector.Result, error) {
	tx := transaction.NewTransaction(c.params, m)
	if c.pair == nil {
		return c.deployByAPI(ctx, tx)
	}
	files, warnings := c.pair.Files(m)
	tx.Files = files
	if tx.Reload = c.reload; c.reload == nil {
		tx.Apply = c.admin.reload
	}
	result, err := c.files.Deploy(ctx, tx)
	result.Warnings = append(warnings, result.Warnings...)
	return result, err
}

// deployByAPI writes no file but those of the key store. It runs as a
// transaction all the same: two deployments take turns, and what went before
// is settled first.
func (c *Connector) deployByAPI(ctx context.Context, tx transaction.Transaction) (connector.Result, error) {
	m := tx.Material
	cert := append(pemutil.EncodeCertificates(m.Leaf), pemutil.EncodeCertificates(m.Chain...)...)
	l := &loading{
		admin: c.admin,
		tag:   tagPrefix + c.params.TargetID,
		pair:  loadedPair{Certificate: string(cert), Key: string(m.Key())},
	}
	tx.Apply, tx.Undo = l.apply, l.undo
	result, err := c.files.Deploy(ctx, tx)
	if err != nil && l.undone {
		err = fmt.Errorf("%w; Caddy has the pair from before", err)
	}
	result.Unchanged = err == nil && !l.changed && len(m.KeyFiles) == 0
	if l.changed && err == nil {
		result.Warnings = append(result.Warnings,
			`Caddy holds the certificate in its running configuration only: unless it runs with --resume, a restart loses it (mode "file" does not)`)
	}
	return result, err
}
