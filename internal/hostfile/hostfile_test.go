package hostfile

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	file, pipe := filepath.Join(dir, "file"), filepath.Join(dir, "pipe")
	must(t, os.WriteFile(file, []byte("four"), 0o600))
	must(t, os.Symlink("file", filepath.Join(dir, "link")))
	must(t, os.Symlink("/etc/hostname", filepath.Join(dir, "out")))
	must(t, syscall.Mkfifo(pipe, 0o600))
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	tests := []struct {
		name      string
		limit     int64
		says      string // "": four is read
		onlyRoots bool
	}{
		{"file", 4, "", false},
		{"link", 4, "", false},
		{"file", 3, file + " is longer than 3 bytes", false},
		{"pipe", 9, pipe + " is not a regular file", false},
		{".", 9, dir + " is not a regular file", false},
		{"none", 9, "no such file", false},
		{"out", 1 << 10, "escapes", true},
	}
	for _, test := range tests {
		check := func(data []byte, info fs.FileInfo, err error) {
			t.Helper()
			if test.says == "" && (err != nil || string(data) != "four" || info.Size() != 4) || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
				t.Errorf("%s: got %q, %v", test.name, data, err)
			}
		}
		check(ReadIn(root, test.name, test.limit))
		if !test.onlyRoots {
			check(Read(filepath.Join(dir, test.name), test.limit))
		}
	}
}

// TestReadOfAPipe replaces a file by a FIFO between the check and the open.
func TestReadOfAPipe(t *testing.T) {
	dir := t.TempDir()
	file, pipe := filepath.Join(dir, "file"), filepath.Join(dir, "pipe")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, syscall.Mkfifo(pipe, 0o600))
	_, _, err := read(file, 1, func() (fs.FileInfo, error) { return os.Stat(file) }, func(flags int) (*os.File, error) { return os.OpenFile(pipe, flags, 0) })
	if err == nil || !strings.Contains(err.Error(), "is not a regular file") {
		t.Errorf("got %v", err)
	}
}

func TestFollow(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(base, "a/b"), 0o700))
	must(t, os.WriteFile(filepath.Join(base, "a/b/f"), nil, 0o600))
	for name, to := range map[string]string{"rel": "a/b", "a/up": "../a/./b/f", "abs": base + "/rel", "gone": "a/none/f", "loop": "loop"} {
		must(t, os.Symlink(to, filepath.Join(base, name)))
	}
	tests := []struct{ path, want, visits string }{
		{"a/b/f", "a/b/f", "a a/b a/b/f"},
		{"rel/f", "a/b/f", "rel a a/b a/b/f"},
		{"abs/f", "a/b/f", "abs rel a a/b a/b/f"},
		{"a//up", "a/b/f", "a a a/up a a a/b a/b/f"},
		{"gone", "a/none/f", "gone a"},
		{"none/x/y", "none/x/y", ""},
		{"a/b/f/x", "a/b/f/x", "a a/b a/b/f"},
		{"loop", "", ""},
	}
	for _, test := range tests {
		var visits []string
		got, err := Follow(base+"/"+test.path, func(at string, info fs.FileInfo) error {
			if rel, below := strings.CutPrefix(at, base+"/"); below {
				visits = append(visits, rel)
			}
			return nil
		})
		if test.want == "" {
			if err == nil || !strings.Contains(err.Error(), "too many levels") {
				t.Errorf("%s: got %v", test.path, err)
			}
			continue
		}
		if slices.Contains(visits, ".") || strings.Join(visits, " ") != test.visits || err != nil || got != filepath.Join(base, test.want) {
			t.Errorf("%s: got %q, %v, by way of %q", test.path, got, err, visits)
		}
	}
	if _, err := Follow(base+"/a/b", func(at string, _ fs.FileInfo) error {
		if strings.HasSuffix(at, "/a") {
			return syscall.EPERM
		}
		return nil
	}); err != syscall.EPERM {
		t.Errorf("got %v, want the visitor's error", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestResolve(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	for _, dir := range []string{"a/b/c", "d"} {
		must(t, os.MkdirAll(filepath.Join(base, dir), 0o755))
	}
	for name, to := range map[string]string{
		"l": "a/b", "abs": base + "/a", "dangling": "nowhere/x", "chain": "l/c", "d/up": "../l/../x", "loop": "loop",
	} {
		must(t, os.Symlink(to, filepath.Join(base, name)))
	}
	for path, want := range map[string]string{
		"l/c/f": "a/b/c/f", "abs/b": "a/b", "dangling": "nowhere/x", "chain/f": "a/b/c/f", "not/there": "not/there",
		"d/up": "a/x", // the parent of where l leads, as in the kernel
		"":     "",
	} {
		got, err := Resolve(filepath.Join(base, path))
		if err != nil || got != filepath.Join(base, want) {
			t.Errorf("%s: got %s, %v, want %s", path, got, err, want)
		}
	}
	if got, err := Resolve(filepath.Join(base, "loop")); err == nil {
		t.Errorf("a loop: got %s and no error", got)
	}
}
