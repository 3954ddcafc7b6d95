package atomicfile_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"certctl-agent/internal/atomicfile"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/testing/needs"
)

func openRoot(t *testing.T, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

// tree lists all files below root.
func tree(t *testing.T, root *os.Root) []string {
	t.Helper()
	var names []string
	err := fs.WalkDir(root.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			names = append(names, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestWriteFile(t *testing.T) {
	root := openRoot(t, t.TempDir())
	if err := root.Mkdir("sub", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "sub/a"} {
		for _, content := range []string{"first", "", "second, longer"} {
			if err := atomicfile.WriteFile(root, name, []byte(content), 0o640); err != nil {
				t.Fatal(err)
			}
			got, err := root.ReadFile(name)
			if err != nil || string(got) != content {
				t.Errorf("%s holds %q (%v), want %q", name, got, err, content)
			}
		}
	}
	if got := tree(t, root); !slices.Equal(got, []string{"a", "sub/a"}) {
		t.Errorf("files = %q, want a and sub/a alone", got)
	}
}

// TestMode checks that the mode is exact under any umask, and replaces that of the old file. The
// umask belongs to the process, so the test does not run in parallel with others.
func TestMode(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o777} {
		for _, mode := range []fs.FileMode{0o600, 0o640, 0o644, 0o400} {
			root := openRoot(t, t.TempDir())
			for range 2 { // a new file, then an existing one
				old := syscall.Umask(umask)
				err := atomicfile.WriteFile(root, "f", []byte("x"), mode)
				syscall.Umask(old)
				if err != nil {
					t.Fatal(err)
				}
				info, err := root.Stat("f")
				if err != nil {
					t.Fatal(err)
				}
				if got := info.Mode().Perm(); got != mode {
					t.Errorf("umask %04o: mode = %04o, want %04o", umask, got, mode)
				}
				if err := root.Chmod("f", 0o666); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// TestFailureLeavesNoTemporary fails each step that can be made to fail.
func TestFailureLeavesNoTemporary(t *testing.T) {
	tests := []struct {
		name    string
		prepare func(t *testing.T, root *os.Root) // may change the directory
		file    string
		want    error // nil: any
	}{
		{"create: no such directory", func(*testing.T, *os.Root) {}, "no/such/f", fs.ErrNotExist},
		{"create: name leads out of the root", func(*testing.T, *os.Root) {}, "../f", nil},
		{"create: through a symlink out of the root", func(t *testing.T, root *os.Root) {
			if err := root.Symlink(t.TempDir(), "out"); err != nil {
				t.Fatal(err)
			}
		}, "out/f", nil},
		{"create: name too long", func(*testing.T, *os.Root) {}, strings.Repeat("f", 250), syscall.ENAMETOOLONG},
		{"write: file too large", func(t *testing.T, _ *os.Root) { limitFileSize(t, 100) }, "f", syscall.EFBIG},
		{"rename: a directory is there", func(t *testing.T, root *os.Root) {
			if err := root.MkdirAll("dir/below", 0o700); err != nil {
				t.Fatal(err)
			}
		}, "dir", nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			root := openRoot(t, t.TempDir())
			if err := root.WriteFile("f", []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			test.prepare(t, root)
			before := tree(t, root)
			err := atomicfile.WriteFile(root, test.file, bytes.Repeat([]byte("x"), 1000), 0o600)
			if err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("error = %v, want %v", err, test.want)
			}
			if after := tree(t, root); !slices.Equal(before, after) {
				t.Errorf("files = %q, want %q as before", after, before)
			}
			if got, err := root.ReadFile("f"); err != nil || string(got) != "old" {
				t.Errorf("the old file holds %q (%v)", got, err)
			}
		})
	}
}

// limitFileSize makes writes beyond size bytes fail for the rest of the test, as on a full disk.
func limitFileSize(t *testing.T, size uint64) {
	signal.Ignore(syscall.SIGXFSZ)
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: size, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		signal.Reset(syscall.SIGXFSZ)
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
			t.Fatal(err)
		}
	})
}

func TestReadOnlyDirectory(t *testing.T) {
	if !needs.Unprivileged(t) {
		return
	}
	dir := t.TempDir()
	root := openRoot(t, dir)
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.WriteFile(root, "f", nil, 0o600); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("error = %v, want permission denied", err)
	}
}

// TestReadersSeeOneVersion checks that a reader always finds the whole content of one write.
func TestReadersSeeOneVersion(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	version := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i%26)}, 4096) }
	if err := atomicfile.WriteFile(root, "f", version(0), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var readers sync.WaitGroup
	readers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			got, err := os.ReadFile(filepath.Join(dir, "f"))
			if err != nil || len(got) != 4096 || bytes.Count(got, got[:1]) != len(got) {
				t.Errorf("read %d bytes of a torn file (%v)", len(got), err)
				return
			}
		}
	})
	for i := range 50 {
		if err := atomicfile.WriteFile(root, "f", version(i), 0o600); err != nil {
			t.Error(err)
		}
	}
	close(done)
	readers.Wait()
}

// TestSymlinkIsReplaced checks that a symlink is replaced, and not the file that it points to.
func TestSymlinkIsReplaced(t *testing.T) {
	root := openRoot(t, t.TempDir())
	if err := root.WriteFile("real", []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := root.Symlink("real", "link"); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.WriteFile(root, "link", []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := root.ReadFile("real"); err != nil || string(got) != "old" {
		t.Errorf("the file behind the link holds %q (%v)", got, err)
	}
	if info, err := root.Lstat("link"); err != nil || !info.Mode().IsRegular() {
		t.Errorf("the link is %v (%v), want a regular file", info.Mode(), err)
	}
}

func TestSweep(t *testing.T) {
	root := openRoot(t, t.TempDir())
	random := "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	keep := []string{
		".hidden.tmp", ".a.abcdefghijklmnopqrstuvwxyz.tmp", "a." + random + ".tmp", ".a." + random + ".tmpx",
		"sub/.a." + random + ".tmp", "a",
	}
	gone := []string{".a." + random + ".tmp", ".a.b.key." + random[1:] + "7.tmp"}
	if err := root.Mkdir("sub", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Concat(keep, gone) {
		if err := root.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := atomicfile.Sweep(root); err != nil {
		t.Fatal(err)
	}
	slices.Sort(keep)
	got := tree(t, root)
	slices.Sort(got)
	if !slices.Equal(got, keep) {
		t.Errorf("left = %q, want %q", got, keep)
	}
}

func TestRemove(t *testing.T) {
	root := openRoot(t, t.TempDir())
	if err := root.WriteFile("f", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.Remove(root, "f"); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Stat("f"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
	if err := atomicfile.Remove(root, "f"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error = %v, want fs.ErrNotExist", err)
	}
	if err := atomicfile.SyncDir(root, "no/such"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("SyncDir of nothing: %v, want fs.ErrNotExist", err)
	}
}

// TestCreate creates the same file many times concurrently: one call succeeds, the others get
// fs.ErrExist.
func TestCreate(t *testing.T) {
	root := openRoot(t, t.TempDir())
	var group sync.WaitGroup
	made := make(chan string, 8)
	for i := range cap(made) {
		group.Go(func() {
			content := strings.Repeat("x", i+1)
			switch err := atomicfile.Create(root, "a", []byte(content), 0o640); {
			case err == nil:
				made <- content
			case !errors.Is(err, fs.ErrExist):
				t.Error(err)
			}
		})
	}
	group.Wait()
	if len(made) != 1 {
		t.Fatalf("%d calls created the file, want one", len(made))
	}
	want := <-made
	if got, err := root.ReadFile("a"); err != nil || string(got) != want {
		t.Errorf("the file holds %q (%v), want %q", got, err, want)
	}
	if info, err := root.Stat("a"); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if got := tree(t, root); !slices.Equal(got, []string{"a"}) {
		t.Errorf("files %q", got)
	}
}

// TestRewrite checks that the new file has the mode and owner of the old one.
func TestRewrite(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	if err := root.WriteFile("f", []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = 12345, 12346
	}
	if err := errors.Join(root.Chown("f", uid, gid), root.Chmod("f", 0o664)); err != nil {
		t.Fatal(err)
	}
	was, err := root.Stat("f")
	if err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.Rewrite(root, "f", []byte("new"), was); err != nil {
		t.Fatal(err)
	}
	is, err := root.Stat("f")
	if err != nil {
		t.Fatal(err)
	}
	gotUID, gotGID := hostfile.Owner(is)
	if gotUID != uid || gotGID != gid || is.Mode() != 0o664 || os.SameFile(was, is) {
		t.Errorf("the file has owner %d:%d and mode %v, want a new file with owner %d:%d and mode 0664", gotUID, gotGID, is.Mode(), uid, gid)
	}
	if got, err := root.ReadFile("f"); err != nil || string(got) != "new" {
		t.Errorf("content %q, %v", got, err)
	}
	if got := tree(t, root); !slices.Equal(got, []string{"f"}) {
		t.Errorf("files %q", got)
	}
}
