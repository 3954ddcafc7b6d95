package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/agent"
	"certctl-agent/internal/api"
	"certctl-agent/internal/budget"
	"certctl-agent/internal/deploy"
	"certctl-agent/internal/discovery"
	"certctl-agent/internal/installed"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/pace"
)

const (
	heartbeatEvery = time.Minute
	pollEvery      = 30 * time.Second
)

// world is an agent with fakes, in a synctest bubble.
type world struct {
	t       *testing.T
	options agent.Options
	agent   *agent.Agent
	ledger  *ledger.Ledger
	log     *lockedBuffer

	cancel    context.CancelFunc
	result    chan error
	reporting chan struct{} // one element while report or verify is called

	mu    sync.Mutex // guards calls
	calls []call

	// The behaviour of the fakes; nil means success, or no work.
	heartbeat func(ctx context.Context, n int) error
	work      func(ctx context.Context, n int) (api.Work, error)
	enroll    func(ctx context.Context, job api.Job) error
	deploy    func(calls, work context.Context, job api.Job) (deploy.Outcome, error)
	holding   func(ctx context.Context, job api.Job, holds deploy.Holds) (deploy.Outcome, error) // instead of deploy
	report    func(job string, s api.JobStatus) error
	verify    func(job string, v api.Verification) error
	scan      func(ctx context.Context) (discovery.Stats, error)
}

// call is a call of the agent to a fake.
type call struct {
	at   time.Duration // since the start
	name string
	what string
}

type lockedBuffer struct {
	mu   sync.Mutex
	data bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data.String()
}

// newWorld prepares an agent whose random numbers are all in the middle of their range, so that
// every interval is exactly the configured one.
func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	w := &world{t: t, log: new(lockedBuffer), result: make(chan error, 1), reporting: make(chan struct{}, 1)}
	log := slog.New(slog.NewJSONHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if w.ledger, err = ledger.Open(root, log); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.ledger.Close() })
	list, err := installed.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	w.options = agent.Options{
		Budget:            budget.New(pace.Global),
		AgentID:           "agent-1",
		Plane:             plane{w},
		Enroller:          enroller{w},
		Deployer:          deployer{w},
		Ledger:            w.ledger,
		Installed:         list,
		Notify:            notifier{},
		Log:               log,
		Describe:          func(context.Context) api.Heartbeat { return api.Heartbeat{Version: "1"} },
		HeartbeatInterval: heartbeatEvery,
		PollInterval:      pollEvery,
		DiscoveryInterval: time.Hour,
		MaxDeploys:        2,
		ShutdownGrace:     20 * time.Second,
		Rand:              func(n int64) int64 { return n / 2 },
	}
	return w
}

// start runs the agent.
func (w *world) start() {
	w.t.Helper()
	w.agent = agent.New(w.options)
	ctx, cancel := context.WithCancel(w.t.Context())
	w.cancel = cancel
	started := time.Now()
	w.mu.Lock()
	w.calls = nil
	w.mu.Unlock()
	w.noteStart(started)
	go func() { w.result <- w.agent.Run(ctx) }()
}

// slowEvery is the interval for tests that span weeks: with the default they would spend a minute
// on heartbeats.
const slowEvery = 20 * time.Minute

// slowDown sets all intervals to slowEvery.
func (w *world) slowDown() {
	w.options.HeartbeatInterval, w.options.PollInterval = slowEvery, slowEvery
}

// stop stops the agent as SIGTERM does, and returns the result of Run.
func (w *world) stop() error {
	w.cancel()
	return <-w.result
}

var errTest = errors.New("no route to host")

func gone(call string, final bool) error {
	return &api.StatusError{Call: call, Status: http.StatusGone, Body: "Agent has been retired", Final: final}
}

func (w *world) noteStart(at time.Time) { w.note(at, "start", "") }

func (w *world) note(now time.Time, name, what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := call{name: name, what: what}
	if len(w.calls) > 0 {
		c.at = now.Sub(epoch(w.calls[0]))
	} else {
		c.at = time.Duration(now.UnixNano())
	}
	w.calls = append(w.calls, c)
}

func epoch(first call) time.Time { return time.Unix(0, int64(first.at)) }

// times returns when calls of a name were made.
func (w *world) times(name string) []time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	var at []time.Duration
	for _, c := range w.calls {
		if c.name == name {
			at = append(at, c.at)
		}
	}
	return at
}

// done lists the calls of the given names, in order.
func (w *world) done(names ...string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []string
	for _, c := range w.calls {
		for _, name := range names {
			if c.name == name {
				all = append(all, strings.TrimSpace(c.name+" "+c.what))
			}
		}
	}
	return strings.Join(all, ", ")
}

func (w *world) count(name string) int { return len(w.times(name)) }

// answer ends a call like the client: the agent observes it first.
func (w *world) answer(call string, err error) error {
	w.agent.Observe(api.Observation{Call: call, Err: err})
	return err
}

type plane struct{ w *world }

func (p plane) Heartbeat(ctx context.Context, _ api.Heartbeat) error {
	p.w.note(time.Now(), "heartbeat", "")
	if p.w.heartbeat == nil {
		return nil
	}
	return p.w.answer("heartbeat", p.w.heartbeat(ctx, p.w.count("heartbeat")))
}

func (p plane) Work(ctx context.Context) (api.Work, error) {
	p.w.note(time.Now(), "poll", "")
	if p.w.work == nil {
		return api.Work{}, nil
	}
	work, err := p.w.work(ctx, p.w.count("poll"))
	return work, p.w.answer("poll", err)
}

func (p plane) ReportStatus(_ context.Context, job api.ID, s api.JobStatus) error {
	p.w.note(time.Now(), "report", string(job)+" "+s.Status)
	if p.w.report == nil {
		return nil
	}
	p.w.reporting <- struct{}{}
	defer func() { <-p.w.reporting }()
	return p.w.answer("status report", p.w.report(string(job), s))
}

func (p plane) ReportVerification(_ context.Context, job api.ID, v api.Verification) error {
	p.w.note(time.Now(), "verify", string(job))
	if p.w.verify == nil {
		return nil
	}
	p.w.reporting <- struct{}{}
	defer func() { <-p.w.reporting }()
	return p.w.answer("verification", p.w.verify(string(job), v))
}

type enroller struct{ w *world }

func (e enroller) Enroll(_, ctx context.Context, job api.Job) error {
	e.w.note(time.Now(), "enroll", string(job.ID))
	if e.w.enroll == nil {
		return nil
	}
	return e.w.answer("CSR", e.w.enroll(ctx, job))
}

type deployer struct{ w *world }

func (d deployer) Deploy(calls, work context.Context, job api.Job, holds deploy.Holds) (deploy.Outcome, error) {
	d.w.note(time.Now(), "deploy", string(job.ID))
	if d.w.holding != nil {
		return d.w.holding(work, job, holds)
	}
	holds.ReleaseCertificate()
	if d.w.deploy == nil {
		return deploy.Outcome{Status: api.StatusCompleted}, nil
	}
	outcome, err := d.w.deploy(calls, work, job)
	return outcome, d.w.answer("certificate", err)
}

type scanner struct{ w *world }

func (s scanner) Run(ctx context.Context) (discovery.Stats, error) {
	s.w.note(time.Now(), "scan", "")
	if s.w.scan == nil {
		return discovery.Stats{}, nil
	}
	stats, err := s.w.scan(ctx)
	return stats, s.w.answer("discovery report", err)
}

type notifier struct{}

func (notifier) Status(string) bool { return true }
func (notifier) Watchdog()          {}

// manager is a service manager that loses every second notification.
type manager struct {
	notifier
	asked int
	lines []string
}

func (m *manager) Status(line string) bool {
	m.asked++
	if m.asked%2 == 1 {
		return false
	}
	m.lines = append(m.lines, line)
	return true
}

// TestServiceManager: the status line is set at the start, follows the state, and is sent again if
// it was lost.
func TestServiceManager(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, m := newWorld(t), new(manager)
		w.options.Notify = m
		w.heartbeat = func(_ context.Context, n int) error {
			switch n {
			case 1:
				return sleep(t.Context(), 3*pollEvery)
			case 4, 5, 6:
				return errTest
			}
			return nil
		}
		w.start()
		time.Sleep(20 * heartbeatEvery)
		if err := w.stop(); err != nil {
			t.Error(err)
		}
		got := strings.Join(m.lines, "\n")
		for _, want := range []string{"in contact; 0 deployments running", "no contact, 2 heartbeats failed in a row: no route to host"} {
			if !strings.Contains(got, want) {
				t.Errorf("the service manager shows\n%s\nbut never %q", got, want)
			}
		}
		if last := m.lines[len(m.lines)-1]; !strings.HasPrefix(last, "in contact") {
			t.Errorf("at the end it shows %q", last)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w, m := newWorld(t), &manager{asked: 1}
		w.options.Notify = m
		w.heartbeat = func(ctx context.Context, _ int) error { return sleep(ctx, time.Hour) }
		w.start()
		synctest.Wait()
		if want := []string{"started; no heartbeat has been answered yet"}; !slices.Equal(m.lines, want) {
			t.Errorf("before the first answer it shows %q, want %q", m.lines, want)
		}
		if err := w.stop(); err != nil {
			t.Error(err)
		}
	})
}

// sleep sleeps until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// once returns work from the nth poll only.
func once(n int, jobs ...api.Job) func(context.Context, int) (api.Work, error) {
	return func(_ context.Context, poll int) (api.Work, error) {
		if poll != n {
			return api.Work{}, nil
		}
		return api.Work{Jobs: jobs, Count: len(jobs)}, nil
	}
}

func deployment(id, target string) api.Job {
	return api.Job{ID: api.ID(id), Type: api.TypeDeployment, Status: api.StatusRunning, CertificateID: "cert-1",
		TargetID: api.ID(target), TargetType: "NGINX", TargetConfig: json.RawMessage(`{}`)}
}

func csrJob(id string) api.Job {
	return api.Job{ID: api.ID(id), Type: api.TypeRenewal, Status: api.StatusAwaitingCSR, CertificateID: "cert-1", CommonName: "www.example.org"}
}

// everyMinute checks that heartbeats were regular for some minutes.
func (w *world) everyMinute(minutes int) {
	w.t.Helper()
	got := w.times("heartbeat")
	if len(got) < minutes {
		w.t.Errorf("%d heartbeats in %d minutes", len(got), minutes)
	}
	for i := 1; i < len(got); i++ {
		if gap := got[i] - got[i-1]; gap > heartbeatEvery*11/10 {
			w.t.Errorf("heartbeat %d came %v after the one before, want at most %v", i+1, gap, heartbeatEvery*11/10)
		}
	}
}

func TestHeartbeatsKeepTheirRhythm(t *testing.T) {
	forever := func(ctx context.Context) error { return sleep(ctx, 24*time.Hour) }
	tests := []struct {
		name  string
		setUp func(w *world)
	}{
		{"a deployment that hangs", func(w *world) {
			w.work = once(1, deployment("j1", "t1"), deployment("j2", "t2"), deployment("j3", "t3"))
			w.deploy = func(_, work context.Context, _ api.Job) (deploy.Outcome, error) {
				return deploy.Outcome{}, forever(work)
			}
		}},
		{"a poll that hangs", func(w *world) {
			w.work = func(ctx context.Context, _ int) (api.Work, error) { return api.Work{}, forever(ctx) }
		}},
		{"a CSR that hangs", func(w *world) {
			w.work = once(1, csrJob("j1"))
			w.enroll = func(ctx context.Context, _ api.Job) error { return forever(ctx) }
		}},
		{"a scan that takes an hour", func(w *world) {
			w.options.Scanner = scanner{w}
			w.scan = func(ctx context.Context) (discovery.Stats, error) { return discovery.Stats{}, forever(ctx) }
		}},
		{"reports that nobody takes", func(w *world) {
			w.work = once(1, deployment("j1", "t1"))
			w.report = func(string, api.JobStatus) error { return errTest }
		}},
		{"panics everywhere", func(w *world) {
			w.options.Scanner = scanner{w}
			w.work = func(ctx context.Context, n int) (api.Work, error) {
				if n%2 == 0 {
					panic("poll")
				}
				return api.Work{Jobs: []api.Job{csrJob(fmt.Sprint("c", n)), deployment(fmt.Sprint("d", n), "t")}}, nil
			}
			w.enroll = func(context.Context, api.Job) error { panic("enroll") }
			w.deploy = func(_, _ context.Context, _ api.Job) (deploy.Outcome, error) { panic("deploy") }
			w.scan = func(context.Context) (discovery.Stats, error) { panic("scan") }
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				test.setUp(w)
				w.start()
				time.Sleep(30 * time.Minute)
				w.everyMinute(30)
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

func TestDeadControlPlane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.heartbeat = func(context.Context, int) error { return errTest }
		w.work = func(context.Context, int) (api.Work, error) { return api.Work{}, errTest }
		w.start()
		time.Sleep(2 * time.Hour)
		beats := w.times("heartbeat")
		for i := 1; i < len(beats); i++ {
			if gap := beats[i] - beats[i-1]; gap < heartbeatEvery*9/10 || gap > heartbeatEvery+5*time.Minute {
				t.Errorf("try %d came after %v", i+1, gap)
			}
		}
		if len(beats) < 2*60/6 {
			t.Errorf("%d heartbeats tried in two hours: it gave up", len(beats))
		}
		if w.count("poll") == 0 {
			t.Error("no poll was tried: the first one must follow the first heartbeat even if that fails")
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestOrderOfTheStart(t *testing.T) {
	for _, jitter := range []bool{true, false} {
		t.Run(fmt.Sprintf("jitter %v", jitter), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.options.Scanner = scanner{w}
				w.options.StartupJitter = jitter
				w.options.Rand = pace.Global
				// Heartbeats fail: the first poll must not wait for a success.
				w.heartbeat = func(ctx context.Context, _ int) error { return errors.Join(sleep(ctx, time.Second), errTest) }
				w.start()
				time.Sleep(10 * time.Minute)
				beat, poll, scan := w.times("heartbeat")[0], w.times("poll")[0], w.times("scan")[0]
				if poll < beat+time.Second || scan < poll {
					t.Errorf("heartbeat at %v, poll at %v, scan at %v: want that order, the poll after the heartbeat's end", beat, poll, scan)
				}
				if !jitter && (beat > 0 || poll > time.Second || scan > time.Second) {
					t.Errorf("without jitter: heartbeat at %v, poll at %v, scan at %v", beat, poll, scan)
				}
				if jitter && (beat == 0 || beat >= heartbeatEvery || poll-beat-time.Second >= pollEvery) {
					t.Errorf("with jitter: heartbeat at %v, poll %v later", beat, poll-beat-time.Second)
				}
				if err := w.stop(); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

func TestRetirement(t *testing.T) {
	tests := []struct {
		name    string
		setUp   func(w *world)
		unborn  []string // what must never happen
		minimum map[string]int
		log     string
	}{
		{
			name: "first heartbeat",
			setUp: func(w *world) {
				w.heartbeat = func(context.Context, int) error { return gone("heartbeat", true) }
				accepted, refused := w.ledger.Claim([]api.Job{deployment("old", "t1")}, time.Now())
				if len(accepted) != 1 || len(refused) != 0 {
					w.t.Fatal("the ledger did not take the job of an earlier run")
				}
			},
			unborn: []string{"poll", "deploy", "report", "enroll", "scan"},
		},
		{
			name: "first poll",
			setUp: func(w *world) {
				w.work = func(context.Context, int) (api.Work, error) { return api.Work{}, gone("poll", true) }
			},
			unborn: []string{"deploy", "report", "enroll", "scan"},
		},
		{
			name: "in the middle of a deployment",
			setUp: func(w *world) {
				w.work = once(1, deployment("j1", "t1"), deployment("j2", "t1"))
				w.deploy = func(_, work context.Context, _ api.Job) (deploy.Outcome, error) {
					if err := sleep(work, 70*time.Second); err != nil {
						return deploy.Outcome{Status: api.StatusFailed, Error: "rolled back"}, nil
					}
					return deploy.Outcome{Status: api.StatusCompleted}, nil
				}
				w.heartbeat = func(_ context.Context, n int) error {
					if n == 2 {
						return gone("heartbeat", true)
					}
					return nil
				}
			},
			unborn:  []string{"report", "deploy j2"},
			minimum: map[string]int{"deploy": 1},
		},
		{
			name: "a status report, confirmed by a heartbeat",
			setUp: func(w *world) {
				w.work = once(1, deployment("j1", "t1"))
				w.report = func(string, api.JobStatus) error { return gone("job status", false) }
				w.heartbeat = func(_ context.Context, n int) error {
					if n == 2 {
						return gone("heartbeat", true)
					}
					return nil
				}
			},
			minimum: map[string]int{"heartbeat": 2, "report": 1},
		},
		{
			name: "a CSR, confirmed by a heartbeat",
			setUp: func(w *world) {
				w.work = once(1, csrJob("j1"))
				w.enroll = func(context.Context, api.Job) error { return gone("csr", false) }
				w.heartbeat = func(_ context.Context, n int) error {
					if n == 2 {
						return gone("heartbeat", true)
					}
					return nil
				}
			},
			minimum: map[string]int{"heartbeat": 2},
		},
		{
			name: "a call of a deployment that goes on, confirmed by a heartbeat",
			setUp: func(w *world) {
				w.work = once(1, deployment("j1", "t1"))
				w.deploy = func(_, work context.Context, _ api.Job) (deploy.Outcome, error) {
					_ = w.answer("status report", gone("status report", false)) // "Running"
					return deploy.Outcome{Status: api.StatusCompleted}, sleep(work, time.Second)
				}
				w.heartbeat = func(_ context.Context, n int) error {
					if n == 2 {
						return gone("heartbeat", true)
					}
					return nil
				}
			},
			unborn:  []string{"report"},
			minimum: map[string]int{"heartbeat": 2, "deploy": 1},
		},
		{
			name: "several calls at once",
			setUp: func(w *world) {
				w.heartbeat = func(ctx context.Context, n int) error {
					if n == 1 {
						return nil
					}
					_ = sleep(ctx, time.Second)
					return gone("heartbeat", true)
				}
				w.work = func(ctx context.Context, n int) (api.Work, error) {
					if n == 3 {
						_ = sleep(ctx, time.Second)
						return api.Work{}, gone("poll", true)
					}
					return api.Work{}, nil
				}
			},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.options.Scanner = nil
				test.setUp(w)
				w.start()
				started := time.Now()
				if err := <-w.result; !errors.Is(err, api.ErrRetired) {
					t.Fatalf("Run: %v, want ErrRetired", err)
				}
				if took := time.Since(started); took > 5*time.Minute {
					t.Errorf("it took %v to stop", took)
				}
				for _, name := range test.unborn {
					if name, what, ok := strings.Cut(name, " "); ok {
						if strings.Contains(w.done(name), what) {
							t.Errorf("%s %s happened", name, what)
						}
					} else if w.count(name) > 0 {
						t.Errorf("after retirement: %s", w.done(name))
					}
				}
				for name, n := range test.minimum {
					if w.count(name) < n {
						t.Errorf("%d calls of %s, want %d", w.count(name), name, n)
					}
				}
				if got := strings.Count(w.log.String(), "has retired this agent"); got != 1 {
					t.Errorf("%d lines about the retirement, want one", got)
				}
				for _, part := range []string{`"status":410`, `"agent_id":"agent-1"`, "Agent has been retired"} {
					if !strings.Contains(w.log.String(), part) {
						t.Errorf("the log does not say %s", part)
					}
				}
			})
		})
	}
}

func TestGoneElsewhereIsNotRetirement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.work = once(1, deployment("j1", "t1"))
		refusals := 0
		w.report = func(string, api.JobStatus) error {
			if refusals++; refusals < 3 {
				return gone("job status", false)
			}
			return nil
		}
		w.start()
		time.Sleep(time.Second)
		if got := w.count("heartbeat"); got != 2 {
			t.Errorf("%d heartbeats right after a 410 on a status report, want the first one and one that asks", got)
		}
		time.Sleep(10 * time.Minute)
		if got := w.done("report"); !strings.HasSuffix(got, "report j1 Completed") || w.count("report") != 3 {
			t.Errorf("reports: %s, want three tries of j1 Completed", got)
		}
		w.everyMinute(10)
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestWorkThatComesAfterRetirementIsNotTouched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.heartbeat = func(_ context.Context, n int) error {
			if n == 2 {
				return gone("heartbeat", true)
			}
			return nil
		}
		// The poll ignores its context, as if its answer were already on the wire.
		w.work = func(_ context.Context, n int) (api.Work, error) {
			if n == 2 {
				time.Sleep(35 * time.Second)
				return api.Work{Jobs: []api.Job{deployment("late", "t1"), csrJob("late-csr")}}, nil
			}
			return api.Work{}, nil
		}
		w.start()
		if err := <-w.result; !errors.Is(err, api.ErrRetired) {
			t.Fatalf("Run: %v, want ErrRetired", err)
		}
		if w.count("poll") != 2 {
			t.Fatalf("%d polls, want 2", w.count("poll"))
		}
		if got := w.done("deploy", "enroll", "report"); got != "" {
			t.Errorf("a retired agent started work: %s", got)
		}
		if jobs := w.ledger.Unfinished(); len(jobs) != 0 {
			t.Errorf("it was recorded: %v", jobs)
		}
	})
}

// TestRetirementEndsClaims: a poll and a CSR under way when the agent is retired are
// cut at once, not after the grace of transactions.
func TestRetirementEndsClaims(t *testing.T) {
	for _, name := range []string{"poll", "enroll"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.heartbeat = func(_ context.Context, n int) error {
				if n == 2 {
					return gone("heartbeat", true)
				}
				return nil
			}
			w.work = once(1, csrJob("j1"))
			if name == "poll" {
				w.work = func(ctx context.Context, _ int) (api.Work, error) { return api.Work{}, sleep(ctx, time.Hour) }
			}
			w.enroll = func(ctx context.Context, _ api.Job) error { return sleep(ctx, time.Hour) }
			w.start()
			begun := time.Now()
			if err := <-w.result; !errors.Is(err, api.ErrRetired) {
				t.Errorf("Run: %v, want ErrRetired", err)
			}
			if took := time.Since(begun); took != heartbeatEvery || w.count(name) == 0 {
				t.Errorf("with a %s under way it ended after %v, want %v; begun: %s", name, took, heartbeatEvery, w.done("poll", "enroll"))
			}
		})
	}
}

func TestRescanAndRefusedJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.options.Scanner = scanner{w}
		w.work = func(_ context.Context, n int) (api.Work, error) {
			if n != 1 {
				return api.Work{}, nil
			}
			var work api.Work
			err := json.Unmarshal([]byte(`{"jobs":[
				{"id":"../evil","type":"Deployment","status":"Running","certificate_id":"c"},
				{"id":"a\u0000b","type":"Renewal","status":"AwaitingCSR","certificate_id":"c"},
				{"id":"other","type":"Revocation","status":"Running","certificate_id":"a/b"},
				{"id":"odd","type":"Deployment","status":"Running","certificate_id":"c","sans":"no list"},
				{"id":"certificate","type":"Deployment","status":"Running","certificate_id":"../../evil","target_id":"t"},
				{"id":"csr","type":"Renewal","status":"AwaitingCSR","certificate_id":"../../evil","common_name":"x.test"},
				{"id":"target","type":"Deployment","status":"Running","certificate_id":"c","target_id":"a/b"},
				{"id":"none","type":"Deployment","status":"Running","certificate_id":"c","target_type":"NGINX"}]}`), &work)
			work.Excess = 7
			return work, err
		}
		reasons := make(map[string]string)
		w.report = func(job string, s api.JobStatus) error { reasons[job] = s.Error; return nil }
		w.start()
		time.Sleep(time.Minute)
		if got := w.done("deploy", "enroll"); got != "" {
			t.Errorf("done: %q, want no job started", got)
		}
		const expected = " is not valid: expected 1 to 128 of A-Z a-z 0-9 . _ -"
		for job, want := range map[string]string{
			"odd": "the job could not be decoded: json: ", "certificate": `the certificate id "../../evil"` + expected,
			"csr": `the certificate id "../../evil"` + expected, "target": `the target id "a/b"` + expected, "none": `the target id ""` + expected,
		} {
			if got := reasons[job]; !strings.HasPrefix(got, want) || !strings.Contains(w.done("report"), "report "+job+" Failed") {
				t.Errorf("job %s: reason %q, want %q", job, got, want)
			}
		}
		if got := w.count("report"); got != 5 {
			t.Errorf("reports: %s, want one on each malformed job that has an id", w.done("report"))
		}
		if got := w.ledger.Unfinished(); len(got) != 0 {
			t.Errorf("claimed: %v", got)
		}
		for _, part := range []string{"its id is invalid", "could not be decoded", "more jobs than any host has targets"} {
			if !strings.Contains(w.log.String(), part) {
				t.Errorf("the log does not say %q", part)
			}
		}
		scans := w.count("scan")
		w.agent.Rescan()
		time.Sleep(time.Second)
		if got := w.count("scan"); got != scans+1 {
			t.Errorf("%d scans after Rescan, want %d", got, scans+1)
		}
		if err := w.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestClockSkewIsSaidOnce(t *testing.T) {
	w := newWorld(t)
	a := agent.New(w.options)
	observe := func(server time.Time) { a.Observe(api.Observation{Date: server, Received: time.Now()}) }
	observe(time.Now())
	if strings.Contains(w.log.String(), "clock") {
		t.Error("warned although the clocks agree")
	}
	for range 3 {
		observe(time.Now().Add(10 * time.Minute))
	}
	if got := strings.Count(w.log.String(), "time synchronisation"); got != 1 {
		t.Errorf("%d warnings about the clock, want one", got)
	}
}
