package connector

import (
	"bytes"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/testca"
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

	p := Pair{CertPath: "/c", KeyPath: "/k", KeyFile: targetconf.FileOptions{Mode: 0o640}}
	plan := p.Plan(m)
	files, warnings := plan.Files, plan.Warnings
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
	p = Pair{CertPath: "/c", ChainPath: targetconf.Path(chain)}
	files = p.Plan(m).Files
	if len(files) != 2 || blocks(files[0]) != 1 || files[1].Path != chain || blocks(files[1]) != len(m.Chain) {
		t.Errorf("with chain_path and no key_path: got %+v", files)
	}

	m.Chain = nil
	if plan = p.Plan(m); len(plan.Files) != 1 || len(plan.Warnings) != 0 {
		t.Errorf("without a chain: got %+v, %q", plan.Files, plan.Warnings)
	}
	must(t, os.WriteFile(chain, nil, 0o600))
	if plan = p.Plan(m); len(plan.Files) != 1 || len(plan.Warnings) != 1 || !strings.Contains(plan.Warnings[0], chain) {
		t.Errorf("without a chain, over an old one: got %+v, %q", plan.Files, plan.Warnings)
	}

	// The server reads the key store's own file through a link, which is dangling
	// before the first deployment.
	link := filepath.Join(t.TempDir(), "key.pem")
	must(t, os.Symlink(m.KeyPath, link))
	for _, path := range []string{m.KeyPath, link} {
		p = Pair{CertPath: "/c", KeyPath: targetconf.Path(path)}
		if files = p.Plan(m).Files; len(files) != 1 {
			t.Errorf("%s: the key store's own file must not be a destination", path)
		}
	}
}

// TestMatch: the server's answer decides about key_path.
func TestMatch(t *testing.T) {
	const cert = "/tls/site.pem"
	at := func(key string) []serverconf.Pair { return []serverconf.Pair{{Cert: cert, Key: key, Where: "conf:7"}} }
	broken := errors.New("exit status 1")
	tests := []struct {
		name    string
		config  string
		overlay string
		pairs   []serverconf.Pair
		err     error  // the server gives no answer
		want    string // key_path
		says    string // in the error, or in the warning
		refused bool
	}{
		{"the server's key", `{"key_path": "/k"}`, "", at("/k"), nil, "/k", "", false},
		{"another key", `{"key_path": "/k"}`, "", at("/other"), nil, "", "reads the key of /tls/site.pem from /other (conf:7)", true},
		{"no key, and the server reads one", `{}`, "", at("/other"), nil, "", "reads the key of /tls/site.pem from /other (conf:7)", true},
		{"no key, and the server reads the key store", `{}`, "", at("/store/c.key"), nil, "", "", false},
		{"one file, key apart", `{"key_path": "/k"}`, "", at(cert), nil, "", "set key_path to /tls/site.pem", true},
		{"one file, no key", `{}`, "", at(cert), nil, "", "set key_path to /tls/site.pem", true},
		{"one file, as the server has it", `{"key_path": "/tls/site.pem"}`, "", at(cert), nil, cert, "", false},
		{"one file, key apart in the server", `{"key_path": "/tls/site.pem"}`, "", at("/k"), nil, "", "from /k", true},
		{"another key than the overlay's", `{}`, `{"key_path": "/k"}`, at("/other"), nil, "", "from /other", true},

		{"several keys", `{"key_path": "/k"}`, "", append(at("/k"), at("/other")...), nil, "", "a separate certificate file", true},
		{"no key that is certain", `{"key_path": "/k"}`, "", at(""), nil, "", "name its key file there", true},
		{"a variable", `{"key_path": "/k"}`, "", at("/$x"), nil, "", "write the path in full", true},
		{"unclear, no key", `{}`, "", at(""), nil, "", "overlay", true},
		{"unclear, but the host's owner knows", `{}`, `{"key_path": "/k"}`, at("/$x"), nil, "/k", "cannot check that", false},

		{"certificate not used", `{"key_path": "/k"}`, "", nil, nil, "/k", "will not load", false},
		{"no answer", `{"key_path": "/k"}`, "", nil, broken, "/k", "cannot check that httpd reads its key from key_path: exit status 1", false},

		{"masked", `{"key_path": "********"}`, "", at("/k"), nil, "/k", "", false},
		{"masked, one file", `{"key_path": "********"}`, "", at(cert), nil, cert, "", false},
		{"masked, one file and a chain", `{"key_path": "********", "chain_path": "/n"}`, "", at(cert), nil, "", "chain_path: is not allowed", true},
		{"masked, unclear", `{"key_path": "********"}`, "", at(""), nil, "", "sent it masked", true},
		{"masked, not used", `{"key_path": "********"}`, "", nil, nil, "", "sent it masked", true},
		{"masked, no answer", `{"key_path": "********"}`, "", nil, broken, "", "exit status 1", true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			if test.overlay != "" {
				must(t, os.WriteFile(filepath.Join(dir, "t.json"), []byte(test.overlay), 0o600))
			}
			config, err := targetconf.Merge([]byte(test.config), "Apache", nil, "t", targetconf.Overlays{Dir: dir})
			must(t, err)
			p := Pair{CertPath: cert}
			must(t, config.Decode(&p, "key_path"))
			found, err := serverconf.Pair{}, test.err
			if err == nil {
				found, err = serverconf.KeyFor(cert, test.pairs)
			}
			warnings, err := p.Match(config, Host{Log: slog.New(slog.DiscardHandler)}, &Material{KeyPath: "/store/c.key"}, "httpd", found, err)
			said := strings.Join(warnings, "\n")
			if err != nil {
				said = err.Error()
			}
			if (err != nil) != test.refused || !strings.Contains(said, test.says) || test.says == "" && said != "" {
				t.Errorf("got %q, refused: %v; want %q, %v", said, err != nil, test.says, test.refused)
			}
			if err == nil && string(p.KeyPath) != test.want {
				t.Errorf("key_path is %s, want %s", p.KeyPath, test.want)
			}
		})
	}
}

// TestOneFile: if both keys name one file, it holds the key first and then the chain, and
// is treated as a key file.
func TestOneFile(t *testing.T) {
	m := material(t)
	p := Pair{CertPath: "/all.pem", KeyPath: "/all.pem", CertFile: targetconf.FileOptions{Mode: 0o644}, KeyFile: targetconf.FileOptions{Mode: 0o640}}
	plan := p.Plan(m)
	files, warnings := plan.Files, plan.Warnings
	want := slices.Concat(m.Key(), pemutil.EncodeCertificates(m.Leaf), pemutil.EncodeCertificates(m.Chain...))
	if len(files) != 1 || len(warnings) != 0 || files[0].Path != "/all.pem" || files[0].Kind != KeyFile || *files[0].Mode != 0o640 || !bytes.Equal(files[0].Data, want) {
		t.Errorf("got %d files: %+v, %q", len(files), files, warnings)
	}
}

func TestPairCheck(t *testing.T) {
	ok := Pair{CertPath: "/c", KeyPath: "/k", ChainPath: "/n", ReloadCommand: "r"}
	must(t, ok.Check("cert_path", "reload_command"))
	for key, p := range map[string]Pair{
		"cert_path":          {ReloadCommand: "r", ValidateCommand: "v"},
		"reload_command":     {CertPath: "/c", ValidateCommand: "v"},
		"validate_command":   {CertPath: "/c", ReloadCommand: "r"},
		"chain_path: is not": {CertPath: "/c", KeyPath: "/c", ChainPath: "/n", ReloadCommand: "r", ValidateCommand: "v"},
		"chain_path":         {CertPath: "/c", ChainPath: "/c", ReloadCommand: "r", ValidateCommand: "v"},
		"chain_path: ":       {CertPath: "/c", ChainPath: "/k", KeyPath: "/k", ReloadCommand: "r", ValidateCommand: "v"},
	} {
		if err := p.Check("cert_path", "reload_command", "validate_command"); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%+v: got %v, want an error that names %s", p, err, key)
		}
	}
}

func TestCommands(t *testing.T) {
	host := Host{Policy: &policy.Policy{}}
	timeout := func(job string) *targetconf.Config {
		config, err := targetconf.Merge([]byte(job), "NGINX", nil, "t", targetconf.Overlays{})
		must(t, err)
		return config
	}
	p := Pair{ValidateCommand: "nginx -t"}
	validate, reload, err := host.Commands(timeout(`{"command_timeout":"5s"}`), p.ValidateCommand, p.ReloadCommand)
	if err != nil || validate == nil || validate.Timeout != 5*time.Second || reload != nil {
		t.Errorf("got %v, %v, %v", validate, reload, err)
	}
	if validate, _, _ = host.Commands(timeout(`{}`), p.ValidateCommand, p.ReloadCommand); validate.Timeout != time.Minute {
		t.Errorf("default timeout: got %v", validate.Timeout)
	}
	p.ReloadCommand = "nginx -s reload; reboot"
	if _, _, err := host.Commands(timeout(`{}`), p.ValidateCommand, p.ReloadCommand); err == nil || !strings.Contains(err.Error(), "reload_command: ") {
		t.Errorf("a semicolon: got %v", err)
	}
	p.ValidateCommand = "$(reboot)"
	if _, _, err := host.Commands(timeout(`{}`), p.ValidateCommand, p.ReloadCommand); err == nil || !strings.Contains(err.Error(), "validate_command: ") {
		t.Errorf("a substitution: got %v", err)
	}
}
