// Package agent is the select loop of the daemon. It decides when things happen: it owns the
// timers, the retirement channel, the job slots and every goroutine. The interfaces in Options do
// the work.
//
// The goroutine of Run owns all state of the loop. Everything that takes time runs in another
// goroutine, which sends its result to the loop as an event: a function that the loop calls. So the
// loop needs no locks, and neither a hanging deployment, an unreachable control plane nor a long
// scan can delay a heartbeat.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/deploy"
	"certctl-agent/internal/discovery"
	"certctl-agent/internal/installed"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/pace"
	"certctl-agent/internal/status"
)

// Plane is the control plane as the loop uses it. Package api defines the meaning of its errors.
// The client also reports every call, also those of other packages, to Agent.Observe.
type Plane interface {
	Heartbeat(ctx context.Context, h api.Heartbeat) error
	Work(ctx context.Context) (api.Work, error)
	ReportStatus(ctx context.Context, job api.ID, s api.JobStatus) error
	ReportVerification(ctx context.Context, job api.ID, v api.Verification) error
}

// Enroller makes a key for one job and gets its CSR accepted. Calls ends when the agent stops,
// claims with the shutdown grace or when the agent is retired. An enroll.RefusedError is final;
// after any other error the job can be retried.
type Enroller interface {
	Enroll(calls, claims context.Context, job api.Job) error
}

// Deployer carries out one Deployment job. Calls ends when the agent stops, work with the shutdown
// grace. An error is temporary: nothing has changed, and the job is retried.
type Deployer interface {
	Deploy(calls, work context.Context, job api.Job, holds deploy.Holds) (deploy.Outcome, error)
}

// Scanner scans the disks once and reports the certificates that it found.
type Scanner interface {
	Run(ctx context.Context) (discovery.Stats, error)
}

// Ledger keeps claimed jobs and undelivered reports on disk; see package ledger.
type Ledger interface {
	Claim(jobs []api.Job, now time.Time) (accepted []api.Job, refused []ledger.Refusal)
	Start(job api.ID) error
	Finish(job api.ID, reports []ledger.Report) error
	Report(job api.ID, s api.JobStatus) error
	Unfinished() []api.Job
	Job(id api.ID) (job api.Job, ok bool)
	Undelivered() []ledger.Delivery
	UndeliveredOf(job api.ID) []ledger.Delivery
	Delivered(d ledger.Delivery) error
	Drop(d ledger.Delivery, reason string) error
}

// Budget limits the rate of calls; see package budget.
type Budget interface {
	Throttled() bool
	Stop()
}

// Notifier notifies the service manager; see package sdnotify.
type Notifier interface {
	Status(text string) (sent bool)
	Watchdog()
}

// Options configure the loop. All fields are required unless noted.
type Options struct {
	AgentID   string
	Plane     Plane
	Enroller  Enroller
	Deployer  Deployer
	Scanner   Scanner // nil: discovery is off
	Ledger    Ledger
	Budget    Budget
	Installed *installed.List // across restarts
	Notify    Notifier
	Log       *slog.Logger

	// Describe returns the next heartbeat. It may use the network.
	Describe func(ctx context.Context) api.Heartbeat

	// Repair rolls back or finishes interrupted deployments and reloads their servers. The loop
	// calls it at the start and after a failed deployment, until it succeeds. Calls ends when the
	// agent stops and bounds waiting; work ends with the shutdown grace. May be nil.
	Repair func(calls, work context.Context) error

	HeartbeatInterval time.Duration // 60 s by default
	PollInterval      time.Duration // 30 s
	DiscoveryInterval time.Duration // 6 h
	StartupJitter     bool          // delay the first heartbeat, poll and scan
	MaxDeploys        int           // parallel deployments, at least 1
	ShutdownGrace     time.Duration // for running transactions; then they are rolled back
	WatchdogInterval  time.Duration // 0: no watchdog
	Rand              pace.Rand

	// Base has the fields of the snapshot that the loop does not know: version, server,
	// configuration warnings.
	Base status.Snapshot
}

const (
	// finalDelivery bounds the last try to deliver reports when the agent stops. Undelivered
	// reports are kept.
	finalDelivery = 5 * time.Second

	// maxSkew is the clock difference to the control plane beyond which the agent warns.
	maxSkew = 5 * time.Minute
)

// errStopping is the cause of the cancellation of work at the end of the shutdown grace.
var errStopping = errors.New("the agent is stopping")

// Agent is the loop. Create it with New and run it once.
type Agent struct {
	opts Options
	log  *slog.Logger

	events  chan func()   // to the loop, from its goroutines
	beatNow chan struct{} // requests a heartbeat, from any goroutine
	scanNow chan struct{} // requests a scan, from any goroutine

	retireOnce sync.Once
	retired    context.Context // ends when the control plane retires this agent
	retire     context.CancelFunc
	skewNanos  atomic.Int64
	skewOnce   sync.Once
	inContact  atomic.Bool // the last heartbeat was accepted

	limitedMu sync.Mutex
	limited   map[string]uint64 // 429s by activity; guarded by limitedMu

	// The goroutine of Run owns the fields below.

	started    time.Time
	goroutines sync.WaitGroup
	stopping   bool

	calls      context.Context // ends when the agent stops: heartbeats, scans, deliveries
	stopCalls  context.CancelFunc
	work       context.Context // ends with the shutdown grace: transactions
	stopWork   context.CancelCauseFunc
	claims     context.Context // like work, but ends at once if retired: polls and CSRs
	stopClaims context.CancelFunc

	beat, poll, scan, repair *activity
	activities               []*activity // all of them
	resumed                  bool        // unfinished jobs have been resumed
	fruitless                int         // polls in a row that were of no use; see followUp

	jobs       jobTable
	csrs       csrTable
	delivery   deliveryTable
	counters   status.Counters
	lastScan   status.Scan
	lastStatus string // last sent to the service manager
}

// New returns an agent that has not started.
func New(opts Options) *Agent {
	a := &Agent{
		opts:    opts,
		log:     opts.Log,
		events:  make(chan func()),
		beatNow: make(chan struct{}, 1),
		scanNow: make(chan struct{}, 1),
		limited: make(map[string]uint64),
	}
	a.retired, a.retire = context.WithCancel(context.Background())
	a.beat = a.newActivity(status.Heartbeat, opts.HeartbeatInterval, pace.New, a.heartbeat)
	a.poll = a.newActivity(status.Poll, opts.PollInterval, pace.NewYielding, a.claim)
	a.scan = a.newActivity(status.Discovery, opts.DiscoveryInterval, pace.NewYielding, a.scanOnce)
	a.repair = a.newActivity("repair", opts.PollInterval, pace.NewYielding, a.repairOnce)
	a.scan.off, a.repair.off = opts.Scanner == nil, opts.Repair == nil
	a.repair.untilDone = true

	// The first poll follows the first heartbeat, so that a retired agent learns of it before it
	// claims work; the first scan follows the first poll. Its delay is that of a poll, since its
	// own interval is hours.
	a.beat.next, a.poll.next = a.poll, a.scan
	a.scan.first = a.poll.pacer.First
	a.jobs = newJobTable(opts.MaxDeploys)
	a.csrs = newCSRTable(pace.New(opts.PollInterval, opts.Rand))
	a.delivery = newDeliveryTable()
	return a
}

// Rescan requests a scan now. It never blocks.
func (a *Agent) Rescan() { wake(a.scanNow) }

// Observe records what a call revealed about the control plane: its clock, a 429, and a 410, which
// may mean that this agent is retired. Any goroutine may call it. It never blocks.
func (a *Agent) Observe(o api.Observation) {
	if !o.Date.IsZero() {
		a.observeClock(o.Date.Sub(o.Received).Round(time.Second))
	}
	switch {
	case api.RateLimited(o.Err):
		a.limitedMu.Lock()
		defer a.limitedMu.Unlock()
		a.limited[activityOf(o.Call)]++
	case errors.Is(o.Err, api.ErrRetired):
		a.retireOnce.Do(func() {
			status, _ := errors.AsType[*api.StatusError](o.Err)
			a.log.Error("the control plane has retired this agent: it shuts down",
				"call", o.Call, "status", status.Status, "body", status.Body, "agent_id", a.opts.AgentID)
			a.retire()
		})
	case errors.Is(o.Err, api.ErrGone):
		wake(a.beatNow)
	}
}

// activityOf returns the activity that a call belongs to, for metrics.
func activityOf(call string) string {
	switch call {
	case "poll":
		return status.Poll
	case "discovery report":
		return status.Discovery
	case "status report", "verification":
		return status.Delivery
	}
	return strings.ToLower(call) // heartbeat, csr, certificate
}

func (a *Agent) observeClock(skew time.Duration) {
	a.skewNanos.Store(int64(skew))
	if skew.Abs() <= maxSkew {
		return
	}
	a.skewOnce.Do(func() {
		a.log.Warn("this host's clock and the control plane's differ: certificates may be judged expired or not yet valid; check time synchronisation",
			"control_plane_is_ahead_by", skew.String())
	})
}

// Run runs the agent until ctx ends or the control plane retires it. It returns nil in the first
// case and api.ErrRetired in the second. By then all goroutines that it started have ended.
func (a *Agent) Run(ctx context.Context) error {
	a.started = time.Now()
	a.calls, a.stopCalls = context.WithCancel(ctx)
	defer a.stopCalls()
	a.work, a.stopWork = context.WithCancelCause(context.WithoutCancel(ctx))
	defer a.stopWork(nil)
	a.claims, a.stopClaims = context.WithCancel(a.work)
	defer a.stopClaims()
	a.jobs.unfinished = a.opts.Ledger.Unfinished()
	for _, d := range a.opts.Ledger.Undelivered() {
		a.scheduleReports(d.Job)
	}

	watchdog := time.Tick(a.opts.WatchdogInterval) // nil if that is 0
	a.notifyStatus()
	a.startFirst(a.beat)
	a.begin(a.repair)

	for {
		select {
		case <-ctx.Done():
			a.log.Info("stopping", "cause", context.Cause(ctx).Error(), "grace", a.opts.ShutdownGrace.String())
			return a.stop(watchdog, nil)
		case <-a.retired.Done():
			return a.stop(watchdog, api.ErrRetired)
		case event := <-a.events:
			event()
		case <-a.beatNow:
			a.begin(a.beat)
		case <-a.scanNow:
			a.begin(a.scan)
		case <-a.beat.timer.C:
			a.begin(a.beat)
		case <-a.poll.timer.C:
			a.resume()
			a.begin(a.poll)
		case <-a.scan.timer.C:
			a.begin(a.scan)
		case <-a.repair.timer.C:
			a.begin(a.repair)
		case <-a.jobs.timer.C:
			a.startJobs()
		case <-a.delivery.timer.C:
			a.deliver()
		case <-watchdog:
			a.opts.Notify.Watchdog()
		}
	}
}

// stop ends the agent. It starts nothing new, cancels calls, and rolls back transactions that still
// run after the grace.
func (a *Agent) stop(watchdog <-chan time.Time, cause error) error {
	a.stopping = true
	a.stopCalls()
	a.opts.Budget.Stop()
	if cause != nil {
		a.stopClaims()
	}
	for _, act := range a.activities {
		act.timer.Stop()
	}
	a.jobs.timer.Stop()
	a.delivery.timer.Stop()

	done := make(chan struct{})
	go func() {
		a.goroutines.Wait()
		close(done)
	}()
	grace := time.After(a.opts.ShutdownGrace)
	for {
		select {
		case event := <-a.events:
			event()
		case <-grace:
			a.log.Warn("the shutdown grace is over: running transactions are rolled back", "grace", a.opts.ShutdownGrace.String())
			a.stopWork(errStopping)
		case <-watchdog:
			a.opts.Notify.Watchdog()
		case <-done:
			if cause == nil && a.retired.Err() == nil {
				a.deliverLast()
				return nil
			}
			return api.ErrRetired
		}
	}
}

// spawn runs work in a goroutine. The loop then calls the function that work returned, or failed if
// work panicked. All work runs through spawn, so a panic costs one job or one try, never the agent.
func (a *Agent) spawn(work func() (event func()), failed func(error)) {
	a.goroutines.Go(func() {
		var event func()
		err := a.contain(func() { event = work() })
		if err != nil {
			event = func() { failed(err) }
		}
		a.events <- event
	})
}

// contain turns a panic into an error and logs its stack.
func (a *Agent) contain(work func()) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v", p)
			a.log.Error("panic contained; please report it", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	work()
	return nil
}

// exhausted reports whether to give up after a refusal that may be a gateway's: it has lasted, and
// heartbeats are accepted. Some gateways answer 404 to all calls while the control plane is down.
func (a *Agent) exhausted(p *pace.Patience, err error) bool {
	return p.Exhausted(api.Doubtful(err)) && a.inContact.Load()
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
