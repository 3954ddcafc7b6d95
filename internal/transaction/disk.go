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

const (
	privateFile = 0o600 // mode of every new file until it gets its final one
	privateDir  = 0o700 // mode of the agent's own directories
)

// maxFile bounds the size of a file that is read, in bytes: 4 MiB hold thousands of certificates.
const maxFile = 4 << 20

// A Step is one change to the disk, one command, or one call of a connector.
type Step struct {
	// Op is create, write, chmod, chown, setxattr, removexattr, truncate, sync,
	// rename, remove, mkdir, syncdir, run, change, restore or finish.
	Op   string
	Path string // or the ID of a Change

	to   string     // rename: the new path
	data []byte     // write, truncate: the bytes
	attr attributes // chown, chmod
}

// Touches reports whether the step is visible outside the agent: it replaces a file, runs a
// command or calls a connector.
func (s Step) Touches() bool {
	switch s.Op {
	case "rename", "run", "change", "restore", "finish":
		return true
	}
	return false
}

// disk makes all of the package's changes to the disk, one step at a time, so that a test can stop
// at, fail or record each step. The journal does not use atomicfile for the same reason.
type disk struct {
	before func(Step) error // Options.Before
}

func (d disk) step(s Step) error {
	if d.before == nil {
		return nil
	}
	return d.before(s)
}

// attributes are the metadata of a file.
type attributes struct {
	Mode   fs.FileMode       `json:"mode"`
	UID    int               `json:"uid"` // -1: the agent's user
	GID    int               `json:"gid"`
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
}

// privateAttributes returns the attributes of the agent's own files.
func privateAttributes() attributes { return attributes{Mode: privateFile, UID: -1, GID: -1} }

func (a attributes) equal(b attributes) bool {
	return a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && maps.EqualFunc(a.Xattrs, b.Xattrs, bytes.Equal)
}

// create creates a file that must not exist, with its final attributes, and syncs it. The next
// syncDir makes its name durable.
func (d disk) create(at *dir, name string, data []byte, a attributes) (fs.FileInfo, error) {
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
		_ = d.remove(at, name) // callers try again and report the error
		return nil, err
	}
	return info, nil
}

// fill writes and syncs a new file. The attributes come after the bytes, because they may let
// others open the file.
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

// overwrite replaces the bytes of an existing file, which must still be the one that info
// describes. A crash halfway leaves a torn file.
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

// setAttributes sets the attributes of f that differ from a. Changing the owner may clear mode
// bits, and setting an ACL changes them, so the mode comes last.
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
			return fmt.Errorf("change its owner to user %d, group %d: %w (run the agent as root, or as that user)", a.UID, a.GID, withoutPath(err))
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

// setXattrs sets the preserved extended attributes of f to want. It removes an ACL that want does
// not have: a new file inherits the default ACL of its directory, which could let others read a
// key.
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

// rename renames a file within its directory.
func (d disk) rename(at *dir, from, to string) error {
	if err := d.step(Step{Op: "rename", Path: at.join(from), to: at.join(to)}); err != nil {
		return err
	}
	return at.Rename(from, to)
}

// remove removes a file or an empty directory. It returns nil if there is none.
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
	// Some network and FUSE file systems cannot sync a directory.
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("sync directory %s: %w", at.path, withoutPath(err))
	}
	return nil
}

// subdir opens the private directory name in at. It creates the directory durably if it is missing.
func (d disk) subdir(at *dir, name string) (*dir, error) {
	if _, err := at.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		if err := d.step(Step{Op: "mkdir", Path: at.join(name)}); err != nil {
			return nil, err
		}
		if err := at.Mkdir(name, privateDir); err != nil {
			return nil, fmt.Errorf("make directory %s: %w", at.join(name), withoutPath(err))
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
			return nil, fmt.Errorf("other users have access to %s, and its mode cannot be changed: %w", sub.path, withoutPath(err))
		}
	}
	return sub, nil
}

// openSame opens the file that info describes, and fails if another file has taken its place.
// O_NONBLOCK keeps a FIFO from blocking the open.
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
	errReplaced   = errors.New("another program replaced it at the same time")
	errNotRegular = errors.New("it is not a regular file")
)

// read returns the bytes and attributes of a regular file. It returns fs.ErrNotExist if the name
// does not exist, and errNotRegular if it is not a regular file.
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
		return nil, nil, a, fmt.Errorf("it is larger than %d MiB, so it is not a certificate or a key", maxFile>>20)
	}
	a.Mode = info.Mode().Perm()
	a.UID, a.GID = hostfile.Owner(info)
	a.Xattrs, err = readXattrs(f)
	return data, info, a, err
}

// withoutPath strips the operation and the path that package os adds to an error. That path is
// relative to a directory handle; the caller names the full path.
func withoutPath(err error) error {
	switch e := err.(type) {
	case *fs.PathError:
		return e.Err
	case *os.LinkError:
		return e.Err
	}
	return err
}

// dir is an open directory. The handle keeps referring to it even if its path is renamed.
type dir struct {
	*os.Root
	path string      // where it was opened, without symlinks
	info fs.FileInfo // of the directory itself, when it was opened

	// untrusted is the first directory on the path, this one included, in which users other than
	// root and the agent's own can replace entries. It is empty if there is none, or if the
	// directory was not opened by resolve.
	untrusted string
}

func (d *dir) join(name string) string { return filepath.Join(d.path, name) }
