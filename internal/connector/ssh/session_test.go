package ssh

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
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

// TestSaid: what a server has ssh say reaches an error without escapes, without
// what looks like a key, and not all of it.
func TestSaid(t *testing.T) {
	p := &process{ended: make(chan struct{})}
	close(p.ended)
	const secret = "MHcCAQEEIJx3vQ9Yk2Lw7TzR5uB8nE4mD6sA1pG0hF3jK9cVbXqZoAoGCCqGSM49"
	_, err := fmt.Fprintf(&p.stderr, "\x1b[2J-----BEGIN EC PRIVATE KEY-----\n%s\n-----END EC PRIVATE KEY-----\n%s", secret, strings.Repeat("no\n", 1<<20))
	must(t, err)
	d := &directory{target: &target{}}
	said := d.explain(t.Context(), p, errors.New("ended")).Error()
	if strings.Contains(said, secret[:20]) || strings.Contains(said, "\x1b") || len(said) > 2*maxReason || !strings.Contains(said, "no no") {
		t.Errorf("got %q", said)
	}
}
