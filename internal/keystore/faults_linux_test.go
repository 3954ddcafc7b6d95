package keystore

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/testing/crashstates"
	"certctl-agent/internal/testing/needs"
)

// TestUnlistedDirectory: the directory can be neither listed nor synced. Its files can be read and
// written.
func TestUnlistedDirectory(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	key := pending(t, s, "cert-1", "a")
	deploy(t, s, "cert-1", key)
	stranger, err := generate()
	do(t, err)
	steps := map[string]func() error{
		"a key again": func() error { _, err := s.Pending("cert-1", "a", noKey(t)); return err },
		"a new key":   func() error { _, err := s.Pending("cert-1", "b", generate); return err },
		"find":        func() error { _, err := s.Find("cert-1", stranger.Public()); return err },
		"prune":       func() error { return s.Prune("cert-1", key) },
	}
	const nobody = 65534
	if os.Getuid() == 0 {
		for _, name := range append(files(t, dir), ".") {
			do(t, os.Chown(filepath.Join(dir, name), nobody, nobody))
		}
	}
	do(t, os.Chmod(dir, 0o300))
	defer os.Chmod(dir, 0o700)
	for name, step := range steps {
		failed := make(chan error)
		go func() {
			if os.Getuid() == 0 {
				// The thread acts as another user, and ends with the goroutine.
				runtime.LockOSThread()
				syscall.RawSyscall(syscall.SYS_SETFSUID, nobody, 0, 0)
			}
			failed <- step()
		}()
		if err := <-failed; !errors.Is(err, fs.ErrPermission) || errors.Is(err, ErrNoKey) {
			t.Errorf("%s: %v, want permission denied", name, err)
		}
	}
}

// reuseDir makes this binary the child of TestReuseSyncs.
var reuseDir = flag.String("reuse-dir", "", "internal to TestReuseSyncs")

// TestReuseSyncs: the process that made a key may have been killed before it synced the directory.
// So the next one does that before the key's CSR is sent: after a power cut the key would be gone.
func TestReuseSyncs(t *testing.T) {
	if *reuseDir != "" {
		s := open(t, *reuseDir)
		fmt.Println("opened")
		_, err := s.Pending("cert-1", "a", noKey(t))
		do(t, err)
		fmt.Println("reused")
		return
	}
	strace, dir := needs.Need(t, "strace"), t.TempDir()
	s := open(t, dir)
	pending(t, s, "cert-1", "a")
	do(t, s.Close())
	trace, record, err := os.Pipe()
	do(t, err)
	defer trace.Close()
	child := crashstates.Command(t.Context(), strace, record, os.Args[0], "-test.run=^TestReuseSyncs$", "-reuse-dir="+dir)
	do(t, child.Start())
	record.Close()
	calls, err := crashstates.Parse(trace)
	do(t, errors.Join(err, child.Wait()))
	var last, synced string // what the child said last, and what at the sync
	for _, call := range calls {
		if text, ok := call.Output(); ok {
			last = strings.TrimSpace(text)
		} else if call.Name == "fsync" {
			synced = last
		}
	}
	if synced != "opened" {
		t.Errorf("the last sync came after %q, want it between %q and %q: %q", synced, "opened", "reused", calls)
	}
}

// TestKeysThatStay: if a key cannot be removed, the call fails.
func TestKeysThatStay(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	pending(t, s, "cert-1", "a")
	busy := filepath.Join(dir, pendingName("cert-1", "a"))
	if err := syscall.Mount(busy, busy, "", syscall.MS_BIND, ""); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	defer syscall.Unmount(busy, syscall.MNT_DETACH)
	steps := map[string]error{"discard": s.Discard("cert-1", "a")}
	deploy(t, s, "cert-1", pending(t, s, "cert-1", "b"))
	third := pending(t, s, "cert-1", "c")
	s.totalLimit = 1
	_, steps["exchange"] = s.Pending("cert-1", "d", generate)
	do(t, s.Promote("cert-1", third))
	steps["prune"] = s.Prune("cert-1", third)
	for name, err := range steps {
		if !errors.Is(err, syscall.EBUSY) {
			t.Errorf("%s: %v, want that it is busy", name, err)
		}
	}
}

// TestDescriptors: an idle agent must not depend on the garbage collector to close files.
func TestDescriptors(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	dir := t.TempDir()
	s := open(t, dir)
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		do(t, err)
		return len(list)
	}
	before := count()
	key := pending(t, s, "cert-1", "a")
	deploy(t, s, "cert-1", key)
	find(t, s, "cert-1", key)
	do(t, s.Discard("cert-1", "a"))
	look, err := Look(dir)
	do(t, err)
	find(t, look, "cert-1", key)
	look.Close()
	do(t, os.Chmod(dir, 0o755))
	do(t, Inspect(dir, Owner{}))
	if after := count(); after != before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}
