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

// maxShared bounds how long deployments in a row may keep the flock of a directory by sharing it,
// because other agents wait for it. After that, new deployments do not share.
const maxShared = time.Minute

// sharing lets several deployments into one directory share a reload, as databases let transactions
// share a sync of the log (group commit).
//
// Only one deployment at a time has the turn in a directory. It swaps its files and validates them.
// Then it is ready: it passes its turn on and queues for it again, behind the deployments that are
// waiting already, which swap and validate in the meantime. The first one to get its turn back is
// the leader. It reloads for itself and for its followers: all that are ready by then and have the
// same commands. They stop waiting, and each goes on to its own verification and commit, or is
// rolled back alone.
//
//   - Files are swapped and commands run only during a turn, so a server never reads a key without
//     its certificate.
//   - A validation sees the new files of this deployment on top of others that are valid. If it
//     fails, this deployment is at fault. A deployment without a validation does not share.
//   - If a shared reload fails, any of the deployments may be at fault. All of them are rolled back,
//     and then each is tried alone.
//   - A deployment that has a file in common with a ready one waits until that one has ended.
type sharing struct {
	mu     sync.Mutex        // guards the rest, and reloaded and err of the ready attempts
	flocks map[string]*flock // by nameOf
	ready  []*attempt        // until they end, in the order in which they became ready
}

// readiness is the state of a ready deployment that others use.
type readiness struct {
	commands string        // its validation and reload: a reload is shared only if they are equal
	stop     func()        // ends its wait for the turn
	reloaded bool          // a leader has reloaded for it
	err      error         // the result of that reload
	ended    chan struct{} // closed when it is committed or rolled back
}

// reloadShared reloads the server for this deployment, alone or with others, or waits until another
// deployment has done so.
func (a *attempt) reloadShared(ctx context.Context) error {
	if !a.canShare() {
		return a.reload(ctx)
	}
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	a.becomeReady(stop)
	a.locked.passTurns()
	err := a.locked.retakeTurns(waiting)
	if reloaded, err := a.sharing.result(a); reloaded {
		a.locked.passTurns() // retakeTurns may have succeeded just before
		return err
	}
	if ctx.Err() != nil {
		return cancelled(ctx)
	}
	if err != nil {
		return fmt.Errorf("wait for other deployments in the directory: %w", err)
	}
	return a.lead(ctx)
}

// canShare reports whether the deployment can share a reload with others.
func (a *attempt) canShare() bool {
	if a.alone || a.plan.Validate == nil || a.plan.Reload.Command == nil || a.plan.Reload.Call != nil || len(a.changes) > 0 {
		return false
	}
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	return !slices.ContainsFunc(a.locked.dirs, func(d *dir) bool { return time.Since(a.sharing.flocks[nameOf(d)].since) > maxShared })
}

// becomeReady adds the deployment to those that are ready.
func (a *attempt) becomeReady(stop func()) {
	a.ready = &readiness{
		commands: fmt.Sprintf("%q %q", *a.plan.Validate, *a.plan.Reload.Command),
		stop:     stop,
		ended:    make(chan struct{}),
	}
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	a.sharing.ready = append(a.sharing.ready, a)
}

// result returns the result of the reload that a leader has made for a, if there was one.
func (s *sharing) result(a *attempt) (reloaded bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return a.ready.reloaded, a.ready.err
}

// lead reloads for the deployment and its followers.
func (a *attempt) lead(ctx context.Context) error {
	followers := a.sharing.followers(a)
	err := a.reload(ctx)
	if err != nil && ctx.Err() != nil {
		return err // only the leader is cancelled: the next deployment reloads
	}
	if err != nil && len(followers) > 0 {
		err = &sharedReloadError{err, append(followers, a)}
	}
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	for _, f := range followers {
		if !f.ready.reloaded {
			f.ready.reloaded, f.ready.err = true, err
			f.ready.stop()
		}
	}
	return err
}

// followers returns the other ready deployments that have the same commands as a. Some may have
// been reloaded already, and may be rolling back.
func (s *sharing) followers(a *attempt) []*attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.ready), func(other *attempt) bool {
		return other == a || other.ready.commands != a.ready.commands
	})
}

// sharedReloadError is the failure of a reload that was shared.
type sharedReloadError struct {
	error
	all []*attempt // those that shared it
}

func (e *sharedReloadError) Unwrap() error { return e.error }

// waitForAll waits until all deployments that shared a failed reload are rolled back. Otherwise the
// files of the one at fault would make the others fail again.
func (a *attempt) waitForAll(ctx context.Context, e *sharedReloadError) error {
	return a.locked.yieldUntil(ctx)(func(ctx context.Context) error {
		for _, other := range e.all {
			select {
			case <-other.ready.ended:
			case <-ctx.Done():
				return cancelled(ctx)
			}
		}
		return nil
	})
}

// retakeTurn waits for the deployment's turn before a rollback, because a command of another
// deployment could read the files half restored.
func (a *attempt) retakeTurn(ctx context.Context) {
	if a.ready == nil || len(a.locked.turns) > 0 {
		return
	}
	if err := detached(ctx, lateWait, a.locked.retakeTurns); err != nil {
		a.log.Warn("rolling back while other deployments in the directory are still running", "error", err)
	}
}

// leave releases the deployment's locks and ends its readiness.
func (a *attempt) leave() {
	a.locked.release()
	if a.ready == nil {
		return
	}
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	a.sharing.ready = slices.DeleteFunc(a.sharing.ready, func(other *attempt) bool { return other == a })
	close(a.ready.ended)
}

// conflicting returns a ready deployment that has a file in common with this one, perhaps under
// another name, or nil.
func (a *attempt) conflicting() *attempt {
	a.sharing.mu.Lock()
	ready := slices.Clone(a.sharing.ready)
	a.sharing.mu.Unlock()
	for _, other := range ready {
		if slices.ContainsFunc(a.files, other.owns) {
			return other
		}
	}
	return nil
}

// owns reports whether f is one of the files that a has put in place.
func (a *attempt) owns(f *dest) bool {
	now, _ := f.at.Lstat(f.Name)
	return slices.ContainsFunc(a.files, func(own *dest) bool {
		return os.SameFile(f.at.info, own.at.info) && strings.EqualFold(f.Name, own.Name) ||
			now != nil && own.staged != nil && os.SameFile(now, own.staged)
	})
}

// errConflictOver means that the deployment has waited for the end of another and must start again.
var errConflictOver = errors.New("it had a file in common with another deployment, which has ended")

// waitForEnd releases the directories and waits until another deployment has ended.
func (a *attempt) waitForEnd(ctx context.Context, other *attempt) error {
	a.locked.release()
	err := waitFor(ctx, a.Yield, func(ctx context.Context) error {
		select {
		case <-other.ready.ended:
			return nil
		case <-time.After(lockWait):
			return fmt.Errorf("it has not ended within %s", lockWait)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		return &BusyError{Err: fmt.Errorf("wait for a deployment of target %s that has a file in common: %w", other.Target, err)}
	}
	return errConflictOver
}

// flock is the lock that keeps other agents out of a directory. The deployment that has the turn
// there and all ready ones hold it together.
type flock struct {
	file    *os.File
	holders int
	since   time.Time // when it was locked
}

// joinFlock shares the flock of d, if this process has it, and reports whether it does.
func (l *dirLocks) joinFlock(d *dir) bool {
	s := &l.sharing
	s.mu.Lock()
	defer s.mu.Unlock()
	lock := s.flocks[nameOf(d)]
	if lock == nil {
		return false
	}
	lock.holders++
	l.locks = append(l.locks, func() { s.dropFlock(nameOf(d)) })
	return true
}

// keepFlock makes f, which is locked, the flock of d until its last holder drops it.
func (l *dirLocks) keepFlock(d *dir, f *os.File) {
	s := &l.sharing
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flocks == nil {
		s.flocks = make(map[string]*flock)
	}
	s.flocks[nameOf(d)] = &flock{file: f, holders: 1, since: time.Now()}
	l.locks = append(l.locks, func() { s.dropFlock(nameOf(d)) })
}

func (s *sharing) dropFlock(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lock := s.flocks[name]
	if lock.holders--; lock.holders == 0 {
		delete(s.flocks, name)
		lock.file.Close() // which ends the lock
	}
}
