package transaction

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// startWait is how long the start of the agent waits for recovery. It is
	// well under what service managers give a start (90 s), and longer than
	// recoverWait, so that a lock is reported as what it is.
	startWait = 15 * time.Second

	// repairWait is how long Repair waits for the same.
	repairWait = 30 * time.Second

	// settleWait is how long a deployment waits for what is left of an earlier
	// one, with a place among those that run.
	settleWait = time.Second

	// closeWait is how long the end of the agent waits for recovery.
	closeWait = time.Second
)

// errNoAnswer is a recovery that nothing can end: a look at a file of a network
// file system whose server is gone hangs in the kernel until that is back.
var errNoAnswer = errors.New("its file system does not answer; looked at again when it does (a mount whose server is gone?)")

// errReloads is a recovery whose files are done with.
var errReloads = errors.New("its files are in place, and the command that tells the server still runs")

// errUnderWay is a target whose deployment runs: it settles what it finds, and
// what it leaves.
var errUnderWay = errors.New("a deployment of it is under way")

// flight is the recovery of one target, in a goroutine that nobody has to wait
// for. A target has at most one, so a dead mount costs one goroutine.
type flight struct {
	reload bool // it goes on to the reload

	// landing is closed when the files are done with: what remains, if
	// anything, is a command, which ends by itself.
	landing chan struct{}
	land    func()

	done    chan struct{} // closed at the end; what follows is for then
	outcome outcome
	owing   bool // a reload is still to be done
	err     error
}

// fly starts the recovery of a target unless one is under way, and returns that
// in any case. Calls bounds waiting, work the reload.
func (e *Engine) fly(calls, work context.Context, id string, reload bool) *flight {
	e.mu.Lock()
	defer e.mu.Unlock()
	if f := e.flights[id]; f != nil {
		return f
	}
	f := &flight{reload: reload, landing: make(chan struct{}), done: make(chan struct{})}
	f.land = sync.OnceFunc(func() { close(f.landing) })
	if e.flights == nil {
		e.flights = make(map[string]*flight)
	}
	e.flights[id] = f
	go func() {
		f.err = contain(func() error { return e.recoverTarget(calls, work, id, f) })
		f.land()
		e.mu.Lock()
		delete(e.flights, id)
		e.mu.Unlock()
		close(f.done)
	}()
	return f
}

// flying reports whether the recovery of a target is under way.
func (e *Engine) flying(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.flights[id] != nil
}

// await reports whether a flight has ended. It waits no longer than until the
// given moment for the files, and for the command as long as that takes.
func (f *flight) await(until <-chan struct{}) bool {
	select {
	case <-f.landing:
		<-f.done
		return true
	case <-until:
	}
	// Both may be so.
	select {
	case <-f.landing:
		<-f.done
		return true
	default:
		return false
	}
}

// late is why a flight that has not ended in time has not.
func (f *flight) late() error {
	select {
	case <-f.landing:
		return errReloads
	default:
		return errNoAnswer
	}
}

// deadline ends after wait, or soon after ctx, with which the wait for a lock
// ends.
func deadline(ctx context.Context, wait time.Duration) (until <-chan struct{}, cancel func()) {
	limit, end := context.WithTimeout(context.WithoutCancel(ctx), wait)
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(closeWait):
			end()
		case <-limit.Done():
		}
	})
	return limit.Done(), func() { stop(); end() }
}

// Close releases the Engine's directory handles. A recovery that a dead file
// system keeps is left behind.
func (e *Engine) Close() error {
	e.mu.Lock()
	under := slices.Collect(maps.Values(e.flights))
	e.mu.Unlock()
	until, cancel := deadline(context.Background(), closeWait)
	defer cancel()
	for _, f := range under {
		f.await(until)
	}
	return errors.Join(e.backups.Close(), e.journal.Close())
}
