// Package nginx installs certificates for nginx: a certificate file, a key
// file and perhaps a chain file, put in place together, tested with `nginx -t`
// and taken up by a graceful reload.
package nginx

import (
	"context"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
)

// Type is the kind of target.
func Type() connector.Type { return connector.Type{Name: "NGINX", New: newConnector} }

type nginx struct {
	config   *targetconf.Config
	host     connector.Host
	pair     connector.Pair
	validate *policy.Command
	reload   *policy.Command
}

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	n := &nginx{config: c, host: host}
	if err := c.Decode(&n.pair, "key_path"); err != nil {
		return nil, err
	}
	var err error
	n.validate, n.reload, err = n.pair.Commands(c, host)
	return n, targetconf.Join(n.pair.Check("cert_path", "validate_command", "reload_command"), err)
}

// Plan implements connector.Connector.
func (n *nginx) Plan(ctx context.Context, m *connector.Material) (*connector.Plan, error) {
	pair := n.pair
	found, err := serverconf.NGINX(ctx, n.host.Query, pair.CertPath, *n.validate, *n.reload)
	asked, err := pair.Match(n.config, n.host, m, "nginx", found, err)
	if err != nil {
		return nil, err
	}
	plan := pair.Plan(m)
	plan.Validate, plan.Reload.Command, plan.Serves = n.validate, n.reload, n.config.Common.Endpoint()
	plan.Warnings = append(asked, plan.Warnings...)
	return plan, nil
}
