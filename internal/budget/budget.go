// Package budget shares what the control plane grants among the calls of one
// agent. It learns that from the answers: there is no limit until one of them
// is 429, which closes the budget until Retry-After and halves the rate;
// successes raise it slowly again. The agents of a fleet that share a limit
// find their shares without knowing of each other.
//
// A call that has no turn waits for one, the more urgent first.
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
	Heartbeat   Class = iota // waits for nobody
	Report                   // how a job ended
	Certificate              // for a deployment that has begun
	CSR
	Poll
	Discovery
	classes
)

// overdue is how long a poll or a discovery report waits for more urgent calls.
// There is one of each at a time, and there may be CSRs for hours: none of what
// they lead to would be deployed.
const overdue = 5 * time.Minute

// Turn is leave to send one call.
type Turn struct {
	sent  time.Time
	later time.Duration // of the turn that follows
}

// Budget is safe for concurrent use.
type Budget struct {
	mu      sync.Mutex // guards what follows
	limit   limit
	waiting [classes][]waiter // first come, first served in each class
	timer   *time.Timer       // of the next turn; nil until one is waited for
	stopped bool
}

type waiter struct {
	granted chan grant
	since   time.Time
}

// grant is a turn, or why there is none.
type grant struct {
	turn Turn
	err  error
}

// New returns a budget without a limit. Draw is the source of randomness,
// uniform in [0, n).
func New(draw func(n int64) int64) *Budget {
	return &Budget{limit: limit{draw: draw}}
}

// Wait waits for the turn of a call. It fails with the cause of ctx, or of Stop or
// Refuse.
// Whoever has a turn tells how it went, by Succeeded or Limited; one that got no
// answer says nothing of the limit.
func (b *Budget) Wait(ctx context.Context, class Class) (Turn, error) {
	if class == Heartbeat {
		// It uses up no turn either: at the slowest rate there is one a minute.
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

// leave takes a caller out of its queue. A turn that came at the same moment is
// the next one's: at the slowest rate it is a minute's.
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

// Succeeded records that the control plane carried out a call. Other failures
// than a 429 say nothing of the limit.
func (b *Budget) Succeeded() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit.succeeded(time.Now())
	b.grant()
}

// Limited records that a call was answered 429, with Retry-After or 0. It
// reports whether the call may wait for another turn.
func (b *Budget) Limited(turn Turn, retryAfter time.Duration) (again bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit.limited(time.Now(), turn.sent, retryAfter)
	b.grant()
	return !b.stopped
}

// Tight reports whether calls are limited, so that those which matter to nobody
// are better left out.
func (b *Budget) Tight() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.limit.open()
}

// Stop ends waiting, for an agent that stops: who waits now fails, and later
// calls do not wait.
func (b *Budget) Stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stopped = true
	b.refuse(context.Canceled)
}

// Refuse has those that wait now fail with err, if the next turn is further away
// than most: what they hold is of use to others meanwhile.
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

// first is the queue of the most urgent class that has one, or one that is
// overdue.
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

// grant gives out the turns that have come, and sets the timer for the next.
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
