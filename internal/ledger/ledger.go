// Package ledger remembers, across crashes, which jobs this agent has claimed and which reports the
// control plane has not accepted yet.
//
// The control plane hands out a deployment only once. So each claimed job has a record on disk
// before anything else happens to it. The record stays until the job's last report has been
// delivered or given up:
//
//	claimed -> running -> finished, with reports -> delivered: record removed
//
// After a restart an unfinished job is carried out again, which is harmless, and a finished job is
// only reported. A record holds the job as the control plane sent it, without the host's overlays.
package ledger

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path"
	"slices"
	"sync"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/atomicfile"
)

const (
	dir = "jobs"

	// maxRecords bounds the number of jobs in the ledger. No host has that many targets. A full
	// ledger refuses new jobs; it does not forget old ones.
	maxRecords = 4096

	// maxRefusals is the number of additional records for reports on jobs that were never begun,
	// so that the agent can still report that the ledger is full.
	maxRefusals = 4096

	// maxBytes bounds all records together, on disk and in memory: 4 KiB for each of maxRecords.
	maxBytes = 16 << 20
)

// Report is one report on a job: exactly one of Verification and Status is set.
type Report struct {
	Verification *api.Verification `json:"verification,omitempty"`
	Status       *api.JobStatus    `json:"status,omitempty"`

	// Repeat marks a report that repeats the one before it, some time later.
	Repeat bool `json:"repeat,omitempty"`
}

// Refusal is a job that could not be recorded and so must not be begun.
type Refusal struct {
	Job api.Job
	Err error
}

// Delivery is a report that the control plane has not accepted yet.
type Delivery struct {
	Job      api.ID
	Report   Report
	Recorded time.Time

	seq, n uint64 // number of the job's claim, and of the report in it
}

// Ledger is safe for concurrent use. Methods that only read never wait for the disk.
type Ledger struct {
	root *os.Root
	log  *slog.Logger

	// busy holds one element while records are changed, on disk and then in memory. It is a channel
	// and not a mutex because it is held during disk access, which may be slow.
	busy chan struct{}

	mu      sync.Mutex // guards the fields below; never held during disk access
	records map[api.ID]*record
	bytes   int // of all records as they are on disk
	lastSeq uint64
}

// Open reads the records in the state directory. It sets damaged records aside, and records their
// jobs as Failed if it can still tell their ids.
func Open(state *os.Root, log *slog.Logger) (*Ledger, error) {
	root, err := openDir(state)
	if err != nil {
		return nil, fmt.Errorf("open the ledger: %w", err)
	}
	l := &Ledger{root: root, log: log, busy: make(chan struct{}, 1), records: make(map[api.ID]*record)}
	if err := l.load(); err != nil {
		root.Close()
		return nil, fmt.Errorf("read the ledger: %w", err)
	}
	return l, nil
}

func openDir(state *os.Root) (*os.Root, error) {
	err := state.Mkdir(dir, 0o700)
	if err == nil {
		err = atomicfile.SyncDir(state, ".")
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return state.OpenRoot(dir)
}

func (l *Ledger) Close() error { return l.root.Close() }

// hold waits for the right to change records.
func (l *Ledger) hold() (release func()) {
	l.busy <- struct{}{}
	return func() { <-l.busy }
}

// Claim records deployments. The accepted ones are on disk when it returns, and must be carried out
// now. Claim leaves jobs that are already in the ledger and unfinished out of both lists, because
// they must not start twice. If such a job has not begun, its new form, which Job returns, replaces
// the old one. A finished job that is claimed again is new work: it supersedes the undelivered
// reports.
func (l *Ledger) Claim(jobs []api.Job, now time.Time) (accepted []api.Job, refused []Refusal) {
	defer l.hold()()
	var staged []*record
	size := 0
	seen := make(map[api.ID]bool)
	for _, job := range jobs {
		if seen[job.ID] {
			continue
		}
		seen[job.ID] = true
		r, err := l.admit(job, now)
		if err == nil && r != nil {
			size += len(r.data)
			if err = l.room(len(staged)+1, size); err == nil {
				err = atomicfile.Replace(l.root, fileName(r.Job.ID), r.data, 0o600)
			}
		}
		switch {
		case err != nil:
			refused = append(refused, Refusal{job, err})
		case r != nil:
			staged = append(staged, r)
		}
	}
	if len(staged) == 0 {
		return nil, refused
	}
	if err := atomicfile.SyncDir(l.root, "."); err != nil {
		for _, r := range staged {
			_ = l.root.Remove(fileName(r.Job.ID)) // best effort: it is reported as refused
			refused = append(refused, Refusal{r.Job, err})
		}
		return nil, refused
	}
	for _, r := range staged {
		old := l.get(r.Job.ID)
		l.put(r)
		switch {
		case old == nil:
		case old.State != finished:
			l.log.Info("a waiting job was handed out again: its new form replaces the old one", "job", r.Job.ID)
			continue
		default:
			l.log.Warn("a finished job was handed out again: it is carried out again, and its undelivered reports are dropped",
				"job", r.Job.ID, "undelivered", len(old.Reports))
		}
		accepted = append(accepted, r.Job)
	}
	return accepted, refused
}

// admit returns the record for a claimed job, or nil if the ledger has the unfinished job already
// and nothing changes.
func (l *Ledger) admit(job api.Job, now time.Time) (*record, error) {
	r := &record{State: claimed, Claimed: now, Job: job}
	if old := l.get(job.ID); old != nil && old.State != finished {
		if old.begun || sameJob(old.Job, job) {
			return nil, nil
		}
		r.Seq, r.Claimed = old.Seq, old.Claimed
	} else {
		r.Seq = l.nextSeq()
	}
	return r, r.encode()
}

// room returns an error if the ledger cannot take more records of size bytes in all.
func (l *Ledger) room(more, size int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.records)+more > maxRecords {
		return fmt.Errorf("the agent's ledger is full: it holds %d jobs", maxRecords)
	}
	if l.bytes+size > maxBytes {
		return fmt.Errorf("the agent's ledger is full: its jobs take %d of %d bytes", l.bytes, maxBytes)
	}
	return nil
}

// Start records that a job has begun. If a retry begins in the same process, it does not write to
// disk.
func (l *Ledger) Start(job api.ID) error {
	if r := l.get(job); r != nil && r.State == running && r.begun {
		return nil
	}
	return l.change("start", job, func(r *record) { r.State, r.begun = running, true })
}

// Job returns an unfinished job in its newest form.
func (l *Ledger) Job(id api.ID) (job api.Job, ok bool) {
	if r := l.get(id); r != nil && r.State != finished {
		return r.Job, true
	}
	return api.Job{}, false
}

// Finish records the outcome of a job: the reports to deliver, in order. If it returns an error,
// the outcome exists in memory only: the reports are still delivered, but after a crash the job
// runs again.
func (l *Ledger) Finish(job api.ID, reports []Report) error {
	if len(reports) == 0 {
		return fmt.Errorf("finish job %s: an outcome has at least one report", job)
	}
	now := time.Now()
	return l.change("finish", job, func(r *record) {
		r.State = finished
		// Keep only what the reports need, because the configuration may hold secrets.
		r.Job = api.Job{ID: r.Job.ID, Type: r.Job.Type, CertificateID: r.Job.CertificateID, TargetID: r.Job.TargetID}
		r.Reports = entries(reports, now)
	})
}

// change applies a step to an unfinished job. If the disk fails, the step still holds in memory.
func (l *Ledger) change(step string, job api.ID, apply func(*record)) error {
	defer l.hold()()
	old := l.get(job)
	if old == nil || old.State == finished {
		return fmt.Errorf("%s job %s: the ledger has no such unfinished job", step, job)
	}
	r := *old
	apply(&r)
	if err := l.save(&r); err != nil {
		return fmt.Errorf("%s job %s: %w", step, job, err)
	}
	return nil
}

// Report records the final report on a job that was never begun. It supersedes the undelivered
// reports of an earlier claim. It ignores an unfinished job, which will end with its own report.
func (l *Ledger) Report(job api.ID, status api.JobStatus) error {
	defer l.hold()()
	switch old := l.get(job); {
	case old == nil && l.count() >= maxRecords+maxRefusals:
		return fmt.Errorf("record a report on job %s: the ledger is full: it holds %d records", job, l.count())
	case old == nil:
	case old.State != finished:
		l.log.Warn("a refusal was not recorded because the job is still unfinished", "job", job)
		return nil
	default:
		l.log.Warn("a newer report on a job supersedes its undelivered reports", "job", job, "undelivered", len(old.Reports))
	}
	if err := l.save(l.reported(job, &status)); err != nil {
		return fmt.Errorf("record a report on job %s: %w", job, err)
	}
	return nil
}

// Unfinished lists the jobs that are not finished, in the order of their claims.
func (l *Ledger) Unfinished() []api.Job {
	var jobs []api.Job
	for _, r := range l.sorted() {
		if r.State != finished {
			jobs = append(jobs, r.Job)
		}
	}
	return jobs
}

// Undelivered lists the undelivered reports. Those of one job are in the order in which they must
// arrive.
func (l *Ledger) Undelivered() []Delivery {
	var all []Delivery
	for _, r := range l.sorted() {
		all = append(all, r.deliveries()...)
	}
	return all
}

// UndeliveredOf lists the undelivered reports on one job, in order.
func (l *Ledger) UndeliveredOf(job api.ID) []Delivery {
	if r := l.get(job); r != nil {
		return r.deliveries()
	}
	return nil
}

// Delivered records that the control plane has accepted a report. After a job's last report it
// removes the job's record. It does nothing if a newer claim has superseded the delivery.
func (l *Ledger) Delivered(d Delivery) error {
	if err := l.removeReport(d); err != nil {
		return fmt.Errorf("record the delivery of a report on job %s: %w", d.Job, err)
	}
	return nil
}

// Drop gives up a report, for the given reason. The caller logs that.
func (l *Ledger) Drop(d Delivery, reason string) error {
	if err := l.removeReport(d); err != nil {
		return fmt.Errorf("drop a report on job %s (%s): %w", d.Job, reason, err)
	}
	return nil
}

// removeReport removes a report, and the job's record with the last one.
func (l *Ledger) removeReport(d Delivery) error {
	defer l.hold()()
	old := l.get(d.Job)
	if old == nil || old.Seq != d.seq {
		return nil
	}
	r := *old
	r.Reports = slices.DeleteFunc(slices.Clone(old.Reports), func(e entry) bool { return e.N == d.n })
	if len(r.Reports) > 0 {
		return l.save(&r)
	}
	l.drop(d.Job)
	if err := atomicfile.Remove(l.root, fileName(d.Job)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil // it may never have been written, on a full disk
}

// save stores a record durably on disk, and in memory. If the disk fails, the record still holds
// for as long as the process lives.
func (l *Ledger) save(r *record) error {
	err := r.encode()
	if err == nil {
		err = atomicfile.WriteFile(l.root, fileName(r.Job.ID), r.data, 0o600)
	}
	l.put(r)
	return err
}

func (l *Ledger) get(id api.ID) *record {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.records[id]
}

// put stores a record in memory. Records are never changed in place, so callers may go on reading
// an older one.
func (l *Ledger) put(r *record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.records[r.Job.ID]; old != nil {
		l.bytes -= old.size
	}
	r.size, r.data = len(r.data), nil
	l.bytes += r.size
	l.records[r.Job.ID] = r
	l.lastSeq = max(l.lastSeq, r.Seq)
}

func (l *Ledger) drop(id api.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bytes -= l.records[id].size
	delete(l.records, id)
}

func (l *Ledger) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.records)
}

func (l *Ledger) nextSeq() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lastSeq++
	return l.lastSeq
}

func (l *Ledger) sorted() []*record {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.SortedFunc(maps.Values(l.records), func(a, b *record) int { return cmp.Compare(a.Seq, b.Seq) })
}

func (l *Ledger) load() error {
	if err := atomicfile.Sweep(l.root); err != nil {
		return err
	}
	list, err := fs.ReadDir(l.root.FS(), ".")
	if err != nil {
		return err
	}
	for _, file := range list {
		name := file.Name()
		switch {
		case path.Ext(name) == damagedExt:
		case !isFileName(name) || !file.Type().IsRegular():
			l.log.Warn("a file in the ledger's directory is not a record and is ignored", "file", path.Join(dir, name))
		default:
			l.loadFile(name)
		}
	}
	if err := l.pruneDamaged(); err != nil {
		return err
	}
	// The process that wrote a record may have been killed before it synced the directory.
	return atomicfile.SyncDir(l.root, ".")
}

// loadFile loads one record, or sets it aside if it is damaged. It skips a record that cannot be
// read, because the other jobs must not wait for it.
func (l *Ledger) loadFile(name string) {
	data, err := readBounded(l.root, name)
	if err != nil {
		l.log.Error("a record of the ledger cannot be read: its job is neither carried out nor reported", "file", path.Join(dir, name), "error", err)
		return
	}
	r, err := decode(data)
	if err == nil && fileName(r.Job.ID) != name {
		err = fmt.Errorf("it belongs to another job, %s", r.Job.ID)
	}
	if err != nil {
		l.setAside(name, data, err)
		return
	}
	r.data = data
	l.put(r)
}
