package target

import (
	"bytes"
	"fmt"
	"os"

	"certctl-agent/internal/pemutil"
)

// Pair is the configuration of the targets that read a certificate and its key
// from two files, with the chain in a third or after the certificate.
type Pair struct {
	CertPath  Path `json:"cert_path"`
	KeyPath   Path `json:"key_path"`   // none: the key is not installed, the server reads the key store
	ChainPath Path `json:"chain_path"` // none: the chain follows the leaf in CertPath

	CertFile  FileOptions `json:"cert_file_*"`
	KeyFile   FileOptions `json:"key_file_*" config:"secret"`
	ChainFile FileOptions `json:"chain_file_*"`

	ValidateCommand string `json:"validate_command"`
	ReloadCommand   string `json:"reload_command"`
}

// Check refuses one file under two keys, and the absence of what is required.
func (p *Pair) Check(required ...string) error {
	given := map[string]bool{
		"cert_path":        p.CertPath != "",
		"validate_command": p.ValidateCommand != "",
		"reload_command":   p.ReloadCommand != "",
	}
	for _, key := range required {
		if !given[key] {
			return Invalid(key, "is required")
		}
	}
	switch {
	case p.KeyPath != "" && p.KeyPath == p.CertPath:
		return Invalid("key_path", "is the same file as cert_path")
	case p.ChainPath != "" && p.ChainPath == p.CertPath:
		return Invalid("chain_path", "is the same file as cert_path: leave it out, and the chain follows the certificate there")
	case p.ChainPath != "" && p.ChainPath == p.KeyPath:
		return Invalid("chain_path", "is the same file as key_path")
	}
	return nil
}

// TakeKeyPath sets the masked key_path to the one that the server's own
// configuration has, as found by asking it, which ended with err.
func (p *Pair) TakeKeyPath(params Params, server string, found ServerPair, err error) error {
	if err != nil {
		return params.Config.MaskedError("key_path", err)
	}
	params.Log.Info("key path taken from the server's own configuration", "server", server, "key_path", found.Key, "where", found.Where)
	p.KeyPath = Path(found.Key)
	return nil
}

// Commands are the configured commands, checked. One that is not configured is
// nil.
func (p *Pair) Commands(params Params) (validate, reload *Command, err error) {
	if validate, err = params.Command("validate_command", p.ValidateCommand); err != nil {
		return nil, nil, err
	}
	reload, err = params.Command("reload_command", p.ReloadCommand)
	return validate, reload, err
}

// Files are the destinations of m, and what there is to warn of.
func (p *Pair) Files(m *Material) (files []File, warnings []string) {
	cert := pemutil.EncodeCertificates(m.Leaf)
	chain := pemutil.EncodeCertificates(m.Chain...)
	if p.ChainPath == "" {
		cert = append(cert, chain...)
	}
	files = append(files, p.CertFile.File(p.CertPath, CertificateFile, cert))
	if p.ChainPath != "" {
		if len(m.Chain) > 0 {
			files = append(files, p.ChainFile.File(p.ChainPath, CertificateFile, chain))
		} else if _, err := os.Lstat(string(p.ChainPath)); err == nil {
			warnings = append(warnings, fmt.Sprintf("the certificate came without a chain, and %s is left as it is", p.ChainPath))
		}
	}
	if p.KeyPath != "" && !m.InKeyStore(p.KeyPath) {
		files = append(files, p.KeyFile.File(p.KeyPath, KeyFile, m.Key()))
	}
	return files, warnings
}

// Key is the private key as it is written: one newline at its end.
func (m *Material) Key() []byte {
	return append(bytes.TrimRight(m.KeyPEM, "\r\n"), '\n')
}

// InKeyStore reports whether path is, or leads to, the key store's own file of
// this key. Such a destination is none: the transaction makes the key the
// current one there anyway.
func (m *Material) InKeyStore(path Path) bool {
	return m.KeyPath != "" && resolved(string(path)) == resolved(m.KeyPath)
}

// Command splits and checks the command line that was configured under key.
// An empty one is none.
func (p *Params) Command(key, line string) (*Command, error) {
	if line == "" {
		return nil, nil
	}
	c, err := p.Policy.Command(line, p.Common.CommandTimeout.Or(defaultCommandTimeout))
	if err != nil {
		return nil, &ConfigError{Key: key, Problem: err.Error()}
	}
	return &c, nil
}
