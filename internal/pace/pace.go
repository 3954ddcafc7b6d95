// Package pace decides how long to wait: jitter, back-off, and longer intervals while the control
// plane is overloaded. It only computes: the caller owns the timers.
package pace

import (
	"math/rand/v2"
	"time"

	"certctl-agent/internal/api"
)

const (
	// maxBackoff bounds the random delay that failures add to an interval.
	maxBackoff = 5 * time.Minute

	// yieldFor is for how many tries a yielding activity stays slow after a 429. If every agent
	// sped up again at its first success, a control plane with 80 % of the needed capacity would
	// never stop refusing, heartbeats as often as polls.
	yieldFor = 16
)

// Rand returns a random number, uniform in [0, n).
type Rand func(n int64) int64

// Global is a Rand that uses the global generator of math/rand/v2.
func Global(n int64) int64 { return rand.Int64N(n) }

// Outcome is how a try ended, as far as it affects the next one. The zero value is a success.
type Outcome struct {
	Failed      bool
	RateLimited bool          // 429: not a failure, the whole fleet sends too much
	RetryAfter  time.Duration // minimum wait that the control plane asked for, or 0
}

// After returns the outcome of a call to the control plane that ended with err.
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
	slow     int  // tries left that are spread over a second interval
}

// New returns the Pacer of an activity that is due every interval.
func New(interval time.Duration, draw Rand) *Pacer {
	return &Pacer{interval: interval, draw: draw}
}

// NewYielding returns the Pacer of an activity that slows down while the control plane is
// overloaded. Work may arrive late; heartbeats may not.
func NewYielding(interval time.Duration, draw Rand) *Pacer {
	return &Pacer{interval: interval, draw: draw, yields: true}
}

// Failures returns how many tries have failed in a row.
func (p *Pacer) Failures() int { return p.failures }

// First returns a delay uniform in [0, interval), which spreads out a fleet that starts at the same
// moment.
func (p *Pacer) First() time.Duration { return p.upTo(p.interval) }

// Yield slows the activity down because another call of this agent was rate limited.
func (p *Pacer) Yield() {
	if p.yields {
		p.slow = yieldFor
	}
}

// Next records the outcome of a try and returns the wait before the next.
//
// After a success that is the interval, uniform in ±10 %. The nth failure in a row adds a random
// delay from [0, min(n × interval, 5 min)), so a failing try never comes sooner than a healthy one
// and stays spread out at the cap. After a 429 the next try is spread over a second interval, and a
// yielding activity stays slow for a while. An activity that does not yield retries within half an
// interval after its second 429 in a row, so that no agent of a large fleet stays unlucky for long.
func (p *Pacer) Next(o Outcome) time.Duration {
	wait, spread := p.Interval(), p.interval
	switch {
	case o.RateLimited:
		p.Yield()
		if !p.yields {
			wait = 0 // it is already due: anywhere in the next interval
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
		// Not exactly then: if Retry-After was a date, the whole fleet would come at once.
		wait = o.RetryAfter + p.upTo(spread)
	}
	return wait
}

// Interval returns the interval, uniform in ±10 %.
func (p *Pacer) Interval() time.Duration {
	return p.interval - p.interval/10 + p.upTo(p.interval/5)
}

// upTo returns a duration uniform in [0, d).
func (p *Pacer) upTo(d time.Duration) time.Duration {
	return time.Duration(p.draw(max(int64(d), 1)))
}
