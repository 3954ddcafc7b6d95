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
	name  string
	pacer *pace.Pacer
	timer *time.Timer

	// work does it once, in a goroutine of its own. The loop calls done, unless
	// that is nil, before it counts the outcome.
	work func() (done func(), err error)

	off       bool                 // not configured: it never starts
	untilDone bool                 // it ends with its first success, until it is needed again
	first     func() time.Duration // delay of the first start, where that is spread
	next      *activity            // to be started after the first try of this one; nil: none

	again bool // asked for while it ran
	soon  bool // asked for soon while it ran
	stats status.Activity
}

func (a *Agent) newActivity(name string, interval time.Duration, newPacer func(time.Duration, pace.Rand) *pace.Pacer, work func() (func(), error)) *activity {
	pacer := newPacer(interval, a.opts.Rand)
	act := &activity{name: name, pacer: pacer, timer: stoppedTimer(), work: work, first: pacer.First}
	act.stats.IntervalSeconds = interval.Seconds()
	a.activities = append(a.activities, act)
	return act
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
	if act.stats.Running {
		act.again = true
		return
	}
	if act.off {
		return
	}
	act.timer.Stop()
	act.stats.Running = true
	act.stats.LastAttempt = time.Now()
	a.spawn(func() func() {
		done, err := act.work()
		return func() {
			if done != nil {
				done()
			}
			a.ended(act, err)
		}
	}, func(err error) { a.ended(act, err) })
}

// ended takes the outcome of an activity and sets its next start.
func (a *Agent) ended(act *activity, err error) {
	act.stats.Running = false
	now := time.Now()
	outcome := pace.After(err)
	if outcome.RateLimited || a.opts.Budget.Throttled() {
		a.poll.pacer.Yield()
		a.scan.pacer.Yield()
	}
	wait := act.pacer.Next(outcome)
	if err == nil {
		act.stats.LastSuccess = now
		act.stats.LastError, act.stats.LastErrorKind = "", ""
		// The rhythm is from start to start, however long it took. What took
		// longer than its interval misses a turn.
		if rest := wait - now.Sub(act.stats.LastAttempt); rest > 0 {
			wait = rest
		}
	} else {
		act.stats.LastError, act.stats.LastErrorKind = err.Error(), api.Kind(err)
		a.counters.Failure(act.name, api.Kind(err))
		a.logFailure(act, err, wait)
	}
	if act.soon && err == nil {
		wait = min(wait, a.followUp())
	}
	act.soon = false
	act.stats.Failures = act.pacer.Failures()
	if a.stopping {
		return
	}
	if act.untilDone && err == nil {
		act.stats.NextDue = time.Time{}
	} else {
		act.after(wait)
	}
	if next := act.next; next != nil {
		act.next = nil
		a.startFirst(next)
	}
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

// startFirst sets the first start of an activity, unless it was asked for before.
func (a *Agent) startFirst(act *activity) {
	if act.off || !act.stats.LastAttempt.IsZero() {
		return
	}
	var delay time.Duration
	if a.opts.StartupJitter {
		delay = act.first()
	}
	act.after(delay)
}

// heartbeat is the work of one heartbeat.
func (a *Agent) heartbeat() (done func(), err error) {
	err = a.opts.Plane.Heartbeat(a.calls, a.opts.Describe(a.calls))
	a.inContact.Store(err == nil)
	return func() {
		if err == nil && a.beat.stats.LastSuccess.IsZero() {
			a.log.Info("first heartbeat accepted")
		}
	}, err
}

// maxFruitless keeps followUp in the range of a duration.
const maxFruitless = 20

// claim is the work of one poll: what it brings is on disk before the loop
// hears of it, since the control plane hands out a deployment only once.
func (a *Agent) claim() (done func(), err error) {
	begun := time.Now()
	work, err := a.opts.Plane.Work(a.claims)
	if err != nil || a.retired.Err() != nil {
		return nil, err
	}
	claimed := a.record(work)
	return func() { a.take(claimed, begun) }, nil
}

// pollSoon has the next poll come soon: the last one has made work for it. One
// that failed has set the time of the next.
func (a *Agent) pollSoon() {
	if a.poll.stats.Running {
		a.poll.soon = true
		return
	}
	if a.poll.stats.LastError != "" {
		return
	}
	if wait := a.followUp(); !a.stopping && time.Now().Add(wait).Before(a.poll.stats.NextDue) {
		a.poll.after(wait)
	}
}

// followUp is the delay of a poll that follows work: about a second, in which a
// control plane makes deployments, and twice as long after each poll that
// brought none, or asked for the next CSR of a certificate that was just renewed.
// So one that accepts CSRs and goes on asking for them is polled as often as any
// other in the end.
func (a *Agent) followUp() time.Duration {
	wait := time.Second << min(max(a.fruitless-1, 0), maxFruitless)
	if wait >= a.opts.PollInterval {
		return a.opts.PollInterval
	}
	return wait/2 + time.Duration(a.opts.Rand(int64(wait/2)+1))
}

// survey is the work of one scan.
func (a *Agent) survey() (done func(), err error) {
	begun := time.Now()
	stats, err := a.opts.Surveyor.Run(a.calls)
	return func() {
		a.lastScan = scanStatus(stats, err)
		if err == nil {
			a.log.Info("scan reported", "files", stats.Files, "certificates", stats.Certificates,
				"reports", stats.Reports, "errors", stats.Errors, "took", time.Since(begun).Round(time.Millisecond).String())
		}
	}, err
}

// repairLater schedules a repair after a deployment that failed or could not
// begin: a rollback may be incomplete, or a server may not have reloaded.
func (a *Agent) repairLater() {
	switch {
	case a.repair.off || a.stopping:
	case a.repair.stats.Running:
		a.repair.again = true
	case a.repair.stats.NextDue.After(time.Now()): // no later than that
	default:
		a.repair.after(a.repair.pacer.Interval())
	}
}

// repairOnce retries the rest of recoveries and rollbacks.
func (a *Agent) repairOnce() (done func(), err error) {
	return nil, a.opts.Repair(a.calls, a.work)
}

// resume resumes, with the first poll, the jobs and reports that an earlier run
// of the agent did not finish.
func (a *Agent) resume() {
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
