// Package ledger remembers, across crashes, which jobs this agent has claimed
// and which of its reports the control plane has not taken yet.
//
// The control plane hands a deployment out once. So each claimed job has a
// record on disk before anything is done with it, and keeps one until its last
// report has been delivered or given up:
//
//	claimed -> running -> finished, with its reports -> delivered, and gone
//
// After a restart a job that is not finished is carried out again, which is
// harmless, and one that is finished is only reported. A record holds the job
// as it came from the control plane, never what the host's overlays add to it.
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

	// maxRecords bounds the jobs that can be in hand at once. No host has as
	// many targets. At the bound new jobs are refused, not old ones forgotten.
	maxRecords = 4096

	// maxRefusals is what may come on top for reports on jobs that were never
	// begun, so that a full ledger can still say that it is full.
	maxRefusals = 4096

	// maxBytes bounds all records together: memory holds them too. It is 4 KiB
	// for each of maxRecords.
	maxBytes = 16 << 20
)

// Report is one report on a job: exactly one of Verification and Status is set.
type Report struct {
	Verification *api.Verification `json:"verification,omitempty"`
	Status       *api.JobStatus    `json:"status,omitempty"`

	// Repeat marks a report that says once more, some time later, what the one
	// before it has said.
	Repeat bool `json:"repeat,omitempty"`
}

// Refusal is a job that could not be recorded, and so must not be begun.
type Refusal struct {
	Job api.Job
	Err error
}

// Delivery is a report that the control plane has not taken yet.
type Delivery struct {
	Job      api.ID
	Report   Report
	Recorded time.Time

	seq, n uint64 // which claim of the job, and which of its reports
}

// Ledger is safe for concurrent use. What only reads never waits for the disk.
type Ledger struct {
	root *os.Root
	log  *slog.Logger

	// busy is held while records are changed, on disk and then in memory. It is
	// a channel of one because disks are slow.
	busy chan struct{}

	mu      sync.Mutex // guards what follows; held for memory only
	records map[api.ID]*record
	bytes   int // of all records as they are on disk
	lastSeq uint64
}

// Open reads the records below the state directory. One that is damaged is set
// aside and logged; its job is reported Failed where its id can still be told.
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

// hold waits for its turn to change records.
func (l *Ledger) hold() (release func()) {
	l.busy <- struct{}{}
	return func() { <-l.busy }
}

// Claim records deployments. Those accepted are on disk when it returns, and
// are to be carried out now. Left out of both lists is a job that is in hand
// already: it is not started twice, but one that has not begun takes on its
// new form, which Job returns. A job that is finished here and claimed again is
// new work: what was still to be reported of it is superseded.
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
			_ = l.root.Remove(fileName(r.Job.ID)) // it is reported as refused
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
			l.log.Info("a job that waits here was handed out again: its new form replaces the old one", "job", r.Job.ID)
			continue
		default:
			l.log.Warn("a finished job was handed out again: it is carried out again, and what was not delivered of it is dropped",
				"job", r.Job.ID, "undelivered", len(old.Reports))
		}
		accepted = append(accepted, r.Job)
	}
	return accepted, refused
}

// admit makes the record of a claimed job, or none when it is in hand already
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

// room reports whether the ledger can take more records and bytes.
func (l *Ledger) room(more, size int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.records)+more > maxRecords {
		return fmt.Errorf("the agent has %d jobs in hand, its limit", maxRecords)
	}
	if l.bytes+size > maxBytes {
		return fmt.Errorf("the jobs that the agent has in hand take %d bytes, its limit is %d", l.bytes, maxBytes)
	}
	return nil
}

// Start notes that a job has begun. A job that begins again, because its last
// try could not, costs the disk nothing.
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

// Finish records the outcome of a job: the reports to deliver, in order. When
// it returns an error the outcome is known to this process only: the reports
// are delivered all the same, but after a crash the job is carried out again.
func (l *Ledger) Finish(job api.ID, reports []Report) error {
	if len(reports) == 0 {
		return fmt.Errorf("finish job %s: an outcome has at least one report", job)
	}
	now := time.Now()
	return l.change("finish", job, func(r *record) {
		r.State = finished
		// The reports need no more of the job; a configuration may hold secrets.
		r.Job = api.Job{ID: r.Job.ID, Type: r.Job.Type, CertificateID: r.Job.CertificateID, TargetID: r.Job.TargetID}
		r.Reports = entries(reports, now)
	})
}

// change applies one step to an unfinished job, in memory also when the disk
// refuses it.
func (l *Ledger) change(step string, job api.ID, apply func(*record)) error {
	defer l.hold()()
	old := l.get(job)
	if old == nil || old.State == finished {
		return fmt.Errorf("%s job %s: the ledger holds no such unfinished job", step, job)
	}
	r := *old
	apply(&r)
	if err := l.save(&r); err != nil {
		return fmt.Errorf("%s job %s: %w", step, job, err)
	}
	return nil
}

// Report records the terminal report on a job that was never begun. It
// supersedes the undelivered reports of an earlier claim. A job that is in hand
// is left alone: it ends with a report of its own.
func (l *Ledger) Report(job api.ID, status api.JobStatus) error {
	defer l.hold()()
	switch old := l.get(job); {
	case old == nil && l.count() >= maxRecords+maxRefusals:
		return fmt.Errorf("record a report on job %s: the ledger holds %d records already, its limit", job, l.count())
	case old == nil:
	case old.State != finished:
		l.log.Warn("a refusal was not recorded because the job is in hand", "job", job)
		return nil
	default:
		l.log.Warn("a newer report on a job supersedes what was not delivered of it", "job", job, "undelivered", len(old.Reports))
	}
	if err := l.save(l.reported(job, &status)); err != nil {
		return fmt.Errorf("record a report on job %s: %w", job, err)
	}
	return nil
}

func (l *Ledger) Unfinished() []api.Job {
	var jobs []api.Job
	for _, r := range l.sorted() {
		if r.State != finished {
			jobs = append(jobs, r.Job)
		}
	}
	return jobs
}

// Undelivered lists the reports to deliver. Those of one job stand in the order
// in which they are to arrive.
func (l *Ledger) Undelivered() []Delivery {
	var all []Delivery
	for _, r := range l.sorted() {
		all = append(all, r.deliveries()...)
	}
	return all
}

// UndeliveredOf lists the reports on one job to deliver, in order.
func (l *Ledger) UndeliveredOf(job api.ID) []Delivery {
	if r := l.get(job); r != nil {
		return r.deliveries()
	}
	return nil
}

// Delivered notes that the control plane has taken a report. The last one of a
// job removes its record. A delivery that a newer claim has superseded is none
// of the job's any more, and changes nothing.
func (l *Ledger) Delivered(d Delivery) error {
	if err := l.removeReport(d); err != nil {
		return fmt.Errorf("note the delivery of a report on job %s: %w", d.Job, err)
	}
	return nil
}

// Drop gives a report up, for the reason given. Logging that is the caller's.
func (l *Ledger) Drop(d Delivery, reason string) error {
	if err := l.removeReport(d); err != nil {
		return fmt.Errorf("drop a report on job %s (%s): %w", d.Job, reason, err)
	}
	return nil
}

// removeReport removes a report, and with the last one of a job its record.
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
	return nil // the disk was full when it was to be written
}

// save makes a record durable and takes it over in memory. What the disk
// refuses still holds there, for as long as the process lives.
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

// put takes a record over. Records are never changed in place, so a caller
// that has an older one can go on reading it.
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
			l.log.Warn("a file in the ledger's directory is no record of it and is left alone", "file", path.Join(dir, name))
		default:
			l.loadFile(name)
		}
	}
	if err := l.pruneDamaged(); err != nil {
		return err
	}
	// A process that was killed may not have come as far as this with a record
	// that is about to be relied on.
	return atomicfile.SyncDir(l.root, ".")
}

// loadFile takes one record over, or sets it aside. One that the disk does not
// give is left there: the others must not wait for it.
func (l *Ledger) loadFile(name string) {
	data, err := readBounded(l.root, name)
	if err != nil {
		l.log.Error("a record of the ledger cannot be read: its job is neither carried out nor reported", "file", path.Join(dir, name), "error", err)
		return
	}
	r, err := decode(data)
	if err == nil && fileName(r.Job.ID) != name {
		err = fmt.Errorf("it is the record of another job, %s", r.Job.ID)
	}
	if err != nil {
		l.setAside(name, data, err)
		return
	}
	r.data = data
	l.put(r)
}
