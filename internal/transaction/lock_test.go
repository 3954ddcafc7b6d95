package transaction

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestTwoProcesses checks that a deployment waits for a process that has locked the directory,
// until that process ends.
func TestTwoProcesses(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	child := exec.Command(os.Args[0])
	child.Env = []string{"TRANSACTION_CHILD=lock", "DIR=" + w.path("site")}
	_, err := child.StdinPipe()
	check(t, err)
	out, err := child.StdoutPipe()
	check(t, err)
	check(t, child.Start())
	defer child.Wait()
	defer child.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
		t.Fatalf("child said %q, %v", line, err)
	}

	s := w.mustEngine(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // long enough to reach the lock
	defer cancel()
	if _, err := s.deploy(ctx, w.renewal()); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "another deployment or another program holds it") {
		t.Errorf("while another process holds the lock: %v", err)
	}
	w.want(t, false, "old")

	done := make(chan error, 1)
	go func() {
		_, err := s.deploy(t.Context(), w.renewal())
		done <- err
	}()
	check(t, child.Process.Kill())
	check(t, <-done)
	w.want(t, false, "new")
}

// childLock holds a lock until its standard input ends. With PASS, a child that outlives it holds
// the lock; with RUNS_AS, it runs as that user.
func childLock() int {
	err := func() error {
		if os.Getenv("HELD") == "" {
			dir, err := os.Open(os.Getenv("DIR"))
			if err == nil {
				err = syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
			}
			if err != nil {
				return err
			}
			defer dir.Close()
			if os.Getenv("PASS") != "" {
				heir := exec.Command(os.Args[0])
				heir.Env = append(os.Environ(), "HELD=1")
				heir.Stdin, heir.Stdout, heir.ExtraFiles = os.Stdin, os.Stdout, []*os.File{dir}
				return heir.Start()
			}
		}
		if uid, err := strconv.Atoi(os.Getenv("RUNS_AS")); err == nil {
			if err := syscall.Setuid(uid); err != nil {
				return err
			}
		}
		fmt.Println("locked")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	}()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// TestLockOrder checks that two deployments to the same directories, in opposite order, do not
// deadlock.
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
	// Two engines, because one has an additional table of locks.
	var stores [2]Engine
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error)
	for i := range dirs {
		stores[i].opts.Log = slog.New(slog.DiscardHandler)
		go func() {
			for range 3 {
				h, err := stores[i].lock(ctx, dirs[i], nil)
				if err != nil {
					done <- err
					return
				}
				h.release()
			}
			done <- nil
		}()
	}
	for range dirs {
		check(t, <-done)
	}
}
