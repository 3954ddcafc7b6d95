package keystore

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/needs"
)

// mount mounts a small file system at dir.
func mount(t *testing.T, dir, options string) {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		needs.Missing(t, "cannot mount a tmpfs: "+err.Error())
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
}

// TestCannotTighten opens directories whose mode cannot be changed.
func TestCannotTighten(t *testing.T) {
	for mode, want := range map[string]string{"0700": "", "0750": "the group has access", "0701": "every user has access"} {
		t.Run(mode, func(t *testing.T) {
			dir := t.TempDir()
			mount(t, dir, "size=64k,mode="+mode)
			do(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
			var text bytes.Buffer
			s, err := Open(Owner{}, dir, slog.New(slog.NewTextHandler(&text, nil)))
			if refused := mode == "0701"; (err != nil) != refused {
				t.Fatalf("got %v, want an error: %v", err, refused)
			}
			if err == nil {
				s.Close()
			} else {
				text.WriteString(err.Error())
			}
			if !strings.Contains(text.String(), want) || want == "" && text.Len() > 0 {
				t.Errorf("said %q, want %q", &text, want)
			}
		})
	}
}

func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	mount(t, dir, "size=32k,mode=0700")
	s := open(t, dir)
	first := pending(t, s, "cert-1", "a")
	deploy(t, s, "cert-1", first)
	var err error
	made := 0
	for err == nil {
		_, err = s.Pending("cert-1", api.ID(strings.Repeat("b", made+1)), generate)
		made++
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("got %v, want ENOSPC", err)
	}
	if got := len(files(t, dir)); got != made+1 {
		t.Errorf("files: %v, want the current key and %d pending ones", files(t, dir), made)
	}
	if got := find(t, s, "cert-1", first); got.Role != Current {
		t.Errorf("role %v, want current", got.Role)
	}
}

// TestPromotePreviousHalfway: a previous key that comes back has its file taken by
// the current one before it gets that one's. An older agent left no pending copy of it.
func TestPromotePreviousHalfway(t *testing.T) {
	s := open(t, t.TempDir())
	old := pending(t, s, "cert-1", "a")
	deploy(t, s, "cert-1", old)
	do(t, s.Discard("cert-1", "a"))
	key := pending(t, s, "cert-1", "b")
	deploy(t, s, "cert-1", key)
	// A file that something is mounted on cannot be replaced.
	current := s.Path("cert-1")
	if err := syscall.Mount(current, current, "", syscall.MS_BIND, ""); err != nil {
		needs.Missing(t, "cannot mount: "+err.Error())
	}
	t.Cleanup(func() { syscall.Unmount(current, syscall.MNT_DETACH) })
	if err := s.Promote("cert-1", find(t, s, "cert-1", old)); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("got %v, want that the current key cannot be replaced", err)
	}
	find(t, s, "cert-1", old)
	find(t, s, "cert-1", key)
}

// TestLockWithoutRoom checks that an agent starts on a full disk, on which it cannot create its
// lock, and logs that.
func TestLockWithoutRoom(t *testing.T) {
	dir := t.TempDir()
	mount(t, dir, "size=64k,nr_inodes=1,mode=0700")
	var text bytes.Buffer
	s, err := Open(Owner{}, dir, slog.New(slog.NewTextHandler(&text, nil)))
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if !strings.Contains(text.String(), "cannot be locked") {
		t.Errorf("log %q", &text)
	}
}
