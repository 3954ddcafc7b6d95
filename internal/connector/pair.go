package connector

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
)

// Pair is the configuration of targets that read a certificate and its key from two files, with the
// chain in a third file or after the certificate; or everything from one file, if key_path and
// cert_path are equal.
type Pair struct {
	CertPath  targetconf.Path `json:"cert_path"`
	KeyPath   targetconf.Path `json:"key_path"`   // "": no key file is written, the server reads the key store
	ChainPath targetconf.Path `json:"chain_path"` // "": the chain follows the leaf in CertPath

	CertFile  targetconf.FileOptions `json:"cert_file_*"`
	KeyFile   targetconf.FileOptions `json:"key_file_*" config:"secret"`
	ChainFile targetconf.FileOptions `json:"chain_file_*"`

	ValidateCommand string `json:"validate_command"`
	ReloadCommand   string `json:"reload_command"`
}

// oneFile reports whether the key and the certificates share one file.
func (p *Pair) oneFile() bool { return p.KeyPath != "" && p.KeyPath == p.CertPath }

// Check returns an error if a required key is missing, or if the chain shares a file with the
// certificate or the key.
func (p *Pair) Check(required ...string) error {
	given := map[string]bool{
		"cert_path":        p.CertPath != "",
		"validate_command": p.ValidateCommand != "",
		"reload_command":   p.ReloadCommand != "",
	}
	var missing []error
	for _, key := range required {
		if !given[key] {
			missing = append(missing, targetconf.Invalid(key, "is required"))
		}
	}
	if len(missing) > 0 {
		return targetconf.Join(missing...)
	}
	switch {
	case p.oneFile() && p.ChainPath != "":
		return targetconf.Invalid("chain_path", "is not allowed if key_path and cert_path are the same file, which also holds the chain")
	case p.ChainPath != "" && p.ChainPath == p.CertPath:
		return targetconf.Invalid("chain_path", "is the same file as cert_path: remove it, and the chain follows the certificate there")
	case p.ChainPath != "" && p.ChainPath == p.KeyPath:
		return targetconf.Invalid("chain_path", "is the same file as key_path")
	}
	return nil
}

// Match compares the pair with the server's own configuration: found, its key for CertPath, or err.
// It replaces a masked key_path by the server's. It refuses a pair if the server reads another key
// for the certificate, or if it is unclear which key: most servers notice a mismatch only when they
// load the files, and then exit or turn off TLS. An overlay, which the owner of this host wrote,
// overrides an unclear answer. No answer is a warning.
func (p *Pair) Match(config *targetconf.Config, host Host, m *Material, server string, found serverconf.Pair, err error) (warnings []string, _ error) {
	if config.Masked("key_path") {
		if err != nil {
			return nil, config.MaskedError("key_path", err)
		}
		host.Log.Info("key path taken from the server's own configuration", "server", server, "key_path", found.Key, "where", found.Where)
		p.KeyPath = targetconf.Path(found.Key)
		config.Record("key_path", found.Key, fmt.Sprintf("%s (%s)", server, found.Where))
		return nil, p.Check()
	}
	_, isUnclear := errors.AsType[*serverconf.UnclearError](err)
	switch {
	case errors.Is(err, serverconf.ErrUnnamed):
		return []string{fmt.Sprintf("%s will not load the certificate: its configuration does not use %s, or only through a variable or a table", server, p.CertPath)}, nil
	case isUnclear && !config.Local("key_path"):
		return nil, targetconf.Invalid("key_path", "it is not certain that %s would use the new key with the new certificate, and with another key TLS would fail: %v; or put key_path into an overlay", server, err)
	case err != nil:
		return []string{fmt.Sprintf("cannot check that %s reads its key from key_path: %v", server, err)}, nil
	case p.matches(found, m):
		return nil, nil
	case found.Key == string(p.CertPath):
		return nil, targetconf.Invalid("key_path", "%s reads the key of %s from that same file (%s), so TLS would fail: set key_path to %s as well, and the file will hold both; or name a key file in the configuration of %s",
			server, p.CertPath, found.Where, p.CertPath, server)
	}
	return nil, targetconf.Invalid("key_path", "%s reads the key of %s from %s (%s), so it would use the new certificate with a wrong key, and TLS would fail: set key_path to that file",
		server, p.CertPath, found.Key, found.Where)
}

// matches reports whether the server reads m's key after m is installed.
func (p *Pair) matches(found serverconf.Pair, m *Material) bool {
	return p.KeyPath != "" && found.Reads(p.KeyPath) || m.InKeyStore(targetconf.Path(found.Key))
}

// Plan returns the plan to write m to these files.
func (p *Pair) Plan(m *Material) *Plan {
	plan := new(Plan)
	cert := pemutil.EncodeCertificates(m.Leaf)
	chain := pemutil.EncodeCertificates(m.Chain...)
	if p.oneFile() {
		// Postfix's smtpd_tls_chain_files needs the key first. Other servers accept any order.
		plan.Files = []File{NewFile(p.KeyPath, KeyFile, slices.Concat(m.Key(), cert, chain), p.KeyFile)}
		return plan
	}
	if p.ChainPath == "" {
		cert = append(cert, chain...)
	}
	plan.Files = append(plan.Files, NewFile(p.CertPath, CertificateFile, cert, p.CertFile))
	if p.ChainPath != "" {
		if len(m.Chain) > 0 {
			plan.Files = append(plan.Files, NewFile(p.ChainPath, CertificateFile, chain, p.ChainFile))
		} else if _, err := os.Lstat(string(p.ChainPath)); err == nil {
			plan.Warnings = append(plan.Warnings, fmt.Sprintf("the certificate came without a chain, so %s stays as it is", p.ChainPath))
		}
	}
	if p.KeyPath != "" && !m.InKeyStore(p.KeyPath) {
		plan.Files = append(plan.Files, NewFile(p.KeyPath, KeyFile, m.Key(), p.KeyFile))
	}
	return plan
}

// QueriedPair is a target with a Pair whose server can be asked which key it reads for a
// certificate.
type QueriedPair struct {
	Pair
	Config   *targetconf.Config
	Host     Host
	Validate *policy.Command // nil: not configured
	Reload   *policy.Command // nil: not configured
}

// Decode decodes the Pair. A masked key_path is not an error: Match replaces it.
func (a *QueriedPair) Decode() error { return a.Config.Decode(&a.Pair, "key_path") }

// CheckAll checks the pair and its commands.
func (a *QueriedPair) CheckAll(required ...string) error {
	var err error
	a.Validate, a.Reload, err = a.Host.Commands(a.Config, a.ValidateCommand, a.ReloadCommand)
	return targetconf.Join(a.Check(required...), err)
}

// Propose returns the plan to install m. Found and err are the server's answer, as for Match.
func (a *QueriedPair) Propose(m *Material, server string, found serverconf.Pair, err error) (*Plan, error) {
	pair := a.Pair
	warnings, err := pair.Match(a.Config, a.Host, m, server, found, err)
	if err != nil {
		return nil, err
	}
	plan := pair.Plan(m)
	plan.Validate, plan.Reload.Command, plan.Serves = a.Validate, a.Reload, a.Config.Common.Endpoint()
	plan.Warnings = append(warnings, plan.Warnings...)
	return plan, nil
}
