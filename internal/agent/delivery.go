package agent

import (
	"context"
	"slices"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/pace"
	"certctl-agent/internal/status"
)

const (
	// reportTTL is how long a report is worth delivering.
	reportTTL = 7 * 24 * time.Hour

	// repeatAfter is how long after a verdict it is repeated, where that is
	// needed: longer than a kernel retransmits what a closed connection has
	// left (Linux: under two minutes), and than gateways queue a request.
	repeatAfter = 5 * time.Minute
)

// deliveryTable paces the reports that the control plane has not taken yet.
// Each job has a back-off of its own, so that one whose reports are refused
// (an unknown job id is answered 500) does not hold up the others.
type deliveryTable struct {
	jobs    map[string]*pacedDelivery
	running bool
	again   bool
	timer   *time.Timer
	stats   status.Activity
}

type pacedDelivery struct {
	pacer  *pace.Pacer
	due    time.Time
	repeat bool // what is due is a repetition
}

// delivered is the outcome of one try.
type delivered struct {
	delivery ledger.Delivery
	err      error
}

func newDeliveryTable() deliveryTable {
	return deliveryTable{jobs: make(map[string]*pacedDelivery), timer: stoppedTimer()}
}

// loadDeliveries takes note of jobs that have something to report, and returns
// all that there is.
func (a *Agent) loadDeliveries() []ledger.Delivery {
	undelivered := a.o.Ledger.Undelivered()
	known := make(map[string]bool)
	for _, d := range undelivered {
		if known[d.Job] {
			continue
		}
		known[d.Job] = true
		p := a.delivery.jobs[d.Job]
		if p == nil {
			p = &pacedDelivery{pacer: pace.New(a.o.PollInterval, true, a.o.Rand)}
			a.delivery.jobs[d.Job] = p
		}
		if p.repeat != d.Report.Repeat {
			p.repeat, p.due = d.Report.Repeat, time.Time{}
			if p.repeat {
				p.due = time.Now().Add(repeatAfter)
			}
		}
	}
	for id := range a.delivery.jobs {
		if !known[id] {
			delete(a.delivery.jobs, id)
		}
	}
	return undelivered
}

// deliver sends the reports that are due, in one goroutine.
func (a *Agent) deliver() {
	undelivered := a.loadDeliveries()
	if a.stopping || !a.resumed {
		return
	}
	if a.delivery.running {
		a.delivery.again = true
		return
	}
	now := time.Now()
	var due []ledger.Delivery
	for _, d := range undelivered {
		p := a.delivery.jobs[d.Job]
		if !p.due.After(now) && (!d.Report.Repeat || p.repeat) {
			due = append(due, d)
		}
	}
	if len(due) == 0 {
		a.setDeliveryTimer(now)
		return
	}
	a.delivery.running = true
	a.spawn(func() func() {
		results := a.send(a.calls, due)
		return func() { a.sent(results) }
	}, func(err error) {
		a.sent([]delivered{{due[0], err}})
	})
}

// send tries each delivery once. Within a job it keeps the order: what follows
// a report that did not arrive is not tried. When the network is gone or the
// control plane is short of capacity, the rest shares that outcome untried.
func (a *Agent) send(ctx context.Context, due []ledger.Delivery) []delivered {
	var results []delivered
	var down error
	stuck := make(map[string]bool)
	for _, d := range due {
		if stuck[d.Job] {
			continue
		}
		err := down
		if err == nil {
			err = a.sendOne(ctx, d)
			a.Heard("job status", err)
		}
		results = append(results, delivered{d, err})
		stuck[d.Job] = err != nil
		switch api.Kind(err) {
		case "network", "timeout", "cancelled", "rate_limited":
			down = err
		}
	}
	return results
}

// sendOne delivers one report and settles it in the ledger. The error is
// temporary.
func (a *Agent) sendOne(ctx context.Context, d ledger.Delivery) error {
	if time.Since(d.Recorded) > reportTTL {
		return a.settle(d, "a week has passed")
	}
	var err error
	if d.Report.Verification != nil {
		err = a.o.Plane.ReportVerification(ctx, d.Job, *d.Report.Verification)
	} else {
		err = a.o.Plane.ReportStatus(ctx, d.Job, *d.Report.Status)
	}
	switch {
	case err == nil:
		if err := a.o.Ledger.Delivered(d); err != nil {
			a.log.Error("a delivered report could not be removed from the ledger: after a restart it is sent again", "job", d.Job, "error", err)
		}
		return nil
	case api.Temporary(err):
		return err
	}
	return a.settle(d, err.Error())
}

// settle gives a report up.
func (a *Agent) settle(d ledger.Delivery, reason string) error {
	a.log.Error("a report is given up", "job", d.Job, "reason", reason)
	if err := a.o.Ledger.Drop(d, reason); err != nil {
		a.log.Error("a report could not be removed from the ledger", "job", d.Job, "error", err)
	}
	return nil
}

// sent takes the outcome of one round.
func (a *Agent) sent(results []delivered) {
	a.delivery.running = false
	now := time.Now()
	a.delivery.stats.LastAttempt = now
	for _, r := range results {
		a.delivery.note(now, r.err)
		p := a.delivery.jobs[r.delivery.Job]
		if r.err == nil || p == nil {
			continue
		}
		wait := p.pacer.Next(pace.After(r.err))
		p.due = now.Add(wait)
		a.counters.Failure(status.Delivery, api.Kind(r.err))
		if !a.stopping {
			a.log.Warn("a report was not delivered: it is kept and tried again", "job", r.delivery.Job, "error", r.err, "next_try_in", wait.Round(time.Millisecond).String())
		}
	}
	if a.delivery.again {
		a.delivery.again = false
		a.deliver()
		return
	}
	a.loadDeliveries()
	a.setDeliveryTimer(now)
}

// note keeps the outcome of one try for the snapshot.
func (t *deliveryTable) note(now time.Time, err error) {
	if err == nil {
		t.stats.LastSuccess, t.stats.LastError, t.stats.LastErrorKind, t.stats.Failures = now, "", "", 0
		return
	}
	t.stats.LastError, t.stats.LastErrorKind = err.Error(), api.Kind(err)
	t.stats.Failures++
}

// setDeliveryTimer wakes the loop when the next report is due.
func (a *Agent) setDeliveryTimer(now time.Time) {
	if a.stopping || len(a.delivery.jobs) == 0 {
		return
	}
	var earliest time.Time
	for _, p := range a.delivery.jobs {
		if earliest.IsZero() || p.due.Before(earliest) {
			earliest = p.due
		}
	}
	a.delivery.timer.Reset(max(earliest.Sub(now), 0))
	a.delivery.stats.NextDue = earliest
}

// deliverLast tries once more to deliver what is left when the agent stops.
func (a *Agent) deliverLast() {
	due := slices.DeleteFunc(a.o.Ledger.Undelivered(), func(d ledger.Delivery) bool { return d.Report.Repeat })
	if len(due) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.calls), finalDelivery)
	defer cancel()
	for _, r := range a.send(ctx, due) {
		if r.err != nil {
			a.log.Warn("a report was not delivered: it is kept for the next start", "job", r.delivery.Job, "error", r.err)
		}
	}
}
