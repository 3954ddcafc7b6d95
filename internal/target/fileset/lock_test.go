package fileset

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestTwoProcesses: a transaction waits for that of another process in the same
// directory, and no longer than it lives.
func TestTwoProcesses(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	child := exec.Command(os.Args[0])
	child.Env = []string{"FILESET_CHILD=lock", "DIR=" + w.path("site")}
	out, err := child.StdoutPipe()
	check(t, err)
	check(t, child.Start())
	defer child.Wait()
	defer child.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
		t.Fatalf("child said %q, %v", line, err)
	}

	s := w.mustStore(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Deploy(ctx, w.renewal()); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "another deployment holds it") {
		t.Errorf("while another process holds the lock: %v", err)
	}
	w.want(t, false, "old")

	done := make(chan error, 1)
	go func() {
		_, err := s.Deploy(t.Context(), w.renewal())
		done <- err
	}()
	check(t, child.Process.Kill())
	check(t, <-done)
	w.want(t, false, "new")
}

func childLock() int {
	d, err := resolveDir(os.Getenv("DIR"))
	if err == nil {
		_, err = lock(context.Background(), []*dir{d}, time.Second, slog.New(slog.DiscardHandler))
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("locked")
	time.Sleep(time.Minute) // killed long before
	return 0
}

// TestLockOrder: two transactions with directories in common, named in
// opposite order, do not wait for each other for ever.
func TestLockOrder(t *testing.T) {
	base := t.TempDir()
	var dirs [2][]*dir
	for i := range dirs {
		for _, name := range []string{"a", "b", "c"} {
			check(t, os.MkdirAll(filepath.Join(base, name), 0o700))
			d, err := resolveDir(filepath.Join(base, name))
			check(t, err)
			defer d.Close()
			dirs[i] = append(dirs[i], d)
		}
	}
	dirs[1][0], dirs[1][2] = dirs[1][2], dirs[1][0]
	done := make(chan error)
	for i := range dirs {
		go func() {
			for range 3 {
				unlock, err := lock(t.Context(), dirs[i], 10*time.Second, slog.New(slog.DiscardHandler))
				if err != nil {
					done <- err
					return
				}
				unlock()
			}
			done <- nil
		}()
	}
	for range dirs {
		check(t, <-done)
	}
}
