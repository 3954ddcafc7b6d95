package haproxy

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/liveserver"
	"certctl-agent/internal/target/targettest"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLive(t *testing.T) {
	l := targettest.Start(t, liveserver.StartHAProxy, build)
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
