package targetconf

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/testing/needs"
)

func TestOverlayTrust(t *testing.T) {
	tests := []struct {
		name   string
		damage func(t *testing.T, dir, file string)
		says   string
	}{
		{"writable by group", func(t *testing.T, _, file string) { must(t, os.Chmod(file, 0o620)) }, "chmod go-w"},
		{"writable by others", func(t *testing.T, _, file string) { must(t, os.Chmod(file, 0o602)) }, "chmod go-w"},
		{"directory writable by others", func(t *testing.T, dir, _ string) { must(t, os.Chmod(dir, 0o777)) }, "chmod go-w"},
		{"sticky directory", func(t *testing.T, dir, _ string) { must(t, os.Chmod(dir, 0o777|os.ModeSticky)) }, "chmod go-w"},
		{"another user's", func(t *testing.T, _, file string) {
			needs.Root(t, "giving files away")
			must(t, os.Chown(file, 4242, -1))
		}, "chown root"},
		{"directory above writable by others", func(t *testing.T, dir, _ string) { must(t, os.Chmod(filepath.Dir(dir), 0o777)) }, "chmod go-w"},
		{"another user's directory above", func(t *testing.T, dir, _ string) {
			needs.Root(t, "giving files away")
			must(t, os.Chown(filepath.Dir(dir), 4242, -1))
		}, "chown root"},
		{"a link in another user's directory", func(t *testing.T, dir, file string) {
			needs.Root(t, "giving files away")
			must(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
			must(t, os.Rename(file, filepath.Join(dir, "sub", "real.json")))
			must(t, os.Symlink("sub/real.json", file))
			must(t, os.Chown(filepath.Join(dir, "sub"), 4242, -1))
		}, "chown root"},
		{"a dangling link", func(t *testing.T, _, file string) {
			must(t, os.Remove(file))
			must(t, os.Symlink("none.json", file))
		}, "is a symlink that leads nowhere"},
		{"unreadable", func(t *testing.T, _, file string) {
			must(t, os.Chmod(file, 0))
		}, "permission denied"},
		{"the directory is a dangling link", func(t *testing.T, dir, _ string) {
			must(t, os.Rename(dir, dir+"-moved"))
			must(t, os.Symlink(dir+"-gone", dir))
		}, "is a symlink that leads nowhere"},
		{"a file in place of the directory", func(t *testing.T, dir, _ string) {
			must(t, os.Rename(dir, dir+"-moved"))
			must(t, os.WriteFile(dir, nil, 0o600))
		}, "not a directory"},
		{"another user's directory", func(t *testing.T, dir, _ string) {
			needs.Root(t, "giving files away")
			must(t, os.Chown(dir, 4242, -1))
		}, "chown root"},
		{"too large", func(t *testing.T, _, file string) { must(t, os.WriteFile(file, make([]byte, maxOverlay+1), 0o600)) }, "longer than 65536 bytes"},
		{"not JSON", func(t *testing.T, _, file string) { must(t, os.WriteFile(file, []byte("{hunter2"), 0o600)) }, "invalid character"},
		{"a pipe", func(t *testing.T, _, file string) {
			must(t, os.Remove(file))
			must(t, syscall.Mkfifo(file, 0o600))
		}, "not a regular file"},
		{"a directory", func(t *testing.T, _, file string) {
			must(t, os.Remove(file))
			must(t, os.Mkdir(file, 0o700))
		}, "not a regular file"},
		{"a link to the outside", func(t *testing.T, _, file string) {
			must(t, os.Remove(file))
			must(t, os.Symlink("/etc/hostname", file))
		}, "escapes"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.name == "unreadable" && !needs.Unprivileged(t) {
				return
			}
			o := overlays(t, "t-1.json", `{"key_path":"/k"}`)
			file := filepath.Join(o.Dir, "t-1.json")
			test.damage(t, o.Dir, file)
			_, err := Merge(nil, "NGINX", nil, "t-1", o)
			if err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), o.Dir) {
				t.Errorf("got %v, want %q and the file's name in it", err, test.says)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error shows the file: %v", err)
			}
		})
	}
}

func TestNoOverlays(t *testing.T) {
	for name, o := range map[string]Overlays{"no directory named": {}, "no directory there": {Dir: filepath.Join(t.TempDir(), "x")}} {
		if _, err := Merge(nil, "NGINX", nil, "t-1", o); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A configured directory that is missing makes every job fail.
func TestRequiredOverlays(t *testing.T) {
	base := t.TempDir()
	must(t, os.Chmod(base, 0o755))
	for _, dir := range []string{filepath.Join(base, "none"), filepath.Join(base, "none", "deeper")} {
		_, err := Merge(nil, "NGINX", nil, "t-1", Overlays{Dir: dir, Required: true})
		if err == nil || !strings.Contains(err.Error(), "CERTCTL_TARGETS_DIR") || !strings.Contains(err.Error(), dir) {
			t.Errorf("missing: got %v", err)
		}
		must(t, os.MkdirAll(dir, 0o755))
		if _, err := Merge(nil, "NGINX", nil, "t-1", Overlays{Dir: dir, Required: true}); err != nil {
			t.Errorf("empty: got %v", err)
		}
		must(t, os.RemoveAll(dir))
	}
}

// Only this host can allow the replacement of any file.
func TestReplaceAnyFileIsLocal(t *testing.T) {
	replaceAny := func(o Overlays) bool {
		c, err := Merge([]byte(`{"replace_any_file":true,"Replace_Any_File":true}`), "NGINX", nil, "t-1", o)
		must(t, err)
		return c.Common.ReplaceAny
	}
	if replaceAny(Overlays{}) {
		t.Error("replace_any_file from the control plane is accepted")
	}
	if !replaceAny(overlays(t, "t-1.json", `{"replace_any_file":true}`)) {
		t.Error("replace_any_file from an overlay is ignored")
	}
}

// A Kubernetes volume provides its files through internal links.
func TestOverlayLinkInside(t *testing.T) {
	o := overlays(t, "data.json", `{"key_path":"/k"}`)
	must(t, os.Symlink("data.json", filepath.Join(o.Dir, "t-1.json")))
	c, err := Merge(nil, "NGINX", nil, "t-1", o)
	if err != nil || !c.Local("key_path") {
		t.Errorf("got %v", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestOverlayWithByteOrderMark(t *testing.T) {
	c, err := Merge(nil, "NGINX", nil, "t-1", overlays(t, "t-1.json", "\ufeff{\"key_path\":\"/k\"}"))
	if err != nil || !c.Local("key_path") {
		t.Errorf("got %v", err)
	}
}
