package keystore

import (
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
	if !needs.Unprivileged(t) {
		return
	}
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
	do(t, os.Chmod(dir, 0o300))
	defer os.Chmod(dir, 0o700)
	for name, step := range steps {
		if err := step(); !errors.Is(err, fs.ErrPermission) || errors.Is(err, ErrNoKey) {
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

// TestNothingStaysInMemory: what was read from the key files is overwritten after use. A mark behind
// the keys stands for them: the test has it only inverted, so that it does not find its own.
func TestNothingStaysInMemory(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // or the memory could be used again
	dir := t.TempDir()
	s := open(t, dir)
	deploy(t, s, "cert-1", pending(t, s, "cert-1", "a"))
	deploy(t, s, "cert-1", pending(t, s, "cert-1", "b"))
	pending(t, s, "cert-1", "c")
	stranger, err := generate()
	do(t, err)
	inverted := make([]byte, 32)
	rand.Read(inverted)
	chunk := make([]byte, 1<<20)
	ones := bytes.Repeat([]byte{0xff}, len(chunk))
	for _, name := range files(t, dir) {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_APPEND, 0)
		do(t, err)
		mark := make([]byte, len(inverted))
		subtle.XORBytes(mark, inverted, ones)
		_, err = f.Write(mark)
		clear(mark)
		do(t, errors.Join(err, f.Close()))
	}
	pending(t, s, "cert-1", "c")
	if _, err := s.Find("cert-1", stranger.Public()); !errors.Is(err, ErrNoKey) {
		t.Errorf("find: %v", err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	do(t, err)
	memory, err := os.Open("/proc/self/mem")
	do(t, err)
	defer memory.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
			continue
		}
		if to-from > 128<<20 {
			continue // the race detector's own
		}
		for at := from; at < to; at += int64(len(chunk) - len(inverted)) {
			n, _ := memory.ReadAt(chunk[:min(int64(len(chunk)), to-at)], at)
			subtle.XORBytes(chunk, chunk[:n], ones)
			if bytes.Contains(chunk[:n], inverted) {
				t.Fatal("the content of a key file is still in memory")
			}
			clear(chunk) // or it would find what it has read of the inverted mark
		}
	}
}

// TestKeysThatStay: if a key cannot be removed, the call fails.
func TestKeysThatStay(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	pending(t, s, "cert-1", "a")
	busy := filepath.Join(dir, pendingName("cert-1", "a"))
	if err := syscall.Mount(busy, busy, "", syscall.MS_BIND, ""); err != nil {
		needs.Missing(t, "cannot mount: "+err.Error())
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
