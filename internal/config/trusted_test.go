package config

import (
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fileInfo is a file of any owner, which only root could make.
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
		{"a pipe", fileInfo{0o600 | fs.ModeNamedPipe, 0, 0}, "", "is no regular file"},
	} {
		warning, err := trust(test.info, euid)
		if !strings.Contains(warning, test.wantWarn) || test.wantWarn == "" && warning != "" {
			t.Errorf("%s: warning %q, want %q", test.name, warning, test.wantWarn)
		}
		if test.wantNo == "" && err != nil || test.wantNo != "" && (err == nil || !strings.Contains(err.Error(), test.wantNo)) {
			t.Errorf("%s: error %v, want %q", test.name, err, test.wantNo)
		}
	}
}

func TestReadTrustedDoesNotWaitForAPipe(t *testing.T) {
	path := write(t, "x", "") + ".pipe"
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Skip("no named pipes here: ", err)
	}
	if _, _, _, err := readTrusted(path, 100); err == nil || !strings.Contains(err.Error(), "is no regular file") {
		t.Errorf("error %v, want one about a regular file", err)
	}
}
