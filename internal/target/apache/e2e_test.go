package apache

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/liveserver"
	"certctl-agent/internal/target/targettest"
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

func TestLive(t *testing.T) {
	l := targettest.Start(t, liveserver.StartApache, build)
	command := strings.TrimSuffix(l.Config["reload_command"].(string), " -k graceful")
	started := readPID(l.Dir)
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
	if got := readPID(l.Dir); got != started {
		log, _ := os.ReadFile(filepath.Join(l.Dir, "error.log"))
		t.Errorf("httpd ended and was started again: process %s, not %s\n%s", got, started, log)
		must(t, exec.Command("kill", got).Run())
	}
}
