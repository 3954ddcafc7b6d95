// Package haproxy installs certificates for HAProxy: leaf, chain and key in one file, which a
// `bind ... crt` line names directly or by its directory.
package haproxy

import (
	"context"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// Type returns the target type HAProxy.
func Type() connector.Type {
	return connector.Type{Name: "HAProxy", Aliases: map[string]string{"combined_pem_path": "pem_path"}, New: newConnector}
}

// config is the target's configuration.
type config struct {
	PEMPath targetconf.Path        `json:"pem_path" config:"required"`
	PEMFile targetconf.FileOptions `json:"pem_file_*" config:"secret"`

	ValidateCommand string `json:"validate_command"`
	ReloadCommand   string `json:"reload_command" config:"required"`
}

type haproxy struct {
	config   config
	common   targetconf.Common
	validate *policy.Command
	reload   *policy.Command
}

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	h := &haproxy{common: c.Common}
	if err := c.Decode(&h.config); err != nil {
		return nil, err
	}
	var err error
	h.validate, h.reload, err = host.Commands(c, h.config.ValidateCommand, h.config.ReloadCommand)
	return h, err
}

// Plan implements connector.Connector.
func (h *haproxy) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	file := connector.NewFile(h.config.PEMPath, connector.KeyFile, append(m.FullChain(), m.Key()...), h.config.PEMFile)
	// HAProxy accepts PEM blocks in any order
	// (https://docs.haproxy.org/2.6/configuration.html#5.1-crt).
	file.KeepOthers = true
	return &connector.Plan{
		Files:    []connector.File{file},
		Validate: h.validate,
		Reload:   connector.Reload{Command: h.reload},
		Serves:   h.common.Endpoint(),
	}, nil
}
