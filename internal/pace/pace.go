// Package pace decides how long to wait: jitter, back-off, and less haste while
// the control plane is overloaded. It is arithmetic only: the owner of the timer
// owns the Pacer.
package pace

import (
	"math/rand/v2"
	"time"

	"certctl-agent/internal/api"
)

const (
	// maxBackoff bounds the draw that failures add to an interval.
	maxBackoff = 5 * time.Minute

	// yieldFor is how many tries a yielding activity stays slow after the
	// control plane asked for fewer requests. It must outlast the moment: if
	// every agent sped up again at its first success, a control plane with
	// 80 % of the capacity needed would refuse for ever, and refuse heartbeats
	// as often as polls.
	yieldFor = 16
)

// Rand is the source of randomness, uniform in [0, n). The global generator of
// math/rand/v2 serves; a test injects its own.
type Rand func(n int64) int64

func Global(n int64) int64 { return rand.Int64N(n) }

// Outcome is how a try ended, as far as the next one cares. The zero value is
// a success.
type Outcome struct {
	Failed      bool
	RateLimited bool          // 429: not a failure, the fleet as a whole is too fast
	RetryAfter  time.Duration // the control plane's floor for the next wait, or 0
}

// After is the outcome of a call to the control plane that ended with err.
func After(err error) Outcome {
	limited := api.RateLimited(err)
	return Outcome{Failed: err != nil && !limited, RateLimited: limited, RetryAfter: api.RetryAfter(err)}
}

// Pacer times one activity. It is not safe for concurrent use.
type Pacer struct {
	interval time.Duration
	draw     Rand
	yields   bool // see NewYielding

	failures int  // in a row
	limited  bool // the last try was answered 429
	slow     int  // tries still to be spread over one more interval
}

// New returns the Pacer of an activity that is due every interval.
func New(interval time.Duration, draw Rand) *Pacer {
	return &Pacer{interval: interval, draw: draw}
}

// NewYielding returns the Pacer of an activity that gives way when the control
// plane is overloaded: a host whose work comes a little later is well, one
// whose heartbeat is missing is not.
func NewYielding(interval time.Duration, draw Rand) *Pacer {
	return &Pacer{interval: interval, draw: draw, yields: true}
}

func (p *Pacer) Failures() int { return p.failures }

// First is a delay uniform in [0, interval), so that a fleet that starts at
// once does not arrive at once.
func (p *Pacer) First() time.Duration { return p.upTo(p.interval) }

// Yield tells that another activity of this agent was asked to come less often.
func (p *Pacer) Yield() {
	if p.yields {
		p.slow = yieldFor
	}
}

// Next is the wait before the next try.
//
// A success waits for the interval, uniform in ±10 %. The nth failure in a row
// adds a draw from [0, min(n × interval, 5 min)): never sooner than a healthy
// try, and spread at the cap too. After a 429 the next try is spread over one
// more interval, and a yielding activity stays slow for a while. One that does
// not yield comes back within half an interval after the second in a row: in a
// large fleet some agent is always unlucky, and must not be for long.
func (p *Pacer) Next(o Outcome) time.Duration {
	wait, spread := p.Interval(), p.interval
	switch {
	case o.RateLimited:
		p.Yield()
		if !p.yields {
			wait = 0 // its turn has come already: anywhere in the interval that follows
			if p.limited {
				spread /= 2
			}
		}
		wait += p.upTo(spread)
	case o.Failed:
		p.failures++
		wait += p.upTo(min(time.Duration(p.failures)*p.interval, maxBackoff))
	default:
		p.failures = 0
		if p.slow > 0 {
			p.slow--
			wait += p.upTo(p.interval)
		}
	}
	p.limited = o.RateLimited
	if wait < o.RetryAfter {
		// Not the floor itself: one that is a date would gather the fleet there.
		wait = o.RetryAfter + p.upTo(spread)
	}
	return wait
}

// Interval is the interval, uniform in ±10 %.
func (p *Pacer) Interval() time.Duration {
	return p.interval - p.interval/10 + p.upTo(p.interval/5)
}

func (p *Pacer) upTo(d time.Duration) time.Duration {
	return time.Duration(p.draw(max(int64(d), 1)))
}
