// Package atomicfile replaces files atomically: a reader finds either the whole old content or the
// whole new one, even after a power cut.
package atomicfile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"certctl-agent/internal/hostfile"
)

// WriteFile creates or replaces the file name in root with data and exactly the given mode,
// regardless of the umask. If it returns nil, the new content is on disk. If it returns an error,
// the old file is still there, except that after an error of the last sync the new file is in place
// but may not survive a power cut. It leaves no temporary file in either case.
func WriteFile(root *os.Root, name string, data []byte, mode fs.FileMode) error {
	if err := Replace(root, name, data, mode); err != nil {
		return err
	}
	return SyncDir(root, path.Dir(name))
}

// Replace is WriteFile without the last sync: until SyncDir, a power cut may bring back the old
// file. Use it to replace many files and sync their directory once.
func Replace(root *os.Root, name string, data []byte, mode fs.FileMode) error {
	return replace(root, name, data, mode, -1, -1)
}

// Rewrite is WriteFile for a file that keeps the mode and owner in was. The new file has them
// before it gets its name: otherwise an agent that is not root could not read it.
func Rewrite(root *os.Root, name string, data []byte, was fs.FileInfo) error {
	uid, gid := hostfile.Owner(was)
	if err := replace(root, name, data, was.Mode().Perm(), uid, gid); err != nil {
		return err
	}
	return SyncDir(root, path.Dir(name))
}

func replace(root *os.Root, name string, data []byte, mode fs.FileMode, uid, gid int) error {
	temporary, err := writeTemporary(root, name, data, mode, uid, gid)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := root.Rename(temporary, name); err != nil {
		return errors.Join(fmt.Errorf("replace %s: %w", name, err), root.Remove(temporary))
	}
	return nil
}

// Create is WriteFile for a file that must not exist. If two processes create it at the same time,
// one of them gets fs.ErrExist and the file of the other stays.
func Create(root *os.Root, name string, data []byte, mode fs.FileMode) error {
	temporary, err := writeTemporary(root, name, data, mode, -1, -1)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	// A rename would replace an existing file; a link fails.
	if err = root.Link(temporary, name); err != nil && !errors.Is(err, fs.ErrExist) {
		// Some file systems have no hard links. Two processes may still collide here.
		if _, missing := root.Lstat(name); errors.Is(missing, fs.ErrNotExist) {
			if err = root.Rename(temporary, name); err == nil {
				return SyncDir(root, path.Dir(name))
			}
		}
	}
	removed := root.Remove(temporary)
	if err != nil {
		return errors.Join(fmt.Errorf("create %s: %w", name, err), removed)
	}
	return errors.Join(removed, SyncDir(root, path.Dir(name)))
}

// writeTemporary writes and syncs a temporary file in the same directory as name, because a rename
// is atomic only within one file system. A uid or gid of -1 leaves the agent's own.
func writeTemporary(root *os.Root, name string, data []byte, mode fs.FileMode, uid, gid int) (temporary string, err error) {
	temporary = temporaryName(name)
	// The content may be a key, so nobody else may open the file before it has its mode. Chmod sets
	// that regardless of the umask.
	file, err := root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, root.Remove(temporary))
		}
	}()
	if uid != -1 || gid != -1 {
		if err = file.Chown(uid, gid); err != nil {
			err = fmt.Errorf("keep the file's owner: %w", err)
		}
	}
	if err == nil {
		err = file.Chmod(mode)
	}
	if err == nil {
		_, err = file.Write(data)
	}
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	return temporary, err
}

// temporaryName returns a new name for a temporary file. It begins with a dot, so that a server
// that loads a whole directory skips the file.
func temporaryName(name string) string {
	return path.Join(path.Dir(name), "."+path.Base(name)+"."+rand.Text()+".tmp")
}

// isTemporary reports whether name looks like one of temporaryName's.
func isTemporary(name string) bool {
	const random = 26 // characters of rand.Text, in base 32
	stem, isTemporary := strings.CutSuffix(name, ".tmp")
	if !isTemporary || len(stem) < random+3 || stem[0] != '.' {
		return false
	}
	dot := len(stem) - random - 1
	return stem[dot] == '.' && strings.Trim(stem[dot+1:], "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// Sweep removes the temporary files that a killed process left in root itself, but not in
// directories below it. No other process may be writing there.
func Sweep(root *os.Root) error {
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return fmt.Errorf("look for leftover temporary files: %w", err)
	}
	for _, entry := range entries {
		if entry.Type().IsRegular() && isTemporary(entry.Name()) {
			err = errors.Join(err, root.Remove(entry.Name()))
		}
	}
	return err
}

// Remove removes a file durably: it does not come back after a power cut. It returns fs.ErrNotExist
// if there is no such file.
func Remove(root *os.Root, name string) error {
	if err := root.Remove(name); err != nil {
		return err
	}
	return SyncDir(root, path.Dir(name))
}

// MkdirAll creates a directory and its missing parents durably, with mode 0700. If a power cut
// removed one of them, everything in it would be lost.
func MkdirAll(dir string) error {
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := MkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	root, err := os.OpenRoot(parent)
	if err != nil {
		return err
	}
	defer root.Close()
	return SyncDir(root, ".")
}

// SyncDir makes the files created, renamed and removed in a directory durable.
func SyncDir(root *os.Root, name string) error {
	dir, err := root.Open(name)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer dir.Close()
	err = dir.Sync()
	// Some network and FUSE file systems cannot sync a directory (fsync(2): EINVAL). There is no
	// other way to do it.
	if err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}
