// Package namelock has locks with names, each with one holder at a time. Unlike with a sync.Mutex,
// a caller can stop waiting for a lock, and waiting does not stop virtual time in a
// testing/synctest bubble.
package namelock

import (
	"context"
	"sync"
	"time"
)

// Table holds the locks. The zero value is ready to use. It has entries only for names that are
// held or waited for.
type Table struct {
	mu    sync.Mutex // guards locks; never held while waiting
	locks map[string]*lock
}

type lock struct {
	token chan struct{} // holds the one token while the lock is free
	taken time.Time     // when it was last taken
	users int           // holders and waiters
}

// Acquire waits for the lock of name and returns a function that releases it, which may be called
// more than once. If ctx ends first, Acquire returns its cause.
func (t *Table) Acquire(ctx context.Context, name string) (release func(), err error) {
	l := t.join(name)
	select {
	case <-l.token:
		return t.took(name, l), nil
	case <-ctx.Done():
		t.leave(name, l)
		return nil, context.Cause(ctx)
	}
}

// Try takes the lock of name if it is free. It never waits.
func (t *Table) Try(name string) (release func(), ok bool) {
	l := t.join(name)
	select {
	case <-l.token:
		return t.took(name, l), true
	default:
		t.leave(name, l)
		return nil, false
	}
}

// Held returns how long the present holder has had the lock of name. It returns 0 if nobody holds
// the lock or waits for it.
func (t *Table) Held(name string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.locks[name]; l != nil {
		return time.Since(l.taken)
	}
	return 0
}

func (t *Table) took(name string, l *lock) (release func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l.taken = time.Now()
	return sync.OnceFunc(func() {
		l.token <- struct{}{}
		t.leave(name, l)
	})
}

func (t *Table) join(name string) *lock {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.locks == nil {
		t.locks = make(map[string]*lock)
	}
	l := t.locks[name]
	if l == nil {
		l = &lock{token: make(chan struct{}, 1)}
		l.token <- struct{}{}
		t.locks[name] = l
	}
	l.users++
	return l
}

func (t *Table) leave(name string, l *lock) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(t.locks, name)
	}
}
