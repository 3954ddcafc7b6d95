package discovery

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/discovery/certfile"
	"certctl-agent/internal/discovery/index"
	"certctl-agent/internal/testing/corpus"
)

// TestDamagedIndex checks that a damaged index does not affect the results and is replaced.
func TestDamagedIndex(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	tree, err := corpus.Write(dir, corpus.Options{Seed: 4, Files: 300, Certificates: 100, Odd: true})
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(state)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var log bytes.Buffer
	s := newScanner(t, Options{Dirs: []string{dir}, State: root, Index: "index", Log: slog.New(slog.NewTextHandler(&log, nil))})
	scanAll(t, s)
	path := filepath.Join(state, "index")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const headerSize = 16 + 32 // magic and digest
	damage := map[string][]byte{"empty": {}, "all zeros": make([]byte, len(good)), "without an end": good[:len(good)-8]}
	for _, at := range []int{0, 20, headerSize, headerSize + 5, headerSize + 100, len(good) / 2, len(good) - 12} {
		flipped := slices.Clone(good)
		flipped[at] ^= 0x10
		damage[fmt.Sprintf("bit at %d", at)] = flipped
		damage[fmt.Sprintf("ends at %d", at)] = good[:at]
	}
	for what, data := range damage {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		log.Reset()
		found, summary := scanAll(t, s)
		compare(t, summarise(found), tree.Certificates)
		if !strings.Contains(log.String(), "discarded") {
			t.Errorf("%s: the log does not say so; read %d files", what, summary.Read)
		}
		_, summary = scanAll(t, s)
		mustRemember(t, summary)
	}
}

// TestUndecodableRecord checks that a record that does not decode in spite of its checksum fails
// only one scan.
func TestUndecodableRecord(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	text, _ := testCertificate(t)
	path := filepath.Join(dir, "a.pem")
	write(t, path, text)
	root, err := os.OpenRoot(state)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	w := index.NewWriter(root, "index", []string{dir}, nil)
	w.Add(0, dir, []byte("a.pem"), appendStamp(nil, statusOf(&st)), []byte{0, 0, 200})
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	s := newScanner(t, Options{Dirs: []string{dir}, State: root, Index: "index"})
	if _, err := s.Scan(t.Context(), nil); !errors.Is(err, certfile.ErrDamaged) {
		t.Errorf("error %v, want %v", err, certfile.ErrDamaged)
	}
	if found, _ := scanAll(t, s); len(found) != 1 {
		t.Errorf("the scan after it finds %d certificates, want 1", len(found))
	}
}

func TestIndexOfOtherDirectories(t *testing.T) {
	state, a, b := t.TempDir(), t.TempDir(), t.TempDir()
	text, _ := testCertificate(t)
	write(t, filepath.Join(a, "a.pem"), text)
	write(t, filepath.Join(b, "b.pem"), text)
	root, err := os.OpenRoot(state)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, dirs := range [][]string{{a}, {a, b}, {b}} {
		s := newScanner(t, Options{Dirs: dirs, State: root, Index: "index"})
		for range 2 {
			if found, _ := scanAll(t, s); len(found) != len(dirs) {
				t.Errorf("%d directories: found %d certificates", len(dirs), len(found))
			}
		}
	}
}

func TestUnwritableIndex(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	text, _ := testCertificate(t)
	write(t, filepath.Join(dir, "a.pem"), text)
	if err := os.MkdirAll(filepath.Join(state, ".index.tmp", "in the way"), 0o755); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(state)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var log bytes.Buffer
	s := newScanner(t, Options{Dirs: []string{dir}, State: root, Index: "index", Log: slog.New(slog.NewTextHandler(&log, nil))})
	if found, _ := scanAll(t, s); len(found) != 1 || !strings.Contains(log.String(), "index not written") {
		t.Errorf("found %d certificates; log: %s", len(found), &log)
	}
}
