// Package budget limits the rate of an agent's calls to what the control plane accepts. It learns
// the limit from the answers: there is none until a call is answered 429. A 429 stops all calls
// until Retry-After and halves the rate; successes raise it slowly again. So the agents of a fleet
// that share a limit find their shares without knowing of each other.
//
// Calls beyond the rate wait for a turn, the most urgent first.
package budget

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Class is how urgent a call is.
type Class int

// The classes, the most urgent first.
const (
	Heartbeat   Class = iota // never waits
	Report                   // how a job ended
	Certificate              // for a deployment that has started
	CSR
	Poll
	Discovery
	classes
)

// overdue is how long a poll or a discovery report lets more urgent calls go first. CSRs may go on
// for hours, and without polls none of the new certificates would be deployed.
const overdue = 5 * time.Minute

// Turn permits one call.
type Turn struct {
	sent  time.Time
	later time.Duration // by how much it delayed the next turn
}

// Budget is safe for concurrent use.
type Budget struct {
	mu      sync.Mutex // guards the fields below
	limit   limit
	waiting [classes][]waiter // first come, first served in each class
	timer   *time.Timer       // fires at the next turn; nil until a call has waited
	stopped bool
}

type waiter struct {
	granted chan grant
	since   time.Time
}

// grant is a turn, or an error.
type grant struct {
	turn Turn
	err  error
}

// New returns a budget without a limit. Draw returns a random number, uniform in [0, n).
func New(draw func(n int64) int64) *Budget {
	return &Budget{limit: limit{draw: draw}}
}

// Wait waits for the turn of a call. Its error is the cause of ctx, or that of Stop or Refuse. The
// caller reports a success with Succeeded and a 429 with Limited; other failures say nothing about
// the limit.
func (b *Budget) Wait(ctx context.Context, class Class) (Turn, error) {
	if class == Heartbeat {
		// It uses up no turn either: the slowest rate is one a minute.
		return Turn{sent: time.Now()}, nil
	}
	if ctx.Err() != nil {
		return Turn{}, context.Cause(ctx)
	}
	b.mu.Lock()
	if b.stopped || b.free() {
		defer b.mu.Unlock()
		return b.take(), nil
	}
	granted := make(chan grant, 1)
	b.waiting[class] = append(b.waiting[class], waiter{granted, time.Now()})
	b.grant()
	b.mu.Unlock()

	select {
	case g := <-granted:
		return g.turn, g.err
	case <-ctx.Done():
		b.leave(class, granted)
		return Turn{}, context.Cause(ctx)
	}
}

// leave removes a caller from its queue. If its turn came at the same moment, the next caller gets
// that turn: at the slowest rate it would wait another minute.
func (b *Budget) leave(class Class, granted chan grant) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting[class] = slices.DeleteFunc(b.waiting[class], func(w waiter) bool { return w.granted == granted })
	select {
	case g := <-granted:
		if g.err == nil {
			b.limit.giveBack(g.turn.sent, g.turn.later)
			b.grant()
		}
	default:
	}
}

// Succeeded records that the control plane carried out a call.
func (b *Budget) Succeeded() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit.succeeded(time.Now())
	b.grant()
}

// Limited records that a call was answered 429, with its Retry-After or 0. It reports whether the
// call may wait for another turn.
func (b *Budget) Limited(turn Turn, retryAfter time.Duration) (again bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit.limited(time.Now(), turn.sent, retryAfter)
	b.grant()
	return !b.stopped
}

// Throttled reports whether there is a limit, so that callers can skip calls that matter little.
func (b *Budget) Throttled() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.limit.open()
}

// Stop is for an agent that stops: waiting calls fail, and later calls do not wait.
func (b *Budget) Stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stopped = true
	b.refuse(context.Canceled)
}

// Refuse makes waiting calls fail with err if the next turn is further away than most, so that
// their callers release what they hold.
func (b *Budget) Refuse(most time.Duration, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Until(b.limit.next) > most {
		b.refuse(err)
	}
}

func (b *Budget) refuse(err error) {
	for class, waiting := range b.waiting {
		for _, w := range waiting {
			w.granted <- grant{err: err}
		}
		b.waiting[class] = nil
	}
}

// free reports whether a call may go at once.
func (b *Budget) free() bool {
	return !time.Now().Before(b.limit.next) && b.first() == nil
}

// take uses up a turn.
func (b *Budget) take() Turn {
	now := time.Now()
	return Turn{now, b.limit.take(now)}
}

// first returns the queue that is served next: one whose first caller is overdue, else the most
// urgent. It returns nil if all are empty.
func (b *Budget) first() *[]waiter {
	for class := Poll; class < classes; class++ {
		if queue := b.waiting[class]; len(queue) > 0 && time.Since(queue[0].since) >= overdue {
			return &b.waiting[class]
		}
	}
	for class := range b.waiting {
		if len(b.waiting[class]) > 0 {
			return &b.waiting[class]
		}
	}
	return nil
}

// grant gives out the turns that are due and sets the timer for the next.
func (b *Budget) grant() {
	for {
		queue := b.first()
		if queue == nil {
			return
		}
		if wait := time.Until(b.limit.next); wait > 0 {
			b.wakeAfter(wait)
			return
		}
		(*queue)[0].granted <- grant{turn: b.take()}
		*queue = (*queue)[1:]
	}
}

func (b *Budget) wakeAfter(wait time.Duration) {
	if b.timer != nil {
		b.timer.Reset(wait)
		return
	}
	b.timer = time.AfterFunc(wait, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.grant()
	})
}
