package agent

import (
	"context"
	"fmt"
	"maps"
	"time"

	"certctl-agent/internal/discovery"
	"certctl-agent/internal/status"
)

// Snapshot asks the loop for its state. An answer proves that the loop is running.
func (a *Agent) Snapshot(ctx context.Context) (status.Snapshot, error) {
	reply := make(chan status.Snapshot, 1)
	select {
	case a.events <- func() { reply <- a.snapshot() }:
	case <-ctx.Done():
		return status.Snapshot{}, context.Cause(ctx)
	}
	s := <-reply
	for _, entry := range a.opts.Installed.All() {
		s.Certificates = append(s.Certificates, status.Certificate(entry))
	}
	return s, nil
}

// snapshot runs in the loop.
func (a *Agent) snapshot() status.Snapshot {
	s := a.opts.Base
	s.Started = a.started
	s.Taken = time.Now()
	s.Activities = map[string]status.Activity{
		status.Heartbeat: a.beat.stats,
		status.Poll:      a.poll.stats,
		status.Delivery:  a.delivery.stats,
	}
	if !a.scan.off {
		s.Activities[status.Discovery] = a.scan.stats
	}
	s.Jobs = status.Jobs{
		Running:     a.jobs.running,
		Waiting:     a.jobs.waiting + len(a.jobs.unfinished),
		CSRs:        len(a.csrs.pending),
		Undelivered: len(a.delivery.jobs),
	}
	s.LastScan = a.lastScan
	s.Counters = a.counters.Clone()
	a.limitedMu.Lock()
	s.Counters.RateLimited = maps.Clone(a.limited)
	a.limitedMu.Unlock()
	s.ClockSkewSeconds = time.Duration(a.skewNanos.Load()).Seconds()
	return s
}

// scanStatus converts the outcome of a scan for the snapshot.
func scanStatus(s discovery.Stats, err error) status.Scan {
	last := status.Scan{
		Ended:           time.Now(),
		DurationSeconds: s.Duration.Seconds(),
		Files:           s.Files,
		Certificates:    s.Certificates,
		Reported:        s.Reported,
		Refused:         s.Refused,
		Errors:          s.Errors,
	}
	if err != nil {
		last.Error = err.Error()
	}
	return last
}

// notifyStatus updates the line that the service manager shows, if it has changed or was not sent.
func (a *Agent) notifyStatus() {
	var line string
	switch n := a.beat.pacer.Failures(); {
	case n > 0:
		line = fmt.Sprintf("no contact, %d heartbeats failed in a row: %s", n, a.beat.stats.LastError)
	case a.beat.stats.LastSuccess.IsZero():
		line = "started; no heartbeat has been answered yet"
	default:
		line = fmt.Sprintf("in contact; %d deployments running, %d waiting, %d reports to deliver",
			a.jobs.running, a.jobs.waiting, len(a.delivery.jobs))
	}
	if line != a.lastStatus && a.opts.Notify.Status(line) {
		a.lastStatus = line
	}
}
