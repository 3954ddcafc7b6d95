// Package hostfile reads files that other users of this host may have made, and
// finds the way to them.
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

// ByteOrderMark is what some editors put before UTF-8 text.
const ByteOrderMark = "\ufeff"

// Read reads a regular file of at most limit bytes. The info is that of the
// file that was read, whatever has taken its name meanwhile.
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
	// Opening a device can have effects.
	if info, err := stat(); err == nil && !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is not a regular file", path)
	}
	// Without O_NONBLOCK a pipe that has taken its place would wait for a writer.
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

// maxLinks is the kernel's own limit for one path, see path_resolution(7).
const maxLinks = 40

// Follow walks an absolute path from / on, as the kernel does, and returns it
// without symlinks. What does not exist is kept by name: that is where a file
// would be created. Each directory, symlink and file on the way is first shown
// to visit, whose error ends the walk. A symlink is in the last directory shown.
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
		next, rest = filepath.Join(at, rest[0]), rest[1:] // at has no links, so .. is above it
	}
}

// Owner returns the user and the group that a file belongs to, -1 where the
// system has none.
func Owner(info fs.FileInfo) (uid, gid int) {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(stat.Uid), int(stat.Gid)
	}
	return -1, -1
}

// MayWriteIn asks the kernel, access(2), whether this process may put files into
// a directory. It writes nothing.
func MayWriteIn(dir string) error {
	const writeAndSearch = 0o3 // W_OK | X_OK
	return syscall.Access(dir, writeAndSearch)
}

// Ours reports whether a file belongs to root or to the agent's own user.
func Ours(info fs.FileInfo) bool {
	uid, _ := Owner(info)
	return uid == 0 || uid == os.Geteuid()
}

// OwnGroup reports whether only root and the agent's own user are sure to be in
// a group, or the agent itself is in it.
func OwnGroup(gid int) bool {
	groups, err := os.Getgroups()
	return gid == 0 || gid == os.Getegid() || err == nil && slices.Contains(groups, gid)
}

// Real is path without symlinks, as far as it exists: the elements that do not
// are kept as they are.
func Real(path string) string {
	real, err := Resolve(path)
	if err != nil {
		return filepath.Clean(path)
	}
	return real
}

// Resolve follows the symlinks of path. What does not exist yet, at its end or
// behind a symlink that leads nowhere, is kept by name: that is where a file
// would be created.
func Resolve(path string) (string, error) {
	return Follow(filepath.Clean(path), func(string, fs.FileInfo) error { return nil })
}

// TrustedLink refuses a symlink that others than root and the agent's own user
// could have made: it would let them choose which directory is allowed.
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
