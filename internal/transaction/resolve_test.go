package transaction

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/testing/needs"
)

func umask(mask int) (restore func()) {
	old := syscall.Umask(mask)
	return func() { syscall.Umask(old) }
}

func TestResolve(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	check(t, err)
	at := func(name string) string { return filepath.Join(base, name) }
	for _, name := range []string{"real/deep", "other"} {
		check(t, os.MkdirAll(at(name), 0o755))
	}
	check(t, os.Mkdir(at("open"), 0o700))
	check(t, os.Chmod(at("open"), 0o777))
	check(t, os.Mkdir(at("sticky"), 0o700))
	check(t, os.Chmod(at("sticky"), 0o777|fs.ModeSticky))
	check(t, os.Mkdir(at("group"), 0o700))
	check(t, os.Chmod(at("group"), 0o770))
	check(t, os.WriteFile(at("real/file"), nil, 0o600))
	check(t, syscall.Mkfifo(at("real/fifo"), 0o600))
	for link, to := range map[string]string{
		"relative": "real/deep", "absolute": at("real"), "file": "real/file", "dangling": "real/none", "nowhere": "none/file",
		"real/up": "../other", "real/deep/far": "../../other/x", "loop": "loop", "a": "b", "b": "a", "slash": "real/",
		"sticky/link": "../real/file", "group/link": "../real/file",
	} {
		check(t, os.Symlink(to, at(link)))
	}
	tests := []struct{ path, want, problem string }{
		{"real/file", "real/file", ""},
		{"real/none", "real/none", ""},
		{"real//./deep/../file", "real/file", ""},
		{"relative/x", "real/deep/x", ""},
		{"relative/../x", "real/x", ""}, // not base/x: ".." is the parent of where the link leads
		{"absolute/x", "real/x", ""},
		{"file", "real/file", ""},
		{"dangling", "real/none", ""},
		{"real/up/x", "other/x", ""},
		{"real/deep/far", "other/x", ""},
		{"slash/x", "real/x", ""},
		{"sticky/x", "sticky/x", ""},
		{"sticky/link", "real/file", ""},
		{"nowhere", "", "none does not exist: create it"},
		{"none/x", "", "none does not exist: create it"},
		{"loop", "", "too many symlinks"},
		{"a/x", "", "too many symlinks"},
		{"open/x", "", "can be written by every user"},
		{"group/link", "", "is a symlink that others could change"},
		{"real/file/x", "", "real/file is not a directory"},
		{"real/fifo/x", "", "real/fifo is not a directory"},
		{"real/..", "", "is a directory, not a file"},
	}
	for _, test := range tests {
		got, name, err := resolve(base + "/" + test.path)
		if err != nil {
			if test.problem == "" || !strings.Contains(err.Error(), test.problem) {
				t.Errorf("%s: error %v, want %q", test.path, err, test.problem)
			}
			continue
		}
		if got.join(name) != at(test.want) || test.problem != "" {
			t.Errorf("%s leads to %s, want %s %s", test.path, got.join(name), at(test.want), test.problem)
		}
		if info, err := os.Stat(got.path); err != nil || !os.SameFile(info, got.info) {
			t.Errorf("%s: the handle is not that of %s", test.path, got.path)
		}
		got.Close()
	}
	for _, path := range []string{"", "x", "./x", "/x\x00y"} {
		if _, _, err := resolve(path); err == nil || !strings.Contains(err.Error(), "is not an absolute path") {
			t.Errorf("%q: error %v", path, err)
		}
	}
	if _, err := resolveDir(at("none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory is %v", err)
	}
	if d, err := resolveDir(at("absolute/deep")); err != nil || d.path != at("real/deep") {
		t.Errorf("resolveDir: %v", err)
	}
}

// TestLinkOfAnotherUser checks that a link is refused if it or its directory belongs to another
// user, who could choose where it leads.
func TestLinkOfAnotherUser(t *testing.T) {
	needs.Root(t, "acting as two users")
	base := t.TempDir()
	for _, name := range []string{"mine", "theirs"} {
		check(t, os.Mkdir(filepath.Join(base, name), 0o755))
		check(t, os.Symlink("/etc/passwd", filepath.Join(base, name, "link")))
	}
	check(t, os.Lchown(filepath.Join(base, "mine/link"), uidKeep, gidKeep))
	check(t, os.Chown(filepath.Join(base, "theirs"), uidKeep, gidKeep))
	for _, name := range []string{"mine", "theirs"} {
		if _, _, err := resolve(filepath.Join(base, name, "link")); err == nil || !strings.Contains(err.Error(), "others could change") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// TestLinkedDestinations checks that a symlink stays and the file that it leads to is replaced, and
// that a hard link is replaced and its other names keep the old file.
func TestLinkedDestinations(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	before, after := pairs()
	check(t, os.Rename(w.path("site/cert.pem"), w.path("private/cert.real")))
	check(t, os.Symlink("../private/cert.real", w.path("site/cert.pem")))
	check(t, os.Symlink("../private/chain.real", w.path("site/chain.pem")))
	check(t, os.Link(w.path("private/key.pem"), w.path("site/other-name")))
	_, err := w.deploy(t, w.renewal())
	check(t, err)
	for name, want := range map[string][]byte{
		"private/cert.real": after.cert, "private/chain.real": after.chain, "private/key.pem": after.key, "site/other-name": before.key,
	} {
		if got, err := os.ReadFile(w.path(name)); err != nil || string(got) != string(want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"site/cert.pem", "site/chain.pem"} {
		if info, err := os.Lstat(w.path(name)); err != nil || info.Mode().Type() != fs.ModeSymlink {
			t.Errorf("%s is no longer a symlink: %v, %v", name, info, err)
		}
	}
	if info, err := os.Stat(w.path("private/cert.real")); err != nil || info.Mode() != 0o640 {
		t.Errorf("the linked file's mode was not kept: %v", info)
	}
}

// TestNotRegular checks that only a regular file is opened, and above all not a FIFO, which would
// block.
func TestNotRegular(t *testing.T) {
	w := newWorld(t, t.TempDir())
	check(t, syscall.Mkfifo(w.path("site/cert.pem"), 0o644))
	if _, err := w.deploy(t, w.renewal()); !errors.Is(err, errNotRegular) {
		t.Errorf("got error %v", err)
	}
}

// TestEveryonesDirectory checks that a file of another user in a directory like /tmp is not
// replaced: it may have been put there to get the new one.
func TestEveryonesDirectory(t *testing.T) {
	w := newWorld(t, t.TempDir())
	check(t, os.Chmod(w.path("site"), 0o777))
	if _, err := w.deploy(t, w.renewal()); err == nil || !strings.Contains(err.Error(), "can be written by every user") {
		t.Errorf("got error %v", err)
	}
	check(t, os.Chmod(w.path("site"), 0o777|fs.ModeSticky))
	_, err := w.deploy(t, w.renewal())
	check(t, err)
	needs.Root(t, "acting as two users")
	check(t, os.Chown(w.path("site/cert.pem"), uidKeep, gidKeep))
	if _, err := w.deploy(t, w.renewal()); err == nil || !strings.Contains(err.Error(), "anyone could have put it there") {
		t.Errorf("got error %v", err)
	}
}
