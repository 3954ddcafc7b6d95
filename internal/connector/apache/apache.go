// Package apache installs certificates for the Apache HTTP server: a
// certificate file, a key file and perhaps a chain file, put in place together
// and taken up by a graceful restart.
package apache

import (
	"context"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
)

// Type is the kind of target.
func Type() connector.Type { return connector.Type{Name: "Apache", New: newConnector} }

type apache struct{ connector.AskedPair }

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	a := &apache{connector.AskedPair{Config: c, Host: host}}
	if err := a.Decode(); err != nil {
		return nil, err
	}
	return a, a.CheckAll("cert_path", "validate_command", "reload_command")
}

// loadTime is how long httpd is given to read its files once it has been told
// to restart, which takes it a few milliseconds. The command that restarts it
// returns before that, and an httpd that meets a certificate beside another
// one's key, because the next deployment or a rollback is just replacing them,
// ends.
const loadTime = 500 * time.Millisecond

// Plan implements connector.Connector.
func (a *apache) Plan(ctx context.Context, m *connector.Material) (*connector.Plan, error) {
	// httpd finds a mismatch not when it tests its configuration but when it
	// restarts, and then ends.
	found, err := serverconf.HTTPD(ctx, a.Host.Query, a.CertPath, *a.Validate, *a.Reload)
	plan, err := a.Propose(m, "httpd", found, err)
	if err != nil {
		return nil, err
	}
	// The first file is the one of the certificate, and httpd reads DH PARAMETERS
	// from there as well (https://httpd.apache.org/docs/2.4/mod/mod_ssl.html#sslcertificatefile).
	plan.Files[0].KeepOthers = true
	plan.Reload.Wait = loadTime
	return plan, nil
}
