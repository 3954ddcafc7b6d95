// Package apache installs certificates for the Apache HTTP server: a certificate file, a key file
// and optionally a chain file, replaced together and loaded by a graceful restart.
package apache

import (
	"context"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
)

// Type returns the target type Apache.
func Type() connector.Type { return connector.Type{Name: "Apache", New: newConnector} }

type apache struct{ connector.QueriedPair }

func newConnector(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
	a := &apache{connector.QueriedPair{Config: c, Host: host}}
	if err := a.Decode(); err != nil {
		return nil, err
	}
	return a, a.CheckAll("cert_path", "validate_command", "reload_command")
}

// loadTime is how long httpd may take to read its files after the restart command returned. It
// needs a few milliseconds. If the next deployment or a rollback replaced the files meanwhile,
// httpd would find a certificate with the wrong key and exit.
const loadTime = 500 * time.Millisecond

// Plan implements connector.Connector.
func (a *apache) Plan(ctx context.Context, m *connector.Material) (*connector.Plan, error) {
	// httpd's configuration test does not notice a mismatched key: httpd exits in the restart.
	found, err := serverconf.HTTPD(ctx, a.Host.Query, a.CertPath, *a.Validate, *a.Reload)
	plan, err := a.Propose(m, "httpd", found, err)
	if err != nil {
		return nil, err
	}
	// The first file is the certificate's. httpd also reads DH PARAMETERS from it
	// (https://httpd.apache.org/docs/2.4/mod/mod_ssl.html#sslcertificatefile).
	plan.Files[0].KeepOthers = true
	plan.Reload.Wait = loadTime
	return plan, nil
}
