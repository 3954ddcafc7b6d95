package ssh

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"certctl-agent/internal/testing/needs"
)

// shortTemp makes connections create their directories in a directory of the test,
// whose path is short enough for a socket.
func shortTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "t")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	return dir
}

// TestSweep: the next connection removes the directory of a killed agent's connection,
// but not one that another agent is creating at that moment.
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

// TestEndedIsNotKilled: the group id of an ssh that has exited may be reused.
func TestEndedIsNotKilled(t *testing.T) {
	other := exec.CommandContext(t.Context(), needs.Need(t, "cat"))
	other.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := other.StdinPipe()
	must(t, err)
	stdout, err := other.StdoutPipe()
	must(t, err)
	must(t, other.Start())
	read, write, err := os.Pipe()
	must(t, err)
	defer write.Close()
	p := &process{command: other, stdout: read, ended: make(chan struct{})}
	close(p.ended)
	must(t, p.Close())
	_, err = stdin.Write([]byte("alive"))
	must(t, errors.Join(err, stdin.Close()))
	if said, err := io.ReadAll(stdout); string(said) != "alive" || other.Wait() != nil {
		t.Errorf("it was killed: it says %q, %v", said, err)
	}
}

// TestSaid: the server's text in an error has no escapes, nothing that
// looks like a key, and is bounded.
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
