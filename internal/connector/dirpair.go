package connector

import (
	"certctl-agent/internal/targetconf"
)

// DirPair is the configuration of targets that read a certificate, followed by its chain, and its
// key from two files in one directory.
type DirPair struct {
	CertDir  targetconf.Path     `json:"cert_dir" config:"required"`
	CertName targetconf.FileName `json:"cert_file" default:"cert.pem"`
	KeyName  targetconf.FileName `json:"key_file" default:"key.pem"`

	CertFile targetconf.FileOptions `json:"cert_file_*"`
	KeyFile  targetconf.FileOptions `json:"key_file_*" config:"secret"`
}

// Pair returns the Pair with full paths.
func (d *DirPair) Pair() (Pair, error) {
	p := Pair{
		CertPath: d.CertDir.Join(d.CertName),
		KeyPath:  d.CertDir.Join(d.KeyName),
		CertFile: d.CertFile,
		KeyFile:  d.KeyFile,
	}
	if p.CertPath == p.KeyPath {
		return Pair{}, targetconf.Invalid("key_file", "is the same file as cert_file")
	}
	return p, nil
}
