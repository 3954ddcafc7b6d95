package ledger

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/needs"
)

// TestUnsyncedClaim: the directory cannot be opened, and so not synced. Files can be created in it.
func TestUnsyncedClaim(t *testing.T) {
	if !needs.Unprivileged(t) {
		return
	}
	dir := t.TempDir()
	l := open(t, dir)
	jobs := filepath.Join(dir, "jobs")
	do(t, os.Chmod(jobs, 0o300))
	accepted, refused := l.Claim([]api.Job{deployment("job-1"), deployment("job-2")}, time.Now())
	do(t, os.Chmod(jobs, 0o700))
	if len(accepted) != 0 || len(refused) != 2 || refused[0].Job.ID != "job-1" || refused[1].Job.ID != "job-2" {
		t.Fatalf("accepted %v, refused %v, want that both are refused", accepted, refused)
	}
	for _, r := range refused {
		if !os.IsPermission(r.Err) && !strings.Contains(r.Err.Error(), "permission denied") {
			t.Errorf("%s was refused because of %v", r.Job.ID, r.Err)
		}
	}
	if list, err := os.ReadDir(jobs); err != nil || len(list) > 0 {
		t.Errorf("left behind: %v (%v)", list, err)
	}
	if got := l.Unfinished(); got != nil {
		t.Errorf("unfinished: %v", ids(got))
	}
}

// TestReadOnlyLedger: Open fails if it cannot remove the temporary files of a crash.
func TestReadOnlyLedger(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700"); err != nil {
		needs.Missing(t, "cannot mount a tmpfs: "+err.Error())
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	open(t, dir)
	do(t, os.WriteFile(filepath.Join(dir, "jobs", "."+fileName("job-1")+"."+strings.Repeat("A", 26)+".tmp"), nil, 0o600))
	do(t, syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	root, err := os.OpenRoot(dir)
	do(t, err)
	defer root.Close()
	if l, err := Open(root, nil); err == nil || !strings.Contains(err.Error(), "read the ledger") {
		t.Errorf("opened %v: %v, want that it cannot be read", l, err)
	}
}
