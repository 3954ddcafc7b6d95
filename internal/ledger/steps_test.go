package ledger

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
)

// TestOneChangeAtATime: each step reads records, then changes the disk and the memory. It would undo
// another step in between.
func TestOneChangeAtATime(t *testing.T) {
	failed := api.JobStatus{Status: api.StatusFailed}
	steps := map[string]func(*Ledger) error{
		"claim":  func(l *Ledger) error { l.Claim([]api.Job{deployment("job-3")}, time.Now()); return nil },
		"start":  func(l *Ledger) error { return l.Start("job-1") },
		"finish": func(l *Ledger) error { return l.Finish("job-1", outcome("x")) },
		"report": func(l *Ledger) error { return l.Report("job-4", failed) },
		"deliver": func(l *Ledger) error {
			return l.Delivered(l.UndeliveredOf("job-2")[0])
		},
		"drop": func(l *Ledger) error { return l.Drop(l.UndeliveredOf("job-2")[0], "refused") },
	}
	for name, step := range steps {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				root, err := os.OpenRoot(dir)
				do(t, err)
				defer root.Close()
				l, err := Open(root, slog.New(slog.DiscardHandler))
				do(t, err)
				defer l.Close()
				claim(t, l, deployment("job-1"), deployment("job-2"))
				do(t, l.Finish("job-2", outcome("x")))
				done := false
				release := l.hold()
				go func() {
					if err := step(l); err != nil {
						t.Error(err)
					}
					done = true
				}()
				synctest.Wait()
				if done {
					t.Error("it did not wait for another step")
				}
				release()
				synctest.Wait()
				if !done {
					t.Error("it still waits after the other step")
				}
			})
		})
	}
}

// TestStartAgain: a job that cannot start is retried for days, without writes.
func TestStartAgain(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	claim(t, l, deployment("job-1"))
	do(t, l.Start("job-1"))
	do(t, os.RemoveAll(filepath.Join(dir, "jobs")))
	if err := l.Start("job-1"); err != nil {
		t.Errorf("the second start used the disk: %v", err)
	}
}

func TestClaimTime(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	first := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	l.Claim([]api.Job{deployment("job-1")}, first)
	changed := deployment("job-1")
	changed.TargetID = "target-2"
	l.Claim([]api.Job{changed}, first.Add(time.Hour))
	for _, l := range []*Ledger{l, open(t, dir)} {
		if r := l.get("job-1"); !r.Claimed.Equal(first) || r.Job.TargetID != "target-2" {
			t.Errorf("the record is of %v and %s, want %v and target-2", r.Claimed, r.Job.TargetID, first)
		}
	}
}

// TestBoundsAreReached: a ledger is full at its limits, not before.
func TestBoundsAreReached(t *testing.T) {
	l := open(t, t.TempDir())
	claim(t, l, deployment("job-1"))
	size := l.bytes
	l.bytes = maxBytes - size
	claim(t, l, deployment("job-2"))
	if _, refused := l.Claim([]api.Job{deployment("job-3")}, time.Now()); len(refused) != 1 {
		t.Error("a job was accepted beyond the limit of bytes")
	}
	l.bytes = 0
	for i := len(l.records); i < maxRecords-1; i++ {
		l.records[api.ID(filepath.Join("old", time.Duration(i).String()))] = &record{}
	}
	claim(t, l, deployment("job-4"))
	if _, refused := l.Claim([]api.Job{deployment("job-5")}, time.Now()); len(refused) != 1 {
		t.Error("a job was accepted beyond the limit of records")
	}
}

// TestDeliveryOnABrokenDisk: if a delivery cannot be recorded, it is repeated after a restart, so the
// caller must get an error to log.
func TestDeliveryOnABrokenDisk(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	claim(t, l, deployment("job-1"))
	do(t, l.Finish("job-1", outcome("x")))
	file := filepath.Join(dir, "jobs", fileName("job-1"))
	do(t, os.Remove(file))
	do(t, os.MkdirAll(filepath.Join(file, "not", "empty"), 0o700))
	if err := l.Delivered(l.Undelivered()[0]); err == nil {
		t.Error("no error from the delivery of the first report")
	}
	if err := l.Delivered(l.Undelivered()[0]); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("delivery of the last report: %v, want an error", err)
	}
	if got := l.Undelivered(); got != nil {
		t.Errorf("%+v would be delivered again by this process", got)
	}
}
