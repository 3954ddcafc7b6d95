package installed_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/installed"
)

func open(t *testing.T, dir string) *installed.List {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	list, err := installed.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestSurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	first := installed.Entry{TargetID: "b", TargetType: "NGINX", CertificateID: "c", CommonName: "old", Fingerprint: "00", NotAfter: at, DeployedAt: at}
	newer := first
	newer.CommonName = "new"
	other := installed.Entry{TargetID: "a", NotAfter: at}

	list := open(t, dir)
	for _, entry := range []installed.Entry{first, other, newer} {
		if err := list.Put(entry); err != nil {
			t.Fatal(err)
		}
	}
	got := open(t, dir).All()
	if len(got) != 2 || got[0] != other || got[1] != newer {
		t.Errorf("after a restart: %+v, want %+v and %+v", got, other, newer)
	}
	info, err := os.Stat(filepath.Join(dir, "served.json"))
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("mode = %v, want 0600", got)
	}
}

func TestDamagedIsSetAside(t *testing.T) {
	for _, content := range []string{"", "{", `{"version":99}`, `[]`, `{"version":1,"served":[{"not_after":"never"}]}`} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "served.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		list, err := installed.Open(root)
		if err == nil || !strings.Contains(err.Error(), "set aside") {
			t.Errorf("%q: error = %v, want one that says it was set aside", content, err)
		}
		if err := list.Put(installed.Entry{TargetID: "t"}); err != nil {
			t.Errorf("%q: a list that was set aside cannot be used: %v", content, err)
		}
		if kept, err := os.ReadFile(filepath.Join(dir, "served.json.damaged")); err != nil || string(kept) != content {
			t.Errorf("%q: kept %q, %v", content, kept, err)
		}
	}
}

func TestBounded(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	// Fill it in one write: Put syncs the disk.
	entries := make([]string, 0, 4096)
	for i := range 4096 {
		entries = append(entries, fmt.Sprintf(`{"target_id":"t%04d","deployed_at":%q}`, i, start.Add(time.Duration(i)*time.Second).Format(time.RFC3339)))
	}
	dir := t.TempDir()
	content := `{"version":1,"served":[` + strings.Join(entries, ",") + `]}`
	if err := os.WriteFile(filepath.Join(dir, "served.json"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	list := open(t, dir)
	if err := list.Put(installed.Entry{TargetID: "new", DeployedAt: start.Add(time.Hour * 24)}); err != nil {
		t.Fatal(err)
	}
	all := list.All()
	if len(all) != 4096 || all[0].TargetID != "new" || all[1].TargetID != "t0001" {
		t.Errorf("%d entries, first %q and %q: want 4096 without the oldest", len(all), all[0].TargetID, all[1].TargetID)
	}
}
