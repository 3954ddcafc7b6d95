package transaction

import (
	"io/fs"
	"os"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/testing/needs"
)

// TestModeAndOwner checks that a new file gets the configured mode and owner, or else those of the
// existing file, or else the default.
func TestModeAndOwner(t *testing.T) {
	mode := func(m fs.FileMode) *fs.FileMode { return &m }
	tests := []struct {
		name     string
		existing fs.FileMode // 0: none
		file     connector.File
		want     fs.FileMode
		warning  string
	}{
		{"default", 0, connector.File{DefaultMode: 0o644}, 0o644, ""},
		{"no default", 0, connector.File{}, 0o600, ""},
		{"existing", 0o604, connector.File{DefaultMode: 0o644}, 0o604, ""},
		{"configured", 0o604, connector.File{Mode: mode(0o660), DefaultMode: 0o644}, 0o660, ""},
		{"key", 0o640, connector.File{Kind: connector.KeyFile, DefaultMode: 0o600}, 0o640, ""},
		{"loose key", 0o644, connector.File{Kind: connector.KeyFile, DefaultMode: 0o600}, 0o640, "tightened"},
		{"very loose key", 0o666, connector.File{Kind: connector.KeyFile}, 0o660, "tightened"},
		{"configured key", 0o644, connector.File{Kind: connector.KeyFile, Mode: mode(0o400)}, 0o400, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			if test.existing != 0 {
				w.write(t, "site/file", version(1), test.existing)
				if root() {
					check(t, os.Chown(w.path("site/file"), uidKeep, gidKeep))
				}
			}
			test.file.Path, test.file.Data = w.path("site/file"), version(2)
			result, err := w.deploy(t, Transaction{Deployment{Target: "t1"}, proposal{Files: []connector.File{test.file}}})
			check(t, err)
			info, err := os.Stat(w.path("site/file"))
			check(t, err)
			if info.Mode() != test.want {
				t.Errorf("mode %v, want %v", info.Mode(), test.want)
			}
			if got := strings.Join(result.Warnings, " "); !strings.Contains(got, test.warning) || test.warning == "" && got != "" {
				t.Errorf("warnings %q, want %q", got, test.warning)
			}
			wantUID, wantGID := os.Geteuid(), os.Getegid()
			if test.existing != 0 && root() {
				wantUID, wantGID = uidKeep, gidKeep
			}
			if uid, gid := hostfile.Owner(info); uid != wantUID || gid != wantGID {
				t.Errorf("owner %d:%d, want %d:%d", uid, gid, wantUID, wantGID)
			}
		})
	}
}

// TestConfiguredOwner checks that owner and group are independent, and can be names or numbers.
func TestConfiguredOwner(t *testing.T) {
	needs.Root(t, "changing the owner of files")
	tests := []struct {
		owner, group     string
		wantUID, wantGID int
	}{
		{"4001", "", 4001, gidKeep},
		{"", "4002", uidKeep, 4002},
		{"root", "0", 0, 0},
	}
	for _, test := range tests {
		w := newWorld(t, t.TempDir())
		w.write(t, "site/file", []byte("same"), 0o640)
		check(t, os.Chown(w.path("site/file"), uidKeep, gidKeep))
		tx := Transaction{Deployment{Target: "t1"}, proposal{Files: []connector.File{{Path: w.path("site/file"), Data: []byte("same"), Owner: test.owner, Group: test.group}}}}
		for _, unchanged := range []bool{false, true} {
			result, err := w.deploy(t, tx)
			check(t, err)
			if result.Unchanged != unchanged {
				t.Errorf("%s:%s: unchanged %t, want %t", test.owner, test.group, result.Unchanged, unchanged)
			}
		}
		info, err := os.Stat(w.path("site/file"))
		check(t, err)
		if uid, gid := hostfile.Owner(info); uid != test.wantUID || gid != test.wantGID || info.Mode() != 0o640 {
			t.Errorf("%s:%s: got %d:%d %v, want %d:%d", test.owner, test.group, uid, gid, info.Mode(), test.wantUID, test.wantGID)
		}
	}
}

// TestUmask checks that the umask has no influence.
func TestUmask(t *testing.T) {
	w := newWorld(t, t.TempDir())
	for _, mask := range []int{0, 0o777} {
		restore := umask(mask)
		_, err := w.deploy(t, w.renewal())
		restore()
		check(t, err)
		check(t, os.Remove(w.path("site/cert.pem")))
		check(t, os.Remove(w.path("private/key.pem")))
	}
	_, err := w.deploy(t, w.renewal())
	check(t, err)
	w.want(t, true, "new")
}
