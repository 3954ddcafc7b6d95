// Package filelock has one process at a time use a directory, by a lock on a
// file in it.
package filelock

import (
	"cmp"
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"certctl-agent/internal/printable"
)

const (
	// Free holds a lock for a moment, which must not refuse it to a process that
	// starts.
	tries = 3
	pause = 50 * time.Millisecond

	// maxOwner bounds what is read of a lock's owner.
	maxOwner = 2 << 10
)

// Lock is held until it is closed or the process ends, however that ends.
type Lock struct{ file *os.File }

// HeldError means that another process holds the lock.
type HeldError struct {
	by string // the owner that it named, on one line; "" for none
}

func (e *HeldError) Error() string {
	return "in use by " + cmp.Or(e.by, "a process that has not said which")
}

// Take locks a file in root, made if missing, and writes the owner into it, for
// others that find it locked. The error is a *HeldError when another process
// holds the lock.
func Take(root *os.Root, name, owner string) (*Lock, error) {
	file, err := root.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := take(file); err != nil {
		defer file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			by, _ := io.ReadAll(io.LimitReader(file, maxOwner))
			return nil, &HeldError{by: printable.Line(by, maxOwner)}
		}
		return nil, err
	}
	if owner != "" {
		// A full disk costs the name only.
		_ = file.Truncate(0)
		_, _ = io.WriteString(file, owner+"\n")
	}
	return &Lock{file}, nil
}

func take(file *os.File) (err error) {
	for range tries {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return err
		}
		time.Sleep(pause)
	}
	return err
}

// Close gives up the lock. There may be none.
func (l *Lock) Close() {
	if l != nil {
		l.file.Close()
	}
}

// Unsupported reports whether Take, or flock(2), failed because the file system
// has no locks.
func Unsupported(err error) bool {
	errno, ok := err.(syscall.Errno) // that of opening the file is an *fs.PathError
	return ok && (errno.Is(errors.ErrUnsupported) || errno == syscall.ENOLCK || errno == syscall.EINVAL || errno == syscall.EBADF)
}

// Free reports whether a lock file is there and nobody holds it.
func Free(path string) bool {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer file.Close()
	return syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == nil
}
