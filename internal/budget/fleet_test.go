package budget

import (
	"container/heap"
	"flag"
	"math/rand/v2"
	"testing"
	"time"

	"certctl-agent/internal/pace"
)

// A fleet is simulated with the real pacing code: each agent has a heartbeat
// and a poll, started in the order of the agent's loop, and a budget for both.
// Requests take no time.
const (
	heartbeats = 60 * time.Second
	polls      = 30 * time.Second
)

var fleetSize = flag.Int("fleet", 10_000, "agents in the simulations of a fleet")

// fleetRate is the request rate of a healthy fleet, per second.
func fleetRate(agents int) float64 {
	return float64(agents)/heartbeats.Seconds() + float64(agents)/polls.Seconds()
}

type activity struct {
	due       time.Duration
	pacer     *pace.Pacer
	limit     *limit    // of the agent
	poll      *activity // a heartbeat's: the poll of the same agent
	started   bool      // a heartbeat's: the poll has been scheduled
	heartbeat bool
}

type schedule []*activity

func (s schedule) Len() int           { return len(s) }
func (s schedule) Less(i, j int) bool { return s[i].due < s[j].due }
func (s schedule) Swap(i, j int)      { s[i], s[j] = s[j], s[i] }
func (s *schedule) Push(x any)        { *s = append(*s, x.(*activity)) }
func (s *schedule) Pop() any {
	old := *s
	last := old[len(old)-1]
	*s = old[:len(old)-1]
	return last
}

// simulate runs a fleet until the given time. answer decides each request; seen records it.
func simulate(seed uint64, agents int, until time.Duration, answer func(now time.Duration) pace.Outcome,
	seen func(now time.Duration, a *activity, o pace.Outcome)) {
	start := time.Now()
	rnd := rand.New(rand.NewPCG(seed, seed))
	var queue schedule
	for range agents {
		l := &limit{draw: rnd.Int64N}
		poll := &activity{pacer: pace.NewYielding(polls, rnd.Int64N), limit: l}
		beat := &activity{pacer: pace.New(heartbeats, rnd.Int64N), limit: l, poll: poll, heartbeat: true}
		beat.due = beat.pacer.First()
		queue = append(queue, beat)
	}
	heap.Init(&queue)
	for queue[0].due < until {
		a := queue[0]
		now := a.due
		if turn := a.limit.next.Sub(start); !a.heartbeat && turn > now {
			a.due = turn
			heap.Fix(&queue, 0)
			continue
		}
		if !a.heartbeat {
			a.limit.take(start.Add(now))
		}
		outcome := answer(now)
		seen(now, a, outcome)
		switch {
		case outcome.RateLimited:
			a.limit.limited(start.Add(now), start.Add(now), outcome.RetryAfter)
		case !outcome.Failed:
			a.limit.succeeded(start.Add(now))
		}
		if outcome.RateLimited && !a.heartbeat {
			continue // its next turn
		}
		if !a.heartbeat && !a.limit.open() {
			a.pacer.Yield()
		}
		a.due = now + a.pacer.Next(outcome)
		heap.Fix(&queue, 0)
		if !a.heartbeat {
			continue
		}
		if !a.limit.open() {
			a.poll.pacer.Yield()
		}
		if !a.started {
			a.started = true
			a.poll.due = now + a.poll.pacer.First()
			heap.Push(&queue, a.poll)
		}
	}
}

// busiestSecond counts requests by second.
type busiestSecond []int

func (b *busiestSecond) count(now time.Duration) {
	for len(*b) <= int(now/time.Second) {
		*b = append(*b, 0)
	}
	(*b)[now/time.Second]++
}

// ratio is the busiest second from a time on, in units of the healthy rate.
func (b busiestSecond) ratio(agents int, from time.Duration) float64 {
	most := 0
	for _, n := range b[from/time.Second:] {
		most = max(most, n)
	}
	return float64(most) / fleetRate(agents)
}

func TestFleetMassRestart(t *testing.T) {
	agents := *fleetSize
	var load busiestSecond
	simulate(1, agents, 10*time.Minute,
		func(time.Duration) pace.Outcome { return pace.Outcome{} },
		func(now time.Duration, _ *activity, _ pace.Outcome) { load.count(now) })
	got := load.ratio(agents, 0)
	t.Logf("mass restart of %d agents: busiest second %.2f times the steady rate", agents, got)
	if got > 1.25 {
		t.Errorf("busiest second = %.2f times the steady rate, want at most 1.25", got)
	}
}

func TestFleetAfterOutage(t *testing.T) {
	agents := *fleetSize
	const down, up = 10 * time.Minute, 40 * time.Minute
	var load busiestSecond
	back := make(map[*activity]time.Duration)
	simulate(2, agents, up+20*time.Minute,
		func(now time.Duration) pace.Outcome { return pace.Outcome{Failed: now >= down && now < up} },
		func(now time.Duration, a *activity, _ pace.Outcome) {
			load.count(now)
			if _, seen := back[a]; a.heartbeat && now >= up && !seen {
				back[a] = now - up
			}
		})
	if got := load.ratio(agents, up); got > 1.25 {
		t.Errorf("busiest second after the outage = %.2f times the steady rate, want at most 1.25", got)
	}
	inTime := 0
	for _, after := range back {
		if after <= 6*time.Minute {
			inTime++
		}
	}
	share := float64(inTime) / float64(agents)
	t.Logf("30 min outage of %d agents: busiest second after it %.2f times the steady rate, %.2f %% back within 6 min",
		agents, load.ratio(agents, up), 100*share)
	if share < 0.99 {
		t.Errorf("%.2f %% of the agents are back within 6 minutes, want 99 %%", 100*share)
	}
}

// TestFleetShortOfCapacity: the control plane serves 80 % of the fleet's requests and answers the
// rest with 429 and Retry-After: 1.
func TestFleetShortOfCapacity(t *testing.T) {
	agents := *fleetSize
	const until = 90 * time.Minute
	capacity := 0.8 * fleetRate(agents)
	tokens, filled := capacity, time.Duration(0)
	var longest time.Duration
	refused, asked := 0, 0
	lastGood := make(map[*activity]time.Duration, agents)
	simulate(3, agents, until,
		func(now time.Duration) pace.Outcome {
			tokens = min(capacity, tokens+(now-filled).Seconds()*capacity)
			filled = now
			if tokens < 1 {
				return pace.Outcome{RateLimited: true, RetryAfter: time.Second}
			}
			tokens--
			return pace.Outcome{}
		},
		func(now time.Duration, a *activity, o pace.Outcome) {
			asked++
			if o.RateLimited {
				refused++
			}
			if a.heartbeat {
				longest = max(longest, now-lastGood[a])
				if !o.RateLimited {
					lastGood[a] = now
				}
			}
		})
	for _, last := range lastGood {
		longest = max(longest, until-last)
	}
	t.Logf("80 %% capacity for %d agents: longest time without a heartbeat %v, %.1f %% of the requests refused",
		agents, longest.Round(time.Second), 100*float64(refused)/float64(asked))
	if longest >= 5*time.Minute {
		t.Errorf("an agent went without a heartbeat for %v, want less than 5 minutes", longest)
	}
}
