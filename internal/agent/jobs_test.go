package agent_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/deploy"
	"certctl-agent/internal/enroll"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/status"
	"certctl-agent/internal/transaction"
)

func TestCSRIsNotStartedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var accepted atomic.Bool
		w.work = func(context.Context, int) (api.Work, error) {
			if accepted.Load() {
				return api.Work{}, nil
			}
			return api.Work{Jobs: []api.Job{csrJob("j1")}}, nil
		}
		w.enroll = func(ctx context.Context, _ api.Job) error {
			err := sleep(ctx, 100*time.Second) // three polls return the job meanwhile
			accepted.Store(true)
			return err
		}
		w.start()
		time.Sleep(10 * time.Minute)
		if got := w.done("enroll"); got != "enroll j1" {
			t.Errorf("%s: want it once", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestAnswerFromBeforeTheCSR: a poll that was under way while the CSR was accepted still returns
// the job.
func TestAnswerFromBeforeTheCSR(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = func(ctx context.Context, n int) (api.Work, error) {
			switch n {
			case 1:
				return api.Work{Jobs: []api.Job{csrJob("j1")}}, nil
			case 2: // started before the CSR is accepted, ends after it
				return api.Work{Jobs: []api.Job{csrJob("j1")}}, sleep(ctx, 20*time.Second)
			case 5: // the same id as new work
				return api.Work{Jobs: []api.Job{csrJob("j1")}}, nil
			}
			return api.Work{}, nil
		}
		w.enroll = func(ctx context.Context, _ api.Job) error { return sleep(ctx, 35*time.Second) }
		w.start()
		time.Sleep(75 * time.Second)
		if got := w.count("enroll"); got != 1 {
			t.Errorf("%d CSRs, want 1: a stale poll created another certificate version", got)
		}
		time.Sleep(5 * time.Minute)
		if got := w.count("enroll"); got != 2 {
			t.Errorf("%d CSRs, want 2: the new job with the same id was ignored", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestRefusedCSRIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = once(1, csrJob("refused"), csrJob("deferred"))
		w.enroll = func(_ context.Context, job api.Job) error {
			if job.ID == "refused" {
				return &enroll.RefusedError{Reason: "the name is forbidden"}
			}
			return errTest
		}
		var reason string
		w.report = func(_ string, s api.JobStatus) error { reason = s.Error; return nil }
		w.start()
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := w.done("report"); got != "report refused Failed" || !strings.Contains(reason, "the name is forbidden") {
			t.Errorf("reports: %q, reason %q: want only the refused job Failed, with the reason", got, reason)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestOneDeploymentPerTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = once(1, deployment("a1", "a"), deployment("a2", "a"), deployment("b1", "b"), deployment("c1", "c"))
		running := make(map[string]int)
		most, all := 0, 0
		w.deploy = func(_, work context.Context, job api.Job) (deploy.Outcome, error) {
			w.mu.Lock()
			running[string(job.TargetID)]++
			all++
			if running[string(job.TargetID)] > 1 {
				t.Errorf("two deployments of target %s at once", job.TargetID)
			}
			most = max(most, all)
			w.mu.Unlock()
			_ = sleep(work, 10*time.Second)
			w.mu.Lock()
			running[string(job.TargetID)]--
			all--
			w.mu.Unlock()
			return deploy.Outcome{Status: api.StatusCompleted}, nil
		}
		w.start()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if most != 2 {
			t.Errorf("at most %d deployments at once, want MaxDeploys = 2", most)
		}
		if got := w.count("report"); got != 4 {
			t.Errorf("%d reports (%s), want 4", got, w.done("report"))
		}
		if got := w.done("deploy"); strings.Index(got, "a1") > strings.Index(got, "a2") {
			t.Errorf("order of one target: %s", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestDeploymentThatCannotBeginIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = once(1, deployment("j1", "t1"))
		w.deploy = func(_, _ context.Context, _ api.Job) (deploy.Outcome, error) {
			if w.count("deploy") < 4 {
				return deploy.Outcome{}, errTest
			}
			return deploy.Outcome{Status: api.StatusCompleted, Verification: &api.Verification{TargetID: "t1"}}, nil
		}
		w.start()
		time.Sleep(30 * time.Minute)
		if got := w.done("deploy", "verify", "report"); got != "deploy j1, deploy j1, deploy j1, deploy j1, verify j1, report j1 Completed" {
			t.Errorf("done: %s", got)
		}
		for i, at := range w.times("deploy")[1:] {
			if gap := at - w.times("deploy")[i]; gap < pollEvery*9/10 {
				t.Errorf("try %d came after only %v", i+2, gap)
			}
		}
		if got := w.ledger.Unfinished(); len(got) != 0 {
			t.Errorf("unfinished: %v", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestDeploymentThatAGatewayRefuses: how long a gateway's 404 is retried.
func TestDeploymentThatAGatewayRefuses(t *testing.T) {
	gateway := &api.StatusError{Call: "certificate", Status: http.StatusNotFound, Body: "default backend"}
	for name, test := range map[string]struct {
		refusals int
		want     string
	}{
		"a moment": {2, "report j1 Completed"},
		"long":     {1000, "report j1 Failed"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.work = once(1, deployment("j1", "t1"))
				w.deploy = func(_, _ context.Context, _ api.Job) (deploy.Outcome, error) {
					if w.count("deploy") <= test.refusals {
						return deploy.Outcome{}, gateway
					}
					return deploy.Outcome{Status: api.StatusCompleted}, nil
				}
				var reason string
				w.report = func(_ string, s api.JobStatus) error { reason = s.Error; return nil }
				w.start()
				time.Sleep(10 * time.Minute)
				if got := w.done("report"); strings.Contains(got, api.StatusFailed) {
					t.Errorf("%s, within ten minutes", got)
				}
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if got := w.done("report"); got != test.want || test.refusals > 2 && !strings.Contains(reason, "default backend") {
					t.Errorf("reports: %q, reason %q, want %s", got, reason, test.want)
				}
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

// TestGatewayRefusesEverything: while the control plane is down, the gateway in front of it answers
// every call 404.
func TestGatewayRefusesEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		up := time.Now().Add(time.Hour)
		down := func() error {
			if time.Now().Before(up) {
				return &api.StatusError{Status: http.StatusNotFound, Body: "404 page not found"}
			}
			return nil
		}
		w.heartbeat = func(context.Context, int) error { return down() }
		w.work = func(_ context.Context, n int) (api.Work, error) {
			if n == 1 { // just before
				return api.Work{Jobs: []api.Job{deployment("j1", "t1"), deployment("j2", "t2")}}, nil
			}
			return api.Work{}, down()
		}
		w.deploy = func(_, _ context.Context, job api.Job) (deploy.Outcome, error) {
			if job.ID == "j2" && down() != nil {
				return deploy.Outcome{}, down()
			}
			return deploy.Outcome{Status: api.StatusCompleted}, nil
		}
		delivered := make(map[string]string)
		w.report = func(job string, s api.JobStatus) error {
			err := down()
			if err == nil {
				delivered[job] = s.Status + s.Error
			}
			return err
		}
		w.start()
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if want := map[string]string{"j1": api.StatusCompleted, "j2": api.StatusCompleted}; !maps.Equal(delivered, want) {
			t.Errorf("delivered %v, want %v", delivered, want)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestDeploymentThatNeverBeginsIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.slowDown()
		w.work = once(1, deployment("j1", "t1"))
		w.deploy = func(_, _ context.Context, _ api.Job) (deploy.Outcome, error) { return deploy.Outcome{}, errTest }
		w.start()
		time.Sleep(7*24*time.Hour - time.Minute)
		if got := w.done("report"); got != "" {
			t.Errorf("%s, before a week has passed", got)
		}
		time.Sleep(slowEvery + 7*time.Minute) // the next try
		if got := w.done("report"); got != "report j1 Failed" {
			t.Errorf("reports after a week: %q, want j1 Failed", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestUnfinishedJobsAreTakenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.ledger.Claim([]api.Job{deployment("old", "t1")}, time.Now())
		w.options.StartupJitter = true
		w.start()
		time.Sleep(5 * time.Minute)
		if got := w.done("deploy", "report"); got != "deploy old, report old Completed" {
			t.Errorf("done: %q", got)
		}
		if beat, job := w.times("heartbeat")[0], w.times("deploy")[0]; job <= beat {
			t.Errorf("job at %v, first heartbeat at %v: want the heartbeat first", job, beat)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestShutdown(t *testing.T) {
	tests := []struct {
		name       string
		takes      time.Duration
		want       string // reports
		unfinished int
		most       time.Duration
	}{
		{"a transaction that ends within the grace", 10 * time.Second, "report j1 Completed", 0, 11 * time.Second},
		{"one that does not is rolled back and kept", time.Hour, "", 1, 22 * time.Second},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.work = once(1, deployment("j1", "t1"), deployment("j2", "t1"))
				w.deploy = func(_, work context.Context, _ api.Job) (deploy.Outcome, error) {
					if err := sleep(work, test.takes); err != nil {
						_ = sleep(context.WithoutCancel(work), time.Second) // the rollback
						return deploy.Outcome{Status: api.StatusFailed, Error: "rolled back: " + err.Error()}, nil
					}
					return deploy.Outcome{Status: api.StatusCompleted}, nil
				}
				w.start()
				time.Sleep(time.Second)
				started := time.Now()
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
				if took := time.Since(started); took > test.most {
					t.Errorf("stopping took %v, want at most %v", took, test.most)
				}
				if got := w.done("report"); got != test.want {
					t.Errorf("reports: %q, want %q", got, test.want)
				}
				if got := w.done("deploy"); got != "deploy j1" {
					t.Errorf("%s: nothing new must start while stopping", got)
				}
				// j2 never started and also waits for the next start.
				if got := len(w.ledger.Unfinished()); got != test.unfinished+1 {
					t.Errorf("%d unfinished jobs, want %d", got, test.unfinished+1)
				}
			})
		})
	}
}

// TestPollUnderWayAtShutdown: no other poll returns the jobs of its answer.
func TestPollUnderWayAtShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = func(ctx context.Context, _ int) (api.Work, error) {
			return api.Work{Jobs: []api.Job{deployment("j1", "t1")}}, sleep(ctx, 5*time.Second)
		}
		w.start()
		time.Sleep(time.Second)
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
		if got := w.ledger.Unfinished(); len(got) != 1 || w.count("deploy") != 0 {
			t.Errorf("recorded %v, started %q: want the job recorded and not started", got, w.done("deploy"))
		}
	})
}

func TestPanicIsTheJobsFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = once(1, deployment("j1", "t1"), deployment("j2", "t2"))
		w.deploy = func(_, _ context.Context, job api.Job) (deploy.Outcome, error) {
			if job.ID == "j1" {
				panic("connector bug")
			}
			return deploy.Outcome{Status: api.StatusCompleted}, nil
		}
		var reason string
		w.report = func(job string, s api.JobStatus) error {
			if job == "j1" {
				reason = s.Error
			}
			return nil
		}
		w.start()
		time.Sleep(time.Minute)
		synctest.Wait()
		got := w.done("report")
		if !strings.Contains(got, "report j1 Failed") || !strings.Contains(got, "report j2 Completed") {
			t.Errorf("reports: %s", got)
		}
		if !strings.Contains(reason, "connector bug") {
			t.Errorf("reason: %q", reason)
		}
		if !strings.Contains(w.log.String(), "agent_test.deployer.Deploy") {
			t.Error("the log has no stack")
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// waitFor makes deployments wait for another one for the given time and then take a second.
func (w *world) waitFor(waits map[string]time.Duration) {
	w.holding = func(work context.Context, job api.Job, holds deploy.Holds) (deploy.Outcome, error) {
		holds.ReleaseCertificate()
		if wait, ok := waits[string(job.ID)]; ok {
			if err := holds.Yield(1, func(ctx context.Context) error { return sleep(ctx, wait) }); err != nil {
				return deploy.Outcome{}, err
			}
		}
		w.note(time.Now(), "run", string(job.ID))
		if err := sleep(work, time.Second); err != nil {
			return deploy.Outcome{}, err
		}
		w.note(time.Now(), "ran", string(job.ID))
		return deploy.Outcome{Status: api.StatusCompleted}, nil
	}
}

// TestWaitingHoldsNoSlot: while as many jobs as there are slots wait for a lock, another one runs.
// After the wait they do not exceed the slots.
func TestWaitingHoldsNoSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = once(1, deployment("a", "a"), deployment("b", "b"), deployment("c", "c"), deployment("d", "d"))
		w.waitFor(map[string]time.Duration{"a": time.Hour, "b": time.Hour, "c": time.Hour})
		w.start()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if got := w.done("ran"); got != "ran d" {
			t.Errorf("while three wait: %q, want the fourth", got)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		active, most := 0, 0
		w.mu.Lock()
		for _, c := range w.calls {
			switch c.name {
			case "run":
				active++
			case "ran":
				active--
			}
			most = max(most, active)
		}
		w.mu.Unlock()
		if got := w.count("ran"); got != 4 || most != 2 {
			t.Errorf("%d ran, %d at once, want 4, 2 at once", got, most)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestStopEndsWaiting: a job that waits for a lock, or for a slot after that, does not use up the
// grace.
func TestStopEndsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.ShutdownGrace = 20 * time.Minute
		w.work = once(1, deployment("a", "a"), deployment("b", "b"))
		w.waitFor(map[string]time.Duration{"a": 24 * time.Hour, "b": 24 * time.Hour})
		w.start()
		time.Sleep(10 * time.Minute)
		started := time.Now()
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
		if took := time.Since(started); took > 0 {
			t.Errorf("the stop took %v", took)
		}
		if got := len(w.ledger.Unfinished()); got != 2 || w.count("ran") > 0 {
			t.Errorf("%d jobs left for the next start, want 2; ran %q", got, w.done("ran"))
		}
	})
}

// TestCertificateIsOneJobs: while a job may promote a key, no other job of its certificate starts,
// but jobs of other certificates do. Once the job shares the key, all start.
func TestCertificateIsOneJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.MaxDeploys = 3
		other := deployment("d", "d")
		other.CertificateID = "cert-2"
		w.work = once(1, deployment("a", "a"), deployment("b", "b"), deployment("c", "c"), other)
		promoted := make(chan struct{})
		w.holding = func(work context.Context, job api.Job, holds deploy.Holds) (deploy.Outcome, error) {
			if job.ID == "a" {
				<-promoted
			}
			holds.ReleaseCertificate()
			holds.ReleaseCertificate()
			err := sleep(work, time.Minute)
			return deploy.Outcome{Status: api.StatusCompleted}, err
		}
		w.start()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if got := w.done("deploy"); w.count("deploy") != 2 || !strings.Contains(got, "deploy a") || !strings.Contains(got, "deploy d") {
			t.Errorf("started: %s", got)
		}
		close(promoted)
		synctest.Wait()
		if got := w.done("deploy"); !strings.Contains(got, "deploy b") || !strings.Contains(got, "deploy c") {
			t.Errorf("started when the key was promoted: %s", got)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := w.count("report"); got != 4 {
			t.Errorf("%d reports, want 4: %s", got, w.done("report"))
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestRepair: a reload that failed after a crash or a rollback is retried until it succeeds.
func TestRepair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = once(20, deployment("j1", "t1"), deployment("j2", "t2"))
		w.deploy = func(_, _ context.Context, _ api.Job) (deploy.Outcome, error) {
			return deploy.Outcome{Status: api.StatusFailed, Error: "and the server did not load that"}, nil
		}
		var failing atomic.Int64
		failing.Store(2)
		w.options.Repair = func(_, _ context.Context) error {
			w.note(time.Now(), "repair", "")
			if failing.Add(-1) >= 0 {
				return errTest
			}
			return nil
		}
		w.start()
		time.Sleep(9 * time.Minute)
		if got := w.count("repair"); got != 3 {
			t.Errorf("%d tries after the start, want 3: two fail", got)
		}
		failing.Store(1)
		time.Sleep(9 * time.Minute)
		if got := w.count("repair"); got != 3+2 {
			t.Errorf("%d tries after the failed deployments, want 2 more: one fails", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestDelivery(t *testing.T) {
	refused := func(status int) error { return &api.StatusError{Call: "job status", Status: status, Own: true} }
	gateway := &api.StatusError{Call: "job status", Status: http.StatusNotFound, Body: "default backend"}
	tests := []struct {
		name   string
		answer func(n int) error
		after  time.Duration
		want   int // tries
		left   int // undelivered
	}{
		{"taken at once", func(int) error { return nil }, time.Minute, 1, 0},
		{"taken at the third try", func(n int) error {
			if n < 3 {
				return errTest
			}
			return nil
		}, 10 * time.Minute, 3, 0},
		{"refused permanently", func(int) error { return refused(http.StatusNotFound) }, time.Hour, 1, 0},
		{"a gateway's 404 passes", func(n int) error {
			if n < 3 {
				return gateway
			}
			return nil
		}, 10 * time.Minute, 3, 0},
		// Tries come at 0, 45 s, 1:45, 3:00, 4:30, 6:15, 8:15 and 10:30.
		{"a gateway's 404 is not the end for ten minutes", func(int) error { return gateway }, 10 * time.Minute, 7, 1},
		{"a gateway's 404 that lasts is the end", func(int) error { return gateway }, time.Hour, 8, 0},
		{"429 is not the end", func(n int) error {
			if n == 1 {
				return &api.StatusError{Status: http.StatusTooManyRequests, RetryAfter: time.Second}
			}
			return nil
		}, 10 * time.Minute, 2, 0},
		{"Retry-After is a floor", func(int) error {
			return &api.StatusError{Status: http.StatusServiceUnavailable, RetryAfter: 10 * time.Minute}
		}, 9 * time.Minute, 1, 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.work = once(1, deployment("j1", "t1"))
				var last atomic.Bool
				w.report = func(string, api.JobStatus) error {
					if last.Load() {
						return nil
					}
					return test.answer(w.count("report"))
				}
				w.start()
				time.Sleep(test.after)
				if got := w.count("report"); got != test.want {
					t.Errorf("%d tries, want %d", got, test.want)
				}
				if got := len(w.ledger.Undelivered()); got != test.left {
					t.Errorf("%d undelivered, want %d", got, test.left)
				}
				snapshot, err := w.agent.Snapshot(t.Context())
				if due := snapshot.Activities[status.Delivery].NextDue; err != nil || due.IsZero() != (test.left == 0) {
					t.Errorf("the next try is due at %v, %v, with %d undelivered", due, err, test.left)
				}
				last.Store(true)
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
				if got := len(w.ledger.Undelivered()); got != 0 {
					t.Errorf("%d undelivered after the last try", got)
				}
			})
		})
	}
}

func TestReportsAreGivenUpAfterAWeek(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.slowDown()
		w.work = once(1, deployment("j1", "t1"))
		w.report = func(string, api.JobStatus) error { return errTest }
		w.start()
		time.Sleep(7*24*time.Hour - time.Minute)
		if len(w.ledger.Undelivered()) != 1 {
			t.Error("the agent gave up before a week had passed")
		}
		time.Sleep(slowEvery + 7*time.Minute) // the next try
		if len(w.ledger.Undelivered()) != 0 || !strings.Contains(w.log.String(), "a week has passed") {
			t.Error("the agent did not give up after a week, or did not log it")
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestVerdictAfterAnUnansweredRunning: an unanswered Running may arrive after the final status, and
// would leave the job running forever.
func TestVerdictAfterAnUnansweredRunning(t *testing.T) {
	tests := []struct {
		name  string
		setUp func(w *world)
	}{
		{"in the last try", func(w *world) {
			w.deploy = func(_, _ context.Context, _ api.Job) (deploy.Outcome, error) {
				return deploy.Outcome{Status: api.StatusCompleted, RunningUnanswered: true}, nil
			}
		}},
		{"in an earlier try", func(w *world) {
			w.deploy = func(_, _ context.Context, _ api.Job) (deploy.Outcome, error) {
				if w.count("deploy") == 1 {
					return deploy.Outcome{RunningUnanswered: true}, errTest
				}
				return deploy.Outcome{Status: api.StatusCompleted}, nil
			}
		}},
		{"perhaps, by an agent that was killed", func(w *world) {
			w.ledger.Claim([]api.Job{deployment("j1", "t1")}, time.Now())
			w.work = nil
		}},
		{"of an earlier claim", func(w *world) {
			w.ledger.Claim([]api.Job{deployment("j1", "t1")}, time.Now())
			outcome := ledger.Report{Status: &api.JobStatus{Status: api.StatusFailed, Error: "refused"}, Repeat: true}
			if err := w.ledger.Finish("j1", []ledger.Report{outcome}); err != nil {
				w.t.Fatal(err)
			}
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.work = once(1, deployment("j1", "t1"))
				test.setUp(w)
				w.start()
				time.Sleep(4 * time.Minute)
				if got := w.done("report"); got != "report j1 Completed" {
					t.Errorf("reports: %q, want one so far", got)
				}
				// The final status is not sent early when the agent stops, and not lost by a
				// restart.
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
				if got := w.done("report"); got != "report j1 Completed" {
					t.Errorf("reports after stopping: %q, want one", got)
				}
				w.work = nil
				w.start()
				time.Sleep(10 * time.Minute)
				if got := w.done("report"); got != "report j1 Completed" {
					t.Errorf("reports of the second agent: %q, want the same once more", got)
				}
				if got := len(w.ledger.Undelivered()); got != 0 {
					t.Errorf("%d undelivered", got)
				}
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

// TestSupersededReportIsNotSent: a job is handed out again while the report on its earlier claim
// waits behind another report. The control plane would take it for a report on the new claim.
func TestSupersededReportIsNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for _, job := range []api.ID{"slow", "again"} {
			w.ledger.Claim([]api.Job{deployment(string(job), "t1")}, time.Now())
			if err := w.ledger.Finish(job, []ledger.Report{{Status: &api.JobStatus{Status: api.StatusFailed, Error: "refused"}}}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		w.work = once(1, deployment("again", "t1"))
		w.deploy = func(_, ctx context.Context, _ api.Job) (deploy.Outcome, error) {
			return deploy.Outcome{Status: api.StatusCompleted}, sleep(ctx, 2*time.Minute)
		}
		w.report = func(job string, _ api.JobStatus) error {
			if job == "slow" {
				time.Sleep(time.Minute)
			}
			return nil
		}
		w.start()
		time.Sleep(10 * time.Minute)
		if got, want := w.done("report"), "report slow Failed, report again Completed, report again Completed"; got != want {
			t.Errorf("reports: %q, want %q, the last one repeated", got, want)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestOneRefusedReportDoesNotHoldUpTheOthers: an unknown job id is always answered 500.
func TestOneRefusedReportDoesNotHoldUpTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = func(_ context.Context, n int) (api.Work, error) {
			switch n {
			case 1:
				return api.Work{Jobs: []api.Job{deployment("unknown", "t1")}}, nil
			case 20:
				return api.Work{Jobs: []api.Job{deployment("good", "t2")}}, nil
			}
			return api.Work{}, nil
		}
		w.report = func(job string, _ api.JobStatus) error {
			if job == "unknown" {
				return &api.StatusError{Call: "job status", Status: http.StatusInternalServerError}
			}
			return nil
		}
		w.start()
		time.Sleep(20 * pollEvery)
		claimed := w.times("deploy")
		if len(claimed) != 2 || !strings.Contains(w.done("report"), "report good Completed") {
			t.Errorf("deployments at %v, reports %s: want good reported at once", claimed, w.done("report"))
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// walkedLedger counts how often all undelivered reports are listed.
type walkedLedger struct {
	*ledger.Ledger
	walks atomic.Int64
}

func (l *walkedLedger) Undelivered() []ledger.Delivery {
	l.walks.Add(1)
	return l.Ledger.Undelivered()
}

// TestEventsDoNotWalkAllReports: with thousands of undelivered reports, each event would cost the
// loop milliseconds.
func TestEventsDoNotWalkAllReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		counted := &walkedLedger{Ledger: w.ledger}
		w.options.Ledger = counted
		w.work = func(_ context.Context, n int) (api.Work, error) {
			if n > 20 {
				return api.Work{}, nil
			}
			return api.Work{Jobs: []api.Job{deployment(fmt.Sprint("d", n), "t"), csrJob(fmt.Sprint("c", n))}}, nil
		}
		w.report = func(string, api.JobStatus) error { return errTest }
		w.start()
		time.Sleep(time.Hour)
		if got := len(w.ledger.Undelivered()); got != 20 || w.count("report") < 100 {
			t.Errorf("%d reports tried %d times", got, w.count("report"))
		}
		if got := counted.walks.Load(); got != 1 {
			t.Errorf("all reports were listed %d times, want once at the start", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestHungDirectoryHoldsUpWhatNeedsItOnly: hundreds of jobs need a directory that another program
// has locked. One of them keeps trying. When it succeeds, the others need one more try each.
func TestHungDirectoryHoldsUpWhatNeedsItOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		const hung = 300
		var jobs []api.Job
		for i := range hung + 10 {
			job := deployment(fmt.Sprintf("j%d", i), fmt.Sprintf("t%d", i))
			job.CertificateID = api.ID(fmt.Sprint("cert-", i))
			jobs = append(jobs, job)
		}
		w.work = once(1, jobs...)
		started := time.Now()
		var free atomic.Bool
		w.holding = func(work context.Context, job api.Job, holds deploy.Holds) (deploy.Outcome, error) {
			var n int
			fmt.Sscanf(string(job.ID), "j%d", &n)
			if n < hung && !free.Load() {
				// Like the engine: jobs do not wait for a lock that was busy for 15 s.
				err := holds.Yield(64<<10, func(ctx context.Context) error { return sleep(ctx, 15*time.Second-time.Since(started)) })
				return deploy.Outcome{}, errors.Join(err, &transaction.BusyError{Lock: "directory 1:2", Err: errTest})
			}
			if err := sleep(work, time.Second); err != nil {
				return deploy.Outcome{}, err
			}
			w.note(time.Now(), "ran", string(job.ID))
			return deploy.Outcome{Status: api.StatusCompleted}, nil
		}
		w.start()
		time.Sleep(30 * time.Second)
		if got := w.count("ran"); got != 10 {
			t.Errorf("%d jobs ran that do not need the directory, want 10", got)
		}
		time.Sleep(time.Hour)
		if got := w.count("deploy"); got < hung+20 || got > hung+50 {
			t.Errorf("%d tries of %d jobs in an hour: want one for each, and of one some more", got, hung+10)
		}
		before := w.count("deploy")
		free.Store(true)
		time.Sleep(6*time.Minute + hung*time.Second)
		synctest.Wait()
		if got := w.count("ran"); got != hung+10 || w.count("deploy") != before+hung {
			t.Errorf("%d ran of %d, with %d tries more", got, hung+10, w.count("deploy")-before)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestLongRetryAfter: after a 429 with a long Retry-After no deployment starts before that time;
// then all run.
func TestLongRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var jobs []api.Job
		for i := range 50 {
			job := deployment(fmt.Sprint("j", i), fmt.Sprint("t", i))
			job.CertificateID = api.ID(fmt.Sprint("cert-", i))
			jobs = append(jobs, job)
		}
		w.work = once(1, jobs...)
		started := time.Now()
		w.deploy = func(_, work context.Context, _ api.Job) (deploy.Outcome, error) {
			if err := sleep(work, time.Second); err != nil {
				return deploy.Outcome{}, err
			}
			if left := 15*time.Minute - time.Since(started); left > 0 {
				return deploy.Outcome{}, &api.StatusError{Call: "certificate", Status: 429, RetryAfter: left}
			}
			return deploy.Outcome{Status: api.StatusCompleted}, nil
		}
		w.start()
		time.Sleep(15 * time.Minute)
		if got := w.count("deploy"); got != w.options.MaxDeploys {
			t.Errorf("%d tries within Retry-After, want %d", got, w.options.MaxDeploys)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := w.done("report"); strings.Count(got, "Completed") != 50 || strings.Contains(got, "Failed") {
			t.Errorf("reports: %s", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestHandedOutAgainWithAnotherTarget: a job that is claimed again with another target while it
// waits for a slot also waits for that target.
func TestHandedOutAgainWithAnotherTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.MaxDeploys = 2
		var jobs []api.Job
		for i, id := range []string{"long", "short", "moves"} {
			job := deployment(id, fmt.Sprint("t", i))
			job.CertificateID = api.ID("cert-" + id)
			jobs = append(jobs, job)
		}
		w.work = func(_ context.Context, n int) (api.Work, error) {
			switch n {
			case 1:
				return api.Work{Jobs: jobs}, nil
			case 2:
				jobs[2].TargetID = jobs[0].TargetID
				return api.Work{Jobs: jobs[2:]}, nil
			}
			return api.Work{}, nil
		}
		var atTarget atomic.Int64
		var order []string // appended to in turn
		w.holding = func(work context.Context, job api.Job, _ deploy.Holds) (deploy.Outcome, error) {
			if job.TargetID == jobs[0].TargetID {
				if atTarget.Add(1) > 1 {
					t.Error("two deployments to the same target at once")
				}
				defer atTarget.Add(-1)
			}
			err := sleep(work, map[api.ID]time.Duration{"long": time.Hour, "short": 30 * time.Minute, "moves": time.Minute}[job.ID])
			order = append(order, fmt.Sprint(job.ID, " to ", job.TargetID))
			return deploy.Outcome{Status: api.StatusCompleted}, err
		}
		w.start()
		time.Sleep(2 * time.Hour)
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
		if want := []string{"short to t1", "long to t0", "moves to t0"}; !slices.Equal(order, want) {
			t.Errorf("deployed %q, want %q", order, want)
		}
	})
}
