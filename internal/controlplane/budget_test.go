package controlplane_test

import (
	"errors"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/budget"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/testing/devplane"
)

// budgeted runs a test with a client that has a budget, in virtual time.
func budgeted(t *testing.T, test func(t *testing.T, p *devplane.Plane, c *controlplane.Client, b *budget.Budget)) {
	synctest.Test(t, func(t *testing.T) {
		p, err := devplane.New(devplane.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		opts := options(p, p.RegisterAgent("test"))
		opts.Budget = budget.New(func(int64) int64 { return 0 })
		c := controlplane.New(opts)
		defer c.Close()
		test(t, p, c, opts.Budget)
	})
}

// limited makes calls fail with 429 and Retry-After: 5.
func limited(p *devplane.Plane, call string, times int) {
	p.Inject(devplane.Fault{Call: call, Times: times, Status: http.StatusTooManyRequests, RetryAfter: "5"})
}

func TestLimitedCallsWait(t *testing.T) {
	budgeted(t, func(t *testing.T, p *devplane.Plane, c *controlplane.Client, b *budget.Budget) {
		limited(p, devplane.CallWork, 1)
		started := time.Now()
		if _, err := c.Work(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(started); took < 5*time.Second || took > 6*time.Second {
			t.Errorf("a poll was answered after %v, want Retry-After", took)
		}
		if got := p.Count(devplane.CallWork); got != 2 {
			t.Errorf("%d polls were sent, want 2", got)
		}
	})
}

func TestHeartbeatsDoNotWait(t *testing.T) {
	budgeted(t, func(t *testing.T, p *devplane.Plane, c *controlplane.Client, b *budget.Budget) {
		limited(p, devplane.CallHeartbeat, 1)
		started := time.Now()
		if err := c.Heartbeat(t.Context(), api.Heartbeat{}); !api.RateLimited(err) {
			t.Errorf("got %v, want the 429", err)
		}
		if err := c.Heartbeat(t.Context(), api.Heartbeat{}); err != nil {
			t.Error(err)
		}
		if took := time.Since(started); took != 0 {
			t.Errorf("two heartbeats took %v", took)
		}
	})
}

func TestRunningIsLeftOutWhileThrottled(t *testing.T) {
	budgeted(t, func(t *testing.T, p *devplane.Plane, c *controlplane.Client, b *budget.Budget) {
		job := api.ID(p.AddJob(devplane.WireJob{Type: api.TypeDeployment, Status: api.StatusRunning}))
		report := func(status string) {
			t.Helper()
			if err := c.ReportStatus(t.Context(), job, api.JobStatus{Status: status}); err != nil {
				t.Fatal(err)
			}
		}
		report(api.StatusRunning)
		limited(p, devplane.CallHeartbeat, 1)
		_ = c.Heartbeat(t.Context(), api.Heartbeat{})
		report(api.StatusRunning)
		report(api.StatusCompleted)
		if got := p.Count(devplane.CallStatus); got != 2 {
			t.Errorf("%d reports were sent, want the first Running and Completed", got)
		}
	})
}

func TestTurnsThatDoNotCome(t *testing.T) {
	budgeted(t, func(t *testing.T, p *devplane.Plane, c *controlplane.Client, b *budget.Budget) {
		limited(p, devplane.CallWork, 1000)
		started := time.Now()
		_, err := c.Work(t.Context())
		if !errors.Is(err, api.ErrNoTurn) || !api.RateLimited(err) || !api.Temporary(err) {
			t.Errorf("got %v, want api.ErrNoTurn, which counts as a 429", err)
		}
		if took := time.Since(started); took != 10*time.Minute {
			t.Errorf("gave up after %v, want 10 minutes", took)
		}
		b.Stop()
		sent := p.Count(devplane.CallWork)
		if _, err := c.Work(t.Context()); !api.RateLimited(err) || p.Count(devplane.CallWork) != sent+1 {
			t.Errorf("a poll of an agent that stops: %v after %d requests, want the 429 of one", err, p.Count(devplane.CallWork)-sent)
		}
	})
}

// TestLongRetryAfterIsTheCallers: a call does not wait for a Retry-After of 15 minutes while its
// caller holds resources.
func TestLongRetryAfterIsTheCallers(t *testing.T) {
	budgeted(t, func(t *testing.T, p *devplane.Plane, c *controlplane.Client, b *budget.Budget) {
		p.Inject(devplane.Fault{Call: devplane.CallWork, Times: 1, Status: http.StatusTooManyRequests, RetryAfter: "900"})
		started := time.Now()
		_, err := c.Work(t.Context())
		if !api.RateLimited(err) || api.RetryAfter(err) != 15*time.Minute || time.Since(started) > time.Second {
			t.Errorf("got %v after %v, want the 429 at once", err, time.Since(started))
		}
	})
}

// TestLongRetryAfterIsForThoseThatWait: calls that wait for their turn fail too.
func TestLongRetryAfterIsForThoseThatWait(t *testing.T) {
	budgeted(t, func(t *testing.T, p *devplane.Plane, c *controlplane.Client, b *budget.Budget) {
		limited(p, devplane.CallWork, 1)
		p.Inject(devplane.Fault{Call: devplane.CallCertificate, Times: 1, Status: http.StatusTooManyRequests, RetryAfter: "900"})
		var waiting sync.WaitGroup
		for _, call := range []func() error{
			func() error { _, err := c.Work(t.Context()); return err }, // stops the budget until Retry-After, and waits
			func() error { _, err := c.Certificate(t.Context(), "mc-1"); return err },
			func() error { _, err := c.Certificate(t.Context(), "mc-2"); return err },
		} {
			started := time.Now()
			waiting.Go(func() {
				if err := call(); !api.RateLimited(err) || api.RetryAfter(err) != 15*time.Minute || time.Since(started) > 10*time.Second {
					t.Errorf("got %v after %v, want the long Retry-After of the first certificate", err, time.Since(started))
				}
			})
			synctest.Wait()
		}
		waiting.Wait()
		if got := p.Count(devplane.CallCertificate); got != 1 {
			t.Errorf("%d certificate requests, want 1", got)
		}
	})
}

// TestLongRetryAfterOfAHeartbeat: calls that have not been refused themselves still get their turn
// if it comes soon.
func TestLongRetryAfterOfAHeartbeat(t *testing.T) {
	budgeted(t, func(t *testing.T, p *devplane.Plane, c *controlplane.Client, b *budget.Budget) {
		limited(p, devplane.CallWork, 1)
		p.Inject(devplane.Fault{Call: devplane.CallHeartbeat, Times: 1, Status: http.StatusTooManyRequests, RetryAfter: "900"})
		started := time.Now()
		var waiting sync.WaitGroup
		waiting.Go(func() {
			if _, err := c.Work(t.Context()); err != nil || time.Since(started) > 10*time.Second {
				t.Errorf("got %v after %v, want the answer to a second poll", err, time.Since(started))
			}
		})
		time.Sleep(time.Second)
		if err := c.Heartbeat(t.Context(), api.Heartbeat{}); !api.RateLimited(err) {
			t.Errorf("got %v, want the 429", err)
		}
		waiting.Wait()
	})
}
