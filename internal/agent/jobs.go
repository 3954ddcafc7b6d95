package agent

import (
	"context"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/deploy"
	"certctl-agent/internal/installed"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/pace"
)

// jobTable is what the loop has in hand of deployments: those that wait or run.
type jobTable struct {
	slots      chan struct{} // one element for each deployment that runs and waits for no other
	unfinished []api.Job
	waiting    []*waitingJob
	running    map[api.ID]api.Job // begun, by job id
	targets    map[api.ID]bool    // target ids a running deployment is for
	certs      map[api.ID]api.ID  // certificates that are a running job's alone; its id
	timer      *time.Timer        // the earliest retry of a waiting job
}

// waitingJob is a deployment that has not begun: no slot, its target or its
// certificate busy, or a try could not begin.
type waitingJob struct {
	job   api.Job
	since time.Time // when it was claimed or resumed

	// runningUnanswered: an earlier try reported, or may have, that the job
	// runs, and got no answer.
	runningUnanswered bool

	pacer    *pace.Pacer
	due      time.Time
	patience pace.Patience // with its fetch; a running deployment owns it
}

func newJobTable(slots int) jobTable {
	return jobTable{
		slots:   make(chan struct{}, slots),
		running: make(map[api.ID]api.Job),
		targets: make(map[api.ID]bool),
		certs:   make(map[api.ID]api.ID),
		timer:   stoppedTimer(),
	}
}

func (t *jobTable) add(job api.Job, runningUnanswered bool) {
	t.waiting = append(t.waiting, &waitingJob{job: job, since: time.Now(), runningUnanswered: runningUnanswered})
}

// claimed is what a poll brought, recorded.
type claimed struct {
	csrs        []api.Job
	deployments []api.Job
	refused     []api.ID        // job ids; each has a report now
	more        bool            // there were more jobs than one poll can bring
	again       map[api.ID]bool // deployments of which an earlier claim has something to report
}

// maxYielding bounds the deployments that have begun and given their slot away to
// wait for a directory: each holds its certificate and its plan in memory.
const maxYielding = 64

// maxNameless bounds the lines that one poll's jobs without a usable id have in
// the log: a control plane that is broken sends them with every poll.
const maxNameless = 20

// record writes the jobs of a poll to disk. It runs in the poll's goroutine: the
// loop does not wait for a disk.
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
		a.log.Error("a poll brought more jobs than any host has targets: the rest was left out", "limit", api.MaxJobs, "left_out", work.Excess)
	}
	nameless := 0 // jobs that cannot even be reported
	for _, m := range work.Malformed {
		if m.ID != "" {
			a.refuse(m.ID, m.Err.Error())
			c.refused = append(c.refused, m.ID)
			continue
		}
		if nameless++; nameless <= maxNameless {
			a.log.Error("job ignored: its id is not one", "job", m.Name, "type", m.Type, "error", m.Err)
		}
	}
	if nameless > maxNameless {
		a.log.Error("more jobs were ignored: their ids are none", "jobs", nameless-maxNameless)
	}
	c.again = make(map[api.ID]bool)
	for _, job := range deployments {
		c.again[job.ID] = len(a.opts.Ledger.UndeliveredOf(job.ID)) > 0
	}
	accepted, refused := a.opts.Ledger.Claim(deployments, time.Now())
	for _, r := range refused {
		a.refuse(r.Job.ID, "the job could not be recorded on the agent's disk, so it was not begun: "+r.Err.Error())
		c.refused = append(c.refused, r.Job.ID)
	}
	c.deployments = accepted
	return c
}

// refuse reports a job Failed that was never begun.
func (a *Agent) refuse(job api.ID, reason string) {
	a.log.Error("job refused", "job", job, "reason", reason)
	if err := a.opts.Ledger.Report(job, api.JobStatus{Status: api.StatusFailed, Error: reason}); err != nil {
		a.log.Error("the refusal of a job could not be recorded and may not reach the control plane", "job", job, "error", err)
	}
}

// take starts the jobs of a poll that began at the given time.
func (a *Agent) take(c claimed, begun time.Time) {
	if !c.more && (len(c.deployments) > 0 || len(c.csrs) == 0) && !a.csrs.endless(c.csrs, begun) {
		a.fruitless = 0
	} else {
		a.fruitless++
	}
	a.takeCSRs(c.csrs, begun)
	if c.more {
		a.pollSoon()
	}
	for _, job := range c.deployments {
		a.log.Info("deployment claimed", "job", job.ID, "certificate", job.CertificateID, "target", job.TargetID, "target_type", job.TargetType)
		a.jobs.add(job, c.again[job.ID])
		a.noteReports(job.ID) // those of an earlier claim are superseded
	}
	a.startJobs()
	a.deliver(c.refused...)
}

// startJobs fills the free slots.
func (a *Agent) startJobs() {
	if a.stopping {
		return
	}
	now := time.Now()
	var later []*waitingJob
	for i, w := range a.jobs.waiting {
		if len(a.jobs.slots) == cap(a.jobs.slots) || len(a.jobs.running) >= cap(a.jobs.slots)+maxYielding {
			later = append(later, a.jobs.waiting[i:]...)
			break
		}
		if newer, ok := a.opts.Ledger.Job(w.job.ID); ok {
			w.job = newer // handed out again while it waited
		}
		if w.due.After(now) || a.jobs.busy(w.job) || !a.startDeployment(w) {
			later = append(later, w)
		}
	}
	a.jobs.waiting = later
	a.setJobTimer(now)
}

// busy reports whether a job's target or certificate is another's, or its id.
func (t *jobTable) busy(job api.Job) bool {
	_, running := t.running[job.ID]
	_, taken := t.certs[job.CertificateID]
	return running || taken || job.TargetID != "" && t.targets[job.TargetID]
}

// free lets other jobs of a certificate begin.
func (t *jobTable) free(job api.Job) {
	if t.certs[job.CertificateID] == job.ID {
		delete(t.certs, job.CertificateID)
	}
}

// turn is a slot and a certificate that a running job holds. It belongs to the
// job's goroutine, and when that has ended to the loop.
type turn struct {
	*Agent
	job    api.Job
	slot   bool // held
	shared bool
}

// share lets other jobs of the certificate begin.
func (t *turn) share() {
	if t.shared {
		return
	}
	t.shared = true
	t.events <- func() {
		t.jobs.free(t.job)
		t.startJobs()
	}
}

// yield gives the slot away while the job waits for another. It is had again
// before the loop can give it to a job that has not begun.
func (t *turn) yield(wait func(context.Context) error) error {
	t.leave()
	t.events <- t.startJobs
	if err := wait(t.calls); err != nil {
		return err
	}
	select {
	case t.jobs.slots <- struct{}{}:
		t.slot = true
		return nil
	case <-t.calls.Done():
		return context.Cause(t.calls)
	}
}

func (t *turn) leave() {
	if t.slot {
		t.slot = false
		<-t.jobs.slots
	}
}

// setJobTimer wakes the loop for the earliest retry. Jobs that wait for a slot
// or a target are started when one becomes free.
func (a *Agent) setJobTimer(now time.Time) {
	var earliest time.Time
	for _, w := range a.jobs.waiting {
		if w.due.After(now) && (earliest.IsZero() || w.due.Before(earliest)) {
			earliest = w.due
		}
	}
	if !earliest.IsZero() {
		a.jobs.timer.Reset(earliest.Sub(now))
	}
}

// startDeployment reports false when there is no slot.
func (a *Agent) startDeployment(w *waitingJob) bool {
	select {
	case a.jobs.slots <- struct{}{}:
	default:
		return false
	}
	job := w.job
	a.jobs.running[job.ID] = job
	a.jobs.certs[job.CertificateID] = job.ID
	if job.TargetID != "" {
		a.jobs.targets[job.TargetID] = true
	}
	t := &turn{Agent: a, job: job, slot: true}
	a.spawn(func() func() {
		outcome, err := a.deploy(t, w.since, w.runningUnanswered, &w.patience)
		return func() { a.deployed(w, t, outcome, err) }
	}, func(err error) {
		a.deployed(w, t, deploy.Outcome{Status: api.StatusFailed, Error: err.Error()}, nil)
	})
	return true
}

// deploy carries out one deployment and makes its outcome durable.
func (a *Agent) deploy(t *turn, since time.Time, runningUnanswered bool, patience *pace.Patience) (deploy.Outcome, error) {
	job := t.job
	if err := a.opts.Ledger.Start(job.ID); err != nil {
		a.log.Warn("the ledger could not note that a job has begun", "job", job.ID, "error", err)
	}
	var outcome deploy.Outcome
	var err error
	panicked := a.contain(func() {
		outcome, err = a.opts.Deployer.Deploy(a.calls, a.work, job, deploy.Turn{Share: t.share, Yield: t.yield})
	})
	if panicked != nil {
		outcome, err = deploy.Outcome{Status: api.StatusFailed, Error: panicked.Error(), Broken: true}, nil
	}
	if err != nil && context.Cause(a.calls) == nil && time.Since(since) > reportTTL {
		outcome.Status, outcome.Error, err = api.StatusFailed, "given up after a week: "+err.Error(), nil
	}
	if a.lost(patience, err) {
		outcome.Status, outcome.Error, err = api.StatusFailed, "given up after several tries: "+err.Error(), nil
	}
	if err != nil {
		return outcome, err
	}
	if outcome.Status == api.StatusFailed && !outcome.Broken && context.Cause(a.work) != nil {
		// Rolled back because the agent stops: not the job's failure. It is
		// resumed by the next start.
		return outcome, errStopping
	}
	if err := a.opts.Ledger.Finish(job.ID, reports(outcome, runningUnanswered)); err != nil {
		a.log.Error("the outcome of a job could not be recorded: after a restart it would run again", "job", job.ID, "error", err)
	}
	if outcome.Status == api.StatusCompleted && job.TargetID != "" {
		if err := a.opts.Installed.Put(entryOf(job, outcome)); err != nil {
			a.log.Warn("the list of served certificates could not be written", "error", err)
		}
	}
	return outcome, nil
}

// reports lists the reports on an outcome, in order. A
// "Running" that is still on its way would undo the verdict when it arrives, so
// after one that was not answered the verdict is said twice.
func reports(o deploy.Outcome, runningUnanswered bool) []ledger.Report {
	var all []ledger.Report
	if o.Verification != nil {
		all = append(all, ledger.Report{Verification: o.Verification})
	}
	verdict := ledger.Report{Status: &api.JobStatus{Status: o.Status, Error: o.Error}}
	all = append(all, verdict)
	if runningUnanswered || o.RunningUnanswered {
		verdict.Repeat = true
		all = append(all, verdict)
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

// deployed takes the end of a deployment: its outcome, or err when it did not
// begin and has to be tried again.
func (a *Agent) deployed(w *waitingJob, t *turn, o deploy.Outcome, err error) {
	job := w.job
	t.leave()
	a.jobs.free(job)
	delete(a.jobs.running, job.ID)
	delete(a.jobs.targets, job.TargetID)
	switch {
	case err != nil && a.stopping:
		a.log.Info("deployment left for the next start", "job", job.ID, "target", job.TargetID, "error", err)
	case err != nil:
		if w.pacer == nil {
			w.pacer = pace.NewYielding(a.opts.PollInterval, a.opts.Rand)
		}
		wait := w.pacer.Next(pace.After(err))
		w.due = time.Now().Add(wait)
		w.runningUnanswered = w.runningUnanswered || o.RunningUnanswered
		a.jobs.waiting = append(a.jobs.waiting, w)
		a.log.Warn("deployment not begun: it is tried again", "job", job.ID, "target", job.TargetID, "error", err, "next_try_in", wait.Round(time.Millisecond).String())
		a.repairLater()
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
