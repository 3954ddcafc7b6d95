package apache

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/e2e"
	"certctl-agent/internal/target/targettest"
	"certctl-agent/internal/testca"
	"certctl-agent/internal/tlsprobe"
)

const confHead = `ServerRoot %[1]s
ServerName localhost
Define MODULES %[2]s
LoadModule mpm_event_module ${MODULES}/mod_mpm_event.so
LoadModule authz_core_module ${MODULES}/mod_authz_core.so
LoadModule ssl_module ${MODULES}/mod_ssl.so
PidFile %[1]s/httpd.pid
ErrorLog %[1]s/error.log
DocumentRoot %[1]s
Mutex pthread
StartServers 2
MinSpareThreads 25
ThreadsPerChild 25
GracefulShutdownTimeout 5
Listen 127.0.0.1:%[3]d
<IfModule mod_unixd.c>
</IfModule>
`

const confTLS = `Listen 127.0.0.1:%[1]d
Define TLS tls
<VirtualHost 127.0.0.1:%[1]d>
	ServerName localhost
	SSLEngine on
	SSLCertificateFile "${TLS}/cert.pem"
	SSLCertificateKeyFile "${TLS}/key.pem"
</VirtualHost>
`

// start starts httpd without TLS, and then gives it a configuration whose
// certificate is not there: the state in which a first deployment finds it.
func start(t *testing.T) (l *targettest.Live, command string, httpd *os.Process) {
	program := e2e.Need(t, "apache2")
	modules := "/usr/lib/apache2/modules"
	if _, err := os.Stat(filepath.Join(modules, "mod_ssl.so")); err != nil {
		e2e.Missing(t, "the modules of apache2 are not in "+modules)
	}
	host := targettest.NewHost(t, targettest.RunCommand)
	plain, port := e2e.FreePort(t), e2e.FreePort(t)
	conf := filepath.Join(host.Dir, "httpd.conf")
	command = program + " -f " + conf
	l = &targettest.Live{
		Host: host, Type: "Apache", New: build, CA: testca.Must(t),
		Endpoint: tlsprobe.Endpoint{Address: fmt.Sprintf("127.0.0.1:%d", port), ServerName: "localhost"},
		Watched:  filepath.Join(host.Dir, "tls"),
		Config: map[string]any{
			"cert_path":        filepath.Join(host.Dir, "tls/cert.pem"),
			"key_path":         filepath.Join(host.Dir, "tls/key.pem"),
			"validate_command": command + " -t",
			"reload_command":   command + " -k graceful",
		},
	}
	maps.Copy(l.Config, targettest.Verified(l.Endpoint.Address))
	must(t, os.Mkdir(l.Watched, 0o755))
	head := fmt.Sprintf(confHead, host.Dir, modules, plain)
	if os.Geteuid() == 0 {
		head += "User www-data\nGroup www-data\n"
	}
	must(t, os.WriteFile(conf, []byte(head), 0o644))
	httpd = targettest.Serve(t, fmt.Sprintf("127.0.0.1:%d", plain), append(strings.Fields(command), "-D", "FOREGROUND")...)
	// It listens before it reads its configuration a second time; the process
	// number comes after that.
	for deadline := time.Now().Add(10 * time.Second); readPID(host.Dir) == ""; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("httpd wrote no process number")
		}
	}
	must(t, os.WriteFile(conf, []byte(head+fmt.Sprintf(confTLS, port)), 0o644))
	return l, command, httpd
}

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

func TestLive(t *testing.T) {
	l, command, httpd := start(t)
	cert, key := l.Config["cert_path"].(string), l.Config["key_path"].(string)

	t.Run("first deployment, key path masked", func(t *testing.T) {
		l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
		if !strings.Contains(l.Log(), "where="+filepath.Join(l.Dir, "httpd.conf:")) || !strings.Contains(l.Log(), "key_path="+key) {
			t.Errorf("the log does not say where the key path came from:\n%s", l.Log())
		}
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
	})
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

	// An httpd that ended is started again by the next -k graceful, so nothing
	// else would notice.
	if got := readPID(l.Dir); got != strconv.Itoa(httpd.Pid) {
		log, _ := os.ReadFile(filepath.Join(l.Dir, "error.log"))
		t.Errorf("httpd ended and was started again: process %s, not %d\n%s", got, httpd.Pid, log)
		must(t, exec.Command("kill", got).Run())
	}
}
