package agent_test

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/deploy"
	"certctl-agent/internal/ledger"
)

// TestEventsCostTheSame: the loop's allocations and ledger calls for 50 jobs that end do not grow
// with the number of waiting jobs.
func TestEventsCostTheSame(t *testing.T) {
	const few = 600 // more than end in the time of the test
	csrs := func(cert func(i int) api.ID) func(n int) []api.Job {
		return func(n int) (jobs []api.Job) {
			for i := range n {
				job := csrJob(fmt.Sprint("j", i))
				job.CertificateID = cert(i)
				jobs = append(jobs, job)
			}
			return jobs
		}
	}
	deployments := func(cert, target func(i int) api.ID) func(n int) []api.Job {
		return func(n int) (jobs []api.Job) {
			for i := range n {
				job := deployment(fmt.Sprint("j", i), string(target(i)))
				job.CertificateID = cert(i)
				jobs = append(jobs, job)
			}
			return jobs
		}
	}
	one := func(int) api.ID { return "one" }
	many := func(i int) api.ID { return api.ID(fmt.Sprint("many", i)) }
	for name, jobs := range map[string]func(n int) []api.Job{
		"CSRs":                           csrs(many),
		"CSRs of one certificate":        csrs(one),
		"deployments":                    deployments(many, many),
		"deployments of one certificate": deployments(one, many),
		"deployments to one target":      deployments(many, one),
		"deployments of one, to one":     deployments(one, one),
	} {
		t.Run(name, func(t *testing.T) {
			fewBytes, fewAsked := costOfEvents(t, jobs(few))
			all, allAsked := costOfEvents(t, jobs(4096))
			t.Logf("%d jobs: %d bytes, %d questions; 4096: %d, %d", few, fewBytes, fewAsked, all, allAsked)
			if all > 3*fewBytes {
				t.Errorf("50 jobs allocate %d bytes with %d unfinished jobs, %d with 4096", fewBytes, few, all)
			}
			if allAsked != fewAsked {
				t.Errorf("50 jobs ask the ledger %d times with %d unfinished jobs, %d times with 4096", fewAsked, few, allAsked)
			}
		})
	}
}

// costOfEvents returns the cost of 50 jobs, one a second.
func costOfEvents(t *testing.T, jobs []api.Job) (bytes uint64, asked int64) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.MaxDeploys = 1
		w.options.Log = slog.New(slog.DiscardHandler)
		w.options.HeartbeatInterval, w.options.PollInterval = 24*time.Hour, 24*time.Hour
		book := &book{Ledger: w.ledger}
		w.options.Ledger = book
		w.work = once(1, jobs...)
		w.options.Enroller, w.options.Deployer = second{}, second{}
		w.start()
		time.Sleep(10*time.Second + time.Second/2)
		synctest.Wait()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		asked = book.asked.Load()
		time.Sleep(50 * time.Second)
		synctest.Wait()
		runtime.ReadMemStats(&after)
		bytes, asked = after.TotalAlloc-before.TotalAlloc, book.asked.Load()-asked
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return bytes, asked
}

// second takes a second for each job.
type second struct{}

func (second) Enroll(_, ctx context.Context, job api.Job) error { return sleep(ctx, time.Second) }

func (second) Deploy(_, ctx context.Context, job api.Job, holds deploy.Holds) (deploy.Outcome, error) {
	err := sleep(ctx, time.Second/2)
	holds.ReleaseCertificate()
	_ = sleep(ctx, time.Second/2)
	return deploy.Outcome{Status: api.StatusCompleted}, err
}

// book is a ledger in memory that counts its calls.
type book struct {
	*ledger.Ledger
	asked atomic.Int64
}

func (b *book) Claim(jobs []api.Job, _ time.Time) ([]api.Job, []ledger.Refusal) { return jobs, nil }

func (b *book) Start(api.ID) error                     { return nil }
func (b *book) Finish(api.ID, []ledger.Report) error   { return nil }
func (b *book) Job(id api.ID) (job api.Job, ok bool)   { b.asked.Add(1); return api.Job{}, false }
func (b *book) UndeliveredOf(api.ID) []ledger.Delivery { b.asked.Add(1); return nil }
func (b *book) Undelivered() []ledger.Delivery         { b.asked.Add(1000); return nil }
func (b *book) Unfinished() []api.Job                  { b.asked.Add(1000); return nil }
