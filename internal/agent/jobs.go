package agent

import (
	"context"
	"errors"
	"slices"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/deploy"
	"certctl-agent/internal/installed"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/pace"
	"certctl-agent/internal/transaction"
)

// jobTable holds the deployments that wait or run.
//
// There may be thousands of them, so an event does not look at jobs that wait for another one.
type jobTable struct {
	slots      chan struct{} // one element for each running deployment that does not yield
	unfinished []api.Job     // of an earlier run of the agent, not resumed yet
	waiting    int           // jobs that have not started
	running    int           // jobs that have started
	yielding   int           // size of the jobs that gave up their slot to wait, in bytes
	ready      []*waitingJob // only need a slot
	resources  resources
	later      dueQueue[*waitingJob] // jobs whose last try could not start
	timer      *time.Timer           // fires at the earliest of later, or at due
	due        time.Time             // no job starts before; set from a Retry-After
}

// waitingJob is a deployment that has not started: there is no slot, its target or certificate is
// busy, or its last try could not start. While a try runs, its goroutine may read it, and the loop
// does not change it.
type waitingJob struct {
	timed
	job   api.Job
	since time.Time // when it was claimed or resumed

	// runningUnanswered: an earlier try may have reported the status Running, but got no answer.
	runningUnanswered bool

	// lock is the lock (see transaction.BusyError) that was busy when this job was last tried. Of
	// the jobs that need it only one tries again; the others wait for that job.
	lock string

	pacer    *pace.Pacer
	patience pace.Patience // for fetching the certificate; a running deployment owns it
}

func newJobTable(slots int) jobTable {
	return jobTable{
		slots:     make(chan struct{}, slots),
		resources: make(resources),
		timer:     stoppedTimer(),
	}
}

func (t *jobTable) add(job api.Job, runningUnanswered bool) {
	t.waiting++
	t.enter(&waitingJob{job: job, since: time.Now(), runningUnanswered: runningUnanswered})
}

// needs lists what a job holds from when it is ready until it ends.
func (w *waitingJob) needs() []need {
	all := []need{{"job", string(w.job.ID)}, w.certificate()}
	if w.job.TargetID != "" {
		all = append(all, need{"target", string(w.job.TargetID)})
	}
	if w.lock != "" {
		all = append(all, need{"lock", w.lock})
	}
	return all
}

// certificate is held by one job until that job releases it.
func (w *waitingJob) certificate() need { return need{"certificate", string(w.job.CertificateID)} }

// enter makes a job ready, or lets it wait behind the jobs that hold what it needs.
func (t *jobTable) enter(w *waitingJob) {
	if t.resources.take(w) {
		t.ready = append(t.ready, w)
	}
}

// release takes needs away from a job.
func (t *jobTable) release(w *waitingJob, needs ...need) {
	t.ready = append(t.ready, t.resources.release(w, needs...)...)
}

// end takes everything away from a job, except a lock that is still busy: this job tries again for
// all jobs that need it.
func (t *jobTable) end(w *waitingJob, err error) {
	had := w.needs()
	w.lock = ""
	if busy, ok := errors.AsType[*transaction.BusyError](err); ok {
		w.lock = busy.Lock
	}
	t.release(w, slices.DeleteFunc(had, func(n need) bool { return n == need{"lock", w.lock} })...)
}

// claimed is the recorded answer to a poll.
type claimed struct {
	csrs        []api.Job
	deployments []api.Job
	refused     []api.ID // jobs that now have a report
	more        bool     // the control plane had more jobs than MaxJobs

	// again has the deployments that still had reports of an earlier claim. The new claim replaces
	// them, but a status that was sent without an answer may still arrive.
	again map[api.ID]bool
}

// maxYielding bounds the total size of deployments that gave up their slot to wait for a directory,
// in bytes. While it is exceeded, no deployment starts.
const maxYielding = 5 << 20

// maxNameless bounds the log lines for jobs without a valid id, per poll: a broken control plane
// sends them with every poll.
const maxNameless = 20

// record writes the jobs of a poll to disk. It runs in the poll's goroutine, so that the loop does
// not wait for the disk.
func (a *Agent) record(work api.Work) claimed {
	var c claimed
	var deployments []api.Job
	for _, job := range work.Jobs {
		switch {
		case job.AwaitsCSR():
			c.csrs = append(c.csrs, job)
		case job.IsDeployment():
			deployments = append(deployments, job)
		default:
			a.log.Debug("job ignored: not for agents", "job", job.ID, "type", job.Type, "status", job.Status)
		}
	}
	if c.more = work.Excess > 0; c.more {
		a.log.Error("a poll returned more jobs than any host has targets: the rest was ignored", "limit", api.MaxJobs, "left_out", work.Excess)
	}
	nameless := 0 // jobs that cannot be reported
	for _, m := range work.Malformed {
		if m.ID != "" {
			a.refuse(m.ID, m.Err.Error())
			c.refused = append(c.refused, m.ID)
			continue
		}
		if nameless++; nameless <= maxNameless {
			a.log.Error("job ignored: its id is invalid", "job", m.Name, "type", m.Type, "error", m.Err)
		}
	}
	if nameless > maxNameless {
		a.log.Error("more jobs were ignored: their ids are invalid", "jobs", nameless-maxNameless)
	}
	c.again = make(map[api.ID]bool)
	for _, job := range deployments {
		c.again[job.ID] = len(a.opts.Ledger.UndeliveredOf(job.ID)) > 0
	}
	accepted, refused := a.opts.Ledger.Claim(deployments, time.Now())
	for _, r := range refused {
		a.refuse(r.Job.ID, "the job could not be recorded on the agent's disk, so it was not started: "+r.Err.Error())
		c.refused = append(c.refused, r.Job.ID)
	}
	c.deployments = accepted
	return c
}

// refuse reports a job as Failed before it has started.
func (a *Agent) refuse(job api.ID, reason string) {
	a.log.Error("job refused", "job", job, "reason", reason)
	if err := a.opts.Ledger.Report(job, api.JobStatus{Status: api.StatusFailed, Error: reason}); err != nil {
		a.log.Error("the refusal of a job could not be recorded and may not reach the control plane", "job", job, "error", err)
	}
}

// resume resumes the unfinished jobs and reports of an earlier run of the agent. The first poll
// triggers it.
func (a *Agent) resume() {
	if a.resumed {
		return
	}
	a.resumed = true
	for _, job := range a.jobs.unfinished {
		a.log.Info("unfinished job resumed", "job", job.ID, "certificate", job.CertificateID, "target", job.TargetID)
		a.jobs.add(job, true) // the ledger does not record whether Running was answered
	}
	a.jobs.unfinished = nil
	a.startJobs()
	a.deliver()
}

// take starts the jobs of a poll that started at the given time.
func (a *Agent) take(c claimed, started time.Time) {
	if !c.more && (len(c.deployments) > 0 || len(c.csrs) == 0) && !a.csrs.endless(c.csrs, started) {
		a.fruitless = 0
	} else {
		a.fruitless++
	}
	a.takeCSRs(c.csrs, started)
	if c.more {
		a.pollSoon()
	}
	for _, job := range c.deployments {
		a.log.Info("deployment claimed", "job", job.ID, "certificate", job.CertificateID, "target", job.TargetID, "target_type", job.TargetType)
		a.jobs.add(job, c.again[job.ID])
		a.scheduleReports(job.ID) // this claim has replaced the reports of an earlier one
	}
	a.startJobs()
	a.deliver(c.refused...)
}

// startJobs fills the free slots.
func (a *Agent) startJobs() {
	t := &a.jobs
	if a.stopping {
		return
	}
	now := time.Now()
	for _, w := range t.later.take(now) {
		t.enter(w)
	}
	for len(t.ready) > 0 && t.yielding < maxYielding && !t.due.After(now) {
		select {
		case t.slots <- struct{}{}:
		default:
			return // the next job that releases a slot calls startJobs
		}
		w := t.ready[0]
		t.ready[0] = nil
		t.ready = t.ready[1:]
		had := w.needs()
		if newer, ok := a.opts.Ledger.Job(w.job.ID); ok {
			w.job = newer // claimed again while it waited
		}
		if !slices.Equal(had, w.needs()) {
			<-t.slots
			t.release(w, had...)
			t.enter(w)
			continue
		}
		t.waiting--
		t.running++
		a.startDeployment(w)
	}
	switch {
	case len(t.ready) > 0 && t.due.After(now):
		t.timer.Reset(t.due.Sub(now)) // the later ones must wait for that too
	case len(t.later) > 0:
		t.timer.Reset(t.later[0].due.Sub(now))
	}
}

// held is the slot and the certificate of a running job. The job's goroutine owns it, and after its
// end the loop.
type held struct {
	*Agent
	w           *waitingJob
	slot        bool // false: given up
	certificate bool // false: released
}

// releaseCertificate lets other jobs of the certificate start.
func (h *held) releaseCertificate() {
	if !h.certificate {
		return
	}
	h.certificate = false
	h.events <- func() {
		h.jobs.release(h.w, h.w.certificate())
		h.startJobs()
	}
}

// yield gives up the slot while the job waits for another one. It gets a slot back before jobs that
// have not started.
func (h *held) yield(size int, wait func(context.Context) error) error {
	h.releaseSlot()
	h.events <- func() { h.addYielding(size) }
	defer func() { h.events <- func() { h.addYielding(-size) } }()
	if err := wait(h.calls); err != nil {
		return err
	}
	select {
	case h.jobs.slots <- struct{}{}:
		h.slot = true
		return nil
	case <-h.calls.Done():
		return context.Cause(h.calls)
	}
}

func (h *held) addYielding(size int) {
	h.jobs.yielding += size
	h.startJobs()
}

func (h *held) releaseSlot() {
	if h.slot {
		h.slot = false
		<-h.jobs.slots
	}
}

// startDeployment starts a job that has a slot and everything it needs.
func (a *Agent) startDeployment(w *waitingJob) {
	h := &held{Agent: a, w: w, slot: true, certificate: true}
	a.spawn(func() func() {
		outcome, err := a.deploy(h)
		return func() { a.deployed(h, outcome, err) }
	}, func(err error) {
		a.deployed(h, deploy.Outcome{Status: api.StatusFailed, Error: err.Error()}, nil)
	})
}

// deploy carries out one deployment and makes its outcome durable.
func (a *Agent) deploy(h *held) (deploy.Outcome, error) {
	job := h.w.job
	if err := a.opts.Ledger.Start(job.ID); err != nil {
		a.log.Warn("the ledger could not record that a job has started", "job", job.ID, "error", err)
	}
	var outcome deploy.Outcome
	var err error
	panicked := a.contain(func() {
		outcome, err = a.opts.Deployer.Deploy(a.calls, a.work, job, deploy.Holds{ReleaseCertificate: h.releaseCertificate, Yield: h.yield})
	})
	if panicked != nil {
		outcome, err = deploy.Outcome{Status: api.StatusFailed, Error: panicked.Error(), Broken: true}, nil
	}
	if err != nil && context.Cause(a.calls) == nil && time.Since(h.w.since) > reportTTL {
		outcome.Status, outcome.Error, err = api.StatusFailed, "gave up after a week: "+err.Error(), nil
	}
	if a.exhausted(&h.w.patience, err) {
		outcome.Status, outcome.Error, err = api.StatusFailed, "gave up after several tries: "+err.Error(), nil
	}
	if err != nil {
		return outcome, err
	}
	if outcome.Status == api.StatusFailed && !outcome.Broken && context.Cause(a.work) != nil {
		// Rolled back because the agent stops, which is not a failure of the job. The next start
		// resumes it.
		return outcome, errStopping
	}
	if err := a.opts.Ledger.Finish(job.ID, reports(outcome, h.w.runningUnanswered)); err != nil {
		a.log.Error("the outcome of a job could not be recorded: after a restart it would run again", "job", job.ID, "error", err)
	}
	if outcome.Status == api.StatusCompleted && job.TargetID != "" {
		if err := a.opts.Installed.Put(entryOf(job, outcome)); err != nil {
			a.log.Warn("the list of served certificates could not be written", "error", err)
		}
	}
	return outcome, nil
}

// reports lists the reports of an outcome, in order. If a Running was not answered, it may still
// arrive and overwrite the final status, so the final status is sent again later.
func reports(o deploy.Outcome, runningUnanswered bool) []ledger.Report {
	var all []ledger.Report
	if o.Verification != nil {
		all = append(all, ledger.Report{Verification: o.Verification})
	}
	final := ledger.Report{Status: &api.JobStatus{Status: o.Status, Error: o.Error}}
	all = append(all, final)
	if runningUnanswered || o.RunningUnanswered {
		final.Repeat = true
		all = append(all, final)
	}
	return all
}

func entryOf(job api.Job, o deploy.Outcome) installed.Entry {
	return installed.Entry{
		CertificateID: job.CertificateID,
		CommonName:    o.CommonName,
		TargetID:      job.TargetID,
		TargetType:    job.TargetType,
		Fingerprint:   o.Fingerprint,
		NotAfter:      o.NotAfter,
		DeployedAt:    time.Now(),
	}
}

// deployed records the end of a deployment: its outcome, or err if it did not start and must be
// retried.
func (a *Agent) deployed(h *held, o deploy.Outcome, err error) {
	w, job := h.w, h.w.job
	h.releaseSlot()
	a.jobs.running--
	a.jobs.end(w, err)
	switch {
	case err != nil && a.stopping:
		a.log.Info("deployment left for the next start", "job", job.ID, "target", job.TargetID, "error", err)
	case err != nil:
		w.runningUnanswered = w.runningUnanswered || o.RunningUnanswered
		a.jobs.waiting++
		a.repairLater()
		if w.pacer == nil {
			w.pacer = pace.NewYielding(a.opts.PollInterval, a.opts.Rand)
		}
		wait := w.pacer.Next(pace.After(err))
		w.due = time.Now().Add(wait)
		if api.RateLimited(err) && api.RetryAfter(err) > 0 && w.due.After(a.jobs.due) {
			a.jobs.due = w.due // every deployment starts with a fetch
		}
		a.jobs.later.add(w)
		a.log.Warn("deployment not started: it will be retried", "job", job.ID, "target", job.TargetID, "error", err, "next_try_in", wait.Round(time.Millisecond).String())
	case o.Status == api.StatusCompleted:
		a.counters.Job(job.TargetType, o.Status, o.Duration)
		a.log.Info("deployment completed", "job", job.ID, "certificate", job.CertificateID, "target", job.TargetID,
			"target_type", job.TargetType, "fingerprint", o.Fingerprint, "unchanged", o.Unchanged, "took", o.Duration.Round(time.Millisecond).String())
	default:
		a.counters.Job(job.TargetType, o.Status, o.Duration)
		a.log.Error("deployment failed", "job", job.ID, "certificate", job.CertificateID, "target", job.TargetID,
			"target_type", job.TargetType, "error", o.Error, "took", o.Duration.Round(time.Millisecond).String())
		a.repairLater()
	}
	a.deliver(job.ID)
	a.startJobs()
}
