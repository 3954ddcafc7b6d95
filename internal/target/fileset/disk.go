package fileset

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// privateFile is the mode of a file from its creation on, until it is given
// another one; privateDir that of the agent's own directories.
const (
	privateFile = 0o600
	privateDir  = 0o700
)

// dir is a directory held by handle, so that it stays the same directory
// whatever happens to its name.
type dir struct {
	*os.Root
	path string // where it was found, without symlinks
}

func (d *dir) join(name string) string { return filepath.Join(d.path, name) }

// A step is one change to the disk, or one command.
type step struct {
	op   string // create, write, chmod, chown, setxattr, truncate, sync, rename, remove, mkdir, syncdir, run
	path string
	to   string // rename: the new path; setxattr: the attribute
	data []byte
	mode fs.FileMode
}

// disk makes every change that this package makes to a disk, one step at a
// time, so that a test can stop, fail or record each of them. That is why the
// journal is not written by atomicfile.
type disk struct {
	before func(step) error // called before each step; nil outside tests
}

func (d disk) step(s step) error {
	if d.before == nil {
		return nil
	}
	return d.before(s)
}

// subdir makes a private directory below at unless it is there, durably, and
// opens it.
func (d disk) subdir(at *dir, name string) (*dir, error) {
	info, err := at.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		if err := d.mkdir(at, name); err != nil {
			return nil, err
		}
		if err := d.syncDir(at); err != nil {
			return nil, err
		}
		info, err = at.Lstat(name)
	}
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", at.join(name))
	}
	sub, err := enter(at, name)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&^privateDir != 0 {
		if err := sub.Chmod(".", privateDir); err != nil {
			return nil, errors.Join(fmt.Errorf("%s can be read by others: %w", sub.path, err), sub.Close())
		}
	}
	return sub, nil
}

func (d disk) mkdir(at *dir, name string) error {
	if err := d.step(step{op: "mkdir", path: at.join(name)}); err != nil {
		return err
	}
	return at.Mkdir(name, privateDir)
}

// syncDir makes the names in a directory durable.
func (d disk) syncDir(at *dir) error {
	if err := d.step(step{op: "syncdir", path: at.path}); err != nil {
		return err
	}
	f, err := at.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	// Some network and FUSE file systems have no such call, and no journal
	// that would need it.
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("sync directory %s: %w", at.path, err)
	}
	return nil
}
