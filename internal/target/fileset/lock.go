package fileset

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"syscall"
	"time"
)

const (
	// lockWait bounds the wait for another transaction's directory. One can
	// take several minutes, with two commands and a verification to wait for.
	lockWait = 10 * time.Minute

	// recoverWait is the same at the start of the agent, which must not hang
	// because of one directory.
	recoverWait = 10 * time.Second

	// lockPause is between two tries.
	lockPause = 50 * time.Millisecond
)

// lock takes the locks of all dirs. flock works between processes, and ends
// with the process, however it ends. The order is that of the directories'
// numbers, so that two transactions with two directories in common cannot each
// hold one; and no try ever blocks, since whoever can open a directory can
// lock it and keep it.
func lock(ctx context.Context, dirs []*dir, wait time.Duration, log *slog.Logger) (unlock func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("given up after %s", wait))
	defer cancel()
	dirs = slices.SortedFunc(slices.Values(dirs), func(a, b *dir) int {
		x, y := a.info.Sys().(*syscall.Stat_t), b.info.Sys().(*syscall.Stat_t)
		return cmp.Or(cmp.Compare(x.Dev, y.Dev), cmp.Compare(x.Ino, y.Ino))
	})
	var held []*os.File
	unlock = func() {
		for _, f := range held {
			f.Close() // ends the lock
		}
	}
	for _, d := range dirs {
		f, err := d.Open(".")
		if err == nil {
			held = append(held, f)
			err = lockOne(ctx, f, d, log)
		}
		if err != nil {
			unlock()
			return nil, fmt.Errorf("lock directory %s: %w", d.path, reason(err))
		}
	}
	return unlock, nil
}

func lockOne(ctx context.Context, f *os.File, d *dir, log *slog.Logger) error {
	for waited := false; ; waited = true {
		err := flock(f)
		switch {
		case errors.Is(err, syscall.EWOULDBLOCK) || errors.Is(err, syscall.EINTR):
		case errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EBADF) || errors.Is(err, syscall.ENOLCK) || errors.Is(err, syscall.EINVAL):
			// Network file systems: NFS wants a handle for writing, which no
			// directory has.
			log.Warn("file system has no locks: two agents that deploy here at once could get in each other's way", "directory", d.path, "error", err)
			return nil
		default:
			return err
		}
		if !waited {
			log.Debug("waiting for another deployment in the same directory", "directory", d.path)
		}
		select {
		case <-time.After(lockPause):
		case <-ctx.Done():
			return fmt.Errorf("another deployment holds it: %w", context.Cause(ctx))
		}
	}
}

func flock(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var locked error
	err = raw.Control(func(fd uintptr) { locked = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB) })
	return cmp.Or(err, locked)
}
