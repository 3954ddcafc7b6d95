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
	// startWait is how long the agent's start waits for recovery. It is well below the time that
	// service managers allow for a start (90 s), and above recoverWait, so that a held lock is
	// reported as such.
	startWait = 15 * time.Second

	// repairWait is how long Repair waits for recovery.
	repairWait = 30 * time.Second

	// settleWait is how long a deployment waits for the recovery of an earlier one. It occupies a
	// job slot in the meantime.
	settleWait = time.Second

	// closeWait is how long Close waits for recovery.
	closeWait = time.Second
)

// errNoAnswer means that the recovery hangs in the kernel, for example on a network file system
// whose server is gone. It cannot be cancelled.
var errNoAnswer = errors.New("its file system does not answer; recovery goes on when it does (a mount whose server is gone?)")

// errReloads means that the files are recovered and only the reload is left.
var errReloads = errors.New("its files are in place, and the reload is still running")

// errInProgress means that a deployment of the target is running. It settles everything itself.
var errInProgress = errors.New("a deployment of it is in progress")

// recoveryRun is the recovery of one target in the background: nothing waits for it. A target
// has at most one, so a dead mount costs a single goroutine.
type recoveryRun struct {
	reload bool // run the reload too

	// filesDone is closed once the files are recovered. Only a command may still be running then,
	// and its timeout ends it.
	filesDone    chan struct{}
	setFilesDone func() // may be called more than once

	done chan struct{} // closed at the end

	// Valid once done is closed.
	outcome       outcome
	reloadPending bool
	err           error
}

// startRecovery starts the recovery of a target, unless one is in progress, and returns it. calls
// bounds the waiting, work the reload.
func (e *Engine) startRecovery(calls, work context.Context, id string, reload bool) *recoveryRun {
	e.mu.Lock()
	defer e.mu.Unlock()
	if run := e.recoveries[id]; run != nil {
		return run
	}
	run := &recoveryRun{reload: reload, filesDone: make(chan struct{}), done: make(chan struct{})}
	run.setFilesDone = sync.OnceFunc(func() { close(run.filesDone) })
	if e.recoveries == nil {
		e.recoveries = make(map[string]*recoveryRun)
	}
	e.recoveries[id] = run
	go func() {
		run.err = catchPanic(func() error { return e.recoverTarget(calls, work, id, run) })
		run.setFilesDone()
		e.mu.Lock()
		delete(e.recoveries, id)
		e.mu.Unlock()
		close(run.done)
	}()
	return run
}

// recovering reports whether the recovery of a target is in progress.
func (e *Engine) recovering(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.recoveries[id] != nil
}

// wait waits for the end of a recovery and reports whether it has ended. It waits for the files
// until the given channel is closed, and for the reload as long as that takes.
func (run *recoveryRun) wait(until <-chan struct{}) bool {
	select {
	case <-run.filesDone:
		<-run.done
		return true
	case <-until:
	}
	// Both channels may be ready, and select chooses at random.
	select {
	case <-run.filesDone:
		<-run.done
		return true
	default:
		return false
	}
}

// lateError returns what a recovery that has not ended in time is waiting for.
func (run *recoveryRun) lateError() error {
	select {
	case <-run.filesDone:
		return errReloads
	default:
		return errNoAnswer
	}
}

// deadline returns a channel that is closed after wait, or closeWait after the end of ctx. The
// delay gives recoveries, which stop waiting for locks when ctx ends, time to report that.
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

// Close waits for recoveries in progress, but not for those that hang on a dead file system, and
// releases the Engine's directory handles.
func (e *Engine) Close() error {
	e.mu.Lock()
	runs := slices.Collect(maps.Values(e.recoveries))
	e.mu.Unlock()
	until, cancel := deadline(context.Background(), closeWait)
	defer cancel()
	for _, run := range runs {
		run.wait(until)
	}
	return errors.Join(e.backups.Close(), e.journal.Close())
}
