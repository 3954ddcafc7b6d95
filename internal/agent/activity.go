package agent

import (
	"errors"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pace"
	"certctl-agent/internal/status"
)

// activity is something done again and again: heartbeat, poll, discovery. It
// is never started twice at once.
type activity struct {
	name     string
	interval time.Duration
	pacer    *pace.Pacer
	timer    *time.Timer
	running  bool
	again    bool // asked for while it ran
	begun    time.Time
	stats    status.Activity
}

func (a *Agent) newActivity(name string, interval time.Duration, newPacer func(time.Duration, pace.Rand) *pace.Pacer) *activity {
	return &activity{name: name, interval: interval, pacer: newPacer(interval, a.o.Rand), timer: stoppedTimer()}
}

// stoppedTimer returns a timer whose channel never fires until it is reset, so
// that a select can name it before its time.
func stoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// after sets the next start.
func (act *activity) after(d time.Duration) {
	act.timer.Reset(d)
	act.stats.NextDue = time.Now().Add(d)
}

// begin starts an activity, or has it start again at once if it is running.
func (a *Agent) begin(act *activity) {
	if act.running {
		act.again = true
		return
	}
	if act == a.scan && a.o.Surveyor == nil {
		return
	}
	act.timer.Stop()
	act.running = true
	act.begun = time.Now()
	act.stats.LastAttempt = act.begun
	switch act {
	case a.beat:
		a.spawn(a.heartbeat, func(err error) { a.ended(a.beat, err) })
	case a.poll:
		a.firstPoll()
		a.spawn(a.claim, func(err error) { a.ended(a.poll, err) })
	case a.scan:
		a.spawn(a.survey, func(err error) { a.ended(a.scan, err) })
	case a.repair:
		a.spawn(a.mend, func(err error) { a.ended(a.repair, err) })
	}
}

// ended takes the outcome of an activity and sets its next start.
func (a *Agent) ended(act *activity, err error) {
	act.running = false
	now := time.Now()
	outcome := pace.After(err)
	wait := act.pacer.Next(outcome)
	if err == nil {
		act.stats.LastSuccess = now
		act.stats.LastError, act.stats.LastErrorKind = "", ""
		// The rhythm is from start to start, however long it took. What took
		// longer than its interval misses a turn.
		if rest := wait - now.Sub(act.begun); rest > 0 {
			wait = rest
		}
	} else {
		act.stats.LastError, act.stats.LastErrorKind = err.Error(), api.Kind(err)
		a.counters.Failure(act.name, api.Kind(err))
		a.logFailure(act, err, wait)
	}
	act.stats.Failures = act.pacer.Failures()
	if outcome.RateLimited {
		a.poll.pacer.Yield()
		a.scan.pacer.Yield()
	}
	if a.stopping {
		return
	}
	act.after(wait)
	a.afterFirst(act)
	a.tellServiceManager()
	if act.again {
		act.again = false
		a.begin(act)
	}
}

func (a *Agent) logFailure(act *activity, err error, wait time.Duration) {
	if a.stopping || errors.Is(err, api.ErrRetired) {
		return // the verdict has a line of its own
	}
	level := a.log.Warn
	if api.RateLimited(err) {
		level = a.log.Info
	}
	level("try failed", "activity", act.name, "error", err, "in_a_row", act.pacer.Failures(), "next_try_in", wait.Round(time.Millisecond).String())
}

// afterFirst keeps the order of the start: no poll before a heartbeat has been
// tried, so that a retired agent learns it before it claims work; no scan
// before the first poll.
func (a *Agent) afterFirst(act *activity) {
	switch {
	case act == a.beat && a.poll.stats.NextDue.IsZero():
		a.poll.after(a.firstDelay(a.poll))
	case act == a.poll && !a.polled:
		a.polled = true
		if a.o.Surveyor != nil && a.scan.stats.LastAttempt.IsZero() {
			a.scan.after(a.firstDelay(a.poll))
		}
	}
}

// heartbeat is the work of one heartbeat.
func (a *Agent) heartbeat() func() {
	err := a.o.Plane.Heartbeat(a.calls, a.o.Describe(a.calls))
	a.inContact.Store(err == nil)
	return func() {
		if err == nil && a.beat.stats.LastSuccess.IsZero() {
			a.log.Info("first heartbeat accepted")
		}
		a.ended(a.beat, err)
	}
}

// claim is the work of one poll: what it brings is on disk before the loop
// hears of it, since the control plane hands out a deployment only once.
func (a *Agent) claim() func() {
	begun := time.Now()
	work, err := a.o.Plane.Work(a.claims)
	if err != nil || a.isRetired() {
		return func() { a.ended(a.poll, err) }
	}
	claimed := a.record(work)
	return func() {
		a.take(claimed, begun)
		a.ended(a.poll, nil)
	}
}

// survey is the work of one scan.
func (a *Agent) survey() func() {
	begun := time.Now()
	stats, err := a.o.Surveyor.Run(a.calls)
	return func() {
		a.lastScan = scanStatus(stats, err)
		if err == nil {
			a.log.Info("scan reported", "files", stats.Files, "certificates", stats.Certificates,
				"reports", stats.Reports, "errors", stats.Errors, "took", time.Since(begun).Round(time.Millisecond).String())
		}
		a.ended(a.scan, err)
	}
}

// repairLater looks after what a deployment that failed, or could not begin,
// has left or met: a rollback that was not complete, a server that was not told.
func (a *Agent) repairLater() {
	switch {
	case a.o.Repair == nil || a.stopping:
	case a.repair.running:
		a.repair.again = true
	case a.repair.stats.NextDue.After(time.Now()): // no later than that
	default:
		a.repair.after(a.repair.pacer.Interval())
	}
}

// mend retries what recovery and rollbacks left to do, until nothing is left.
func (a *Agent) mend() func() {
	err := a.o.Repair(a.calls, a.work)
	return func() {
		a.ended(a.repair, err)
		if err == nil && !a.repair.running {
			a.repair.timer.Stop()
			a.repair.stats.NextDue = time.Time{}
		}
	}
}

// firstPoll takes up, at the time of the first poll, what an earlier run of
// the agent left unfinished or unreported.
func (a *Agent) firstPoll() {
	if a.resumed {
		return
	}
	a.resumed = true
	for _, job := range a.jobs.unfinished {
		a.log.Info("job taken up again", "job", job.ID, "certificate", job.CertificateID, "target", job.TargetID)
		a.jobs.add(job, true)
	}
	a.jobs.unfinished = nil
	a.startJobs()
	a.deliver()
}
