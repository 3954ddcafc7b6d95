package reliability_test

import (
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/statedir"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

// TestNotYetValid deploys a certificate from a CA whose clock is ahead of this host's.
func TestNotYetValid(t *testing.T) {
	tests := []struct {
		name  string
		ahead time.Duration
		want  string
	}{
		{"within the tolerance", 4 * time.Minute, api.StatusCompleted},
		{"a clock that is wrong", time.Hour, api.StatusFailed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 1, []server{{id: "web", cert: "cert"}})
				defer w.close()
				w.plane.AddCertificate(devplane.Certificate{ID: "cert", CommonName: "www.example.org", Targets: []string{"web"},
					Signing: testca.CSROptions{NotBefore: time.Now().Add(test.ahead + time.Minute)}}) // the first poll takes a while
				begun := time.Now()
				w.start()
				w.plane.StartIssuance("cert")
				w.waitUntilDone()
				job := w.plane.Jobs()[1]
				if job.Status != test.want {
					t.Errorf("the deployment is %s (%s), want %s", job.Status, job.Error, test.want)
				}
				leaf, err := w.site.pair(w.site.servers[0])
				switch {
				case err != nil:
					t.Error(err)
				case test.want == api.StatusFailed && (leaf != nil || !strings.Contains(job.Error, "clock")):
					t.Errorf("installed: %v, reason %q: want nothing touched, and the clock named", leaf != nil, job.Error)
				case test.want == api.StatusCompleted && leaf == nil:
					t.Error("nothing is installed")
				case leaf != nil && job.History[len(job.History)-1].Time.Before(leaf.NotBefore):
					t.Errorf("completed %v after the start, before the certificate was valid", job.History[len(job.History)-1].Time.Sub(begun))
				}
				w.terminate()
				w.report(t)
			})
		})
	}
}

// TestSkewIsSaidOnce checks that the real client, which reads the Date of every answer, logs the
// skew once.
func TestSkewIsSaidOnce(t *testing.T) {
	for _, skew := range []time.Duration{0, 4 * time.Minute, 10 * time.Minute, -24 * time.Hour} {
		t.Run(skew.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorldWith(t, 1, []server{{id: "web", cert: "cert"}}, devplane.Options{Skew: skew})
				defer w.close()
				log := new(locked)
				w.log = slog.New(slog.NewTextHandler(log, nil))
				w.start()
				time.Sleep(time.Hour)
				want := 0
				if skew.Abs() > 5*time.Minute {
					want = 1
				}
				if got := strings.Count(string(log.since(0)), "check time synchronisation"); got != want {
					t.Errorf("%d warnings in an hour, want %d", got, want)
				}
				if snapshot, err := w.life.app.Agent.Snapshot(t.Context()); err != nil || (snapshot.ClockSkewSeconds-skew.Seconds()) > 2 {
					t.Errorf("the status says a skew of %v s (%v)", snapshot.ClockSkewSeconds, err)
				}
				// Nothing else depends on the clock.
				if got := w.plane.Count(devplane.CallHeartbeat); got < 54 || got > 67 {
					t.Errorf("%d heartbeats in an hour", got)
				}
				w.terminate()
				w.report(t)
			})
		})
	}
}

// TestClockWentBack starts with state that was written by a clock years ahead, because a bubble
// begins in the year 2000. Claimed jobs are carried out, reports are delivered, and nothing waits
// for the old time.
func TestClockWentBack(t *testing.T) {
	dir := needs.MemoryDir(t)
	state, err := statedir.Open(dir, "agent-1", "machine")
	if err != nil {
		t.Fatal(err)
	}
	jobs, err := ledger.Open(state.Root, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var claimed []api.Job
	for _, id := range []api.ID{"finished", "unfinished"} {
		claimed = append(claimed, api.Job{ID: id, Type: api.TypeDeployment, Status: api.StatusRunning,
			CertificateID: "cert", TargetID: "gone", TargetType: "Unknown"})
	}
	if accepted, _ := jobs.Claim(claimed, time.Now()); len(accepted) != 2 {
		t.Fatal("the jobs were not accepted")
	}
	if err := jobs.Finish("finished", []ledger.Report{{Status: &api.JobStatus{Status: api.StatusCompleted}}}); err != nil {
		t.Fatal(err)
	}
	jobs.Close()
	state.Close()

	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, []server{{id: "web", cert: "cert"}})
		defer w.close()
		if err := os.CopyFS(w.stateDir(), os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		for _, job := range claimed {
			w.plane.AddJob(devplane.WireJob{ID: string(job.ID), Type: job.Type, Status: job.Status,
				CertificateID: string(job.CertificateID), TargetID: string(job.TargetID), TargetType: job.TargetType})
		}
		w.start()
		time.Sleep(2 * time.Minute)
		for id, want := range map[string]string{"finished": api.StatusCompleted, "unfinished": api.StatusFailed} {
			if job, _ := w.plane.Job(id); job.Status != want {
				t.Errorf("job %s is %s, want %s", id, job.Status, want)
			}
		}
		w.terminate()
		w.report(t)
	})
}
