package budget

import (
	"math"
	"time"
)

const (
	// slowest is the lowest rate, in requests a second.
	slowest = 1.0 / 60

	// minAssumed is the lowest rate, in requests a second, that a 429 is assumed to refuse. An
	// agent that sends little does not overload the control plane, and needs a few quick answers to
	// renew a certificate.
	minAssumed = 1.0

	// remembered is how many of the latest successes determine the granted rate. It is a number and
	// not a time, since agents' rates range from one a minute to hundreds a second.
	remembered = 16

	// calmTime and calmAnswers: the limit is lifted after this long and this many answers without a
	// 429. It needs both. An agent of a fleet that shares 50 requests a second may have one answer
	// in half a minute, and a single agent at the granted rate has a 429 every few seconds.
	calmTime    = time.Minute
	calmAnswers = 64

	// gain scales the step that a success raises the rate by; see raise.
	gain = 0.01
)

// limit is the rate that the control plane seems to grant to this agent. It only computes.
type limit struct {
	draw func(n int64) int64 // uniform in [0, n)

	rate float64   // requests a second; 0: no limit
	next time.Time // no turn before

	// proven is what the rate was lowered to by the last 429 that followed a success. Further 429s
	// in a row only show that nothing is granted for a while, not how much will be later.
	proven float64

	taken     time.Time // when a turn was last taken
	slowed    time.Time // when the rate was last lowered
	refused   time.Time // when a call was last refused
	successes int       // since refused

	granted [remembered]time.Time // ring of successes
	count   int                   // successes ever added to granted
}

// open reports whether there is no limit.
func (l *limit) open() bool { return l.rate == 0 }

// take uses up one turn and returns by how much that delayed the next.
func (l *limit) take(now time.Time) (later time.Duration) {
	l.taken = now
	if l.open() {
		return 0
	}
	if l.next.Before(now) {
		l.next = now
	}
	later = l.gap()
	l.next = l.next.Add(later)
	return later
}

// giveBack returns an unused turn, unless a call has been refused since it was taken.
func (l *limit) giveBack(taken time.Time, later time.Duration) {
	if !l.open() && l.refused.Before(taken) {
		l.next = l.next.Add(-later)
	}
}

// gap returns the time from one turn to the next.
func (l *limit) gap() time.Duration { return time.Duration(float64(time.Second) / l.rate) }

// succeeded records that a call was not refused.
func (l *limit) succeeded(now time.Time) {
	l.granted[l.count%remembered] = now
	l.count++
	l.successes++
	if l.open() {
		return
	}
	if l.successes >= calmAnswers && now.Sub(l.refused) >= calmTime {
		l.rate, l.next = 0, time.Time{}
		return
	}
	l.raise()
}

// raise doubles the rate up to the proven one, and then raises it by a step. Relative to the rate,
// the step shrinks as the rate grows, so that agents that share a control plane converge to equal
// shares. A constant step would converge faster, but fits only one size of fleet: one agent at 50
// requests a second needs about 0.1, with which most calls of a thousand agents would be refused.
func (l *limit) raise() {
	if l.rate < l.proven {
		l.rate = min(2*l.rate, l.proven)
		return
	}
	l.rate += gain * math.Pow(l.rate, 2.0/3)
}

// limited records that a call sent at the given time was answered 429. Refusals of calls that were
// under way together lower the rate only once.
func (l *limit) limited(now, sent time.Time, retryAfter time.Duration) {
	granted := l.successes > 0
	again := !l.open() && sent.After(l.refused) && !l.taken.After(l.refused)
	l.refused, l.successes = now, 0
	if sent.After(l.slowed) {
		l.slowed = now
		rate := max(l.grantedRate(now), minAssumed)
		if !l.open() {
			rate = min(rate, l.rate)
		}
		if granted || l.open() {
			l.proven = rate / 2
		}
		l.rate = max(rate/2, slowest)
	}
	if again {
		return // a heartbeat, which took no turn: it must not delay the calls that wait for one
	}
	// A little later than Retry-After: calls refused in the same second must not return in one
	// wave.
	spread := max(retryAfter/4, l.gap())
	closed := now.Add(retryAfter + time.Duration(l.draw(int64(spread)+1)))
	if l.next.Before(closed) {
		l.next = closed
	}
}

// grantedRate returns the rate of the latest successes.
func (l *limit) grantedRate(now time.Time) float64 {
	n := min(l.count, remembered)
	if n == 0 {
		return 0
	}
	took := now.Sub(l.granted[(l.count-n)%remembered])
	return float64(n) / max(took, time.Millisecond).Seconds()
}
