package keystore

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/filelock"
)

// locked reports whether another agent was in the way.
func locked(err error) bool {
	_, held := errors.AsType[*filelock.HeldError](err)
	return held && strings.Contains(err.Error(), "another agent uses this key directory")
}

// TestOneOwner checks that only one agent at a time has a key directory, and that the error of
// another names it.
func TestOneOwner(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	first, err := Open(Owner{Agent: "agent-1\x1b"}, dir, log)
	do(t, err)
	left := filepath.Join(dir, ".cert-1.key.ABCDEFGHIJKLMNOPQRSTUVWXYZ.tmp")
	do(t, os.WriteFile(left, nil, 0o600))
	_, err = Open(Owner{Agent: "agent-2"}, dir, log)
	if !locked(err) || !strings.Contains(err.Error(), "agent agent-1\ufffd, process ") || !strings.Contains(err.Error(), "CERTCTL_KEY_DIR") {
		t.Errorf("second agent: %v", err)
	}
	if _, err := os.Stat(left); err != nil {
		t.Errorf("the second agent removed a file of the first one: %v", err)
	}
	do(t, first.Close())
	second, err := Open(Owner{Agent: "agent-2"}, dir, log)
	do(t, err)
	defer second.Close()
	if _, err := Open(Owner{Agent: "agent-3"}, dir, log); err == nil || !strings.Contains(err.Error(), "agent agent-2,") || strings.Contains(err.Error(), "agent-1") {
		t.Errorf("third agent: %v", err)
	}
}

// TestCrashedOwner checks that the lock of a killed process ends with it, even if its children live
// on.
func TestCrashedOwner(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$", "-crash-dir="+dir)
	out, err := cmd.StdoutPipe()
	do(t, err)
	do(t, cmd.Start())
	_, err = out.Read(make([]byte, 1)) // it has made a key
	do(t, err)
	if _, err := Open(Owner{}, dir, slog.New(slog.DiscardHandler)); !locked(err) {
		t.Errorf("while it runs: %v, want that the directory is in use", err)
	}
	do(t, cmd.Process.Kill())
	cmd.Wait()
	open(t, dir)
}

// TestWithoutLocks runs two agents on a file system without locks. The second one gets the key that
// the first one made for the same job.
func TestWithoutLocks(t *testing.T) {
	dir := t.TempDir()
	first := open(t, dir)
	root, err := os.OpenRoot(dir)
	do(t, err)
	second := &Store{dir: dir, root: root, log: slog.New(slog.DiscardHandler), busy: make(chan struct{}, 1), totalLimit: maxPendingTotal}
	defer second.Close()
	key := pending(t, first, "cert-1", "job-1")
	// This is as if it had looked for the job's key before the first one made it.
	if _, err := second.store("cert-1", "job-1", key.Signer); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("a pending key was replaced: %v", err)
	}
	if again := pending(t, second, "cert-1", "job-1"); again.Fresh || !same(key, again) {
		t.Error("the second agent got another key")
	}
	if got := files(t, dir); len(got) != 1 {
		t.Errorf("files %v, want one", got)
	}
}

// TestSharedDirectory opens directories that others use, and some that only look as if they did.
func TestSharedDirectory(t *testing.T) {
	type file struct {
		name string
		mode fs.FileMode
	}
	for _, test := range []struct {
		name  string
		mode  fs.FileMode
		files []file
		state string
		want  string // part of the error; "" for none
	}{
		{"empty", 0o755, nil, "", ""},
		{"a fleet's", 0o755, []file{{"cert-1.key", 0o600}, {"mc.web.1.key", 0o600}, {"cert-1.previous", 0o600}, {"cert-1.0123456789abcdef.pending", 0o600},
			{"cert-1.0123456789abcdef.pending.damaged", 0o600}, {".state", fs.ModeDir | 0o700}, {".lock", 0o600}, {".cert-1.key.ABCDEFGHIJKLMNOPQRSTUVWXYZ.tmp", 0o600}}, "", ""},
		{"the root of a volume", 0o755, []file{{"lost+found", fs.ModeDir | 0o700}, {"..data", fs.ModeSymlink}, {"..2026_11_25", fs.ModeDir | 0o755}, {"cert-1.key", 0o600}}, "", ""},
		{"a state directory of another name", 0o755, []file{{"mine", fs.ModeDir | 0o700}}, "mine/agent", ""},
		{"another directory", 0o755, []file{{"mine", fs.ModeDir | 0o700}}, "", `holds "mine", which is not the agent's`},
		{"a foreign file", 0o755, []file{{"cert-1.key", 0o600}, {"passwd", 0o644}}, "", `holds "passwd", which is not the agent's`},
		{"certificates", 0o755, []file{{"cert-1.key", 0o600}, {"cert-1.pem", 0o644}}, "", `holds "cert-1.pem"`},
		{"a directory with the name of a key", 0o755, []file{{"cert-1.key", fs.ModeDir | 0o700}}, "", `holds "cert-1.key"`},
		{"keys that others read", 0o755, []file{{"www.key", 0o644}}, "", `others can read the key "www.key"`},
		{"for the group", 0o710, []file{{"passwd", 0o644}}, "", "run chmod 0700"},
		{"closed already", 0o700, []file{{"passwd", 0o644}, {"mine", fs.ModeDir | 0o700}}, "", ""},
		{"a name with an escape", 0o755, []file{{"\x1b[31m", 0o600}}, "", "\ufffd[31m"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range test.files {
				path := filepath.Join(dir, f.name)
				switch {
				case f.mode.IsDir():
					do(t, os.Mkdir(path, f.mode.Perm()))
				case f.mode&fs.ModeSymlink != 0:
					do(t, os.Symlink("..2026_11_25", path))
				default:
					do(t, os.WriteFile(path, nil, f.mode))
					do(t, os.Chmod(path, f.mode))
				}
			}
			do(t, os.Chmod(dir, test.mode))
			before := files(t, dir)
			owner := Owner{}
			if test.state != "" {
				owner.StateDir = filepath.Join(dir, test.state)
			}
			s, err := Open(owner, dir, slog.New(slog.DiscardHandler))
			if err == nil {
				s.Close()
			}
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "CERTCTL_KEY_DIR")) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			info, statErr := os.Stat(dir)
			do(t, statErr)
			if err != nil && (info.Mode().Perm() != test.mode || len(files(t, dir)) != len(before)) {
				t.Errorf("a refused directory has mode %v and holds %v", info.Mode(), files(t, dir))
			}
			if err == nil && info.Mode().Perm() != 0o700 {
				t.Errorf("mode %v, want 0700", info.Mode())
			}
		})
	}
	if os.Geteuid() == 0 {
		dir := t.TempDir()
		do(t, os.WriteFile(filepath.Join(dir, "www.key"), nil, 0o640))
		do(t, os.Chown(filepath.Join(dir, "www.key"), 0, 4242))
		if err := Inspect(dir, Owner{}); err == nil || !strings.Contains(err.Error(), `others can read the key "www.key"`) {
			t.Errorf("a key of a group: %v", err)
		}
	}
	for _, dir := range []string{"/", "/etc", "/etc/ssl", "/var/lib", "/usr/../etc"} {
		if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o077 != 0 {
			if err := Inspect(dir, Owner{}); err == nil || !strings.Contains(err.Error(), "belongs to the system") {
				t.Errorf("%s: %v", dir, err)
			}
		}
	}
}

// TestNamelessOwner finds the lock of an agent whose disk was full.
func TestNamelessOwner(t *testing.T) {
	dir := t.TempDir()
	first := open(t, dir)
	do(t, os.Truncate(filepath.Join(dir, lockFile), 0))
	var text bytes.Buffer
	if _, err := Open(Owner{}, dir, slog.New(slog.NewTextHandler(&text, nil))); err == nil || !strings.Contains(err.Error(), "an unknown process") {
		t.Errorf("got %v", err)
	}
	do(t, first.Close())
}
