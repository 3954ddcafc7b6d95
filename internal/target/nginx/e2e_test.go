package nginx

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/liveserver"
	"certctl-agent/internal/target"
	"certctl-agent/internal/target/targettest"
)

// start starts nginx and returns the command line that it was started by.
func start(t *testing.T) (l *targettest.Live, command string) {
	l = targettest.Start(t, liveserver.StartNGINX, build)
	return l, strings.TrimSuffix(l.Config["reload_command"].(string), " -s reload")
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
