package target

import "path/filepath"

// DirPair is the configuration of the targets that read a certificate, with its
// chain after it, and its key from two files of one directory.
type DirPair struct {
	CertDir  Path     `json:"cert_dir" config:"required"`
	CertName FileName `json:"cert_file"` // cert.pem
	KeyName  FileName `json:"key_file"`  // key.pem

	CertFile FileOptions `json:"cert_file_*"`
	KeyFile  FileOptions `json:"key_file_*" config:"secret"`
}

// Pair is the same as paths.
func (d *DirPair) Pair() (Pair, error) {
	p := Pair{
		CertPath: d.CertDir.Join(d.CertName.Or("cert.pem")),
		KeyPath:  d.CertDir.Join(d.KeyName.Or("key.pem")),
		CertFile: d.CertFile,
		KeyFile:  d.KeyFile,
	}
	if p.CertPath == p.KeyPath {
		return Pair{}, Invalid("key_file", "is the same file as cert_file")
	}
	return p, nil
}

// Join is the file called name in the directory p.
func (p Path) Join(name FileName) Path { return Path(filepath.Join(string(p), string(name))) }
