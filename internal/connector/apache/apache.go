// Package apache installs certificates for the Apache HTTP server: a
// certificate file, a key file and perhaps a chain file, put in place together
// and taken up by a graceful restart.
package apache

import (
	"context"
	"slices"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/transaction"
)

// Config is what can be set for a target of type Apache. cert_path and both
// commands are required.
type Config struct {
	connector.Pair
}

// Connector is one deployment to httpd.
type Connector struct {
	params   connector.Params
	files    *transaction.Store
	config   Config
	validate *policy.Command
	reload   *policy.Command

	settleTime time.Duration
}

var _ connector.Connector = (*Connector)(nil)

// New checks the configuration.
func New(p connector.Params, files *transaction.Store) (*Connector, error) {
	c := &Connector{params: p, files: files, settleTime: settleTime}
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
	// httpd finds a mismatch not when it tests its configuration but when it
	// restarts, and then ends.
	found, err := c.askServer(ctx)
	asked, err := pair.Settle(c.params, m, "httpd", found, err)
	if err != nil {
		return connector.Result{}, err
	}
	files, warnings := pair.Files(m)
	// The first file is the one of the certificate, and httpd reads DH PARAMETERS
	// from there as well (https://httpd.apache.org/docs/2.4/mod/mod_ssl.html#sslcertificatefile).
	files[0].KeepOthers = true
	tx := transaction.NewTransaction(c.params, m)
	tx.Files, tx.Validate, tx.Reload, tx.Apply = files, c.validate, c.reload, c.settle
	if verify := tx.Verify; verify != nil {
		// What is served has been read: on success there is nothing to wait for.
		tx.Apply, tx.Undo = nil, c.settle
		tx.Verify = func(ctx context.Context) error {
			err := verify(ctx)
			if err != nil {
				_ = c.settle(ctx)
			}
			return err
		}
	}
	result, err := c.files.Deploy(ctx, tx)
	result.Warnings = slices.Concat(asked, warnings, result.Warnings)
	return result, err
}

// settleTime is how long httpd is given to read its files once it has been
// told to restart, which takes it a few milliseconds.
const settleTime = 500 * time.Millisecond

// settle waits until httpd has surely read its files. The command that restarts
// it returns before that, and an httpd that meets a certificate beside another
// one's key, because the next transaction or a rollback is just replacing them,
// ends. For the same reason no cancellation cuts this short.
func (c *Connector) settle(context.Context) error {
	time.Sleep(c.settleTime)
	return nil
}
