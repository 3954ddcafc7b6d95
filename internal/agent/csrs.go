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
	// maxEnrolling bounds the CSRs under way at once. The first are firstEnrolling,
	// and each answer makes room for one more: a CA takes a moment to sign, but a
	// control plane that is down must not be sent many.
	maxEnrolling   = 8
	firstEnrolling = 2

	// maxWaitingCSRs bounds the jobs that wait for that, in bytes: what the
	// answer to one poll can hold. Those left out come again with the next poll.
	maxWaitingCSRs = 8 << 20

	// renewedFor is for how many intervals of the poll another CSR for the same
	// certificate is one too many.
	renewedFor = 4
)

// csrTable is what the loop has in hand of jobs that await a CSR. The control
// plane shows such a job with every poll until it has accepted a CSR. So one
// that has to wait, for a time or for a place, is forgotten here and taken from
// a later poll.
//
// An overloaded control plane is spared by all jobs together: after its refusal
// none is sent until it is due, and then one at a time until one is answered,
// those first whose last try is longest ago: a CA that does not answer can look
// like that too, and must not hold up the jobs that are not for it. A failure of
// a single job, such as a profile that forbids it, holds up only that job.
type csrTable struct {
	next     []api.ID             // certificates whose first job in line has its turn
	lines    map[api.ID][]api.Job // by certificate id, of those in next or under way: its jobs that wait
	size     int                  // of those that wait, in bytes
	underWay int                  // at most one for each certificate
	inHand   map[api.ID]bool      // by job id: waiting or under way
	tries    map[api.ID]*csrTries // by job id: not accepted so far
	accepted map[api.ID]time.Time // by job id, until a later poll began
	renewed  map[api.ID]time.Time // by certificate id: when a CSR was accepted, in the last few intervals

	places int         // CSRs that may be under way at once; 1: overloaded, and has not answered since
	pacer  *pace.Pacer // of the control plane's own failures
	due    time.Time

	follow bool // a poll is to follow when none is in hand: one was accepted, or left out
}

// csrTries is what came of a job so far.
type csrTries struct {
	pacer    *pace.Pacer
	last     time.Time // when the last try began
	due      time.Time
	patience pace.Patience // a running try owns it
}

func newCSRTable(pacer *pace.Pacer) csrTable {
	return csrTable{
		inHand:   make(map[api.ID]bool),
		lines:    make(map[api.ID][]api.Job),
		tries:    make(map[api.ID]*csrTries),
		accepted: make(map[api.ID]time.Time),
		renewed:  make(map[api.ID]time.Time),
		places:   firstEnrolling,
		pacer:    pacer,
	}
}

// takeCSRs takes what a poll showed that began at the given time.
func (a *Agent) takeCSRs(jobs []api.Job, begun time.Time) {
	t := &a.csrs
	// An answer that was on its way while a CSR was accepted still shows that
	// job; handling it again would make a second version of the certificate.
	maps.DeleteFunc(t.accepted, func(_ api.ID, at time.Time) bool { return at.Before(begun) })
	maps.DeleteFunc(t.renewed, func(_ api.ID, at time.Time) bool { return begun.Sub(at) > renewedFor*a.opts.PollInterval })
	shown := make(map[api.ID]bool)
	for _, job := range jobs {
		shown[job.ID] = true
	}
	maps.DeleteFunc(t.tries, func(id api.ID, _ *csrTries) bool { return !shown[id] && !t.inHand[id] })
	now := time.Now()
	if t.due.After(now) {
		return
	}
	if len(t.inHand) == 0 {
		t.places = min(t.places, firstEnrolling)
	}
	jobs = slices.SortedStableFunc(slices.Values(jobs), func(a, b api.Job) int { return t.lastTry(a).Compare(t.lastTry(b)) })
	for _, job := range jobs {
		_, done := t.accepted[job.ID]
		tries := t.tries[job.ID]
		if done || t.inHand[job.ID] || tries != nil && tries.due.After(now) {
			continue
		}
		job.TargetConfig = nil // enrolment needs none
		if t.size+jobSize(job) > maxWaitingCSRs {
			t.follow = true
			continue
		}
		t.inHand[job.ID] = true
		t.size += jobSize(job)
		line, ok := t.lines[job.CertificateID]
		if !ok {
			t.next = append(t.next, job.CertificateID)
		}
		t.lines[job.CertificateID] = append(line, job)
	}
	a.startCSRs()
}

// endless reports whether a poll that began at the given time asks for the next
// CSR of a certificate that was just renewed.
func (t *csrTable) endless(jobs []api.Job, begun time.Time) bool {
	return slices.ContainsFunc(jobs, func(job api.Job) bool {
		at, ok := t.renewed[job.CertificateID]
		return ok && at.Before(begun)
	})
}

// lastTry is when a job was last tried; zero for never.
func (t *csrTable) lastTry(job api.Job) time.Time {
	if tries := t.tries[job.ID]; tries != nil {
		return tries.last
	}
	return time.Time{}
}

// startCSRs fills the free places, with one CSR at a time for a certificate.
func (a *Agent) startCSRs() {
	t := &a.csrs
	for len(t.next) > 0 && t.underWay < t.places && !a.stopping {
		line := t.lines[t.next[0]]
		job := line[0]
		line[0] = api.Job{} // so that it can be freed
		t.lines[t.next[0]] = line[1:]
		t.next = t.next[1:]
		t.size -= jobSize(job)
		t.underWay++
		a.startEnrol(job)
	}
}

// jobSize is the memory that a job takes, roughly.
func jobSize(job api.Job) int {
	size := 256 + len(job.CommonName)
	for _, name := range job.SANs {
		size += 16 + len(name)
	}
	return size
}

func (a *Agent) startEnrol(job api.Job) {
	tries := a.csrs.tries[job.ID]
	if tries == nil {
		tries = &csrTries{pacer: pace.New(a.opts.PollInterval, a.opts.Rand)}
		a.csrs.tries[job.ID] = tries
	}
	tries.last = time.Now()
	a.spawn(func() func() {
		err := a.opts.Enroller.Enroll(a.calls, a.claims, job)
		if a.lost(&tries.patience, err) {
			err = &enroll.RefusedError{Reason: "given up after several tries: " + err.Error(), Err: err}
		}
		if refused, ok := errors.AsType[*enroll.RefusedError](err); ok {
			a.refuse(job.ID, refused.Error())
		}
		return func() { a.enrolled(job, err) }
	}, func(err error) {
		a.refuse(job.ID, err.Error())
		a.enrolled(job, &enroll.RefusedError{Reason: err.Error(), Err: err})
	})
}

// enrolled takes the outcome of a CSR.
func (a *Agent) enrolled(job api.Job, err error) {
	t := &a.csrs
	delete(t.inHand, job.ID)
	t.underWay--
	if len(t.lines[job.CertificateID]) > 0 {
		t.next = append(t.next, job.CertificateID)
	} else {
		delete(t.lines, job.CertificateID)
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
		a.log.Warn("CSR not accepted yet: it is tried again", "job", job.ID, "certificate", job.CertificateID,
			"error", err, "next_try_in", wait.Round(time.Millisecond).String())
	}
	a.deliver(job.ID)
	a.startCSRs()
	if t.follow && len(t.inHand) == 0 {
		t.follow = false
		a.pollSoon()
	}
}

// answered notes that the control plane copes.
func (t *csrTable) answered() {
	t.pacer.Next(pace.Outcome{})
	t.places = min(t.places+1, maxEnrolling)
}

// failed sets the next try of a job, or of all of them, after a temporary
// failure.
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
	for cert, line := range t.lines {
		for _, job := range line {
			delete(t.inHand, job.ID)
		}
		t.lines[cert] = nil
	}
	for _, cert := range t.next {
		delete(t.lines, cert)
	}
	t.next, t.size = nil, 0
	t.places = 1
	if left := t.due.Sub(now); left > 0 {
		// Sent together with the one that failed first: the same event.
		wait = max(left, outcome.RetryAfter)
	} else {
		wait = t.pacer.Next(outcome)
	}
	t.due = now.Add(wait)
	return wait
}

// isJobsOwn reports whether a failure says nothing of other jobs: there is no
// key for this one, or the control plane is well and does not like it. A
// profile's refusal is answered 500.
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
