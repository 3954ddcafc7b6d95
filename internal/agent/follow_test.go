package agent_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/deploy"
)

// TestPollFollowsCSRs: a poll soon follows accepted CSRs, to fetch their deployments. All CSRs of a
// poll are sent, however many there are.
func TestPollFollowsCSRs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.PollInterval = 30 * time.Second
		w.work = once(1, csrJobs(1000)...)
		w.enroll = func(ctx context.Context, job api.Job) error { return sleep(ctx, 10*time.Millisecond) }
		w.start()
		time.Sleep(20 * time.Second)
		if got := w.count("enroll"); got != 1000 {
			t.Errorf("%d CSRs were sent, want 1000", got)
		}
		polls, csrs := w.times("poll"), w.times("enroll")
		if len(polls) != 2 {
			t.Fatalf("polls at %v, want the first and one that follows the CSRs", polls)
		}
		if after := polls[1] - csrs[len(csrs)-1]; after <= 0 || after > 2*time.Second {
			t.Errorf("the poll came %v after the last CSR, want within two seconds", after)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// pollsAsUsual fails the test if the control plane is polled more often than at the normal
// interval.
func pollsAsUsual(t *testing.T, work func(ctx context.Context, n int) (api.Work, error)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.PollInterval = 30 * time.Second
		w.work = work
		w.start()
		time.Sleep(time.Hour)
		if got := w.count("poll"); got > 150 {
			t.Errorf("%d polls in an hour, want about 120", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestCSRsThatAreAskedForAgainDoNotSpin: a control plane that accepts CSRs, creates no deployments
// and asks for more CSRs is polled at the normal interval.
func TestCSRsThatAreAskedForAgainDoNotSpin(t *testing.T) {
	pollsAsUsual(t, func(_ context.Context, n int) (api.Work, error) {
		return api.Work{Jobs: []api.Job{csrJob(fmt.Sprintf("j%d", n))}}, nil
	})
}

// TestRenewalsWithoutEndDoNotSpin: a control plane that asks for another CSR of a certificate right
// after each deployment is eventually polled at the normal interval.
func TestRenewalsWithoutEndDoNotSpin(t *testing.T) {
	pollsAsUsual(t, func(_ context.Context, n int) (api.Work, error) {
		jobs := []api.Job{csrJob(fmt.Sprintf("j%d", n))}
		if n > 1 {
			jobs = append(jobs, deployment(fmt.Sprintf("d%d", n), "t"))
		}
		return api.Work{Jobs: jobs}, nil
	})
}

// TestFollowingPollKeepsRetryAfter: after an accepted CSR the next poll still respects Retry-After.
func TestFollowingPollKeepsRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.PollInterval = 30 * time.Second
		w.work = func(_ context.Context, n int) (api.Work, error) {
			if n == 2 {
				return api.Work{}, &api.StatusError{Call: "poll", Status: 503, RetryAfter: 10 * time.Minute}
			}
			return once(1, csrJob("j"))(t.Context(), n)
		}
		w.enroll = func(ctx context.Context, job api.Job) error { return sleep(ctx, time.Minute) }
		w.start()
		time.Sleep(15 * time.Minute)
		polls := w.times("poll")
		if after := polls[2] - polls[1]; after < 10*time.Minute {
			t.Errorf("polled %v after the 503, want Retry-After", after)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestManyUndeliveredReports: temporarily refused reports do not delay a new one.
func TestManyUndeliveredReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		const refused = 300
		var jobs []api.Job
		for i := range refused {
			jobs = append(jobs, deployment(fmt.Sprintf("j%d", i), fmt.Sprintf("t%d", i)))
		}
		w.work = func(_ context.Context, n int) (api.Work, error) {
			switch n {
			case 1:
				return api.Work{Jobs: jobs}, nil
			case 2:
				return api.Work{Jobs: []api.Job{deployment("new", "t0")}}, nil
			}
			return api.Work{}, nil
		}
		w.report = func(job string, s api.JobStatus) error {
			if job != "new" {
				return &api.StatusError{Call: "status report", Status: 500}
			}
			return nil
		}
		w.start()
		time.Sleep(5 * time.Minute)
		if got := len(w.ledger.UndeliveredOf("new")); got != 0 {
			t.Errorf("%d reports on the new job are not delivered", got)
		}
		if got := len(w.ledger.Undelivered()); got != refused {
			t.Errorf("%d reports are kept, want %d", got, refused)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestLimitedCallsAreCounted: 429s are counted even if the client's retry succeeds.
func TestLimitedCallsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		for _, call := range []string{"poll", "status report", "verification", "CSR"} {
			w.agent.Observe(api.Observation{Call: call, Err: &api.StatusError{Call: call, Status: 429}})
		}
		snapshot, err := w.agent.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprint(snapshot.Counters.RateLimited), "map[csr:1 delivery:2 poll:1]"; got != want {
			t.Errorf("counted %s, want %s", got, want)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestOneRenewal: a job waits at most one interval for a poll. From that poll to the report of the
// deployment, a renewal takes the time of the control plane and the server plus the delay of the
// following poll.
func TestOneRenewal(t *testing.T) {
	for _, after := range []time.Duration{0, time.Second, 14 * time.Second, 29 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			var signed time.Time
			handedOut := false
			exists := time.Now().Add(10*time.Minute + after)
			w.work = func(context.Context, int) (api.Work, error) {
				w.mu.Lock()
				defer w.mu.Unlock()
				switch now := time.Now(); {
				case handedOut || now.Before(exists):
				case signed.IsZero():
					return api.Work{Jobs: []api.Job{csrJob("csr")}}, nil
				case now.Sub(signed) > 300*time.Millisecond:
					handedOut = true
					return api.Work{Jobs: []api.Job{deployment("deploy", "t")}}, nil
				}
				return api.Work{}, nil
			}
			w.enroll = func(ctx context.Context, _ api.Job) error {
				err := sleep(ctx, 300*time.Millisecond)
				w.mu.Lock()
				defer w.mu.Unlock()
				signed = time.Now()
				return err
			}
			w.deploy = func(_, work context.Context, _ api.Job) (deploy.Outcome, error) {
				return deploy.Outcome{Status: api.StatusCompleted}, sleep(work, 300*time.Millisecond)
			}
			w.start()
			time.Sleep(12 * time.Minute)
			shown, done := w.times("enroll"), w.times("report")
			if len(shown) != 1 || len(done) != 1 {
				t.Fatalf("CSRs at %v, reports at %v, want one of each", shown, done)
			}
			waited, took := shown[0]-(10*time.Minute+after), done[0]-shown[0]
			t.Logf("waited %v for a poll, then %v to the report", waited, took)
			if waited > pollEvery || took > 2*time.Second {
				t.Errorf("waited %v for a poll, then %v to the report: want at most %v, then two seconds", waited, took, pollEvery)
			}
			if err := w.stop(); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
}
