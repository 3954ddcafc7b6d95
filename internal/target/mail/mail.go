// Package mail installs certificates for the mail servers Postfix and Dovecot:
// a certificate file, a key file and perhaps a chain file, put in place
// together and taken up by a reload. For Postfix one file can hold it all.
package mail

import (
	"cmp"
	"context"
	"slices"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/target"
	"certctl-agent/internal/target/fileset"
)

// Config is what can be set for a target of type Postfix or Dovecot. Nothing
// is required: there are defaults for each mode.
type Config struct {
	target.Pair
	Mode string `json:"mode"` // postfix or dovecot; "": the one of the type
}

// oneFile reports whether key and certificates go to one file. Postfix starts
// processes that read them at any time, not only at a reload, and two files
// cannot be replaced at once: one that starts in between turns TLS off. From
// smtpd_tls_chain_files it reads one file in one go.
func (c *Config) oneFile() bool {
	return c.Mode == postfix && c.KeyPath != "" && c.KeyPath == c.CertPath
}

func (c *Config) check() error {
	if c.oneFile() && c.ChainPath != "" {
		return target.Invalid("chain_path", "has no place where key_path and cert_path are one file: that holds the chain too")
	}
	if c.oneFile() {
		return nil
	}
	return c.Check()
}

// contents are the destinations of m, and what there is to warn of.
func (c *Config) contents(m *target.Material) (files []target.File, warnings []string) {
	if !c.oneFile() {
		return c.Files(m)
	}
	// The order that smtpd_tls_chain_files wants.
	data := slices.Concat(m.Key(), pemutil.EncodeCertificates(m.Leaf), pemutil.EncodeCertificates(m.Chain...))
	return []target.File{c.KeyFile.File(c.KeyPath, target.KeyFile, data)}, nil
}

// Connector is one deployment to a mail server.
type Connector struct {
	params   target.Params
	files    *fileset.Store
	config   Config
	validate *target.Command
	reload   *target.Command

	// pairs asks the server which keys it uses with which certificates.
	pairs func(ctx context.Context) ([]target.ServerPair, error)
}

var _ target.Connector = (*Connector)(nil)

// The modes.
const (
	postfix = "postfix"
	dovecot = "dovecot"
)

// NewPostfix checks the configuration of a target of type Postfix.
func NewPostfix(p target.Params, files *fileset.Store) (*Connector, error) {
	return build(p, files, postfix)
}

// NewDovecot checks the configuration of a target of type Dovecot.
func NewDovecot(p target.Params, files *fileset.Store) (*Connector, error) {
	return build(p, files, dovecot)
}

func build(p target.Params, files *fileset.Store, mode string) (*Connector, error) {
	c := &Connector{params: p, files: files}
	config := &c.config
	if err := p.Config.Decode(config, "key_path"); err != nil {
		return nil, err
	}
	config.Mode = cmp.Or(config.Mode, mode)
	switch config.Mode {
	case postfix:
		c.pairs = c.askPostfix
		config.ValidateCommand = cmp.Or(config.ValidateCommand, "postfix check")
		config.ReloadCommand = cmp.Or(config.ReloadCommand, "postfix reload")
	case dovecot:
		c.pairs = c.askDovecot
		config.ValidateCommand = cmp.Or(config.ValidateCommand, "doveconf -n")
		config.ReloadCommand = cmp.Or(config.ReloadCommand, "doveadm reload")
	default:
		return nil, target.Invalid("mode", "expected %s or %s", postfix, dovecot)
	}
	config.CertPath = cmp.Or(config.CertPath, target.Path("/etc/"+config.Mode+"/certs/cert.pem"))
	if !p.Config.Masked("key_path") {
		config.KeyPath = cmp.Or(config.KeyPath, target.Path("/etc/"+config.Mode+"/certs/key.pem"))
	}
	if err := config.check(); err != nil {
		return nil, err
	}
	var err error
	c.validate, c.reload, err = config.Commands(p)
	return c, err
}

// Deploy implements target.Connector.
func (c *Connector) Deploy(ctx context.Context, m *target.Material) (target.Result, error) {
	config := c.config
	found, err := c.askServer(ctx)
	switch {
	case c.params.Config.Masked("key_path"):
		if err := config.TakeKeyPath(c.params, config.Mode, found, err); err != nil {
			return target.Result{}, err
		}
		if err := config.check(); err != nil {
			return target.Result{}, err
		}
	case err == nil && !found.Uses(config.KeyPath, m):
		// Neither server's own check compares a certificate with its key.
		return target.Result{}, target.Invalid("key_path", "%s reads the key of %s from %s (%s), so the new certificate would meet another key there, and nobody could connect with TLS: name that file",
			config.Mode, config.CertPath, found.Key, found.Where)
	}
	files, warnings := config.contents(m)
	tx := fileset.NewTransaction(c.params, m)
	tx.Files, tx.Validate, tx.Reload = files, c.validate, c.reload
	result, err := c.files.Deploy(ctx, tx)
	result.Warnings = append(warnings, result.Warnings...)
	return result, err
}
