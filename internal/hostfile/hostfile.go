// Package hostfile reads files that other users of this host may have created, and resolves their
// paths.
package hostfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// ByteOrderMark is what some editors write at the start of UTF-8 text.
const ByteOrderMark = "\ufeff"

// Read reads a regular file of at most limit bytes. The info describes the file that was read, even
// if another file has taken its name in the meantime.
func Read(path string, limit int64) ([]byte, fs.FileInfo, error) {
	return read(path, limit,
		func() (fs.FileInfo, error) { return os.Stat(path) },
		func(flags int) (*os.File, error) { return os.OpenFile(path, flags, 0) })
}

// ReadIn is Read for a file in root.
func ReadIn(root *os.Root, name string, limit int64) ([]byte, fs.FileInfo, error) {
	return read(filepath.Join(root.Name(), name), limit,
		func() (fs.FileInfo, error) { return root.Stat(name) },
		func(flags int) (*os.File, error) { return root.OpenFile(name, flags, 0) })
}

func read(path string, limit int64, stat func() (fs.FileInfo, error), open func(flags int) (*os.File, error)) ([]byte, fs.FileInfo, error) {
	// Check before opening, because opening a device can have side effects.
	if info, err := stat(); err == nil && !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is not a regular file", path)
	}
	// Without O_NONBLOCK, opening a FIFO that has taken its place would wait for a writer.
	file, err := open(os.O_RDONLY | syscall.O_NONBLOCK)
	if err != nil {
		return nil, nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, nil, err
	}
	if int64(len(data)) > limit {
		return nil, nil, fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return data, info, nil
}

// maxLinks is the kernel's limit for one path, see path_resolution(7).
const maxLinks = 40

// Follow walks an absolute path from /, as the kernel does, and returns it without symlinks.
// Elements that do not exist stay as they are: that is where a file would be created. Follow calls
// visit for each directory, symlink and file on the path, and stops at its first error. A symlink
// is in the directory that was visited last.
func Follow(path string, visit func(at string, info fs.FileInfo) error) (string, error) {
	const separator = string(filepath.Separator)
	at, next, rest := separator, separator, strings.Split(path, separator)
	for links := 0; ; {
		info, err := os.Lstat(next)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			return filepath.Join(append([]string{next}, rest...)...), nil
		}
		if err == nil {
			err = visit(next, info)
		}
		if err != nil {
			return "", err
		}
		if info.Mode().Type() != fs.ModeSymlink {
			at = next
		} else {
			link, err := os.Readlink(next)
			if err != nil {
				return "", err
			}
			if links++; links > maxLinks {
				return "", &fs.PathError{Op: "follow", Path: path, Err: syscall.ELOOP}
			}
			if filepath.IsAbs(link) {
				at = separator
			}
			rest = append(strings.Split(link, separator), rest...)
		}
		if len(rest) == 0 {
			return at, nil
		}
		next, rest = filepath.Join(at, rest[0]), rest[1:] // at has no symlinks, so Join may resolve ".."
	}
}

// Owner returns the user and the group of a file, or -1 if the system does not tell.
func Owner(info fs.FileInfo) (uid, gid int) {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(stat.Uid), int(stat.Gid)
	}
	return -1, -1
}

// MayWriteIn returns an error if this process may not create files in dir, according to access(2).
func MayWriteIn(dir string) error {
	const writeAndSearch = 0o3 // W_OK | X_OK
	return syscall.Access(dir, writeAndSearch)
}

// Ours reports whether a file belongs to root or to the agent's own user.
func Ours(info fs.FileInfo) bool {
	uid, _ := Owner(info)
	return uid == 0 || uid == os.Geteuid()
}

// OwnGroup reports whether a group is root's, or one that the agent itself is in.
func OwnGroup(gid int) bool {
	groups, err := os.Getgroups()
	return gid == 0 || gid == os.Getegid() || err == nil && slices.Contains(groups, gid)
}

// Real is like Resolve, but returns a path that cannot be resolved as it is.
func Real(path string) string {
	real, err := Resolve(path)
	if err != nil {
		return filepath.Clean(path)
	}
	return real
}

// Resolve returns path without symlinks. Elements that do not exist, at the end of the path or
// after a dangling symlink, stay as they are: that is where a file would be created.
func Resolve(path string) (string, error) {
	return Follow(filepath.Clean(path), func(string, fs.FileInfo) error { return nil })
}

// TrustedLink returns an error if info is a symlink, at the path at, that users other than root and
// the agent's own could have created. They could redirect an allowed path.
func TrustedLink(at string, info fs.FileInfo) error {
	if info.Mode().Type() != fs.ModeSymlink {
		return nil
	}
	dir, err := os.Lstat(filepath.Dir(at))
	if err != nil {
		return err
	}
	shared := dir.Mode().Perm()&0o022 != 0 && dir.Mode()&fs.ModeSticky == 0
	if shared || !Ours(dir) || !Ours(info) {
		return fmt.Errorf("%s is a symlink that others could change", at)
	}
	return nil
}
