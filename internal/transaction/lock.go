package transaction

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/filelock"
	"certctl-agent/internal/namelock"
	"certctl-agent/internal/printable"
)

const (
	// lockWait bounds the wait for another transaction in a directory. One can
	// take several minutes, with two commands and a verification to wait for.
	lockWait = 10 * time.Minute

	// stuckAfter is for how long one transaction may keep others waiting that
	// have not begun and can come back: most are over within seconds.
	stuckAfter = 15 * time.Second

	// lockPause is between the first two tries, and doubles up to
	// maxLockPause.
	lockPause    = 50 * time.Millisecond
	maxLockPause = time.Second

	// holderPause is between two looks at who holds a lock.
	holderPause = 5 * time.Second
)

// waitFor waits for other transactions: nothing of this one has begun. That its
// place is not had again after the wait is a BusyError.
func waitFor(ctx context.Context, yield Yield, wait func(context.Context) error) error {
	if yield == nil {
		return wait(ctx)
	}
	waited := false
	err := yield(func(ctx context.Context) error {
		err := wait(ctx)
		waited = err == nil
		return err
	})
	if waited && err != nil {
		return &BusyError{Err: fmt.Errorf("wait for a place after that: %w", err)}
	}
	return err
}

// patience is for how long one holder may keep a transaction waiting that has not
// begun: with yield it comes back.
func patience(yield Yield) time.Duration {
	if yield != nil {
		return stuckAfter
	}
	return lockWait
}

// acquire takes a lock of this process. Many can be in its line, so none of them
// fails while that moves; but a dead file system can keep the first. Most is for
// how long one holder may.
func acquire(ctx context.Context, locks *namelock.Table, name string, most time.Duration, yield Yield) (release func(), err error) {
	release, ok := locks.Try(name)
	if ok {
		return release, nil
	}
	err = waitFor(ctx, yield, func(ctx context.Context) (err error) {
		for {
			within, cancel := context.WithTimeoutCause(ctx, most-locks.Held(name), fmt.Errorf("it has had it for %s", most))
			release, err = locks.Acquire(within, name)
			cancel()
			if err == nil || ctx.Err() != nil || locks.Held(name) >= most {
				return err
			}
		}
	})
	if err != nil && release != nil {
		release()
	}
	return release, err
}

// hold is the directories that one transaction has locked.
type hold struct {
	*Engine
	yield Yield
	dirs  []*dir   // in the order in which they are locked
	turns []func() // how to let other transactions of this process in
	locks []func() // and those of other processes
}

func (h *hold) release() {
	for _, release := range slices.Backward(h.locks) {
		release()
	}
	h.locks = nil
	h.pass()
}

// pass lets other transactions of this process into the directories.
func (h *hold) pass() {
	for _, release := range slices.Backward(h.turns) {
		release()
	}
	h.turns = nil
}

// lock takes the locks of all dirs: between the transactions of this process by
// a table, between processes by flock, which ends with the process, however it
// ends. The order is that of the directories' numbers, so that two transactions
// with two directories in common cannot each hold one; and no try ever blocks,
// since any user who can open a directory can lock it for ever.
func (e *Engine) lock(ctx context.Context, dirs []*dir, yield Yield) (*hold, error) {
	dirs = slices.SortedFunc(slices.Values(dirs), func(a, b *dir) int {
		x, y := statOf(a), statOf(b)
		return cmp.Or(cmp.Compare(x.Dev, y.Dev), cmp.Compare(x.Ino, y.Ino))
	})
	h := &hold{Engine: e, yield: yield, dirs: dirs}
	for _, d := range dirs {
		if err := h.take(ctx, d); err != nil {
			h.release()
			return nil, fmt.Errorf("lock directory %s: %w", d.path, reason(err))
		}
	}
	return h, nil
}

func statOf(d *dir) *syscall.Stat_t { return d.info.Sys().(*syscall.Stat_t) }

// nameOf names a directory in the tables of locks.
func nameOf(d *dir) string { return fmt.Sprintf("%d:%d", statOf(d).Dev, statOf(d).Ino) }

func (h *hold) take(ctx context.Context, d *dir) error {
	if err := h.turn(ctx, d, patience(h.yield), h.yield); err != nil {
		return &BusyError{Place: "directory " + nameOf(d), Err: fmt.Errorf("another deployment of this agent holds it: %w", err)}
	}
	// Whose turn it is, is alone here; those that have passed theirs have the
	// lock still.
	if h.join(d) {
		return nil
	}
	f, err := d.Open(".")
	if err != nil {
		return err
	}
	locked, err := h.flock(f, d)
	if !locked && err == nil {
		err = waitFor(ctx, h.yield, func(ctx context.Context) error { return h.await(ctx, f, d) })
	}
	if err != nil {
		f.Close()
		return err
	}
	h.keep(d, f)
	return nil
}

// turn waits until no other transaction of this process is at work in d.
func (h *hold) turn(ctx context.Context, d *dir, most time.Duration, yield Yield) error {
	release, err := acquire(ctx, &h.Engine.dirs, nameOf(d), most, yield)
	if err == nil {
		h.turns = append(h.turns, release)
	}
	return err
}

// again waits for the turn that was passed. What has begun cannot come back later.
func (h *hold) again(ctx context.Context) error {
	for _, d := range h.dirs {
		if err := h.turn(ctx, d, lockWait, h.aside(ctx)); err != nil {
			h.pass()
			return err
		}
	}
	return nil
}

// aside gives others the deployment's place while it waits, until ctx ends and not
// with the agent: what has begun is brought to an end, with a place or without.
func (h *hold) aside(ctx context.Context) Yield {
	return func(wait func(context.Context) error) (err error) {
		if h.yield == nil {
			return wait(ctx)
		}
		_ = h.yield(func(context.Context) error {
			err = wait(ctx)
			return nil
		})
		return err
	}
}

// await tries until it has the lock. Any user who can open the directory can
// lock it, so the lock of a foreign user does not count.
func (h *hold) await(ctx context.Context, f *os.File, d *dir) error {
	bound := time.After(lockWait)
	pause := lockPause
	var looked time.Time
	var by []holder
	for {
		if time.Since(looked) >= holderPause {
			first := looked.IsZero()
			looked = time.Now()
			by = lockHolders(ctx, d)
			if foreign(by) {
				h.opts.Log.Warn("a user who runs no agent holds the lock of a directory: deploying there without it; find out why, or close the directory to that user",
					"directory", d.path, "held_by", describe(by))
				return nil
			}
			if first {
				h.opts.Log.Info("waiting for another deployment in the same directory", "directory", d.path, "held_by", describe(by))
			}
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, maxLockPause)
		case <-bound:
			return fmt.Errorf("another deployment holds it, or another program does: %s; given up after %s", describe(by), lockWait)
		case <-ctx.Done():
			return &BusyError{Err: fmt.Errorf("another deployment holds it, or another program does: %s: %w", describe(by), context.Cause(ctx))}
		}
		if locked, err := h.flock(f, d); locked || err != nil {
			return err
		}
	}
}

// flock tries once. Where the file system has no locks, that counts as one.
func (h *hold) flock(f *os.File, d *dir) (locked bool, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	var tried error
	if err := raw.Control(func(fd uintptr) { tried = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB) }); err != nil {
		return false, err
	}
	switch {
	case errors.Is(tried, syscall.EWOULDBLOCK) || errors.Is(tried, syscall.EINTR):
		return false, nil
	case filelock.Unsupported(tried):
		// Network file systems: NFS wants a handle for writing, which no
		// directory has.
		h.opts.Log.Warn("file system has no locks: two agents that deploy here at once could get in each other's way", "directory", d.path, "error", tried)
		return true, nil
	}
	return tried == nil, tried
}

// holder is a process that holds a lock.
type holder struct {
	pid     int
	command string
	uid     int  // of the user who started it
	foreign bool // which is neither root nor the agent's own
}

// maxCommand bounds a command's name in messages: its process chose it.
const maxCommand = 32

func (h holder) String() string {
	return fmt.Sprintf("process %d (%s) of user %d", h.pid, printable.Line(h.command, maxCommand), h.uid)
}

// foreign reports that the holders are known and all foreign. An agent's lock is
// exclusive, so it has none then. Nobody found is no answer: the holder can be in
// another container, or on another host.
func foreign(by []holder) bool {
	return len(by) > 0 && !slices.ContainsFunc(by, func(h holder) bool { return !h.foreign })
}

func describe(by []holder) string {
	if len(by) == 0 {
		return "by whom is not known here"
	}
	var all []string
	for _, h := range by {
		all = append(all, h.String())
	}
	return strings.Join(all, ", ")
}
