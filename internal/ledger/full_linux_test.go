package ledger

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/needs"
)

// TestDiskFull fills a file system of 16 pages.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k,mode=0700"); err != nil {
		needs.Missing(t, "cannot mount a tmpfs: "+err.Error())
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	l := open(t, dir)
	var jobs []api.Job
	for i := range 40 {
		jobs = append(jobs, deployment(api.ID(fmt.Sprint("job-", i))))
	}
	accepted, refused := l.Claim(jobs, time.Now())
	if len(accepted) == 0 || len(refused) == 0 || len(accepted)+len(refused) != len(jobs) {
		t.Fatalf("%d accepted, %d refused of %d", len(accepted), len(refused), len(jobs))
	}
	for _, r := range refused {
		if !strings.Contains(r.Err.Error(), "no space left") {
			t.Errorf("refused for another reason: %v", r.Err)
		}
		// This process can still report what cannot be written.
		if err := l.Report(r.Job.ID, api.JobStatus{Status: api.StatusFailed}); err == nil {
			t.Errorf("the report on %s was recorded on a full disk", r.Job.ID)
		}
	}
	if got := len(l.Undelivered()); got != len(refused) {
		t.Errorf("%d reports to deliver, want %d", got, len(refused))
	}
	for _, d := range l.Undelivered() {
		do(t, l.Delivered(d))
	}
	list, err := os.ReadDir(filepath.Join(dir, "jobs"))
	do(t, err)
	if len(list) != len(accepted) {
		t.Errorf("%d files for %d records: %v", len(list), len(accepted), list)
	}
	if got := ids(open(t, dir).Unfinished()); !slices.Equal(got, ids(accepted)) {
		t.Errorf("after a restart there are %v, want %v", got, ids(accepted))
	}
}
