package statedir_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/statedir"
)

func TestOneAgentAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys", ".state", "x")
	first, err := statedir.Open(path, "agent-1", "m")
	if err != nil {
		t.Fatal(err)
	}
	_, err = statedir.Open(path, "agent-1", "m")
	if err == nil || !strings.Contains(err.Error(), "another agent is running with this state directory") || !strings.Contains(err.Error(), "CERTCTL_STATE_DIR") {
		t.Errorf("second Open: %v, want that it is locked, and what to do", err)
	}
	first.Close()
	again, err := statedir.Open(path, "agent-1", "m")
	if err != nil {
		t.Fatalf("after the first one ended: %v", err)
	}
	again.Close()
}

// TestSwept checks that Open removes half-written files. Nothing else would.
func TestSwept(t *testing.T) {
	path := t.TempDir()
	left := filepath.Join(path, ".served.json.ABCDEFGHIJKLMNOPQRSTUVWXYZ.tmp")
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := statedir.Open(path, "agent-1", "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := os.Lstat(left); !os.IsNotExist(err) {
		t.Errorf("%s is still there (%v)", left, err)
	}
}

func TestClosedToOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := statedir.Open(path, "agent-1", "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o700 {
		t.Errorf("mode = %v, want 0700", got)
	}
}

func TestCloneIsNoticed(t *testing.T) {
	tests := []struct {
		name           string
		agent, machine string
		want           bool
	}{
		{"same machine", "agent-1", "aaaa\n", false},
		{"other machine", "agent-1", "bbbb", true},
		{"unknown machine", "agent-1", "", false},
		{"other agent", "agent-2", "aaaa", true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state")
			d, err := statedir.Open(path, "agent-1", "aaaa")
			if err != nil {
				t.Fatal(err)
			}
			if d.Cloned {
				t.Error("fresh state counts as cloned")
			}
			d.Close()
			d, err = statedir.Open(path, test.agent, test.machine)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if d.Cloned != test.want {
				t.Errorf("Cloned = %v, want %v", d.Cloned, test.want)
			}
			stored, err := os.ReadFile(filepath.Join(path, "machine"))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(stored), "aaaa") {
				t.Error("the machine id itself is on disk")
			}
		})
	}
}

func TestAbandoned(t *testing.T) {
	base := t.TempDir()
	if got := statedir.Abandoned(filepath.Join(base, "none", "x")); len(got) > 0 {
		t.Errorf("before the first start: %v", got)
	}
	for _, name := range []string{"own", "running", "left"} {
		d, err := statedir.Open(filepath.Join(base, name), "agent-1", "m")
		if err != nil {
			t.Fatal(err)
		}
		if name == "running" {
			defer d.Close()
		} else {
			d.Close()
		}
	}
	if err := os.Mkdir(filepath.Join(base, "other"), 0o700); err != nil {
		t.Fatal(err)
	}
	want := []string{filepath.Join(base, "left")}
	for range 2 {
		if got := statedir.Abandoned(filepath.Join(base, "own")); !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}
