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

// sharing lets deployments into one directory reload once for several of them, as
// databases let transactions share the sync of their log (group commit).
//
// One deployment at a time has the turn of a directory. It swaps its files and
// validates them. Then it is ready: it passes its turn and queues for it again,
// behind those that wait already, and they swap and validate meanwhile. The first
// that has its turn back leads. It reloads, for itself and for all that are ready by
// then and end in the same commands. They stop waiting, and each of them goes on to
// its own verification and its own commit, or is rolled back alone.
//
//   - Nobody swaps without the turn, and commands run with it, so no server reads
//     half of a pair.
//   - A validation sees its own files on top of others that have passed theirs, so
//     who fails is at fault. A deployment without a validation shares nothing.
//   - A reload that fails may be anyone's fault: all for whom it was are rolled back,
//     and then each is tried again alone.
//   - Who has a file in common with one that is ready waits until that has ended.
type sharing struct {
	mu     sync.Mutex        // guards the rest, and what deployments that are ready are told
	flocks map[string]*flock // by nameOf
	ready  []*attempt        // until they end, in the order in which they passed their turn
}

// readiness is what others need to know of a deployment that is ready.
type readiness struct {
	commands string        // its validation and its reload: those with the same can share
	stop     func()        // ends its wait for the turn
	reloaded bool          // another has reloaded for it
	err      error         // the result of that
	ended    chan struct{} // closed when it is committed or rolled back
}

// reloadShared reloads for this deployment and others, or lets another do it.
func (a *attempt) reloadShared(ctx context.Context) error {
	if !a.mayShare() {
		return a.reload(ctx)
	}
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	a.becomeReady(stop)
	a.hold.pass()
	err := a.hold.again(waiting)
	if reloaded, err := a.sharing.result(a); reloaded {
		a.hold.pass() // it may have had its turn just before
		return err
	}
	if ctx.Err() != nil {
		return cancelled(ctx)
	}
	if err != nil {
		return fmt.Errorf("wait for the deployments that go before: %w", err)
	}
	return a.lead(ctx)
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

// becomeReady lets others know the deployment.
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

// result is that of the reload which another has made for a, if one has.
func (s *sharing) result(a *attempt) (reloaded bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return a.ready.reloaded, a.ready.err
}

// lead reloads, for the deployment and its followers.
func (a *attempt) lead(ctx context.Context) error {
	followers := a.sharing.followers(a)
	err := a.reload(ctx)
	if err != nil && ctx.Err() != nil {
		return err // the leader alone was cancelled: the next of them reloads
	}
	if err != nil && len(followers) > 0 {
		err = &togetherError{err, append(followers, a)}
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

// followers are the others whose files are in place, not for good, and that end in
// the same commands as a. One for which a reload was already may be undoing it.
func (s *sharing) followers(a *attempt) []*attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.ready), func(other *attempt) bool {
		return other == a || other.ready.commands != a.ready.commands
	})
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
	return a.hold.aside(ctx)(func(ctx context.Context) error {
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

// turnBack waits for the deployment's turn, to roll it back: a command of another
// could read half of what is put back.
func (a *attempt) turnBack(ctx context.Context) {
	if a.ready == nil || len(a.hold.turns) > 0 {
		return
	}
	if err := regardless(ctx, lateWait, a.hold.again); err != nil {
		a.log.Warn("undoing a deployment beside others in its directory, since they do not end", "error", err)
	}
}

// leave ends the deployment's hold.
func (a *attempt) leave() {
	a.hold.release()
	if a.ready == nil {
		return
	}
	a.sharing.mu.Lock()
	defer a.sharing.mu.Unlock()
	a.sharing.ready = slices.DeleteFunc(a.sharing.ready, func(other *attempt) bool { return other == a })
	close(a.ready.ended)
}

// conflicting returns a deployment that is ready and has a file in common with
// this one, whatever name that has; or nil.
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

// owns reports whether one of the files that a put in place is f.
func (a *attempt) owns(f *dest) bool {
	now, _ := f.at.Lstat(f.Name)
	return slices.ContainsFunc(a.files, func(own *dest) bool {
		return os.SameFile(f.at.info, own.at.info) && strings.EqualFold(f.Name, own.Name) ||
			now != nil && own.staged != nil && os.SameFile(now, own.staged)
	})
}

// errConflictEnded is a deployment that has waited for the end of another, and is to
// be begun anew.
var errConflictEnded = errors.New("it had a file in common with another deployment, which has ended")

// waitForEnd lets others into the directories until another deployment has ended.
func (a *attempt) waitForEnd(ctx context.Context, other *attempt) error {
	a.hold.release()
	err := waitFor(ctx, a.Yield, func(ctx context.Context) error {
		select {
		case <-other.ready.ended:
			return nil
		case <-time.After(lockWait):
			return fmt.Errorf("not ended within %s", lockWait)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		return &BusyError{Err: fmt.Errorf("wait for another deployment, of target %s, with a file in common: %w", other.Target, err)}
	}
	return errConflictEnded
}

// flock is the lock that keeps other agents out of a directory. Whoever has the turn
// there and all that are ready hold it together.
type flock struct {
	file    *os.File
	holders int
	since   time.Time // when it was locked
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
