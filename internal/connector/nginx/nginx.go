// Package nginx installs certificates for nginx: a certificate file, a key file and optionally a
// chain file, replaced together, tested with `nginx -t` and loaded by a graceful reload.
package nginx

import (
	"context"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
)

// Type returns the target type NGINX.
func Type() connector.Type { return connector.Type{Name: "NGINX", New: newConnector} }

type nginx struct{ connector.QueriedPair }

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	n := &nginx{connector.QueriedPair{Config: c, Host: host}}
	if err := n.Decode(); err != nil {
		return nil, err
	}
	return n, n.CheckAll("cert_path", "validate_command", "reload_command")
}

// Plan implements connector.Connector.
func (n *nginx) Plan(ctx context.Context, m *connector.Material) (*connector.Plan, error) {
	found, err := serverconf.NGINX(ctx, n.Host.Query, n.CertPath, *n.Validate, *n.Reload)
	return n.Propose(m, "nginx", found, err)
}
