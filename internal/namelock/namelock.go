// Package namelock serialises work by name: one holder at a time for each. Unlike
// a sync.Mutex, a slot can be given up waiting for, and waiting for one does
// not stop virtual time in a testing/synctest bubble.
package namelock

import (
	"context"
	"sync"
)

// Table hands out the slots. The zero value is ready. It remembers only names
// that are held or waited for.
type Table struct {
	mu    sync.Mutex // guards slots; never held while waiting
	slots map[string]*slot
}

type slot struct {
	token chan struct{} // holds the one token while the slot is free
	users int           // holders and waiters
}

// Acquire waits for the slot of name. The release that it returns may be
// called more than once. When ctx ends first, Acquire returns its cause.
func (t *Table) Acquire(ctx context.Context, name string) (release func(), err error) {
	s := t.join(name)
	select {
	case <-s.token:
		return t.release(name, s), nil
	case <-ctx.Done():
		t.leave(name, s)
		return nil, context.Cause(ctx)
	}
}

// Try takes the slot of name if it is free. It never waits.
func (t *Table) Try(name string) (release func(), ok bool) {
	s := t.join(name)
	select {
	case <-s.token:
		return t.release(name, s), true
	default:
		t.leave(name, s)
		return nil, false
	}
}

func (t *Table) release(name string, s *slot) func() {
	return sync.OnceFunc(func() {
		s.token <- struct{}{}
		t.leave(name, s)
	})
}

func (t *Table) join(name string) *slot {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.slots == nil {
		t.slots = make(map[string]*slot)
	}
	s := t.slots[name]
	if s == nil {
		s = &slot{token: make(chan struct{}, 1)}
		s.token <- struct{}{}
		t.slots[name] = s
	}
	s.users++
	return s
}

func (t *Table) leave(name string, s *slot) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.users--; s.users == 0 {
		delete(t.slots, name)
	}
}
