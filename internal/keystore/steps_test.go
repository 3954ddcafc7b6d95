package keystore

import (
	"crypto"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
)

// noKey fails a test in which a key is made.
func noKey(t *testing.T) func() (crypto.Signer, error) {
	return func() (crypto.Signer, error) {
		t.Error("a key was made")
		return generate()
	}
}

// TestOneAtATime: calls list the pending keys and then read or change them. A change in between
// could remove a key that was just found.
func TestOneAtATime(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, err := Open(Owner{}, dir, slog.New(slog.DiscardHandler))
		do(t, err)
		defer s.Close()
		key := pending(t, s, "cert-1", "a")
		for name, step := range map[string]func() error{
			"a new key":   func() error { _, err := s.store("cert-1", "b", key.Signer); return err },
			"a key again": func() error { _, err := s.Pending("cert-1", "a", noKey(t)); return err },
			"find":        func() error { _, err := s.Find("cert-1", key.Signer.Public()); return err },
			"prune":       func() error { return s.Prune("cert-1", key) },
			"discard":     func() error { return s.Discard("cert-2", "a") },
		} {
			done := false
			release := s.hold()
			go func() {
				if err := step(); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				done = true
			}()
			synctest.Wait()
			if done {
				t.Errorf("%s did not wait", name)
			}
			release()
			synctest.Wait()
			if !done {
				t.Errorf("%s still waits", name)
			}
		}
	})
}

// TestAnotherAgentWasFaster: on a file system without locks, another agent may create the job's key
// first. Its CSR may have been signed, so its key is used.
func TestAnotherAgentWasFaster(t *testing.T) {
	s := open(t, t.TempDir())
	var faster Key
	got, err := s.Pending("cert-1", "a", func() (crypto.Signer, error) {
		faster = pending(t, s, "cert-1", "a")
		return generate()
	})
	do(t, err)
	if !same(got, faster) || got.Fresh {
		t.Errorf("got another key than the one on the disk (fresh: %v)", got.Fresh)
	}
}

// TestUnreadablePending: a pending key that cannot be read now may have been signed, so its job gets
// no other key. Its sequence is unknown, so no key of the certificate gets a new one.
func TestUnreadablePending(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first := pending(t, s, "cert-1", "a")
	pending(t, s, "cert-1", "b")
	name := filepath.Join(dir, pendingName("cert-1", "c"))
	do(t, syscall.Mkfifo(name, 0o600))
	if _, err := s.Pending("cert-1", "a", noKey(t)); err == nil || !strings.Contains(err.Error(), filepath.Base(name)) {
		t.Errorf("an older job: %v, want an error about %s", err, name)
	}
	if _, err := s.Pending("cert-1", "c", noKey(t)); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("its own job: %v, want that it is not a regular file", err)
	}
	if _, err := s.Pending("cert-1", "d", generate); err == nil || !strings.Contains(err.Error(), filepath.Base(name)) {
		t.Errorf("a new job: %v, want an error about %s", err, name)
	}
	find(t, s, "cert-1", first)
	stranger, err := generate()
	do(t, err)
	if _, err := s.Find("cert-1", stranger.Public()); err == nil || errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), filepath.Base(name)) {
		t.Errorf("a key that it could be: %v, want an error about %s", err, name)
	}
	if info, err := os.Lstat(name); err != nil || info.Mode().IsRegular() {
		t.Errorf("it was replaced or removed: %v, %v", info, err)
	}
}

// TestLastKeyIsNotWrittenAgain: a job is retried for as long as the CA is down, without writes.
func TestLastKeyIsNotWrittenAgain(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	pending(t, s, "cert-1", "a")
	pending(t, s, "cert-1", "b")
	look := func() os.FileInfo {
		info, err := os.Stat(filepath.Join(dir, pendingName("cert-1", "b")))
		do(t, err)
		return info
	}
	before := look()
	pending(t, s, "cert-1", "b")
	if !os.SameFile(before, look()) {
		t.Error("the key of the last CSR was written again")
	}
}

func TestLook(t *testing.T) {
	dir := t.TempDir()
	if s, err := Look(filepath.Join(dir, "absent")); err == nil || s != nil {
		t.Errorf("a directory that is not there: %v, %v", s, err)
	}
	owner := open(t, dir)
	key := pending(t, owner, "cert-1", "a")
	s, err := Look(dir)
	do(t, err)
	defer s.Close()
	if got := find(t, s, "cert-1", key); !same(got, key) || got.Role != Pending {
		t.Errorf("found another key (%s)", got.Role)
	}
	do(t, os.WriteFile(owner.Path("cert-2"), []byte("torn"), 0o600))
	if _, err := s.Find("cert-2", key.Signer.Public()); err == nil || errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), owner.Path("cert-2")) {
		t.Errorf("a damaged key: %v, want an error about %s", err, owner.Path("cert-2"))
	}
}

func TestOpenBelowAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	do(t, os.WriteFile(file, nil, 0o600))
	s, err := Open(Owner{}, filepath.Join(file, "keys"), slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "make the key directory") {
		t.Errorf("opened %v: %v, want that the directory cannot be made", s, err)
	}
}

// TestLimitInAll: at the total limit, a new key replaces the oldest of its certificate.
func TestLimitInAll(t *testing.T) {
	s := open(t, t.TempDir())
	first, second := pending(t, s, "cert-1", "a"), pending(t, s, "cert-1", "b")
	s.totalLimit = 2
	third := pending(t, s, "cert-1", "c")
	if _, err := s.Find("cert-1", first.Signer.Public()); !errors.Is(err, ErrNoKey) {
		t.Errorf("the oldest: %v, want ErrNoKey", err)
	}
	find(t, s, "cert-1", second)
	find(t, s, "cert-1", third)
}
