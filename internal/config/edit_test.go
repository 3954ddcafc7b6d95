package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestSetKey(t *testing.T) {
	for _, test := range []struct{ name, before, value, want string }{
		{"empty file", "", "b", "A=b\n"},
		{"appended", "# all\n\nB=1\n", "b", "# all\n\nB=1\nA=b\n"},
		{"appended without a line end", "B=1", "b", "B=1\nA=b\n"},
		{"replaced in place", "B=1\n# of A\n  A = \"x\" # y\nC=2\n", "b", "B=1\n# of A\n  A=b\nC=2\n"},
		{"the one that counts", "A=1\nB=2\nA=3\n", "b", "A=1\nB=2\nA=b\n"},
		{"over several lines", "A='x\ny'\nB=2\n", "b", "A=b\nB=2\n"},
		{"without a line end", "A=1", "b", "A=b\n"},
		{"carriage returns", "A=1\r\nB=2\r\n", "b", "A=b\r\nB=2\r\n"},
		{"a commented key stays", "#A=1\n", "b", "#A=1\nA=b\n"},
		{"blanks inside need no quotes", "", "b c; d", "A=b c; d\n"},
		{"quotes", "", " $x \"y\" `z` \\", "A=\" \\$x \\\"y\\\" \\`z\\` \\\\\"\n"},
		{"emptied", "A=1\n", "", "A=\n"},
	} {
		got, err := setKey([]byte(test.before), "A", test.value)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
		} else if string(got) != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

func TestSetKeyRefuses(t *testing.T) {
	for _, test := range []struct{ name, before, key, value, want string }{
		{"a bad name", "", "A B", "x", "is not a valid variable name"},
		{"a line end in the value", "", "A", "x\ny", "control character"},
		{"a file that cannot be read", "B=\"x\n", "A", "y", "never closed"},
		{"a file that would swallow it", "B=x\\", "A", "y", "edit the file by hand"},
	} {
		if got, err := setKey([]byte(test.before), test.key, test.value); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %q, %v, want an error with %q", test.name, got, err, test.want)
		}
	}
}

func TestSetInFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "agent.env")
	if err := SetInFile(path, "A", "1"); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Fatalf("new file: %v, %v, want mode 0600", info, err)
	}

	// An existing file keeps its mode and owner, and a symlink stays one.
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(path, 0, 12345); err != nil {
			t.Fatal(err)
		}
	} else {
		t.Log("not root: the owner is not tried")
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := SetInFile(link, "B", "2"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o640 {
		t.Errorf("mode %v, want 0640", info.Mode())
	}
	if owner := info.Sys().(*syscall.Stat_t); os.Geteuid() == 0 && owner.Gid != 12345 {
		t.Errorf("group %d, want 12345", owner.Gid)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link is %v, %v", info, err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "A=1\nB=2\n" {
		t.Errorf("content %q, %v", data, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("directory contains %v, %v, want only the file", entries, err)
	}

	if err := SetInFile(filepath.Join(dir, "none", "agent.env"), "A", "1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without the directory: %v", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := SetInFile(path, "A", "1"); err == nil || !strings.Contains(err.Error(), "can be written by others") {
		t.Errorf("a file that others can write: %v", err)
	}
}
