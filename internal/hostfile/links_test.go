package hostfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"certctl-agent/internal/testing/needs"
)

// TestReadFails: a read error is not the end of the file.
func TestReadFails(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs a file that exists and cannot be read")
	}
	if data, _, err := Read("/proc/self/mem", 10); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %q, %v, want an input/output error", data, err)
	}
}

// TestFollowFails: only a missing file is no error.
func TestFollowFails(t *testing.T) {
	visit := func(at string, info fs.FileInfo) error {
		if info == nil {
			t.Errorf("shown %s without its info", at)
		}
		return nil
	}
	if got, err := Follow("/"+strings.Repeat("x", 300), visit); !errors.Is(err, syscall.ENAMETOOLONG) {
		t.Errorf("got %s, %v, want that the name is too long", got, err)
	}
}

// TestFollowAsFarAsTheKernel: Resolve follows as many links as the kernel.
func TestFollowAsFarAsTheKernel(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	must(t, os.WriteFile(filepath.Join(base, "0"), nil, 0o600))
	for i := range maxLinks + 1 {
		must(t, os.Symlink(fmt.Sprint(i), filepath.Join(base, fmt.Sprint(i+1))))
	}
	for _, links := range []int{maxLinks, maxLinks + 1} {
		path := filepath.Join(base, fmt.Sprint(links))
		got, err := Resolve(path)
		if links <= maxLinks && (err != nil || got != filepath.Join(base, "0")) || links > maxLinks && !errors.Is(err, syscall.ELOOP) {
			t.Errorf("%d links: got %s, %v", links, got, err)
		}
		if _, kernel := os.Stat(path); runtime.GOOS == "linux" && (kernel == nil) != (err == nil) {
			t.Errorf("%d links: the kernel says %v, Resolve %v", links, kernel, err)
		}
	}
}

func TestTrustedLink(t *testing.T) {
	tests := []struct {
		name       string
		mode       fs.FileMode // of the directory
		dir, owner int         // users; 0 is the one who runs the test
		file       bool        // in place of a link
		want       bool
	}{
		{"own", 0o755, 0, 0, false, true},
		{"writable for the group", 0o775, 0, 0, false, false},
		{"writable for all", 0o757, 0, 0, false, false},
		{"sticky", 0o777 | fs.ModeSticky, 0, 0, false, true},
		{"another's directory", 0o755, 65534, 0, false, false},
		{"another's link", 0o755, 0, 65534, false, false},
		{"another's link in a sticky directory", 0o777 | fs.ModeSticky, 0, 65534, false, false},
		{"a file", 0o777, 65534, 65534, true, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.dir+test.owner != 0 {
				needs.Root(t, "giving files away")
			}
			dir := t.TempDir()
			at := filepath.Join(dir, "x")
			if test.file {
				must(t, os.WriteFile(at, nil, 0o600))
			} else {
				must(t, os.Symlink("y", at))
			}
			must(t, os.Chmod(dir, test.mode))
			if test.dir != 0 {
				must(t, os.Lchown(dir, test.dir, -1))
			}
			if test.owner != 0 {
				must(t, os.Lchown(at, test.owner, -1))
			}
			info, err := os.Lstat(at)
			must(t, err)
			if err := TrustedLink(at, info); (err == nil) != test.want {
				t.Errorf("got %v, want trusted: %v", err, test.want)
			}
		})
	}
	t.Run("no directory", func(t *testing.T) {
		at := filepath.Join(t.TempDir(), "x")
		must(t, os.Symlink("y", at))
		info, err := os.Lstat(at)
		must(t, err)
		if err := TrustedLink(filepath.Join(at, "none", "x"), info); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v, want that it does not exist", err)
		}
	})
}

func TestOwners(t *testing.T) {
	info, err := fstest.MapFS{"x": {}}.Stat("x")
	must(t, err)
	if uid, gid := Owner(info); uid != -1 || gid != -1 {
		t.Errorf("a file without an owner belongs to %d, %d, want -1, -1", uid, gid)
	}
	groups, err := os.Getgroups()
	must(t, err)
	known := map[int]bool{0: true, os.Getegid(): true}
	for _, gid := range groups {
		known[gid] = true
	}
	for gid := range 20 {
		if got := OwnGroup(gid); got != known[gid] {
			t.Errorf("group %d counts as the agent's own: %v, want %v", gid, got, known[gid])
		}
	}
}
