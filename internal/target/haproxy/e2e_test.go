package haproxy

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/e2e"
	"certctl-agent/internal/target/targettest"
	"certctl-agent/internal/testca"
	"certctl-agent/internal/tlsprobe"
)

const confHead = `global
	stats socket %[1]s/admin.sock mode 600 expose-fd listeners level user
	hard-stop-after 10s
	nbthread 2
defaults
	mode http
	timeout connect 5s
	timeout client 5s
	timeout server 5s
frontend plain
	bind 127.0.0.1:%[2]d
	http-request return status 200
`

// The directory, not the file: HAProxy loads everything that is in it.
const confTLS = `frontend tls
	bind 127.0.0.1:%[2]d ssl crt %[1]s/tls
	http-request return status 200
`

// start starts HAProxy without TLS, and then gives it a configuration whose
// certificate is not there: the state in which a first deployment finds it.
func start(t *testing.T) *targettest.Live {
	program, kill := e2e.Need(t, "haproxy"), e2e.Need(t, "kill")
	host := targettest.NewHost(t, targettest.RunCommand)
	plain, port := e2e.FreePort(t), e2e.FreePort(t)
	conf := filepath.Join(host.Dir, "haproxy.cfg")
	l := &targettest.Live{
		Host: host, Type: "HAProxy", New: build, CA: testca.Must(t),
		Endpoint: tlsprobe.Endpoint{Address: fmt.Sprintf("127.0.0.1:%d", port), ServerName: "localhost"},
		Watched:  filepath.Join(host.Dir, "tls"),
		// A SIGUSR2 that comes while the master still executes itself anew for
		// the one before can be lost.
		Settle: 2 * time.Second,
	}
	must(t, os.Mkdir(l.Watched, 0o755))
	head := fmt.Sprintf(confHead, host.Dir, plain)
	must(t, os.WriteFile(conf, []byte(head), 0o644))
	master := targettest.Serve(t, fmt.Sprintf("127.0.0.1:%d", plain), program, "-W", "-f", conf)
	must(t, os.WriteFile(conf, []byte(head+fmt.Sprintf(confTLS, host.Dir, port)), 0o644))
	l.Config = map[string]any{
		"pem_path":         filepath.Join(host.Dir, "tls/site.pem"),
		"validate_command": program + " -c -q -f " + conf,
		"reload_command":   fmt.Sprintf("%s -USR2 %d", kill, master.Pid),
	}
	maps.Copy(l.Config, targettest.Verified(l.Endpoint.Address))
	return l
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLive(t *testing.T) {
	l := start(t)
	pem := l.Config["pem_path"].(string)

	t.Run("first deployment", func(t *testing.T) { l.MustDeploy(t, l.NewMaterial(t)) })
	t.Run("by the other name", func(t *testing.T) {
		l.MustDeploy(t, l.NewMaterial(t), "combined_pem_path", pem, "pem_path", "")
	})
	t.Run("validation fails", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "validate", "validate_command", l.Config["validate_command"].(string)+".missing")
	})
	t.Run("wrong key", func(t *testing.T) { l.WrongKey(t) })
	t.Run("reload fails", func(t *testing.T) { l.ReloadFails(t) })
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("mode and owner kept", func(t *testing.T) { l.KeepsMode(t, pem) })
	t.Run("started in the middle of a transaction", func(t *testing.T) {
		// A temporary file as the transaction makes them, half written.
		temporary := filepath.Join(l.Watched, ".site.pem.1a2b3c.tmp")
		must(t, os.WriteFile(temporary, []byte("-----BEGIN CERTIFICATE-----\n"), 0o600))
		defer os.Remove(temporary)
		l.MustDeploy(t, l.NewMaterial(t))
	})
	t.Run("rotation under load", func(t *testing.T) {
		stop := make(chan struct{})
		var watching sync.WaitGroup
		watching.Go(func() { onlyHidden(t, l.Watched, "site.pem", stop) })
		l.Rotate(t, 3*time.Second)
		close(stop)
		watching.Wait()
	})
	t.Run("symlinked destination", func(t *testing.T) { l.KeepsSymlink(t, pem) })
}

// onlyHidden keeps looking whether dir ever holds a file that HAProxy would
// load, beside the one that it should.
func onlyHidden(t *testing.T, dir, name string, stop <-chan struct{}) {
	looks := 0
	for {
		select {
		case <-stop:
			t.Logf("looked %d times into the directory", looks)
			return
		case <-time.After(200 * time.Microsecond):
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Error(err)
			return
		}
		looks++
		for _, entry := range entries {
			if entry.Name() != name && !strings.HasPrefix(entry.Name(), ".") {
				t.Errorf("%s is in the directory: HAProxy would load it", entry.Name())
				return
			}
		}
	}
}
