package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/pace"
	"certctl-agent/internal/status"
)

const (
	// reportTTL is how long the agent tries to deliver a report.
	reportTTL = 7 * 24 * time.Hour

	// maxSending bounds the reports under way at once. A distant control plane takes 0.1 s to
	// answer, and a thousand renewals may end within seconds.
	maxSending = 4

	// repeatAfter is how long after a final status it is repeated (see reports): longer than a
	// kernel retransmits data of a closed connection (Linux: under two minutes), and than gateways
	// queue a request.
	repeatAfter = 5 * time.Minute
)

// deliveryTable schedules the undelivered reports. Each job has its own back-off, so that a job
// whose reports are refused (an unknown job id is answered 500) does not block the others.
//
// There may be thousands of jobs, so an event looks only at its own.
type deliveryTable struct {
	jobs  map[api.ID]*pacedDelivery
	queue dueQueue[*pacedDelivery] // without the jobs of the running round
	timer *time.Timer
	stats status.Activity
}

type pacedDelivery struct {
	timed
	queued bool // it is in the queue
	job    api.ID
	pacer  *pace.Pacer
	repeat bool // the next report is a repetition

	// patience is that of the job's first report; a running round owns it.
	patience *pace.Patience
}

// report is a report that is due.
type report struct {
	ledger.Delivery
	patience *pace.Patience
}

// delivered is the outcome of one try.
type delivered struct {
	job api.ID
	err error
}

func newDeliveryTable() deliveryTable {
	return deliveryTable{jobs: make(map[api.ID]*pacedDelivery), timer: stoppedTimer()}
}

// scheduleReports schedules the undelivered reports of a job.
func (a *Agent) scheduleReports(job api.ID) {
	undelivered := a.opts.Ledger.UndeliveredOf(job)
	if len(undelivered) == 0 {
		a.delivery.remove(job)
		return
	}
	p := a.delivery.jobs[job]
	if p == nil {
		p = &pacedDelivery{job: job, pacer: pace.NewYielding(a.opts.PollInterval, a.opts.Rand), patience: new(pace.Patience)}
		a.delivery.jobs[job] = p
	}
	repeat := undelivered[0].Report.Repeat
	switch {
	case repeat && !p.repeat:
		a.delivery.enqueue(p, time.Now().Add(repeatAfter))
	case !repeat && p.repeat:
		a.delivery.enqueue(p, time.Time{})
	case !p.queued:
		a.delivery.enqueue(p, p.due)
	}
	p.repeat = repeat
}

// enqueue schedules the reports of a job for due.
func (t *deliveryTable) enqueue(p *pacedDelivery, due time.Time) {
	if p.queued {
		t.queue.remove(p)
	}
	p.due, p.queued = due, true
	t.queue.add(p)
}

// remove removes a job that has no more reports.
func (t *deliveryTable) remove(job api.ID) {
	if p := t.jobs[job]; p != nil && p.queued {
		t.queue.remove(p)
	}
	delete(t.jobs, job)
}

// deliver sends the reports that are due, in another goroutine. Changed are the jobs that may have
// new reports.
func (a *Agent) deliver(changed ...api.ID) {
	for _, job := range changed {
		a.scheduleReports(job)
	}
	if a.stopping || !a.resumed || a.delivery.stats.Running {
		return
	}
	now := time.Now()
	due := a.dueReports(now)
	if len(due) == 0 {
		a.setDeliveryTimer(now)
		return
	}
	a.delivery.stats.Running = true
	a.spawn(func() func() {
		results := a.send(a.calls, due)
		return func() { a.sent(results) }
	}, func(err error) {
		var results []delivered
		for _, r := range due {
			results = append(results, delivered{r.Job, err})
		}
		a.sent(results)
	})
}

// dueReports takes the reports that are due from the queue, the oldest first.
func (a *Agent) dueReports(now time.Time) []report {
	var due []report
	for _, p := range a.delivery.queue.take(now) {
		p.queued = false
		for _, d := range a.opts.Ledger.UndeliveredOf(p.job) {
			if !d.Report.Repeat || p.repeat {
				due = append(due, report{d, p.patience})
			}
		}
	}
	slices.SortStableFunc(due, func(a, b report) int { return a.Recorded.Compare(b.Recorded) })
	return due
}

// send tries each report once, several jobs in parallel. It keeps the order within a job: after a
// report that failed it does not try the job's next ones. If the network is down or the control
// plane is overloaded, the remaining reports fail untried; so the first is sent alone.
func (a *Agent) send(ctx context.Context, due []report) []delivered {
	var jobs []api.ID // in order
	reports := make(map[api.ID][]report)
	for _, r := range due {
		if reports[r.Job] == nil {
			jobs = append(jobs, r.Job)
		}
		reports[r.Job] = append(reports[r.Job], r)
	}
	var round deliveryRound
	round.send(ctx, a, reports[jobs[0]])
	var senders sync.WaitGroup
	slots := make(chan struct{}, maxSending)
	for _, job := range jobs[1:] {
		slots <- struct{}{}
		senders.Go(func() {
			round.send(ctx, a, reports[job])
			<-slots
		})
	}
	senders.Wait()
	return round.results
}

// deliveryRound collects the outcomes of a round.
type deliveryRound struct {
	mu      sync.Mutex // guards the fields below
	results []delivered
	down    error // the outcome of all further reports
}

// send tries the reports of one job.
func (d *deliveryRound) send(ctx context.Context, a *Agent, reports []report) {
	for _, r := range reports {
		d.mu.Lock()
		err := d.down
		d.mu.Unlock()
		if err == nil {
			if panicked := a.contain(func() { err = a.sendOne(ctx, r) }); panicked != nil {
				err = panicked
			}
		}
		d.mu.Lock()
		d.results = append(d.results, delivered{r.Job, err})
		switch api.Kind(err) {
		case "network", "timeout", "cancelled", "rate_limited":
			d.down = err
		}
		d.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// sendOne delivers one report and removes it from the ledger. Its error is temporary.
func (a *Agent) sendOne(ctx context.Context, r report) error {
	if !slices.Contains(a.opts.Ledger.UndeliveredOf(r.Job), r.Delivery) {
		return nil // superseded by a newer claim while other reports were sent
	}
	if time.Since(r.Recorded) > reportTTL {
		return a.giveUp(r, "a week has passed")
	}
	var err error
	if r.Report.Verification != nil {
		err = a.opts.Plane.ReportVerification(ctx, r.Job, *r.Report.Verification)
	} else {
		err = a.opts.Plane.ReportStatus(ctx, r.Job, *r.Report.Status)
	}
	exhausted := a.exhausted(r.patience, err)
	switch {
	case err == nil:
		if err := a.opts.Ledger.Delivered(r.Delivery); err != nil {
			a.log.Error("a delivered report could not be removed from the ledger: after a restart it is sent again", "job", r.Job, "error", err)
		}
		return nil
	case exhausted:
		return a.giveUp(r, "it is still refused after several tries: "+err.Error())
	case api.Temporary(err):
		return err
	}
	return a.giveUp(r, err.Error())
}

// giveUp drops a report. The job's next report starts with new patience.
func (a *Agent) giveUp(r report, reason string) error {
	*r.patience = pace.Patience{}
	a.log.Error("gave up on a report", "job", r.Job, "reason", reason)
	if err := a.opts.Ledger.Drop(r.Delivery, reason); err != nil {
		a.log.Error("a report could not be removed from the ledger", "job", r.Job, "error", err)
	}
	return nil
}

// sent records the outcomes of a round.
func (a *Agent) sent(results []delivered) {
	a.delivery.stats.Running = false
	now := time.Now()
	a.delivery.stats.LastAttempt = now
	jobs := make([]api.ID, 0, len(results))
	for _, r := range results {
		jobs = append(jobs, r.job)
		a.delivery.record(now, r.err)
		p := a.delivery.jobs[r.job]
		if r.err == nil || p == nil {
			continue
		}
		wait := p.pacer.Next(pace.After(r.err))
		a.delivery.enqueue(p, now.Add(wait))
		a.counters.Failure(status.Delivery, api.Kind(r.err))
		if !a.stopping {
			a.log.Warn("a report was not delivered: it is kept and will be retried", "job", r.job, "error", r.err, "next_try_in", wait.Round(time.Millisecond).String())
		}
	}
	a.deliver(jobs...)
}

// record records the outcome of one try for the snapshot.
func (t *deliveryTable) record(now time.Time, err error) {
	if err == nil {
		t.stats.LastSuccess, t.stats.LastError, t.stats.LastErrorKind, t.stats.Failures = now, "", "", 0
		return
	}
	t.stats.LastError, t.stats.LastErrorKind = err.Error(), api.Kind(err)
	t.stats.Failures++
}

// setDeliveryTimer wakes the loop when the next report is due.
func (a *Agent) setDeliveryTimer(now time.Time) {
	a.delivery.stats.NextDue = time.Time{}
	if len(a.delivery.queue) == 0 {
		return
	}
	a.delivery.stats.NextDue = a.delivery.queue[0].due
	a.delivery.timer.Reset(max(a.delivery.stats.NextDue.Sub(now), 0))
}

// deliverLast tries once more to deliver the remaining reports when the agent stops.
func (a *Agent) deliverLast() {
	var due []report
	for _, d := range a.opts.Ledger.Undelivered() {
		if !d.Report.Repeat {
			due = append(due, report{d, new(pace.Patience)})
		}
	}
	if len(due) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.calls), finalDelivery)
	defer cancel()
	for _, r := range a.send(ctx, due) {
		if r.err != nil {
			a.log.Warn("a report was not delivered: it is kept for the next start", "job", r.job, "error", r.err)
		}
	}
}
