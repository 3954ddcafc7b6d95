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
	// lockWait bounds the wait for a lock. A deployment may hold it for minutes: two commands and
	// a verification take that long.
	lockWait = 10 * time.Minute

	// stuckAfter is how long one deployment may keep others waiting that have not begun and can be
	// retried. Most deployments take seconds.
	stuckAfter = 15 * time.Second

	// lockPause is the pause between the first two tries for a lock. It doubles up to maxLockPause.
	lockPause    = 50 * time.Millisecond
	maxLockPause = time.Second

	// holderPause is the pause between two searches for the holder of a lock.
	holderPause = 5 * time.Second
)

// waitFor waits for other deployments, before this one has begun. It returns a BusyError if the
// wait succeeds but no job slot is free afterwards.
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
		return &BusyError{Err: fmt.Errorf("wait for a free job slot after that: %w", err)}
	}
	return err
}

// maxHeld returns how long one holder of a lock may keep a deployment waiting that has not begun.
// With yield, the deployment can be retried.
func maxHeld(yield Yield) time.Duration {
	if yield != nil {
		return stuckAfter
	}
	return lockWait
}

// acquire takes a lock of this process. It waits for as long as the lock changes hands, because the
// queue may be long, and gives up once one holder, perhaps on a dead file system, has had the lock
// for limit.
func acquire(ctx context.Context, locks *namelock.Table, name string, limit time.Duration, yield Yield) (release func(), err error) {
	release, ok := locks.Try(name)
	if ok {
		return release, nil
	}
	err = waitFor(ctx, yield, func(ctx context.Context) (err error) {
		for {
			within, cancel := context.WithTimeoutCause(ctx, limit-locks.Held(name), fmt.Errorf("held for more than %s", limit))
			release, err = locks.Acquire(within, name)
			cancel()
			if err == nil || ctx.Err() != nil || locks.Held(name) >= limit {
				return err
			}
		}
	})
	if err != nil && release != nil {
		release()
	}
	return release, err
}

// dirLocks are the locks on the directories of one deployment. Within this process deployments
// take turns in a directory; a flock keeps other processes out. A deployment that waits for a
// shared reload passes its turns on, but keeps the flocks.
type dirLocks struct {
	*Engine
	yield Yield
	dirs  []*dir   // in the order of locking
	turns []func() // each ends the turn in one directory
	locks []func() // each releases one flock
}

func (l *dirLocks) release() {
	for _, release := range slices.Backward(l.locks) {
		release()
	}
	l.locks = nil
	l.passTurns()
}

// passTurns lets other deployments of this process into the directories.
func (l *dirLocks) passTurns() {
	for _, release := range slices.Backward(l.turns) {
		release()
	}
	l.turns = nil
}

// lock locks all dirs, against other deployments of this process by a table, and against other
// processes by flock(2), which the kernel releases when a process ends. It locks them in the order
// of their device and inode numbers, so that two deployments cannot deadlock. The flock never
// blocks in the kernel, because any user who can open a directory can lock it forever.
func (e *Engine) lock(ctx context.Context, dirs []*dir, yield Yield) (*dirLocks, error) {
	dirs = slices.SortedFunc(slices.Values(dirs), func(a, b *dir) int {
		x, y := statOf(a), statOf(b)
		return cmp.Or(cmp.Compare(x.Dev, y.Dev), cmp.Compare(x.Ino, y.Ino))
	})
	l := &dirLocks{Engine: e, yield: yield, dirs: dirs}
	for _, d := range dirs {
		if err := l.lockDir(ctx, d); err != nil {
			l.release()
			return nil, fmt.Errorf("lock directory %s: %w", d.path, withoutPath(err))
		}
	}
	return l, nil
}

func statOf(d *dir) *syscall.Stat_t { return d.info.Sys().(*syscall.Stat_t) }

// nameOf returns the name of a directory's lock.
func nameOf(d *dir) string { return fmt.Sprintf("%d:%d", statOf(d).Dev, statOf(d).Ino) }

// lockDir locks one directory.
func (l *dirLocks) lockDir(ctx context.Context, d *dir) error {
	if err := l.takeTurn(ctx, d, maxHeld(l.yield), l.yield); err != nil {
		return &BusyError{Lock: "directory " + nameOf(d), Err: fmt.Errorf("another deployment of this agent holds it: %w", err)}
	}
	// Deployments that have passed their turn on still share the flock.
	if l.joinFlock(d) {
		return nil
	}
	f, err := d.Open(".")
	if err != nil {
		return err
	}
	locked, err := l.tryFlock(f, d)
	if !locked && err == nil {
		err = waitFor(ctx, l.yield, func(ctx context.Context) error { return l.pollFlock(ctx, f, d) })
	}
	if err != nil {
		f.Close()
		return err
	}
	l.keepFlock(d, f)
	return nil
}

// takeTurn waits for the deployment's turn in d.
func (l *dirLocks) takeTurn(ctx context.Context, d *dir, limit time.Duration, yield Yield) error {
	release, err := acquire(ctx, &l.directoryLocks, nameOf(d), limit, yield)
	if err == nil {
		l.turns = append(l.turns, release)
	}
	return err
}

// retakeTurns waits for the turns that were passed on. It waits for up to lockWait, because a
// deployment that has begun cannot be retried later.
func (l *dirLocks) retakeTurns(ctx context.Context) error {
	for _, d := range l.dirs {
		if err := l.takeTurn(ctx, d, lockWait, l.yieldUntil(ctx)); err != nil {
			l.passTurns()
			return err
		}
	}
	return nil
}

// yieldUntil returns a Yield for a deployment that has begun. Its wait ends with ctx and not when
// the agent stops, and it returns even if no job slot is free: the deployment must end either way.
func (l *dirLocks) yieldUntil(ctx context.Context) Yield {
	return func(wait func(context.Context) error) (err error) {
		if l.yield == nil {
			return wait(ctx)
		}
		_ = l.yield(func(context.Context) error {
			err = wait(ctx)
			return nil
		})
		return err
	}
}

// pollFlock tries to lock f until it succeeds. It ignores the lock of a foreign user: any user who
// can open the directory can lock it.
func (l *dirLocks) pollFlock(ctx context.Context, f *os.File, d *dir) error {
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
				l.opts.Log.Warn("a user who runs no agent holds the lock of a directory: deploying there without it; find out why, or close the directory to that user",
					"directory", d.path, "held_by", describe(by))
				return nil
			}
			if first {
				l.opts.Log.Info("waiting for another deployment in the same directory", "directory", d.path, "held_by", describe(by))
			}
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, maxLockPause)
		case <-bound:
			return fmt.Errorf("another deployment or another program holds it: %s; gave up after %s", describe(by), lockWait)
		case <-ctx.Done():
			return &BusyError{Err: fmt.Errorf("another deployment or another program holds it: %s: %w", describe(by), context.Cause(ctx))}
		}
		if locked, err := l.tryFlock(f, d); locked || err != nil {
			return err
		}
	}
}

// tryFlock tries once to lock f. On a file system without locks it reports success.
func (l *dirLocks) tryFlock(f *os.File, d *dir) (locked bool, err error) {
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
		// For example NFS, which needs a handle open for writing, and a directory has none.
		l.opts.Log.Warn("file system has no locks: two agents that deploy here at the same time could interfere", "directory", d.path, "error", tried)
		return true, nil
	}
	return tried == nil, tried
}

// holder is a process that holds a lock.
type holder struct {
	pid     int
	command string
	uid     int  // of the user who started it
	foreign bool // that user is neither root nor the agent's own
}

// maxCommand bounds the name of a process in messages, in bytes: the process chooses it.
const maxCommand = 32

func (h holder) String() string {
	return fmt.Sprintf("process %d (%s) of user %d", h.pid, printable.Line(h.command, maxCommand), h.uid)
}

// foreign reports whether the holders are known and all foreign, so that none of them is an agent.
// It returns false if no holder was found: that one may be in another container or on another host.
func foreign(by []holder) bool {
	return len(by) > 0 && !slices.ContainsFunc(by, func(h holder) bool { return !h.foreign })
}

func describe(by []holder) string {
	if len(by) == 0 {
		return "its holder is not visible from here"
	}
	var all []string
	for _, h := range by {
		all = append(all, h.String())
	}
	return strings.Join(all, ", ")
}
