// Package atomicfile replaces files so that a reader, and a host that loses its
// power, finds either all of the old content or all of the new.
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

// WriteFile replaces the file name in root, or makes it, with data and exactly
// the given mode, whatever the umask. When it returns nil, the new content is
// on the disk. When it returns an error, the old file is still there, unless
// the error came from the last step: then the new file is in place but may not
// survive a power cut. No temporary is left in either case.
func WriteFile(root *os.Root, name string, data []byte, mode fs.FileMode) error {
	if err := Replace(root, name, data, mode); err != nil {
		return err
	}
	return SyncDir(root, path.Dir(name))
}

// Replace is WriteFile without its last step: until SyncDir of the directory,
// a power cut may bring the old file back, whole. It is for many files whose
// directory is then synced once.
func Replace(root *os.Root, name string, data []byte, mode fs.FileMode) error {
	return replace(root, name, data, mode, -1, -1)
}

// Rewrite is WriteFile for a file that keeps the mode and the owner it was seen
// with. It has them before it gets its name: an agent that is not root could not
// read it otherwise.
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

// Create is WriteFile for a file that must not be there yet: of two processes
// that make it at the same time one gets fs.ErrExist, and the other's file stays.
func Create(root *os.Root, name string, data []byte, mode fs.FileMode) error {
	temporary, err := writeTemporary(root, name, data, mode, -1, -1)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	// A rename would replace what is there, and a link does not.
	if err = root.Link(temporary, name); err != nil && !errors.Is(err, fs.ErrExist) {
		// Some file systems have no links. Here two processes may yet collide.
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

// writeTemporary makes a complete, synced file beside name, since a rename is
// atomic only within one file system. Its owner is the agent's user if uid and gid
// are -1.
func writeTemporary(root *os.Root, name string, data []byte, mode fs.FileMode, uid, gid int) (temporary string, err error) {
	temporary = temporaryName(name)
	// The content may be a key: nobody else may open the file before it has its
	// mode, which Chmod then sets without regard to the umask.
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

// temporaryName is dot-first, so that a server which loads a whole directory
// passes over it.
func temporaryName(name string) string {
	return path.Join(path.Dir(name), "."+path.Base(name)+"."+rand.Text()+".tmp")
}

// isTemporary reports whether temporaryName made the name.
func isTemporary(name string) bool {
	const random = 26 // characters of rand.Text, in base 32
	stem, isTemporary := strings.CutSuffix(name, ".tmp")
	if !isTemporary || len(stem) < random+3 || stem[0] != '.' {
		return false
	}
	dot := len(stem) - random - 1
	return stem[dot] == '.' && strings.Trim(stem[dot+1:], "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// Sweep removes the temporaries that a killed process left in root itself, not
// in directories below it. Nothing may be writing there meanwhile.
func Sweep(root *os.Root) error {
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return fmt.Errorf("look for left-over temporary files: %w", err)
	}
	for _, entry := range entries {
		if entry.Type().IsRegular() && isTemporary(entry.Name()) {
			err = errors.Join(err, root.Remove(entry.Name()))
		}
	}
	return err
}

// Remove removes a file for good: it does not come back after a power cut. A
// file that is not there is an error (fs.ErrNotExist).
func Remove(root *os.Root, name string) error {
	if err := root.Remove(name); err != nil {
		return err
	}
	return SyncDir(root, path.Dir(name))
}

// MkdirAll makes a directory, 0700, and what is missing above it, durably: one
// that a power failure takes away takes everything in it along.
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

// SyncDir makes what was created, renamed or removed in a directory durable.
func SyncDir(root *os.Root, name string) error {
	dir, err := root.Open(name)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer dir.Close()
	err = dir.Sync()
	// Some network and FUSE file systems cannot sync a directory (fsync(2):
	// EINVAL). They order such changes themselves, or nobody can.
	if err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}
