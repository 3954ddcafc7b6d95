package budget

import (
	"math"
	"time"
)

const (
	// slowest is the lowest rate that refusals lead to, in requests a second.
	slowest = 1.0 / 60

	// unhurried is the rate, in requests a second, that an agent has at least
	// asked for when it is first refused. One that hardly asks for anything is
	// not what overloads its control plane, and needs a few answers soon when a
	// certificate is renewed.
	unhurried = 1.0

	// remembered is how many successes tell the rate that the control plane has
	// granted so far. A number and not a time: the rates of a fleet's agents are
	// anything from one a minute to hundreds a second.
	remembered = 16

	// calmTime and calmAnswers are how long and for how many answers in a row
	// nothing must have been refused for the limit to be lifted. In a fleet that
	// shares 50 requests a second an agent has one answer in half a minute, and
	// one alone that has found the rate it is granted is refused every few
	// seconds: neither must start over.
	calmTime    = time.Minute
	calmAnswers = 64

	// gain scales the step that a success raises the rate by; see raise.
	gain = 0.01
)

// limit is the rate that the control plane has been found to grant to this
// agent. It is arithmetic only.
type limit struct {
	draw func(n int64) int64 // uniform in [0, n)

	rate float64   // requests a second; 0: open
	next time.Time // no turn before

	// proven is what the rate was lowered to when a call was last refused after one
	// that was granted. Refusals in a row tell that nothing is granted for a while,
	// not what will be then.
	proven float64

	taken     time.Time // when a turn was last taken
	slowed    time.Time // when the rate was last lowered
	refused   time.Time // when a call was last refused
	successes int       // since then

	granted [remembered]time.Time // successes, a ring
	count   int                   // ever added to granted
}

// open reports whether there is no limit.
func (l *limit) open() bool { return l.rate == 0 }

// take uses up one turn, and says how much later that made the next.
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

// giveBack returns a turn that was taken at the given time and not used, unless
// a call has been refused since.
func (l *limit) giveBack(taken time.Time, later time.Duration) {
	if !l.open() && l.refused.Before(taken) {
		l.next = l.next.Add(-later)
	}
}

// gap is the time from one turn to the next.
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

// raise raises the rate: by doubling up to what was proven, and by a step from
// there. In relation to the rate the step is the smaller, the higher the rate
// is, so that agents that share a control plane come to equal shares. A constant
// step would do that faster, but could only fit one size of fleet: for one agent
// at 50 requests a second it has to be about 0.1, of which a thousand agents
// would be refused more often than not.
func (l *limit) raise() {
	if l.rate < l.proven {
		l.rate = min(2*l.rate, l.proven)
		return
	}
	l.rate += gain * math.Pow(l.rate, 2.0/3)
}

// limited records that a call that was sent at the given time was answered 429.
// Several that were under way together are one event.
func (l *limit) limited(now, sent time.Time, retryAfter time.Duration) {
	granted := l.successes > 0
	again := !l.open() && sent.After(l.refused) && !l.taken.After(l.refused)
	l.refused, l.successes = now, 0
	if sent.After(l.slowed) {
		l.slowed = now
		rate := max(l.grantedRate(now), unhurried)
		if !l.open() {
			rate = min(rate, l.rate)
		}
		if granted || l.open() {
			l.proven = rate / 2
		}
		l.rate = max(rate/2, slowest)
	}
	if again {
		return // a heartbeat: those that wait have not asked yet, and must have their turn
	}
	// A little later than was asked for: what one second refuses must not come
	// back as one wave.
	spread := max(retryAfter/4, l.gap())
	closed := now.Add(retryAfter + time.Duration(l.draw(int64(spread)+1)))
	if l.next.Before(closed) {
		l.next = closed
	}
}

// grantedRate is the rate of the latest successes.
func (l *limit) grantedRate(now time.Time) float64 {
	n := min(l.count, remembered)
	if n == 0 {
		return 0
	}
	took := now.Sub(l.granted[(l.count-n)%remembered])
	return float64(n) / max(took, time.Millisecond).Seconds()
}
