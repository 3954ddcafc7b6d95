package target

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/testca"
)

func material(t *testing.T) *Material {
	t.Helper()
	issued, err := testca.Must(t).Issue(testca.Template{Intermediates: 1})
	must(t, err)
	return &Material{Leaf: issued.Leaf, Chain: issued.Chain[1:], KeyPEM: issued.KeyPEM(), KeyPath: filepath.Join(t.TempDir(), "c.key")}
}

func TestPairFiles(t *testing.T) {
	m := material(t)
	encode := func(certs ...*x509.Certificate) int { return len(certs) }
	blocks := func(f File) int { return bytes.Count(f.Data, []byte("-----BEGIN")) }

	p := Pair{CertPath: "/c", KeyPath: "/k", KeyFile: FileOptions{Mode: 0o640}}
	files, warnings := p.Files(m)
	if len(files) != 2 || len(warnings) != 0 || files[0].Path != "/c" || blocks(files[0]) != 1+encode(m.Chain...) ||
		files[1].Path != "/k" || files[1].Kind != KeyFile || *files[1].Mode != 0o640 {
		t.Errorf("without chain_path: got %+v, %q", files, warnings)
	}
	for _, f := range files {
		if !bytes.HasSuffix(f.Data, []byte("-----\n")) || bytes.Contains(f.Data, []byte("\n\n")) {
			t.Errorf("%s: blank lines or no newline at the end", f.Path)
		}
	}

	chain := filepath.Join(t.TempDir(), "chain.pem")
	p = Pair{CertPath: "/c", ChainPath: Path(chain)}
	files, _ = p.Files(m)
	if len(files) != 2 || blocks(files[0]) != 1 || files[1].Path != chain || blocks(files[1]) != len(m.Chain) {
		t.Errorf("with chain_path and no key_path: got %+v", files)
	}

	m.Chain = nil
	if files, warnings = p.Files(m); len(files) != 1 || len(warnings) != 0 {
		t.Errorf("without a chain: got %+v, %q", files, warnings)
	}
	must(t, os.WriteFile(chain, nil, 0o600))
	if files, warnings = p.Files(m); len(files) != 1 || len(warnings) != 1 || !strings.Contains(warnings[0], chain) {
		t.Errorf("without a chain, over an old one: got %+v, %q", files, warnings)
	}

	// The server reads the key store's own file, by a link that leads nowhere
	// before the first deployment.
	link := filepath.Join(t.TempDir(), "key.pem")
	must(t, os.Symlink(m.KeyPath, link))
	for _, path := range []string{m.KeyPath, link} {
		p = Pair{CertPath: "/c", KeyPath: Path(path)}
		if files, _ = p.Files(m); len(files) != 1 {
			t.Errorf("%s: the key store's own file is a destination", path)
		}
	}
}

func TestPairCheck(t *testing.T) {
	ok := Pair{CertPath: "/c", KeyPath: "/k", ChainPath: "/n", ReloadCommand: "r"}
	must(t, ok.Check("cert_path", "reload_command"))
	for key, p := range map[string]Pair{
		"cert_path":        {ReloadCommand: "r", ValidateCommand: "v"},
		"reload_command":   {CertPath: "/c", ValidateCommand: "v"},
		"validate_command": {CertPath: "/c", ReloadCommand: "r"},
		"key_path":         {CertPath: "/c", KeyPath: "/c", ReloadCommand: "r", ValidateCommand: "v"},
		"chain_path":       {CertPath: "/c", ChainPath: "/c", ReloadCommand: "r", ValidateCommand: "v"},
		"chain_path: ":     {CertPath: "/c", ChainPath: "/k", KeyPath: "/k", ReloadCommand: "r", ValidateCommand: "v"},
	} {
		if err := p.Check("cert_path", "reload_command", "validate_command"); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%+v: got %v, want an error that names %s", p, err, key)
		}
	}
}

func TestCommands(t *testing.T) {
	params := Params{Policy: &Policy{}, Common: Common{CommandTimeout: Duration(5 * time.Second)}}
	p := Pair{ValidateCommand: "nginx -t"}
	validate, reload, err := p.Commands(params)
	if err != nil || validate == nil || validate.Timeout != 5*time.Second || reload != nil {
		t.Errorf("got %v, %v, %v", validate, reload, err)
	}
	params.Common.CommandTimeout = 0
	if validate, _, _ = p.Commands(params); validate.Timeout != time.Minute {
		t.Errorf("default timeout: got %v", validate.Timeout)
	}
	p.ReloadCommand = "nginx -s reload; reboot"
	if _, _, err := p.Commands(params); err == nil || !strings.Contains(err.Error(), "reload_command: ") {
		t.Errorf("a semicolon: got %v", err)
	}
	p.ValidateCommand = "$(reboot)"
	if _, _, err := p.Commands(params); err == nil || !strings.Contains(err.Error(), "validate_command: ") {
		t.Errorf("a substitution: got %v", err)
	}
}
