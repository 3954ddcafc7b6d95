package apache

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/testing/liveserver"
)

func readPID(dir string) string {
	pid, _ := os.ReadFile(filepath.Join(dir, "httpd.pid"))
	return strings.TrimSpace(string(pid))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A key in the certificate's file is kept only if the target's configuration has it.
func TestOneFile(t *testing.T) {
	l := conformance.Start(t, liveserver.StartApacheInOneFile, Type())
	all, started := l.Config["cert_path"].(string), readPID(l.Dir)
	l.MustDeploy(t, l.NewMaterial(t))
	l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
	l.Refuses(t, l.NewMaterial(t), "set key_path to "+all, "key_path", "")
	l.Refuses(t, l.NewMaterial(t), "set key_path to "+all, "key_path", filepath.Join(l.Watched, "other.key"))
	if got := readPID(l.Dir); got != started {
		t.Errorf("httpd ended and was started again: process %s, not %s", got, started)
	}
}

// httpd reports what it reads, however its configuration is written. The host deploys to
// files that no running server reads.
func TestWrittenInOtherWays(t *testing.T) {
	l := conformance.Start(t, liveserver.StartApache, Type()) // for its modules
	text, err := os.ReadFile(filepath.Join(l.Dir, "httpd.conf"))
	must(t, err)
	common, _, found := strings.Cut(string(text), "<VirtualHost")
	if !found {
		t.Fatal("httpd.conf has no virtual host")
	}
	common += "LoadModule macro_module ${MODULES}/mod_macro.so\n"
	const host = "<VirtualHost 127.0.0.1:1>\nServerName %s\nSSLEngine on\n%s\n</VirtualHost>\n"
	tests := []struct {
		name, text string
		files      map[string]string // beside httpd.conf
		cert, want string            // without the directory
	}{
		{"a name defined again for each host", "Define site a\n" + fmt.Sprintf(host, "a", "SSLCertificateFile tls/${site}/c.pem\nSSLCertificateKeyFile tls/${site}/k.pem") +
			"Define site b\n" + fmt.Sprintf(host, "b", "SSLCertificateFile tls/${site}/c.pem\nSSLCertificateKeyFile tls/${site}/k.pem"), nil, "a/c.pem", "a/k.pem"},
		{"the second of them", "Define site a\n" + fmt.Sprintf(host, "a", "SSLCertificateFile tls/${site}/c.pem\nSSLCertificateKeyFile tls/${site}/k.pem") +
			"Define site b\n" + fmt.Sprintf(host, "b", "SSLCertificateFile tls/${site}/c.pem\nSSLCertificateKeyFile tls/${site}/k.pem"), nil, "b/c.pem", "b/k.pem"},
		{"the key in an included file", fmt.Sprintf(host, "a", "SSLCertificateFile tls/c.pem\nInclude inc/key*.conf"),
			map[string]string{"inc/key-a.conf": "SSLCertificateKeyFile tls/k.pem\n", "inc/other.conf": "SSLCertificateKeyFile tls/x.pem\n"}, "c.pem", "k.pem"},
		{"the key for all hosts", "SSLCertificateKeyFile tls/k.pem\n" + fmt.Sprintf(host, "a", "SSLCertificateFile tls/c.pem"), nil, "c.pem", "k.pem"},
		{"a macro", "<Macro Host $n>\n" + fmt.Sprintf(host, "$n", "SSLCertificateFile tls/$n/c.pem\nSSLCertificateKeyFile tls/$n/k.pem") + "</Macro>\nUse Host a\nUse Host b\n", nil, "b/c.pem", "b/k.pem"},
		{"a module that is not there", fmt.Sprintf(host, "a", "<IfModule mod_nowhere.c>\nSSLCertificateKeyFile tls/x.pem\n</IfModule>\nSSLCertificateFile tls/c.pem\nSSLCertificateKeyFile tls/k.pem"), nil, "c.pem", "k.pem"},
		{"the environment", fmt.Sprintf(host, "a", "SSLCertificateFile tls/c.pem\nSSLCertificateKeyFile tls/${LANG}.pem"), nil, "c.pem", "C.pem"}, // as the agent runs all commands,
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for name, text := range test.files {
				must(t, os.MkdirAll(filepath.Dir(filepath.Join(l.Dir, name)), 0o755))
				must(t, os.WriteFile(filepath.Join(l.Dir, name), []byte(text), 0o644))
			}
			must(t, os.WriteFile(filepath.Join(l.Dir, "httpd.conf"), []byte(common+test.text), 0o644))
			cert, want := filepath.Join(l.Watched, test.cert), filepath.Join(l.Watched, test.want)
			made, err := l.Connector(Type(), map[string]any{
				"cert_path": cert, "key_path": "********", "validate_command": l.Config["validate_command"], "reload_command": l.Config["reload_command"],
			})
			must(t, err)
			a := made.(*apache)
			if got, err := serverconf.HTTPD(t.Context(), l.Query, a.CertPath, *a.Validate, *a.Reload); err != nil || got.Key != want {
				t.Errorf("got %+v, %v, want %s", got, err, want)
			}
		})
	}
}

func TestLive(t *testing.T) {
	l := conformance.Start(t, liveserver.StartApache, Type())
	command := strings.TrimSuffix(l.Config["reload_command"].(string), " -k graceful")
	started := readPID(l.Dir)
	cert, key := l.Config["cert_path"].(string), l.Config["key_path"].(string)

	t.Run("first deployment, key path masked", func(t *testing.T) {
		l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
		if !strings.Contains(l.Log(), "where="+filepath.Join(l.Dir, "httpd.conf:")) || !strings.Contains(l.Log(), "key_path="+key) {
			t.Errorf("the log does not say where the key path came from:\n%s", l.Log())
		}
	})
	t.Run("key path from the overlay", func(t *testing.T) { l.KeyPathFromOverlay(t, key) })
	t.Run("key path masked and not to be had", func(t *testing.T) { l.NoKeyPath(t) })
	t.Run("validation fails", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "Could not open", "validate_command", command+".missing -t")
	})
	t.Run("another key than httpd reads", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "key_path", "key_path", filepath.Join(l.Watched, "other.key"))
		l.Refuses(t, l.NewMaterial(t), "key_path", "key_path", "")
	})
	t.Run("reload fails", func(t *testing.T) { l.ReloadFails(t) })
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("mode and owner kept", func(t *testing.T) { l.KeepsMode(t, key) })
	t.Run("symlinked destination", func(t *testing.T) { l.KeepsSymlink(t, cert) })
	t.Run("rotation under load", func(t *testing.T) { l.Rotate(t, 3*time.Second) })

	// The next -k graceful starts an httpd that exited, so nothing
	// else would notice.
	if got := readPID(l.Dir); got != started {
		log, _ := os.ReadFile(filepath.Join(l.Dir, "error.log"))
		t.Errorf("httpd ended and was started again: process %s, not %s\n%s", got, started, log)
		must(t, exec.Command("kill", got).Run())
	}
}
