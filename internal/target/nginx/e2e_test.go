package nginx

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/e2e"
	"certctl-agent/internal/target"
	"certctl-agent/internal/target/targettest"
	"certctl-agent/internal/testca"
	"certctl-agent/internal/tlsprobe"
)

const confHead = `pid %[1]s/nginx.pid;
error_log %[1]s/error.log warn;
worker_processes 2;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/tmp;
	proxy_temp_path %[1]s/tmp;
	fastcgi_temp_path %[1]s/tmp;
	uwsgi_temp_path %[1]s/tmp;
	scgi_temp_path %[1]s/tmp;
	server { listen 127.0.0.1:%[2]d; }
`

const confTLS = `	ssl_certificate_key %[1]s/tls/key.pem;
	server {
		listen 127.0.0.1:%[2]d ssl;
		server_name localhost;
		ssl_certificate %[1]s/tls/cert.pem;
	}
`

// start starts nginx without TLS, and then gives it a configuration whose
// certificate is not there: the state in which a first deployment finds it.
func start(t *testing.T) (l *targettest.Live, command string) {
	program := e2e.Need(t, "nginx")
	host := targettest.NewHost(t, targettest.RunCommand)
	plain, port := e2e.FreePort(t), e2e.FreePort(t)
	conf := filepath.Join(host.Dir, "nginx.conf")
	command = program + " -p " + host.Dir + " -c " + conf
	l = &targettest.Live{
		Host: host, Type: "NGINX", New: build, CA: testca.Must(t),
		Endpoint: tlsprobe.Endpoint{Address: fmt.Sprintf("127.0.0.1:%d", port), ServerName: "localhost"},
		Watched:  filepath.Join(host.Dir, "tls"),
		Config: map[string]any{
			"cert_path":        filepath.Join(host.Dir, "tls/cert.pem"),
			"key_path":         filepath.Join(host.Dir, "tls/key.pem"),
			"validate_command": command + " -t -q",
			"reload_command":   command + " -s reload",
		},
	}
	maps.Copy(l.Config, targettest.Verified(l.Endpoint.Address))
	must(t, os.Mkdir(l.Watched, 0o755))
	head := fmt.Sprintf(confHead, host.Dir, plain)
	must(t, os.WriteFile(conf, []byte(head+"}\n"), 0o644))
	targettest.Serve(t, fmt.Sprintf("127.0.0.1:%d", plain), append(strings.Fields(command), "-g", "daemon off;")...)
	must(t, os.WriteFile(conf, []byte(head+fmt.Sprintf(confTLS, host.Dir, port)+"}\n"), 0o644))
	return l, command
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLive(t *testing.T) {
	l, command := start(t)
	cert, key := l.Config["cert_path"].(string), l.Config["key_path"].(string)

	t.Run("first deployment, key path masked", func(t *testing.T) {
		l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
		if !strings.Contains(l.Log(), "where="+filepath.Join(l.Dir, "nginx.conf:")) || !strings.Contains(l.Log(), "key_path="+key) {
			t.Errorf("the log does not say where the key path came from:\n%s", l.Log())
		}
		l.MustDeploy(t, l.NewMaterial(t), "key_path", "********") // this time nginx -T succeeds
	})
	t.Run("key path from the overlay", func(t *testing.T) {
		overlay := filepath.Join(l.Overlays, targettest.TargetID+".json")
		must(t, os.WriteFile(overlay, fmt.Appendf(nil, `{"key_path": %q}`, key), 0o600))
		defer os.Remove(overlay)
		l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
	})
	t.Run("key path masked and not to be had", func(t *testing.T) {
		other := filepath.Join(l.Watched, "other.pem")
		l.Refuses(t, l.NewMaterial(t), "names no key for "+other, "key_path", "********", "cert_path", other)
		l.Query = nil
		defer func() { l.Query = targettest.QueryCommand }()
		l.Refuses(t, l.NewMaterial(t), filepath.Join(l.Overlays, targettest.TargetID+".json"), "key_path", "********")
	})
	t.Run("validation fails", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "open() ", "validate_command", command+".missing -t")
	})
	t.Run("wrong key", func(t *testing.T) { l.WrongKey(t) })
	t.Run("reload fails", func(t *testing.T) { l.ReloadFails(t) })
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("mode and owner kept", func(t *testing.T) { l.KeepsMode(t, key) })
	t.Run("symlinked destination", func(t *testing.T) { l.KeepsSymlink(t, cert) })
	t.Run("the key store's own file", func(t *testing.T) {
		m := l.NewMaterial(t)
		must(t, os.Remove(key))
		must(t, os.Symlink(m.KeyPath, key))
		m.KeyFiles = []target.File{{Path: m.KeyPath, Kind: target.StoreFile, Data: m.KeyPEM, DefaultMode: 0o600}}
		l.MustDeploy(t, m)
		must(t, os.Remove(key))
		must(t, os.WriteFile(key, m.KeyPEM, 0o600))
	})
	t.Run("rotation under load", func(t *testing.T) { l.Rotate(t, 2*time.Second) })
}
