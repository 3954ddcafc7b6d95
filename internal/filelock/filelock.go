// Package filelock makes sure that only one process at a time uses a directory, by a lock on a file
// in it.
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
	// Take tries more than once, because Free in another process may hold the lock for a moment.
	tries = 3
	pause = 50 * time.Millisecond

	// maxOwner bounds the size of a lock's owner, in bytes.
	maxOwner = 2 << 10
)

// Lock is held until it is closed or the process ends.
type Lock struct{ file *os.File }

// HeldError means that another process holds the lock.
type HeldError struct {
	by string // the owner that the process named, on one line, or ""
}

func (e *HeldError) Error() string {
	return "in use by " + cmp.Or(e.by, "an unknown process")
}

// Take locks a file in root, which it creates if it is missing, and writes owner into it, for the
// error of other processes. It returns a *HeldError if another process holds the lock.
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
		// If the disk is full, only the owner's name is missing.
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

// Close releases the lock. l may be nil.
func (l *Lock) Close() {
	if l != nil {
		l.file.Close()
	}
}

// Unsupported reports whether err, from Take or from flock(2), means that the file system has no
// locks.
func Unsupported(err error) bool {
	errno, ok := err.(syscall.Errno) // not an *fs.PathError, which comes from opening the file
	return ok && (errno.Is(errors.ErrUnsupported) || errno == syscall.ENOLCK || errno == syscall.EINVAL || errno == syscall.EBADF)
}

// Free reports whether a lock file exists and nobody holds it.
func Free(path string) bool {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer file.Close()
	return syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == nil
}
