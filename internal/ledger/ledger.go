// Package ledger keeps claimed jobs and undelivered reports on disk.
package ledger

import (
	"errors"
	"log/slog"
	"os"
	"time"

	"certctl-agent/internal/api"
)

// Report is one report on a job: exactly one of its fields is set.
type Report struct {
	Verification *api.Verification `json:"verification,omitempty"`
	Status       *api.JobStatus    `json:"status,omitempty"`
}

// Refusal is a job that could not be recorded, and so must not be begun.
type Refusal struct {
	Job api.Job
	Err error
}

// Delivery is a report that the control plane has not taken yet.
type Delivery struct {
	Job      string // job id
	Report   Report
	Recorded time.Time
}

// Ledger is the directory of records.
type Ledger struct{}

var errTodo = errors.New("not there yet")

// Open reads the records below the state directory.
func Open(root *os.Root, log *slog.Logger) (*Ledger, error) { return nil, errTodo }

// Close releases the directory.
func (l *Ledger) Close() error { return nil }

// Claim records deployments.
func (l *Ledger) Claim(jobs []api.Job, now time.Time) (accepted []api.Job, refused []Refusal) {
	return nil, nil
}

// Start notes that a job has begun.
func (l *Ledger) Start(job string) error { return errTodo }

// Finish records the outcome of a job.
func (l *Ledger) Finish(job string, reports []Report) error { return errTodo }

// Report records a terminal report for a job that was never begun.
func (l *Ledger) Report(job string, status api.JobStatus) error { return errTodo }

// Unfinished lists the jobs to carry out, in order of claim.
func (l *Ledger) Unfinished() []api.Job { return nil }

// Undelivered lists the reports to deliver, per job in order.
func (l *Ledger) Undelivered() []Delivery { return nil }

// Delivered notes that the control plane has taken a report.
func (l *Ledger) Delivered(d Delivery) error { return errTodo }

// Drop gives a report up.
func (l *Ledger) Drop(d Delivery, reason string) error { return errTodo }

// Counts returns how many jobs are unfinished and reports undelivered.
func (l *Ledger) Counts() (unfinished, undelivered int) { return 0, 0 }
