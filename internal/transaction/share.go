package transaction

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxShared is how long transactions that share may keep the lock of a directory
// among them, before one that begins there shares with nobody: other agents wait
// for that lock.
const maxShared = time.Minute

// sharing is how transactions of one directory share reloads. One whose files
// are swapped and validated passes its turn and queues for it anew. Those that
// waited before it swap and validate meanwhile. Its next turn comes after theirs,
// and its reload is then one for all that are ready and end in the same commands,
// since it begins after their swap. Each of them goes on to its own verification
// and its own commit.
//
// No two transactions swap at a time, and none swaps while a command runs, so
// that no server reads half of a pair. A validation is of the files of one
// transaction on top of others that have passed theirs. Without a validation one
// bad file would fail all who share, so such a transaction shares nothing. Where a
// reload fails all the same, all for whom it was are undone, and each is tried
// again by itself, when all are undone: whose fault it was is known then.
type sharing struct {
	mu     sync.Mutex // guards the rest
	flocks map[string]*flock
	ready  []*attempt // in the order in which they passed their turn
}

// flock is the lock of a directory, of all who are at work there or ready.
type flock struct {
	file    *os.File
	holders int
	since   time.Time
}

// join shares the lock of d if this process has it.
func (h *hold) join(d *dir) bool {
	s := &h.sharing
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.flocks[nameOf(d)]
	if l == nil {
		return false
	}
	l.holders++
	h.locks = append(h.locks, func() { s.drop(nameOf(d)) })
	return true
}

// keep makes f, which is locked, the lock of d until its last holder releases it.
func (h *hold) keep(d *dir, f *os.File) {
	s := &h.sharing
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flocks == nil {
		s.flocks = make(map[string]*flock)
	}
	s.flocks[nameOf(d)] = &flock{file: f, holders: 1, since: time.Now()}
	h.locks = append(h.locks, func() { s.drop(nameOf(d)) })
}

func (s *sharing) drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.flocks[name]
	if l.holders--; l.holders == 0 {
		delete(s.flocks, name)
		l.file.Close() // which ends the lock
	}
}

// turnPassed is a deployment that others may overtake.
type turnPassed struct {
	commands string        // that end it
	wake     func()        // it waits no longer
	served   bool          // another's reload was for it too
	err      error         // of that reload
	ended    chan struct{} // closed when its files are final, or undone
}

// mayShare reports whether the deployment can share a reload with others.
func (a *attempt) mayShare() bool {
	if a.alone || a.plan.Validate == nil || a.plan.Reload.Command == nil || a.plan.Reload.Call != nil || len(a.changes) > 0 {
		return false
	}
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	return !slices.ContainsFunc(a.hold.dirs, func(d *dir) bool { return time.Since(a.sharing.flocks[nameOf(d)].since) > maxShared })
}

// reloadShared reloads, for others too, or lets one of them do it.
func (a *attempt) reloadShared(ctx context.Context) error {
	if !a.mayShare() {
		return a.reload(ctx)
	}
	waiting, wake := context.WithCancel(ctx)
	defer wake()
	a.passed = &turnPassed{commands: fmt.Sprintf("%q %q", *a.plan.Validate, *a.plan.Reload.Command), wake: wake, ended: make(chan struct{})}
	a.sharing.mu.Lock()
	a.sharing.ready = append(a.sharing.ready, a)
	a.sharing.mu.Unlock()
	a.hold.pass()
	served, err := a.turnAgain(ctx, waiting)
	if served || err != nil {
		return err
	}
	with := a.sharing.with(a)
	err = a.reload(ctx)
	if err != nil && ctx.Err() != nil {
		return err // nothing of the others'; the next of them reloads
	}
	if err != nil && len(with) > 0 {
		err = &togetherError{err, append(with, a)}
	}
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	for _, other := range with {
		if !other.passed.served {
			other.passed.served, other.passed.err = true, err
			other.passed.wake()
		}
	}
	return err
}

// togetherError is a reload that failed for several deployments.
type togetherError struct {
	error
	all []*attempt
}

func (e *togetherError) Unwrap() error { return e.error }

// waitForAll waits until each deployment for which a reload failed is undone: the
// one whose fault it was would have the others fail again.
func (a *attempt) waitForAll(ctx context.Context, e *togetherError) error {
	return a.aside(ctx)(func(ctx context.Context) error {
		for _, other := range e.all {
			select {
			case <-other.passed.ended:
			case <-ctx.Done():
				return cancelled(ctx)
			}
		}
		return nil
	})
}

// turnAgain waits for the deployment's turn, or until another has reloaded for it.
func (a *attempt) turnAgain(ctx, waiting context.Context) (served bool, err error) {
	err = a.hold.again(waiting, a.aside(waiting))
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	if a.passed.served {
		a.hold.pass()
		return true, a.passed.err
	}
	if err == nil {
		return false, nil
	}
	if ctx.Err() != nil {
		return false, cancelled(ctx)
	}
	return false, fmt.Errorf("wait for the deployments that go before: %w", err)
}

// aside gives others the deployment's place while it waits, until ctx ends and not
// with the agent: what has begun is brought to an end, with a place or without.
func (a *attempt) aside(ctx context.Context) Yield {
	return func(wait func(context.Context) error) (err error) {
		if a.Yield == nil {
			return wait(ctx)
		}
		_ = a.Yield(func(context.Context) error {
			err = wait(ctx)
			return nil
		})
		return err
	}
}

// with are the others whose files are in place, not for good, and that end in the
// same commands as a. One for which a reload was already may be undoing it.
func (s *sharing) with(a *attempt) []*attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.ready), func(other *attempt) bool {
		return other == a || other.passed.commands != a.passed.commands
	})
}

// turnBack waits for the deployment's turn, to undo it: a command of another
// could read half of what is put back.
func (a *attempt) turnBack(ctx context.Context) {
	if a.passed == nil || len(a.hold.turns) > 0 {
		return
	}
	err := regardless(ctx, lateWait, func(ctx context.Context) error { return a.hold.again(ctx, a.aside(ctx)) })
	if err != nil {
		a.log.Warn("undoing a deployment beside others in its directory, since they do not end", "error", err)
	}
}

// leave ends the deployment's hold.
func (a *attempt) leave() {
	a.hold.release()
	if a.passed == nil {
		return
	}
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	a.sharing.ready = slices.DeleteFunc(a.sharing.ready, func(other *attempt) bool { return other == a })
	close(a.passed.ended)
}

// overtaken returns a deployment that is ready, and not at its end, and has a
// file in common with this one, whatever name that has; or nil.
func (a *attempt) overtaken() *attempt {
	a.sharing.mu.Lock()
	ready := slices.Clone(a.sharing.ready)
	a.sharing.mu.Unlock()
	for _, other := range ready {
		for _, f := range a.files {
			if other.owns(f) {
				return other
			}
		}
	}
	return nil
}

// owns reports whether one of the files that a put in place is f.
func (a *attempt) owns(f *dest) bool {
	now, _ := f.at.Lstat(f.Name)
	return slices.ContainsFunc(a.files, func(own *dest) bool {
		return os.SameFile(f.at.info, own.at.info) && strings.EqualFold(f.Name, own.Name) ||
			now != nil && own.staged != nil && os.SameFile(now, own.staged)
	})
}

// errOvertaken is a deployment that has waited for the end of another, and is to
// be begun anew.
var errOvertaken = errors.New("it had a file in common with another deployment, which has ended")

// waitForEnd lets others into the directories until another deployment has ended.
func (a *attempt) waitForEnd(ctx context.Context, other *attempt) error {
	a.hold.release()
	err := waitFor(ctx, a.Yield, func(ctx context.Context) error {
		select {
		case <-other.passed.ended:
			return nil
		case <-time.After(lockWait):
			return fmt.Errorf("not ended within %s", lockWait)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err == nil {
		return errOvertaken
	}
	return &BusyError{Err: fmt.Errorf("wait for another deployment, of target %s, with a file in common: %w", other.Target, err)}
}
