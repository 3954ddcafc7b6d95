package discovery

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/testing/corpus"
)

func TestComparePaths(t *testing.T) {
	ordered := []string{"/", "/a", "/a/b", "/a/b/c", "/a/b-c", "/a-b", "/a.b/c", "/ab", "/b"}
	for i, a := range ordered {
		for j, b := range ordered {
			if got, want := comparePaths(a, b), i-j; got < 0 != (want < 0) || got > 0 != (want > 0) {
				t.Errorf("comparePaths(%q, %q) = %d, want the sign of %d", a, b, got, want)
			}
		}
	}
}

// newIndexWriter writes into a directory of its own.
func newIndexWriter(t *testing.T, dir string, old *os.File) *indexWriter {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return &indexWriter{root: root, name: "index", header: indexHeader([]string{"/r"}), old: old}
}

func readIndex(t *testing.T, path string) (files []indexed, last error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := newIndexReader(f, indexHeader([]string{"/r"}))
	if err != nil {
		return nil, err
	}
	for {
		file, err := r.next()
		if err != nil {
			return files, err
		}
		files = append(files, file)
	}
}

// TestIndexPrefix: where the first difference is, at each record, the new
// index is the same as one written from scratch.
func TestIndexPrefix(t *testing.T) {
	const n = 40
	dir := t.TempDir()
	path := filepath.Join(dir, "index")
	outcome := func(i int) []byte { return bytes.Repeat([]byte{byte(i)}, 5000*(i%3)+3) }
	w := newIndexWriter(t, dir, nil)
	for i := range n {
		w.add(i/30, fmt.Sprintf("/r/%d", i/7), fmt.Appendf(nil, "f%02d", i), []byte("stamp"), outcome(i))
	}
	if err := w.commit(); err != nil {
		t.Fatal(err)
	}
	whole, last := readIndex(t, path)
	if len(whole) != n || last != io.EOF {
		t.Fatalf("read %d records back, %v", len(whole), last)
	}
	original, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for change := range n + 1 {
		if err := os.WriteFile(path, original, 0o600); err != nil {
			t.Fatal(err)
		}
		old, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		w := newIndexWriter(t, dir, old)
		for i, file := range whole {
			if i == change {
				w.add(file.root, file.dir, file.name, []byte("other"), file.outcome)
			} else {
				w.keep(file)
			}
		}
		if err := w.commit(); err != nil {
			t.Fatal(err)
		}
		old.Close()
		got, last := readIndex(t, path)
		if len(got) != n || last != io.EOF {
			t.Fatalf("change at %d: read %d records back, %v", change, len(got), last)
		}
		for i, file := range got {
			want := whole[i]
			if i == change {
				want.stamp = []byte("other")
			}
			if file.root != want.root || file.dir != want.dir || !bytes.Equal(file.name, want.name) || !bytes.Equal(file.stamp, want.stamp) || !bytes.Equal(file.outcome, want.outcome) {
				t.Fatalf("change at %d: record %d is of %s/%s", change, i, file.dir, file.name)
			}
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Fatalf("change at %d: %v in the directory, %v", change, entries, err)
		}
	}
	// Without a change nothing was written.
	if data, err := os.ReadFile(path); err != nil || !bytes.Equal(data, original) {
		t.Error("an unchanged index was rewritten")
	}
}

// TestDamagedIndex: whatever happens to the index, the scan is right and the
// next one remembers again.
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
	damage := map[string][]byte{"empty": {}, "all zeros": make([]byte, len(good)), "without an end": good[:len(good)-8]}
	for _, at := range []int{0, 20, int(headerSize), int(headerSize) + 5, int(headerSize) + 100, len(good) / 2, len(good) - 12} {
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
		if !strings.Contains(log.String(), "thrown away") {
			t.Errorf("%s: the log does not say so; read %d files", what, summary.Read)
		}
		_, summary = scanAll(t, s)
		mustRemember(t, summary)
	}
}

// TestIndexThatLies: a record that does not decode in spite of its checksum
// costs one scan, not all that follow.
func TestIndexThatLies(t *testing.T) {
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
	w := &indexWriter{root: root, name: "index", header: indexHeader([]string{dir})}
	w.add(0, dir, []byte("a.pem"), appendStamp(nil, statusOf(&st)), []byte{0, 0, 200})
	if err := w.commit(); err != nil {
		t.Fatal(err)
	}
	s := newScanner(t, Options{Dirs: []string{dir}, State: root, Index: "index"})
	if _, err := s.Scan(t.Context(), nil); !errors.Is(err, errDamagedOutcome) {
		t.Errorf("error %v, want %v", err, errDamagedOutcome)
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

func TestIndexThatCannotBeWritten(t *testing.T) {
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
