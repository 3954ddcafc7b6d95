package index

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"

	"certctl-agent/internal/api"
	"certctl-agent/internal/discovery/certfile"
)

func TestComparePaths(t *testing.T) {
	ordered := []string{"/", "/a", "/a/b", "/a/b/c", "/a/b-c", "/a-b", "/a.b/c", "/ab", "/b"}
	for i, a := range ordered {
		for j, b := range ordered {
			if got, want := ComparePaths(a, b), i-j; got < 0 != (want < 0) || got > 0 != (want > 0) {
				t.Errorf("ComparePaths(%q, %q) = %d, want the sign of %d", a, b, got, want)
			}
		}
	}
}

// newWriter returns a Writer for a new directory.
func newWriter(t *testing.T, dir string, old *os.File) *Writer {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return &Writer{root: root, name: "index", header: headerOf([]string{"/r"}), old: old}
}

func readIndex(t *testing.T, path string) (files []File, last error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := newReader(f, headerOf([]string{"/r"}))
	if err != nil {
		return nil, err
	}
	for {
		file, err := r.Next()
		if err != nil {
			return files, err
		}
		files = append(files, file)
	}
}

// TestIndexPrefix checks, for a first difference at each record, that the new index equals one
// written from scratch.
func TestIndexPrefix(t *testing.T) {
	const n = 40
	dir := t.TempDir()
	path := filepath.Join(dir, "index")
	outcome := func(i int) []byte { return bytes.Repeat([]byte{byte(i)}, 5000*(i%3)+3) }
	w := newWriter(t, dir, nil)
	for i := range n {
		w.Add(i/30, fmt.Sprintf("/r/%d", i/7), fmt.Appendf(nil, "f%02d", i), []byte("stamp"), outcome(i))
	}
	if err := w.Commit(); err != nil {
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
		w := newWriter(t, dir, old)
		for i, file := range whole {
			if i == change {
				w.Add(file.Root, file.Dir, file.Name, []byte("other"), file.Outcome)
			} else {
				w.Keep(file)
			}
		}
		if err := w.Commit(); err != nil {
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
				want.Stamp = []byte("other")
			}
			if file.Root != want.Root || file.Dir != want.Dir || !bytes.Equal(file.Name, want.Name) || !bytes.Equal(file.Stamp, want.Stamp) || !bytes.Equal(file.Outcome, want.Outcome) {
				t.Fatalf("change at %d: record %d is of %s/%s", change, i, file.Dir, file.Name)
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

func FuzzIndex(f *testing.F) {
	header := headerOf([]string{"/a"})
	f.Add([]byte{})
	f.Add(make([]byte, blockHeader))
	f.Add([]byte("\x03\x00\x00\x00\x00\x00\x00\x00\x02d\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := newReader(iotest.HalfReader(bytes.NewReader(append(bytes.Clone(header), data...))), header)
		if err != nil {
			t.Fatal(err)
		}
		for {
			file, err := r.Next()
			if err != nil {
				return
			}
			_ = certfile.Outcome(file.Outcome).Report("/x", func(api.DiscoveredCertificate) error { return nil }, func(string) {})
		}
	})
}
