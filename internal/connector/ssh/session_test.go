package ssh

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// shortTemp has connections make their directories in one of the test's own,
// whose path is short enough for a socket.
func shortTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "t")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	return dir
}

// TestSweep: the directory of a killed agent's connection is removed by the next,
// and none that others are making at that moment.
func TestSweep(t *testing.T) {
	base := shortTemp(t)
	dead := filepath.Join(base, dirPrefix+"dead")
	must(t, os.Mkdir(dead, 0o700))
	must(t, os.WriteFile(filepath.Join(dead, lockFile), []byte("certctl-agent\n"), 0o600))
	must(t, os.WriteFile(filepath.Join(dead, identityFile), []byte("a key\n"), 0o600))
	var making sync.WaitGroup
	for range 16 {
		making.Go(func() {
			for range 40 {
				d, err := newDirectory(&target{config: config{AuthMethod: byKey}})
				if err != nil {
					t.Error(err)
					return
				}
				d.remove()
			}
		})
	}
	making.Wait()
	checkFiles(t, base)
}
