package filelock

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(t.TempDir())
	must(t, err)
	t.Cleanup(func() { root.Close() })
	return root
}

// TestTake checks that a lock has one holder at a time, and that the error of others names it.
func TestTake(t *testing.T) {
	root := open(t)
	path := filepath.Join(root.Name(), "lock")
	if Free(path) {
		t.Error("a lock file that does not exist counts as free")
	}
	for _, test := range []struct{ owner, by, says string }{
		{"", "", "in use by an unknown process"},
		{"agent a longer name\x1b, process 1", "agent a longer name\ufffd, process 1", "in use by agent a longer name\ufffd, process 1"},
		{"agent b", "agent b", "in use by agent b"},
		{"", "agent b", "in use by agent b"}, // the one before it
		{strings.Repeat("x", 2*maxOwner), strings.Repeat("x", maxOwner), "in use by xxx"},
	} {
		lock, err := Take(root, "lock", test.owner)
		must(t, err)
		if Free(path) {
			t.Error("a held lock counts as free")
		}
		_, err = Take(root, "lock", "another")
		held, ok := errors.AsType[*HeldError](err)
		if !ok || held.by != test.by || !strings.HasPrefix(err.Error(), test.says) {
			t.Errorf("%.40q: got %.80v", test.owner, err)
		}
		lock.Close()
		if !Free(path) {
			t.Error("a released lock does not count as free")
		}
	}
	info, err := root.Stat("lock")
	must(t, err)
	if info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}

// TestTakeWaitsForALook checks that Free in one process does not make Take in another one fail.
func TestTakeWaitsForALook(t *testing.T) {
	root := open(t)
	look, err := root.Create("lock")
	must(t, err)
	must(t, syscall.Flock(int(look.Fd()), syscall.LOCK_SH))
	time.AfterFunc(pause/2, func() { look.Close() })
	lock, err := Take(root, "lock", "")
	must(t, err)
	lock.Close()
}

func TestTakeFails(t *testing.T) {
	root := open(t)
	must(t, os.Mkdir(filepath.Join(root.Name(), "lock"), 0o700))
	lock, err := Take(root, "lock", "")
	if _, ok := errors.AsType[*fs.PathError](err); !ok || Unsupported(err) {
		t.Errorf("a directory in its place: got %v", err)
	}
	lock.Close() // nil: no effect
}

func TestUnsupported(t *testing.T) {
	for _, err := range []error{syscall.ENOLCK, syscall.ENOSYS, syscall.EOPNOTSUPP, syscall.ENOTSUP, syscall.EINVAL, syscall.EBADF} {
		if !Unsupported(err) {
			t.Errorf("%v: a file system without locks", err)
		}
	}
	ofTheFile := &fs.PathError{Op: "openat", Path: "lock", Err: syscall.EINVAL}
	for _, err := range []error{nil, syscall.EIO, syscall.ENOSPC, syscall.EROFS, &HeldError{}, ofTheFile} {
		if Unsupported(err) {
			t.Errorf("%v: not because of the file system's locks", err)
		}
	}
}

// TestFree checks that Free opens only regular files.
func TestFree(t *testing.T) {
	dir := t.TempDir()
	file, pipe, link := filepath.Join(dir, "file"), filepath.Join(dir, "pipe"), filepath.Join(dir, "link")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, syscall.Mkfifo(pipe, 0o200))
	must(t, os.Symlink(file, link))
	for path, want := range map[string]bool{file: true, link: false, filepath.Join(dir, "none"): false} {
		if got := Free(path); got != want {
			t.Errorf("%s: got %v", path, got)
		}
	}
	Free(pipe) // must not wait for a writer
}
