package budget_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/budget"
)

// none is a random number that adds no delay.
func none(int64) int64 { return 0 }

// turn waits for a turn and returns how long that took.
func turn(t *testing.T, b *budget.Budget, class budget.Class) (budget.Turn, time.Duration) {
	t.Helper()
	begun := time.Now()
	turn, err := b.Wait(t.Context(), class)
	if err != nil {
		t.Fatal(err)
	}
	return turn, time.Since(begun)
}

// refuse makes a call that is answered 429.
func refuse(t *testing.T, b *budget.Budget, retryAfter time.Duration) {
	t.Helper()
	refused, _ := turn(t, b, budget.CSR)
	b.Limited(refused, retryAfter)
}

func TestOpenAtFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(none)
		for range 1000 {
			if _, waited := turn(t, b, budget.Discovery); waited != 0 {
				t.Fatalf("waited %v, want no wait before the first 429", waited)
			}
			b.Succeeded()
		}
		if b.Throttled() {
			t.Error("throttled, though nothing was refused")
		}
	})
}

func TestRefusalClosesAndHalves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(none)
		for range 100 { // 20 a second
			turn(t, b, budget.CSR)
			b.Succeeded()
			time.Sleep(50 * time.Millisecond)
		}
		refused, _ := turn(t, b, budget.CSR)
		together, _ := turn(t, b, budget.CSR) // under way at the same time
		b.Limited(refused, 3*time.Second)
		b.Limited(together, 3*time.Second)
		if !b.Throttled() {
			t.Error("not throttled after a 429")
		}
		if _, waited := turn(t, b, budget.Heartbeat); waited != 0 {
			t.Errorf("a heartbeat waited %v", waited)
		}
		if _, waited := turn(t, b, budget.Report); waited != 3*time.Second {
			t.Errorf("the first call after a 429 waited %v, want Retry-After", waited)
		}
		if _, waited := turn(t, b, budget.Report); waited < 95*time.Millisecond || waited > 105*time.Millisecond {
			t.Errorf("the second call waited %v, want 100 ms: half of 20 a second", waited)
		}
	})
}

func TestSuccessesRaiseTheRateAndLiftTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(none)
		refuse(t, b, time.Second)
		begun := time.Now()
		turn(t, b, budget.CSR) // after Retry-After
		last := time.Hour
		for b.Throttled() {
			_, waited := turn(t, b, budget.CSR)
			b.Succeeded()
			if waited > last {
				t.Fatalf("waited %v after %v, want ever less", waited, last)
			}
			last = waited
			if time.Since(begun) > 10*time.Minute {
				t.Fatal("the limit is not lifted")
			}
		}
		if took := time.Since(begun); took < time.Minute {
			t.Errorf("the limit was lifted after %v, want a minute at least", took)
		}
	})
}

func TestUrgentCallsGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(none)
		refuse(t, b, time.Second)
		var mu sync.Mutex
		var order []budget.Class
		var all sync.WaitGroup
		for class := budget.Discovery; class > budget.Heartbeat; class-- {
			for range 2 {
				all.Go(func() {
					turn(t, b, class)
					mu.Lock()
					defer mu.Unlock()
					order = append(order, class)
				})
			}
		}
		all.Wait()
		if !slices.IsSorted(order) {
			t.Errorf("turns were given in the order %v", order)
		}
	})
}

func TestWaitingEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(none)
		refuse(t, b, time.Minute)
		impatient := errors.New("no longer wanted")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, impatient)
		defer cancel()
		if _, err := b.Wait(ctx, budget.Report); !errors.Is(err, impatient) {
			t.Errorf("got %v, want the cause of the context", err)
		}
		time.AfterFunc(time.Second, b.Stop)
		if _, err := b.Wait(t.Context(), budget.Poll); !errors.Is(err, context.Canceled) {
			t.Errorf("a call that waited when the agent stopped: %v", err)
		}
		if _, waited := turn(t, b, budget.Report); waited != 0 {
			t.Errorf("a call after Stop waited %v", waited)
		}
	})
}

// TestRefusedForLong: however often calls are refused, a turn comes each minute.
func TestRefusedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(func(n int64) int64 { return n - 1 })
		for range 50 {
			refuse(t, b, 0)
		}
		if _, waited := turn(t, b, budget.Report); waited > time.Minute {
			t.Errorf("waited %v, want a minute at most", waited)
		}
	})
}

// TestTurnOfOneWhoLeaves: if a caller gives up at the moment of its turn, the next caller gets it.
func TestTurnOfOneWhoLeaves(t *testing.T) {
	for range 50 { // either of the two may be seen first
		synctest.Test(t, func(t *testing.T) {
			b := budget.New(none)
			for range 10 { // to the slowest rate
				refuse(t, b, time.Second)
			}
			refuse(t, b, time.Minute)
			next := time.Now().Add(time.Minute)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var all sync.WaitGroup
			var left error
			all.Go(func() { _, left = b.Wait(ctx, budget.Report) })
			time.Sleep(time.Until(next))
			cancel()
			b.Succeeded() // grants the turn
			_, waited := turn(t, b, budget.Poll)
			all.Wait()
			if left != nil && waited > time.Second {
				t.Errorf("waited %v for the turn of a caller that got %v", waited, left)
			}
		})
	}
}

// TestPollsAreNotStarved: polls and discovery reports get their turns however many CSRs wait.
func TestPollsAreNotStarved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(none)
		refuse(t, b, time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for ctx.Err() == nil {
					_, _ = b.Wait(ctx, budget.CSR)
				}
			})
		}
		for _, class := range []budget.Class{budget.Poll, budget.Discovery} {
			all.Go(func() {
				within, cancel := context.WithTimeout(ctx, 10*time.Minute)
				defer cancel()
				if _, err := b.Wait(within, class); err != nil {
					t.Errorf("class %d: no turn: %v", class, err)
				}
			})
		}
		time.Sleep(11 * time.Minute)
		cancel()
		all.Wait()
	})
}

// TestRefusedAltogether: the rate soon recovers after a minute in which everything was refused.
func TestRefusedAltogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(none)
		for range 100 { // 20 a second
			turn(t, b, budget.CSR)
			b.Succeeded()
			time.Sleep(50 * time.Millisecond)
		}
		for begun := time.Now(); time.Since(begun) < time.Minute; {
			refuse(t, b, time.Second)
		}
		begun := time.Now()
		for range 300 {
			turn(t, b, budget.CSR)
			b.Succeeded()
		}
		if took := time.Since(begun); took > 4*time.Minute {
			t.Errorf("300 calls took %v, want 4 minutes at most: the first waits for one", took)
		}
	})
}

// TestRefusedHeartbeats: 429s of heartbeats do not extend the wait of other calls beyond the first
// Retry-After.
func TestRefusedHeartbeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget.New(none)
		refuse(t, b, 15*time.Minute)
		var beats sync.WaitGroup
		beats.Go(func() {
			for range 60 {
				time.Sleep(time.Minute)
				beat, _ := b.Wait(t.Context(), budget.Heartbeat)
				b.Limited(beat, 15*time.Minute)
			}
		})
		if _, waited := turn(t, b, budget.Report); waited > 15*time.Minute {
			t.Errorf("waited %v, want 15 minutes", waited)
		}
		beats.Wait()
	})
}
