package transaction

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"syscall"

	"certctl-agent/internal/hostfile"
)

// privateFile is the mode of every file from its creation on, until it is
// given another one; privateDir that of the agent's own directories.
const (
	privateFile = 0o600
	privateDir  = 0o700
)

// maxFile bounds what is read from a destination: 4 MiB are some thousand
// certificates.
const maxFile = 4 << 20

// A Step is one change to the disk, one command, or one call of a connector.
type Step struct {
	// Op is create, write, chmod, chown, setxattr, removexattr, truncate, sync,
	// rename, remove, mkdir, syncdir, run, change, restore or finish.
	Op   string
	Path string // or the name of a Change

	to   string     // rename: the new path
	data []byte     // write, truncate: the bytes
	attr attributes // chown, chmod
}

// Touches reports whether others than the agent notice the step: a file of the
// target is replaced, a command runs, a connector is called.
func (s Step) Touches() bool {
	switch s.Op {
	case "rename", "run", "change", "restore", "finish":
		return true
	}
	return false
}

// disk makes every change that this package makes to a disk, one step at a
// time, so that a test can stop at, fail or record each of them. That is why
// the journal is not written by atomicfile.
type disk struct {
	before func(Step) error // called before each step; nil outside tests
}

func (d disk) step(s Step) error {
	if d.before == nil {
		return nil
	}
	return d.before(s)
}

// attributes are what a file has besides its bytes.
type attributes struct {
	Mode   fs.FileMode       `json:"mode"`
	UID    int               `json:"uid"` // -1: whoever creates the file
	GID    int               `json:"gid"`
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
}

// private are the attributes of the agent's own files.
func private() attributes { return attributes{Mode: privateFile, UID: -1, GID: -1} }

func (a attributes) equal(b attributes) bool {
	return a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && maps.EqualFunc(a.Xattrs, b.Xattrs, bytes.Equal)
}

// put creates a file that must not exist, with its final attributes, and syncs
// it. Its name becomes durable with the next syncDir.
func (d disk) put(at *dir, name string, data []byte, a attributes) (fs.FileInfo, error) {
	path := at.join(name)
	if err := d.step(Step{Op: "create", Path: path}); err != nil {
		return nil, err
	}
	f, err := at.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, privateFile)
	if err != nil {
		return nil, err
	}
	info, err := d.fill(f, path, data, a)
	if err := cmp.Or(err, f.Close()); err != nil {
		_ = d.remove(at, name) // callers remove it once more, and report that
		return nil, err
	}
	return info, nil
}

// fill gives an empty file its bytes before its attributes, since those may
// let others read it.
func (d disk) fill(f *os.File, path string, data []byte, a attributes) (fs.FileInfo, error) {
	if err := d.step(Step{Op: "write", Path: path, data: data}); err != nil {
		return nil, err
	}
	if _, err := f.Write(data); err != nil {
		return nil, err
	}
	if err := d.setAttributes(f, path, a); err != nil {
		return nil, err
	}
	if err := d.sync(f, path); err != nil {
		return nil, err
	}
	return f.Stat()
}

// overwrite replaces the bytes of an existing file, which must be the one that
// info describes. A crash in the middle leaves a torn file.
func (d disk) overwrite(at *dir, name string, info fs.FileInfo, data []byte, a attributes) error {
	path := at.join(name)
	f, err := openSame(at, name, info, os.O_WRONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := d.setAttributes(f, path, a); err != nil {
		return err
	}
	if err := d.step(Step{Op: "write", Path: path, data: data}); err != nil {
		return err
	}
	if _, err := f.WriteAt(data, 0); err != nil {
		return err
	}
	if err := d.step(Step{Op: "truncate", Path: path, data: data}); err != nil {
		return err
	}
	if err := f.Truncate(int64(len(data))); err != nil {
		return err
	}
	if err := d.sync(f, path); err != nil {
		return err
	}
	return f.Close()
}

// setAttributes changes what is not right yet. Changing the owner may clear
// mode bits and setting an ACL changes them, so the mode comes last.
func (d disk) setAttributes(f *os.File, path string, a attributes) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	uid, gid := a.UID, a.GID
	hasUID, hasGID := hostfile.Owner(info)
	if uid == hasUID {
		uid = -1
	}
	if gid == hasGID {
		gid = -1
	}
	if uid != -1 || gid != -1 {
		if err := d.step(Step{Op: "chown", Path: path, attr: a}); err != nil {
			return err
		}
		if err := f.Chown(uid, gid); err != nil {
			return fmt.Errorf("give it to user %d, group %d: %w (run the agent as root, or as that user)", a.UID, a.GID, reason(err))
		}
	}
	if err := d.setXattrs(f, path, a.Xattrs); err != nil {
		return err
	}
	if err := d.step(Step{Op: "chmod", Path: path, attr: a}); err != nil {
		return err
	}
	return f.Chmod(a.Mode)
}

// setXattrs makes the attributes that are kept the same as want. A directory's
// default ACL would otherwise decide who can read a new key.
func (d disk) setXattrs(f *os.File, path string, want map[string][]byte) error {
	has, err := readXattrs(f)
	if err != nil {
		return err
	}
	for name, value := range want {
		if old, ok := has[name]; ok && bytes.Equal(old, value) {
			continue
		}
		if err := d.step(Step{Op: "setxattr", Path: path}); err != nil {
			return err
		}
		if err := setXattr(f, name, value); err != nil {
			return fmt.Errorf("set its extended attribute %s: %w", name, err)
		}
	}
	if _, ok := has[accessACL]; ok && want[accessACL] == nil {
		if err := d.step(Step{Op: "removexattr", Path: path}); err != nil {
			return err
		}
		if err := removeXattr(f, accessACL); err != nil {
			return fmt.Errorf("remove the ACL it inherited: %w", err)
		}
	}
	return nil
}

func (d disk) sync(f *os.File, path string) error {
	if err := d.step(Step{Op: "sync", Path: path}); err != nil {
		return err
	}
	return f.Sync()
}

// rename moves a file onto another name of its directory.
func (d disk) rename(at *dir, from, to string) error {
	if err := d.step(Step{Op: "rename", Path: at.join(from), to: at.join(to)}); err != nil {
		return err
	}
	return at.Rename(from, to)
}

// remove removes a name; that it is not there is fine.
func (d disk) remove(at *dir, name string) error {
	if _, err := at.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := d.step(Step{Op: "remove", Path: at.join(name)}); err != nil {
		return err
	}
	if err := at.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// syncDir makes the names in a directory durable.
func (d disk) syncDir(at *dir) error {
	if err := d.step(Step{Op: "syncdir", Path: at.path}); err != nil {
		return err
	}
	f, err := at.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	// Some network and FUSE file systems have no such call.
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("sync directory %s: %w", at.path, reason(err))
	}
	return nil
}

// subdir makes a private directory in at unless it is there, durably, and
// opens it.
func (d disk) subdir(at *dir, name string) (*dir, error) {
	if _, err := at.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		if err := d.step(Step{Op: "mkdir", Path: at.join(name)}); err != nil {
			return nil, err
		}
		if err := at.Mkdir(name, privateDir); err != nil {
			return nil, fmt.Errorf("make directory %s: %w", at.join(name), reason(err))
		}
		if err := d.syncDir(at); err != nil {
			return nil, err
		}
	}
	sub, err := enter(at, name)
	if err != nil {
		return nil, err
	}
	if sub.info.Mode().Perm()&^privateDir != 0 {
		if err := sub.Chmod(".", privateDir); err != nil {
			sub.Close()
			return nil, fmt.Errorf("others have access to %s, and that cannot be changed: %w", sub.path, reason(err))
		}
	}
	return sub, nil
}

// openSame opens the file that info describes, and no other that took its
// place. Without O_NONBLOCK a FIFO there would block the open.
func openSame(at *dir, name string, info fs.FileInfo, flag int) (*os.File, error) {
	f, err := at.OpenFile(name, flag|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	opened, err := f.Stat()
	if err == nil && !(opened.Mode().IsRegular() && os.SameFile(info, opened)) {
		err = errReplaced
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

var (
	errReplaced   = errors.New("it was replaced by someone else at the same time")
	errNotRegular = errors.New("it is no regular file")
)

// read returns the bytes and attributes of a regular file. The error is
// fs.ErrNotExist when there is nothing under that name, errNotRegular when it
// is something else.
func read(at *dir, name string) ([]byte, fs.FileInfo, attributes, error) {
	var a attributes
	info, err := at.Lstat(name)
	if err != nil {
		return nil, nil, a, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil, a, errNotRegular
	}
	f, err := openSame(at, name, info, os.O_RDONLY)
	if err != nil {
		return nil, nil, a, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, nil, a, err
	}
	if len(data) > maxFile {
		return nil, nil, a, fmt.Errorf("it is larger than %d MiB, so it is no certificate or key", maxFile>>20)
	}
	a.Mode = info.Mode().Perm()
	a.UID, a.GID = hostfile.Owner(info)
	a.Xattrs, err = readXattrs(f)
	return data, info, a, err
}

// reason drops the operation and the path, relative to a handle, that os adds
// to an error: the caller names the real path.
func reason(err error) error {
	switch e := err.(type) {
	case *fs.PathError:
		return e.Err
	case *os.LinkError:
		return e.Err
	}
	return err
}

// dir is a directory held by handle, so that it stays the same directory
// whatever happens to its name.
type dir struct {
	*os.Root
	path string      // where it was found, without symlinks
	info fs.FileInfo // of the directory itself, when it was opened

	// foreign is the first directory on the way, d included, that does not
	// belong to root or the agent's user alone; "": there is none, or d was
	// not resolved.
	foreign string
}

func (d *dir) join(name string) string { return filepath.Join(d.path, name) }
