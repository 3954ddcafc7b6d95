package agent_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/enroll"
)

// csrJobs returns n jobs of n different certificates.
func csrJobs(n int) (jobs []api.Job) {
	for i := range n {
		job := csrJob(fmt.Sprintf("j%d", i))
		job.CertificateID = api.ID(fmt.Sprintf("cert-%d", i))
		jobs = append(jobs, job)
	}
	return jobs
}

// TestCSRsSpareAnOverloadedPlane: every poll returns the same five jobs.
func TestCSRsSpareAnOverloadedPlane(t *testing.T) {
	tests := []struct {
		name   string
		err    error
		silent time.Duration // after the first failure
		most   int           // CSRs in an hour
		least  int
	}{
		{"503 with Retry-After", &api.StatusError{Status: 503, RetryAfter: 10 * time.Minute}, 10 * time.Minute, 8, 5},
		{"429 with Retry-After", &api.StatusError{Status: 429, RetryAfter: 10 * time.Minute}, 10 * time.Minute, 8, 5},
		{"500 with Retry-After", &api.StatusError{Status: 500, RetryAfter: 10 * time.Minute}, 10 * time.Minute, 8, 5},
		{"503", &api.StatusError{Status: 503}, 27 * time.Second, 30, 10},
		{"429", &api.StatusError{Status: 429}, 0, 121, 60},
		{"wrong key", &api.StatusError{Status: 401}, 27 * time.Second, 30, 10},
		{"network", errors.New("no route to host"), 27 * time.Second, 30, 10},
		{"timeout", context.DeadlineExceeded, 27 * time.Second, 30, 10},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.options.PollInterval = 30 * time.Second
				left := csrJobs(5)
				w.work = func(context.Context, int) (api.Work, error) {
					w.mu.Lock()
					defer w.mu.Unlock()
					return api.Work{Jobs: slices.Clone(left)}, nil
				}
				healthy := false
				w.enroll = func(ctx context.Context, job api.Job) error {
					_ = sleep(ctx, time.Second)
					w.mu.Lock()
					defer w.mu.Unlock()
					if !healthy {
						return test.err
					}
					left = slices.DeleteFunc(left, func(j api.Job) bool { return j.ID == job.ID })
					return nil
				}
				w.start()
				time.Sleep(time.Hour - time.Second) // a poll is due at the hour
				got := w.times("enroll")
				if len(got) > test.most || len(got) < test.least {
					t.Errorf("%d CSRs in an hour, want %d to %d: %v", len(got), test.least, test.most, got)
				}
				// Two are sent before the first answer.
				for i := 2; i < len(got); i++ {
					if gap := got[i] - got[i-1]; gap < test.silent {
						t.Errorf("CSR %d came %v after the one before, want at least %v", i+1, gap, test.silent)
					}
				}
				w.mu.Lock()
				healthy = true
				w.mu.Unlock()
				time.Sleep(20 * time.Minute)
				w.mu.Lock()
				if len(left) != 0 {
					t.Errorf("%d jobs are left, 20 minutes after the control plane recovered", len(left))
				}
				w.mu.Unlock()
				if got := w.done("report"); got != "" {
					t.Errorf("reports: %s", got)
				}
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

// TestCSRsAfterAnOverload: the first CSR goes alone. Each answer then allows one more at once, and
// makes the next overload count as a first one.
func TestCSRsAfterAnOverload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		left := csrJobs(40)
		w.work = func(context.Context, int) (api.Work, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return api.Work{Jobs: slices.Clone(left)}, nil
		}
		healthy := false
		w.enroll = func(ctx context.Context, job api.Job) error {
			_ = sleep(ctx, time.Second)
			w.mu.Lock()
			defer w.mu.Unlock()
			if !healthy {
				return &api.StatusError{Status: 503}
			}
			left = slices.DeleteFunc(left, func(j api.Job) bool { return j.ID == job.ID })
			return nil
		}
		set := func(to bool) {
			w.mu.Lock()
			defer w.mu.Unlock()
			healthy = to
		}
		w.start()
		time.Sleep(time.Hour)
		before := w.count("enroll")
		set(true)
		for w.count("enroll") < before+31 { // 1, 2, 4, 8, 8 and 8 at once
			time.Sleep(time.Second / 10)
		}
		set(false)
		time.Sleep(10 * time.Minute)
		starts := w.times("enroll")[before:]
		var together []int // how many start at the same time
		var last time.Duration
		var pause time.Duration // before the first try after the second overload
		for _, at := range starts {
			if len(together) > 0 && at == last {
				together[len(together)-1]++
				continue
			}
			if len(together) == 6 {
				pause = at - last
				break
			}
			together = append(together, 1)
			last = at
		}
		if want := []int{1, 2, 4, 8, 8, 8}; !slices.Equal(together, want) {
			t.Errorf("%v CSRs at once, want %v", together, want)
		}
		if pause < pollEvery || pause > 3*pollEvery {
			t.Errorf("the next try after the second overload came %v later, want at most %v, as after the first", pause, 3*pollEvery)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestAnswersAfterAnOverload: the refusal of a single job shows, too, that the control plane is not
// overloaded. A key that cannot be made does not.
func TestAnswersAfterAnOverload(t *testing.T) {
	for name, test := range map[string]struct {
		err  error
		want []int // CSRs at once
	}{
		"profile": {&api.StatusError{Status: 500}, []int{1, 2, 4, 8}},
		"no key":  {fmt.Errorf("%w: is a directory", enroll.ErrKey), []int{1, 1, 1, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.work = func(context.Context, int) (api.Work, error) { return api.Work{Jobs: csrJobs(40)}, nil }
				overloads := 0
				w.enroll = func(ctx context.Context, job api.Job) error {
					_ = sleep(ctx, time.Second)
					w.mu.Lock()
					defer w.mu.Unlock()
					if overloads++; overloads <= 2 { // those that are sent before the first answer
						return &api.StatusError{Status: 503}
					}
					return test.err
				}
				w.start()
				time.Sleep(5 * time.Minute)
				var together []int
				var last time.Duration
				for _, at := range w.times("enroll")[2:] {
					if len(together) > 0 && at == last {
						together[len(together)-1]++
					} else if together = append(together, 1); len(together) > len(test.want) {
						together = together[:len(test.want)]
						break
					}
					last = at
				}
				if !slices.Equal(together, test.want) {
					t.Errorf("%v CSRs at once, want %v", together, test.want)
				}
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

// TestOverloadEndsTheQueueOfACertificate: what waits behind a CSR that is under way when another
// one meets an overload waits for the end of the pause, too.
func TestOverloadEndsTheQueueOfACertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		other := csrJob("other")
		other.CertificateID = "cert-2"
		w.work = once(1, csrJob("a"), csrJob("b"), other)
		w.enroll = func(ctx context.Context, job api.Job) error {
			if job.ID == "other" {
				return &api.StatusError{Status: 503, RetryAfter: 10 * time.Minute}
			}
			return sleep(ctx, time.Second)
		}
		w.start()
		time.Sleep(9 * time.Minute)
		if got := w.done("enroll"); strings.Contains(got, "enroll b") {
			t.Errorf("%s: b did not wait", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestOneBadCSRDoesNotHoldUpTheOthers: a failure of a single job delays only that job.
func TestOneBadCSRDoesNotHoldUpTheOthers(t *testing.T) {
	for name, cause := range map[string]error{
		"profile":          &api.StatusError{Status: 500},
		"gateway":          &api.StatusError{Status: 404},
		"no key":           fmt.Errorf("%w: is a directory", enroll.ErrKey),
		"answer":           api.ErrUnreadable,
		"one that is slow": nil,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				bad := csrJob("bad")
				bad.CertificateID = "cert-bad"
				w.work = func(_ context.Context, n int) (api.Work, error) {
					good := csrJobs(n)[n-1] // a different one with every poll
					return api.Work{Jobs: []api.Job{bad, good}}, nil
				}
				w.enroll = func(ctx context.Context, job api.Job) error {
					if job.ID != "bad" {
						return nil
					}
					if cause == nil {
						return sleep(ctx, time.Hour)
					}
					return cause
				}
				w.start()
				time.Sleep(9*time.Minute + time.Second)
				polls, csrs := w.count("poll"), w.done("enroll")
				if got := strings.Count(csrs, "enroll j"); got != polls {
					t.Errorf("%d good CSRs in %d polls", got, polls)
				}
				if got := strings.Count(csrs, "bad"); got > 8 || cause != nil && got < 3 {
					t.Errorf("%d tries of the bad one in nine minutes: want 3 to 8, ever further apart", got)
				}
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

// TestHangingCSRDoesNotStarveOthers: every poll returns first the jobs of a CA that does not
// answer. That looks like an overload and delays the other jobs, but they are sent eventually.
func TestHangingCSRDoesNotStarveOthers(t *testing.T) {
	for name, cause := range map[string]error{
		"timeout": context.DeadlineExceeded,
		"gateway": &api.StatusError{Status: 504},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				var slow []api.Job
				for i := range 3 {
					job := csrJob(fmt.Sprintf("slow%d", i))
					job.CertificateID = "cert-" + job.ID
					slow = append(slow, job)
				}
				left := csrJobs(5)
				started := time.Now()
				w.work = func(context.Context, int) (api.Work, error) {
					w.mu.Lock()
					defer w.mu.Unlock()
					work := api.Work{Jobs: slices.Clone(slow)}
					if time.Since(started) > time.Hour { // the CA has hung long enough
						work.Jobs = append(work.Jobs, left...)
					}
					return work, nil
				}
				w.enroll = func(ctx context.Context, job api.Job) error {
					if strings.HasPrefix(string(job.ID), "slow") {
						if err := sleep(ctx, 30*time.Second); err != nil {
							return err
						}
						return cause
					}
					w.mu.Lock()
					defer w.mu.Unlock()
					left = slices.DeleteFunc(left, func(j api.Job) bool { return j.ID == job.ID })
					return nil
				}
				w.start()
				time.Sleep(2 * time.Hour)
				w.mu.Lock()
				if len(left) > 0 {
					t.Errorf("%d of 5 CSRs were not sent within an hour", len(left))
				}
				w.mu.Unlock()
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

// TestCSRsOfOneCertificate: two CSRs of one certificate never run at once, and a waiting one does
// not take up the limit.
func TestCSRsOfOneCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		other := csrJob("other")
		other.CertificateID = "cert-2"
		w.work = once(1, csrJob("a"), csrJob("b"), csrJob("c"), other)
		running := make(map[api.ID]bool) // by certificate
		w.enroll = func(ctx context.Context, job api.Job) error {
			w.mu.Lock()
			if running[job.CertificateID] {
				t.Errorf("%s starts while another CSR of %s is under way", job.ID, job.CertificateID)
			}
			running[job.CertificateID] = true
			w.mu.Unlock()
			defer func() {
				w.mu.Lock()
				running[job.CertificateID] = false
				w.mu.Unlock()
			}()
			err := sleep(ctx, time.Minute)
			switch job.ID {
			case "a":
				panic("the first one fails")
			case "b":
				return &enroll.RefusedError{Reason: "so does the second"}
			}
			return err
		}
		w.start()
		time.Sleep(time.Second)
		if got := w.done("enroll"); got != "enroll a, enroll other" && got != "enroll other, enroll a" {
			t.Errorf("%s: want one of each certificate", got)
		}
		time.Sleep(3 * time.Minute)
		if got := w.count("enroll"); got != 4 {
			t.Errorf("%d CSRs, want 4", got)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestCSRThatAGatewayRefuses: a gateway's 404 ends a job only if it lasts.
func TestCSRThatAGatewayRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = func(context.Context, int) (api.Work, error) { return api.Work{Jobs: []api.Job{csrJob("j1")}}, nil }
		w.enroll = func(context.Context, api.Job) error {
			return &api.StatusError{Call: "CSR", Status: http.StatusNotFound, Body: "default backend"}
		}
		var reason string
		w.report = func(_ string, s api.JobStatus) error { reason = s.Error; return nil }
		w.start()
		time.Sleep(10 * time.Minute)
		if got := w.done("report"); got != "" {
			t.Errorf("%s, within ten minutes", got)
		}
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		if got := w.done("report"); got != "report j1 Failed" || !strings.Contains(reason, "default backend") {
			t.Errorf("reports: %q, reason %q, want j1 Failed", got, reason)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestWaitingCSRsAreBounded: the bound holds seven jobs of a MiB. The others wait at
// the control plane, for a poll that follows.
func TestWaitingCSRsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		jobs := csrJobs(20)
		for i := range jobs {
			jobs[i].CommonName = strings.Repeat("x", 1<<20)
		}
		w.work = once(1, jobs...)
		w.start()
		time.Sleep(pollEvery / 2)
		if sent, polls := w.count("enroll"), w.count("poll"); sent != 7 || polls != 2 {
			t.Errorf("%d CSRs were sent and %d polls, want 7 and one that follows the first", sent, polls)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}
