package namelock

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestOneHolderForEachName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var table Table
		var group sync.WaitGroup
		held := map[string]int{}
		var mu sync.Mutex
		began := time.Now()
		for _, name := range []string{"a", "a", "a", "b"} {
			group.Go(func() {
				release, err := table.Acquire(t.Context(), name)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if held[name]++; held[name] > 1 {
					t.Errorf("%s has %d holders", name, held[name])
				}
				mu.Unlock()
				time.Sleep(time.Second)
				mu.Lock()
				held[name]--
				mu.Unlock()
				release()
				release()
			})
		}
		group.Wait()
		if got, want := time.Since(began), 3*time.Second; got != want {
			t.Errorf("took %v, want %v: names must not wait for each other", got, want)
		}
		if len(table.locks) > 0 {
			t.Errorf("%d names are remembered", len(table.locks))
		}
	})
}

func TestWaitingEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var table Table
		release, err := table.Acquire(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		cause := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, cause)
		defer cancel()
		if _, err := table.Acquire(ctx, "a"); err != cause {
			t.Errorf("got %v, want %v", err, cause)
		}
		release()
		if release, err = table.Acquire(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		release()
	})
}

func TestTryNeverWaits(t *testing.T) {
	var table Table
	release, ok := table.Try("a")
	if !ok {
		t.Fatal("a free lock was refused")
	}
	if _, ok := table.Try("a"); ok {
		t.Error("a has two holders")
	}
	release()
	release()
	if release, ok = table.Try("a"); !ok {
		t.Fatal("the lock is not free again")
	}
	release()
	if len(table.locks) > 0 {
		t.Errorf("%d names are remembered", len(table.locks))
	}
}
