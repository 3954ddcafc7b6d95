package agent

import (
	"errors"
	"maps"
	"net/http"
	"slices"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/enroll"
	"certctl-agent/internal/pace"
)

const (
	// maxEnrolling bounds the CSRs under way at once. The limit starts at firstEnrolling and each
	// answer raises it by one: a CA takes a moment to sign, but a control plane that is down must
	// not receive many requests.
	maxEnrolling   = 8
	firstEnrolling = 2

	// maxWaitingCSRs bounds the waiting jobs, in bytes: about the answer to one poll. The next poll
	// returns the others again.
	maxWaitingCSRs = 8 << 20

	// renewedFor is for how many poll intervals another CSR of the same certificate counts as one
	// too many.
	renewedFor = 4
)

// csrTable holds the jobs that await a CSR. Every poll returns such a job until the control plane
// has accepted a CSR. So the loop does not keep jobs that must wait: it takes them from a later
// poll.
//
// After the refusal of an overloaded control plane all jobs wait together. When they are due, they
// are sent one at a time until one is answered, the job whose last try is longest ago first: a CA
// that does not answer looks like an overload, and must not block the jobs of other CAs. A failure
// of a single job, such as a profile that forbids it, delays only that job.
type csrTable struct {
	next     []api.ID             // certificates whose first waiting job may start
	waiting  map[api.ID][]api.Job // waiting jobs by certificate; certificates in next or under way only
	size     int                  // of the waiting jobs, in bytes
	underWay int                  // at most one per certificate
	pending  map[api.ID]bool      // by job: waiting or under way
	tries    map[api.ID]*csrTries // by job: not accepted so far
	accepted map[api.ID]time.Time // by job, until a later poll started
	renewed  map[api.ID]time.Time // by certificate: when a CSR was accepted, in the last few intervals

	limit int         // CSRs that may be under way at once; 1 after an overload, until an answer
	pacer *pace.Pacer // for failures of the control plane
	due   time.Time

	follow bool // poll when none is pending: one was accepted, or there was no room for one
}

// csrTries is the state of a job's earlier tries.
type csrTries struct {
	pacer    *pace.Pacer
	last     time.Time // when the last try started
	due      time.Time
	patience pace.Patience // a running try owns it
}

func newCSRTable(pacer *pace.Pacer) csrTable {
	return csrTable{
		pending:  make(map[api.ID]bool),
		waiting:  make(map[api.ID][]api.Job),
		tries:    make(map[api.ID]*csrTries),
		accepted: make(map[api.ID]time.Time),
		renewed:  make(map[api.ID]time.Time),
		limit:    firstEnrolling,
		pacer:    pacer,
	}
}

// takeCSRs takes the jobs of a poll that started at the given time.
func (a *Agent) takeCSRs(jobs []api.Job, started time.Time) {
	t := &a.csrs
	// A poll that ran while a CSR was accepted still returns that job. Handling it again would
	// create a second version of the certificate.
	maps.DeleteFunc(t.accepted, func(_ api.ID, at time.Time) bool { return at.Before(started) })
	maps.DeleteFunc(t.renewed, func(_ api.ID, at time.Time) bool { return started.Sub(at) > renewedFor*a.opts.PollInterval })
	listed := make(map[api.ID]bool)
	for _, job := range jobs {
		listed[job.ID] = true
	}
	maps.DeleteFunc(t.tries, func(id api.ID, _ *csrTries) bool { return !listed[id] && !t.pending[id] })
	now := time.Now()
	if t.due.After(now) {
		return
	}
	if len(t.pending) == 0 {
		t.limit = min(t.limit, firstEnrolling)
	}
	jobs = slices.SortedStableFunc(slices.Values(jobs), func(a, b api.Job) int { return t.lastTry(a).Compare(t.lastTry(b)) })
	for _, job := range jobs {
		_, done := t.accepted[job.ID]
		tries := t.tries[job.ID]
		if done || t.pending[job.ID] || tries != nil && tries.due.After(now) {
			continue
		}
		job.TargetConfig = nil // not needed
		if t.size+jobSize(job) > maxWaitingCSRs {
			t.follow = true
			continue
		}
		t.pending[job.ID] = true
		t.size += jobSize(job)
		waiting, ok := t.waiting[job.CertificateID]
		if !ok {
			t.next = append(t.next, job.CertificateID)
		}
		t.waiting[job.CertificateID] = append(waiting, job)
	}
	a.startCSRs()
}

// endless reports whether a poll that started at the given time asks for another CSR of a
// certificate just renewed.
func (t *csrTable) endless(jobs []api.Job, started time.Time) bool {
	return slices.ContainsFunc(jobs, func(job api.Job) bool {
		at, ok := t.renewed[job.CertificateID]
		return ok && at.Before(started)
	})
}

// lastTry returns when a job was last tried, or the zero time.
func (t *csrTable) lastTry(job api.Job) time.Time {
	if tries := t.tries[job.ID]; tries != nil {
		return tries.last
	}
	return time.Time{}
}

// startCSRs starts CSRs up to the limit, one at a time per certificate.
func (a *Agent) startCSRs() {
	t := &a.csrs
	for len(t.next) > 0 && t.underWay < t.limit && !a.stopping {
		waiting := t.waiting[t.next[0]]
		job := waiting[0]
		waiting[0] = api.Job{} // so that it can be freed
		t.waiting[t.next[0]] = waiting[1:]
		t.next = t.next[1:]
		t.size -= jobSize(job)
		t.underWay++
		a.startCSR(job)
	}
}

// jobSize estimates the memory of a job, in bytes.
func jobSize(job api.Job) int {
	size := 256 + len(job.CommonName)
	for _, name := range job.SANs {
		size += 16 + len(name)
	}
	return size
}

func (a *Agent) startCSR(job api.Job) {
	tries := a.csrs.tries[job.ID]
	if tries == nil {
		tries = &csrTries{pacer: pace.New(a.opts.PollInterval, a.opts.Rand)}
		a.csrs.tries[job.ID] = tries
	}
	tries.last = time.Now()
	a.spawn(func() func() {
		err := a.opts.Enroller.Enroll(a.calls, a.claims, job)
		if a.exhausted(&tries.patience, err) {
			err = &enroll.RefusedError{Reason: "gave up after several tries: " + err.Error(), Err: err}
		}
		if refused, ok := errors.AsType[*enroll.RefusedError](err); ok {
			a.refuse(job.ID, refused.Error())
		}
		return func() { a.csrEnded(job, err) }
	}, func(err error) {
		a.refuse(job.ID, err.Error())
		a.csrEnded(job, &enroll.RefusedError{Reason: err.Error(), Err: err})
	})
}

// csrEnded records the outcome of a CSR.
func (a *Agent) csrEnded(job api.Job, err error) {
	t := &a.csrs
	delete(t.pending, job.ID)
	t.underWay--
	if len(t.waiting[job.CertificateID]) > 0 {
		t.next = append(t.next, job.CertificateID)
	} else {
		delete(t.waiting, job.CertificateID)
	}
	_, refused := errors.AsType[*enroll.RefusedError](err)
	switch {
	case err == nil:
		delete(t.tries, job.ID)
		t.answered()
		t.accepted[job.ID] = time.Now()
		t.renewed[job.CertificateID] = time.Now()
		t.follow = true
		a.counters.CSR("accepted")
		a.log.Info("CSR accepted", "job", job.ID, "certificate", job.CertificateID, "common_name", job.CommonName)
	case refused:
		delete(t.tries, job.ID)
		a.counters.CSR("refused")
	case !a.stopping:
		wait := t.failed(job, err)
		a.counters.CSR("deferred")
		a.log.Warn("CSR not accepted yet: it will be retried", "job", job.ID, "certificate", job.CertificateID,
			"error", err, "next_try_in", wait.Round(time.Millisecond).String())
	}
	a.deliver(job.ID)
	a.startCSRs()
	if t.follow && len(t.pending) == 0 {
		t.follow = false
		a.pollSoon()
	}
}

// answered records that the control plane is not overloaded.
func (t *csrTable) answered() {
	t.pacer.Next(pace.Outcome{})
	t.limit = min(t.limit+1, maxEnrolling)
}

// failed schedules the next try of a job, or of all of them, after a temporary failure.
func (t *csrTable) failed(job api.Job, err error) (wait time.Duration) {
	now := time.Now()
	outcome := pace.After(err)
	if isJobsOwn(err) {
		if !errors.Is(err, enroll.ErrKey) {
			t.answered()
		}
		tries := t.tries[job.ID]
		wait = tries.pacer.Next(outcome)
		tries.due = now.Add(wait)
		return wait
	}
	for cert, jobs := range t.waiting {
		for _, job := range jobs {
			delete(t.pending, job.ID)
		}
		t.waiting[cert] = nil
	}
	for _, cert := range t.next {
		delete(t.waiting, cert)
	}
	t.next, t.size = nil, 0
	t.limit = 1
	if left := t.due.Sub(now); left > 0 {
		// It was under way when another one failed: part of the same overload.
		wait = max(left, outcome.RetryAfter)
	} else {
		wait = t.pacer.Next(outcome)
	}
	t.due = now.Add(wait)
	return wait
}

// isJobsOwn reports whether a failure concerns only this job: its key could not be made, or the
// control plane works but refuses the job. It answers 500 if a profile refuses it.
func isJobsOwn(err error) bool {
	switch api.Kind(err) {
	case "refused", "gone", "answer":
		return api.RetryAfter(err) == 0
	case "server":
		status, _ := errors.AsType[*api.StatusError](err)
		return status.Status == http.StatusInternalServerError && status.RetryAfter == 0
	}
	return errors.Is(err, enroll.ErrKey)
}
