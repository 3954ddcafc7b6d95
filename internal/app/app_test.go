package app_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/app"
	"certctl-agent/internal/config"
)

type silent struct{}

func (silent) Status(string) bool { return true }
func (silent) Watchdog()          {}

// TestOpenReleases: an App that could not be built, or was closed, holds no lock.
func TestOpenReleases(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	settings := map[string]string{
		"CERTCTL_SERVER_URL":     "https://certctl.test",
		"CERTCTL_API_KEY":        "key",
		"CERTCTL_AGENT_ID":       "agent-1",
		"CERTCTL_KEY_DIR":        filepath.Join(dir, "keys"),
		"CERTCTL_DISCOVERY_DIRS": filepath.Join(dir, "empty"),
	}
	cfg, err := config.Load(nil, func(name string) string { return settings[name] }, config.Options{DefaultFile: filepath.Join(dir, "none")})
	if err != nil {
		t.Fatal(err)
	}
	open := func() (*app.App, error) {
		return app.Open(context.Background(), app.Options{Config: cfg, Log: slog.New(slog.DiscardHandler), Notify: silent{}})
	}
	a, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "in use by agent agent-1") {
		t.Errorf("a second one on the same directories: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("close: %v", err)
	}

	// Each of the parts that are opened late fails once, after the others have been opened.
	before := descriptors()
	for _, name := range []string{"jobs", "journal"} {
		path := filepath.Join(cfg.InstanceStateDir(), name)
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := open(); err == nil {
			t.Errorf("opened although %s is a file", name)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		a, err := open()
		if err != nil {
			t.Fatalf("after removing the file %s: %v", name, err)
		}
		if err := a.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if after := descriptors(); after > before {
		t.Errorf("%d files are open, and %d were before", after, before)
	}
}

// descriptors counts the open files, where the system says that.
func descriptors() int {
	open, _ := os.ReadDir("/proc/self/fd")
	return len(open)
}
