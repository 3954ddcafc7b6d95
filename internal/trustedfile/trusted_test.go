package trustedfile

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fileInfo describes a file of any owner, which only root could create.
type fileInfo struct {
	mode     fs.FileMode
	uid, gid uint32
}

func (f fileInfo) Name() string       { return "f" }
func (f fileInfo) Size() int64        { return 0 }
func (f fileInfo) Mode() fs.FileMode  { return f.mode }
func (f fileInfo) ModTime() time.Time { return time.Time{} }
func (f fileInfo) IsDir() bool        { return false }
func (f fileInfo) Sys() any           { return &syscall.Stat_t{Uid: f.uid, Gid: f.gid} }

func TestTrust(t *testing.T) {
	const euid, stranger = 990, 991
	own := uint32(os.Getegid())
	for _, test := range []struct {
		name             string
		info             fileInfo
		wantWarn, wantNo string
	}{
		{"root's", fileInfo{0o600, 0, 0}, "", ""},
		{"the agent's", fileInfo{0o400, euid, stranger}, "", ""},
		{"a stranger's", fileInfo{0o600, stranger, 0}, "", "belongs to user 991"},
		{"a systemd credential", fileInfo{0o440, 0, 0}, "", ""},
		{"group-writable", fileInfo{0o620, 0, own}, "", "can be written by others"},
		{"world-writable", fileInfo{0o602, euid, own}, "", "can be written by others"},
		{"world-readable", fileInfo{0o604, 0, 0}, "can be read by others", ""},
		{"readable by the agent's group", fileInfo{0o640, 0, own}, "", ""},
		{"readable by another group", fileInfo{0o640, 0, 54321}, "can be read by others", ""},
	} {
		warning, err := checkFile(test.info, euid)
		if !strings.Contains(warning, test.wantWarn) || test.wantWarn == "" && warning != "" {
			t.Errorf("%s: warning %q, want %q", test.name, warning, test.wantWarn)
		}
		if test.wantNo == "" && err != nil || test.wantNo != "" && (err == nil || !strings.Contains(err.Error(), test.wantNo)) {
			t.Errorf("%s: error %v, want %q", test.name, err, test.wantNo)
		}
	}
}

func TestReadDoesNotWaitForAPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Skip("this system has no FIFOs: ", err)
	}
	if _, _, _, err := Read(path, 100); err == nil || !strings.Contains(err.Error(), "is not a regular file") {
		t.Errorf("error %v, want one about a regular file", err)
	}
}

// TestTrustOfDirectories checks files in directories to which others could have moved them.
func TestTrustOfDirectories(t *testing.T) {
	base := t.TempDir()
	dir := func(name string, mode fs.FileMode) string {
		path := filepath.Join(base, name)
		must(t, os.Mkdir(path, 0o700))
		must(t, os.Chmod(path, mode))
		must(t, os.WriteFile(filepath.Join(path, "file"), []byte("x"), 0o600))
		return path
	}
	link := func(at, name, to string) string {
		path := filepath.Join(at, name)
		must(t, os.Symlink(to, path))
		return path
	}
	closed, open, sticky := dir("closed", 0o755), dir("open", 0o777), dir("sticky", 0o777|fs.ModeSticky)
	must(t, os.Mkdir(filepath.Join(open, "below"), 0o700))
	must(t, os.WriteFile(filepath.Join(open, "below", "file"), []byte("x"), 0o600))
	tests := []struct{ name, path, want string }{
		{"closed", closed + "/file", ""},
		{"open to all", open + "/file", "is in the directory " + open + ", which others can write to (mode 0777)"},
		{"above", open + "/below/file", "is in the directory " + open + ", which others can write to"},
		{"sticky", sticky + "/file", ""},
		{"by a link into an open one", link(closed, "to-open", open+"/file"), "is in the directory " + open},
		{"by a link out of an open one", link(open, "to-closed", "../closed/file"), "is in the directory " + open},
		{"by a link to a directory", link(closed, "dir", "../open/below") + "/file", "is in the directory " + open},
		{"past ..", closed + "/../closed/./file", ""},
		{"by a link of the agent's in a sticky one", link(sticky, "link", closed+"/file"), ""},
		{"a circle", link(closed, "circle", "circle"), "too many levels of symbolic links"},
		{"no file", closed + "/none", "no such file"},
	}
	if os.Geteuid() == 0 {
		group := dir("group", 0o775)
		must(t, os.Chown(group, 0, 4242))
		roots := dir("roots-group", 0o775)
		foreign := dir("foreign", 0o755)
		must(t, os.Chown(foreign, 4242, 0))
		strange := link(sticky, "strange", closed+"/file")
		must(t, os.Lchown(strange, 4242, 0))
		theirs := filepath.Join(closed, "theirs")
		must(t, os.WriteFile(theirs, []byte("x"), 0o600))
		must(t, os.Chown(theirs, 4242, 0))
		tests = append(tests, []struct{ name, path, want string }{
			{"open to a group", group + "/file", "is in the directory " + group + ", which others can write to (mode 0775)"},
			{"open to root's group", roots + "/file", ""},
			{"another user's directory", foreign + "/file", "is in the directory " + foreign + " of user 4242"},
			{"another user's link in a sticky one", strange, "is reached through the symlink " + strange + " of user 4242"},
			{"another user's file", theirs, "belongs to user 4242, who is neither root nor the agent's user (0): chown it (a file that is mounted into a container keeps the owner that it has on the host)"},
		}...)
	}
	for _, test := range tests {
		_, _, _, err := Read(test.path, 100)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: error %v, want %q", test.name, err, test.want)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestReadSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(path, []byte("x"), 0o600))
	if data, err := ReadSecret(path, 100); err != nil || string(data) != "x" {
		t.Errorf("got %q, %v", data, err)
	}
	must(t, os.Chmod(path, 0o644))
	if data, err := ReadSecret(path, 100); data != nil || err == nil || !strings.Contains(err.Error(), path+" can be read by others (mode 0644): chmod it to 0600") {
		t.Errorf("readable by others: got %q, %v", data, err)
	}
}

func TestWithin(t *testing.T) {
	never := make(chan struct{})
	defer close(never)
	if within(time.Millisecond, func() func() { <-never; return func() { t.Error("finished") } }) {
		t.Error("work that never ends was in time")
	}
	done := false
	if !within(time.Minute, func() func() { return func() { done = true } }) || !done {
		t.Error("work that ends at once was not in time")
	}
}
