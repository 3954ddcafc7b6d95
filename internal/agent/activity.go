package agent

import (
	"errors"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pace"
	"certctl-agent/internal/status"
)

// activity is a periodic task: heartbeat, poll, scan or repair. It never runs twice at once.
type activity struct {
	name  string
	pacer *pace.Pacer
	timer *time.Timer

	// work runs the task once, in its own goroutine. The loop calls done, unless it is nil, before
	// it records the outcome.
	work func() (done func(), err error)

	off       bool                 // not configured: it never starts
	untilDone bool                 // after a success it stops until it is needed again
	first     func() time.Duration // delay of the first start, with StartupJitter
	next      *activity            // starts after the first try of this one; may be nil

	again bool // requested while it ran
	soon  bool // requested soon, while it ran
	stats status.Activity
}

func (a *Agent) newActivity(name string, interval time.Duration, newPacer func(time.Duration, pace.Rand) *pace.Pacer, work func() (func(), error)) *activity {
	pacer := newPacer(interval, a.opts.Rand)
	act := &activity{name: name, pacer: pacer, timer: stoppedTimer(), work: work, first: pacer.First}
	act.stats.IntervalSeconds = interval.Seconds()
	a.activities = append(a.activities, act)
	return act
}

// stoppedTimer returns a timer that fires only after a reset, so that a select can wait for it
// before it is needed.
func stoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// after schedules the next start.
func (act *activity) after(d time.Duration) {
	act.timer.Reset(d)
	act.stats.NextDue = time.Now().Add(d)
}

// begin starts an activity. If it is running, it starts again when it ends.
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

// ended records the outcome of an activity and schedules its next start.
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
		// Intervals are from start to start, unless a run takes longer than its interval.
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
	a.notifyStatus()
	if act.again {
		act.again = false
		a.begin(act)
	}
}

func (a *Agent) logFailure(act *activity, err error, wait time.Duration) {
	if a.stopping || errors.Is(err, api.ErrRetired) {
		return // Observe has logged the retirement
	}
	level := a.log.Warn
	if api.RateLimited(err) {
		level = a.log.Info
	}
	level("try failed", "activity", act.name, "error", err, "in_a_row", act.pacer.Failures(), "next_try_in", wait.Round(time.Millisecond).String())
}

// startFirst schedules the first start of an activity, unless it has started already.
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

// heartbeat sends one heartbeat.
func (a *Agent) heartbeat() (done func(), err error) {
	err = a.opts.Plane.Heartbeat(a.calls, a.opts.Describe(a.calls))
	a.inContact.Store(err == nil)
	return func() {
		if err == nil && a.beat.stats.LastSuccess.IsZero() {
			a.log.Info("first heartbeat accepted")
		}
	}, err
}

// claim polls once. It records the jobs on disk before it passes them to the loop, since the
// control plane hands out a deployment only once.
func (a *Agent) claim() (done func(), err error) {
	started := time.Now()
	work, err := a.opts.Plane.Work(a.claims)
	if err != nil || a.retired.Err() != nil {
		return nil, err
	}
	claimed := a.record(work)
	return func() { a.take(claimed, started) }, nil
}

// pollSoon moves the next poll forward, because there may be new work. After a failed poll it
// changes nothing.
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

// maxFruitless keeps the delay of followUp within the range of a time.Duration.
const maxFruitless = 20

// followUp returns the delay of a poll that follows work: about a second, which a control plane
// needs to create deployments. It doubles after each poll that returned none, or that asked for
// another CSR of a certificate just renewed. So a control plane that endlessly asks for CSRs is
// eventually polled at the normal interval.
func (a *Agent) followUp() time.Duration {
	wait := time.Second << min(max(a.fruitless-1, 0), maxFruitless)
	if wait >= a.opts.PollInterval {
		return a.opts.PollInterval
	}
	return wait/2 + time.Duration(a.opts.Rand(int64(wait/2)+1))
}

// scanOnce runs one discovery scan.
func (a *Agent) scanOnce() (done func(), err error) {
	started := time.Now()
	stats, err := a.opts.Scanner.Run(a.calls)
	return func() {
		a.lastScan = scanStatus(stats, err)
		if err == nil {
			a.log.Info("scan reported", "files", stats.Files, "certificates", stats.Certificates,
				"reports", stats.Reports, "errors", stats.Errors, "took", time.Since(started).Round(time.Millisecond).String())
		}
	}, err
}

// repairLater schedules a repair after a deployment that failed or could not start: a rollback may
// be incomplete, or a server may not have reloaded.
func (a *Agent) repairLater() {
	switch {
	case a.repair.off || a.stopping:
	case a.repair.stats.Running:
		a.repair.again = true
	case a.repair.stats.NextDue.After(time.Now()): // already scheduled
	default:
		a.repair.after(a.repair.pacer.Interval())
	}
}

// repairOnce retries unfinished recoveries and rollbacks.
func (a *Agent) repairOnce() (done func(), err error) {
	return nil, a.opts.Repair(a.calls, a.work)
}
