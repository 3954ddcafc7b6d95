package budget_test

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/budget"
	"certctl-agent/internal/pace"
)

// The renewals of a fleet are simulated with the real pacing code and the real
// budgets: each agent has heartbeats, polls, and what polls bring.
const (
	latency    = 20 * time.Millisecond // of one request
	retryAfter = time.Second
	settled    = 30 * time.Minute // of the fleet, before the renewals begin
	patience   = 6 * time.Hour    // of the test
)

// plane is a control plane of 50 requests a second, burst 100, for all agents.
type plane struct {
	mu       sync.Mutex
	tokens   float64
	filled   time.Time
	answered int
	refused  int
}

// serve answers one request.
func (p *plane) serve() (limited bool) {
	time.Sleep(latency)
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.tokens = min(100, p.tokens+now.Sub(p.filled).Seconds()*50)
	p.filled = now
	if p.tokens < 1 {
		p.refused++
		return true
	}
	p.tokens--
	p.answered++
	return false
}

func (p *plane) counts() (answered, refused int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.answered, p.refused
}

// host is one agent.
type host struct {
	plane  *plane
	budget *budget.Budget
	draw   pace.Rand

	enrolling, deploying chan struct{} // places
	soon                 chan struct{} // "poll at once"
	work                 sync.WaitGroup

	mu          sync.Mutex // guards what follows
	poll        *pace.Pacer
	csrs        int // that the next poll brings
	deployments int
	inHand      int // CSRs that a poll brought
	renewed     int
	last        time.Time     // renewal
	longest     time.Duration // without a heartbeat
}

func newHost(p *plane, draw pace.Rand) *host {
	return &host{plane: p, budget: budget.New(draw), draw: draw, poll: pace.NewYielding(30*time.Second, draw),
		enrolling: make(chan struct{}, 2), deploying: make(chan struct{}, 4), soon: make(chan struct{}, 1)}
}

// call makes a request until it is answered, as the client does.
func (h *host) call(ctx context.Context, class budget.Class) (answered bool) {
	for {
		turn, err := h.budget.Wait(ctx, class)
		if err != nil {
			return false
		}
		if !h.plane.serve() {
			h.budget.Succeeded()
			return true
		}
		h.budget.Limited(turn, retryAfter)
		if class == budget.Heartbeat {
			return false
		}
	}
}

func (h *host) heartbeats(ctx context.Context) {
	pacer := pace.New(time.Minute, h.draw)
	last := time.Now()
	for wait := pacer.First(); sleep(ctx, wait, nil); {
		answered := h.call(ctx, budget.Heartbeat)
		h.mu.Lock()
		if answered {
			h.longest = max(h.longest, time.Since(last))
			last = time.Now()
		} else {
			h.poll.Yield()
		}
		h.mu.Unlock()
		wait = pacer.Next(pace.Outcome{RateLimited: !answered})
	}
}

func (h *host) polls(ctx context.Context) {
	for wait := h.poll.First(); sleep(ctx, wait, h.soon); {
		answered := h.call(ctx, budget.Poll)
		h.mu.Lock()
		if h.budget.Throttled() {
			h.poll.Yield()
		}
		wait = h.poll.Next(pace.Outcome{})
		if answered {
			h.take(ctx)
		}
		h.mu.Unlock()
	}
}

// take takes the answer of a poll.
func (h *host) take(ctx context.Context) {
	for range h.csrs {
		h.inHand++
		h.work.Go(func() { h.enrol(ctx) })
	}
	for range h.deployments {
		h.work.Go(func() { h.deploy(ctx) })
	}
	h.csrs, h.deployments = 0, 0
}

func (h *host) enrol(ctx context.Context) {
	h.enrolling <- struct{}{}
	answered := h.call(ctx, budget.CSR)
	<-h.enrolling
	h.mu.Lock()
	defer h.mu.Unlock()
	h.inHand--
	if answered {
		h.deployments++
	}
	if h.inHand == 0 && h.deployments > 0 {
		h.work.Go(func() {
			if sleep(ctx, time.Second/2+time.Duration(h.draw(int64(time.Second/2))), nil) {
				select {
				case h.soon <- struct{}{}:
				default:
				}
			}
		})
	}
}

func (h *host) deploy(ctx context.Context) {
	h.deploying <- struct{}{}
	answered := h.call(ctx, budget.Certificate)
	<-h.deploying
	if !answered || !h.call(ctx, budget.Report) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.renewed++
	h.last = time.Now()
}

// sleep reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration, soon <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-soon:
		return true
	case <-ctx.Done():
		return false
	}
}

// TestFleetRenewals: agents that share a limit have certificates renewed. Each
// takes three requests and the polls.
func TestFleetRenewals(t *testing.T) {
	tests := []struct {
		name                 string
		agents, certificates int
		within               time.Duration // the renewals begin
		wantIn               time.Duration // the last has ended
		wantRefused          float64       // at most, of the requests
	}{
		{"one agent", 1, 300, time.Second, time.Minute, 0.03},
		{"ten agents", 10, 100, time.Second, 6 * time.Minute, 0.06},
		{"a thousand agents in an hour", 1000, 20, time.Hour, 90 * time.Minute, 0.1},
		{"a thousand agents in a minute", 1000, 20, time.Minute, 60 * time.Minute, 0.1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := renew(t, test.agents, test.certificates, test.within)
				if want := test.agents * test.certificates; r.renewed != want {
					t.Errorf("%d of %d certificates were renewed", r.renewed, want)
				}
				t.Logf("all renewed after %v; the agents' last: 5 %% before %v, half before %v, 95 %% before %v; %.1f %% of %d requests refused; longest time without a heartbeat %v",
					r.quantile(1), r.quantile(0.05), r.quantile(0.5), r.quantile(0.95), 100*r.refused, r.requests, r.longest.Round(time.Second))
				if got := r.quantile(1); got > test.wantIn {
					t.Errorf("the last renewal ended after %v, want %v", got, test.wantIn)
				}
				if r.refused > test.wantRefused {
					t.Errorf("%.1f %% of the requests were refused, want %.1f %%", 100*r.refused, 100*test.wantRefused)
				}
				if r.longest >= 5*time.Minute {
					t.Errorf("an agent went without a heartbeat for %v, want less than 5 minutes", r.longest)
				}
			})
		})
	}
}

type renewals struct {
	renewed  int
	ends     []time.Duration // of each agent's last one, sorted
	requests int
	refused  float64
	longest  time.Duration // without a heartbeat
}

// quantile is when that share of the agents had ended.
func (r renewals) quantile(share float64) time.Duration {
	return r.ends[int(share*float64(len(r.ends)-1))].Round(time.Second)
}

func renew(t *testing.T, agents, certificates int, within time.Duration) renewals {
	rnd := rand.New(rand.NewPCG(1, 1))
	var mu sync.Mutex
	draw := func(n int64) int64 {
		mu.Lock()
		defer mu.Unlock()
		return rnd.Int64N(n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), settled+patience)
	defer cancel()
	p := &plane{tokens: 100, filled: time.Now()}
	hosts := make([]*host, agents)
	var fleet, renewing sync.WaitGroup
	for i := range hosts {
		h := newHost(p, draw)
		hosts[i] = h
		fleet.Go(func() { h.heartbeats(ctx) })
		fleet.Go(func() { h.polls(ctx) })
		for range certificates {
			renewing.Go(func() {
				sleep(ctx, settled+time.Duration(draw(int64(within))), nil)
				h.mu.Lock()
				defer h.mu.Unlock()
				h.csrs++
			})
		}
	}
	time.Sleep(settled)
	begun := time.Now()
	answered, refused := p.counts()
	renewing.Wait()
	var r renewals
	for r.renewed < agents*certificates && ctx.Err() == nil {
		time.Sleep(time.Second)
		r.renewed = 0
		for _, h := range hosts {
			h.mu.Lock()
			r.renewed += h.renewed
			h.mu.Unlock()
		}
	}
	cancel()
	fleet.Wait()
	for _, h := range hosts {
		h.work.Wait()
		r.ends = append(r.ends, h.last.Sub(begun))
		r.longest = max(r.longest, h.longest)
	}
	slices.Sort(r.ends)
	answeredAtEnd, refusedAtEnd := p.counts()
	r.requests = answeredAtEnd - answered + refusedAtEnd - refused
	r.refused = float64(refusedAtEnd-refused) / float64(r.requests)
	return r
}
