package keystore

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

	"certctl-agent/internal/api"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/printable"
)

const (
	// lockFile is locked while an agent runs, and says which one that is.
	lockFile = ".lock"

	// stateName is the default name of the state directory.
	stateName = ".state"
)

// ErrLocked means that another process uses the key directory.
var ErrLocked = errors.New("another agent uses this key directory")

// Owner is who opens a key directory.
type Owner struct {
	Agent    string // its id, for another one that finds the directory locked
	StateDir string // absolute; may be in the key directory
}

// acquire takes the lock, which ends with the process, however that ends. Two
// agents on one directory would overwrite, promote and prune each other's keys.
func (s *Store) acquire(agent string) error {
	file, err := s.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	switch {
	case errors.Is(err, syscall.EROFS):
		return nil // there is nothing to protect
	case isAny(err, syscall.ENOSPC, syscall.EDQUOT):
		s.unlocked(err)
		return nil
	case err != nil:
		return fmt.Errorf("open the lock of the key directory %s: %w", s.dir, err)
	}
	err = syscall.EINTR
	for errors.Is(err, syscall.EINTR) {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	switch {
	case err == nil:
		s.lock = file
		hostname, _ := os.Hostname()
		// A full disk costs the name only.
		_ = file.Truncate(0)
		_, _ = fmt.Fprintf(file, "agent %s, process %d on host %s\n", agent, os.Getpid(), hostname)
		return nil
	case errors.Is(err, syscall.EWOULDBLOCK):
		const longest = 2 << 10
		holder, _ := io.ReadAll(io.LimitReader(file, longest))
		file.Close()
		return fmt.Errorf("%w: %s is in use by %s; stop that first, or give this one a key directory of its own (-key-dir, CERTCTL_KEY_DIR)",
			ErrLocked, s.dir, orUnknown(printable.Clip(holder, longest)))
	case isAny(err, syscall.ENOLCK, syscall.ENOSYS, syscall.EOPNOTSUPP, syscall.ENOTSUP, syscall.EINVAL, syscall.EBADF):
		file.Close()
		s.unlocked(err)
		return nil
	}
	file.Close()
	return fmt.Errorf("lock the key directory %s: %w", s.dir, err)
}

func (s *Store) unlocked(err error) {
	s.log.Warn("the key directory cannot be locked: make sure that no second agent uses it", "dir", s.dir, "error", err)
}

func orUnknown(holder string) string {
	if holder == "" {
		return "a process that has not said which"
	}
	return holder
}

func isAny(err error, others ...error) bool {
	return slices.ContainsFunc(others, func(other error) bool { return errors.Is(err, other) })
}

// systemDirs are shared whether or not something is in them yet.
var systemDirs = []string{"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/media", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin",
	"/srv", "/sys", "/tmp", "/usr", "/var", "/etc/certctl", "/etc/nginx", "/etc/pki", "/etc/pki/tls", "/etc/pki/tls/private", "/etc/ssl",
	"/etc/ssl/certs", "/etc/ssl/private", "/private", "/private/etc", "/private/tmp", "/private/var", "/run/lock", "/run/secrets", "/usr/local",
	"/usr/local/etc", "/usr/share", "/var/lib", "/var/lock", "/var/run", "/var/tmp", "/Library", "/Users", "/Volumes"}

// Inspect looks whether Open would refuse a key directory, since it would close
// to others what they use. One that is closed already, or not there, is fine.
func Inspect(dir string, owner Owner) error {
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm()&0o077 == 0 {
		return nil // what else is wrong is for Open to say
	}
	refuse := func(what string) error {
		return fmt.Errorf("the key directory %s is open to others (mode %04o) and %s, and the agent would close it to everybody else: give it a directory of its own (-key-dir, CERTCTL_KEY_DIR), or, if nobody else uses this one, run chmod 0700 on it",
			dir, info.Mode().Perm(), what)
	}
	if resolved, err := filepath.EvalSymlinks(dir); err == nil && slices.Contains(systemDirs, resolved) {
		return refuse("belongs to the system")
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil
	}
	defer root.Close()
	list, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil
	}
	state, err := filepath.Rel(dir, owner.StateDir)
	if err != nil {
		state = ""
	}
	state, _, _ = strings.Cut(state, "/")
	for _, entry := range list {
		name := entry.Name()
		switch {
		case entry.IsDir() && (name == stateName || name == state), isArtifact(name):
		case !isKeyFile(name) || entry.IsDir():
			return refuse(fmt.Sprintf("holds %q, which is not the agent's", printable.Clip(name, 100)))
		case readByOthers(root, name):
			return refuse(fmt.Sprintf("others can read the key %q in it", printable.Clip(name, 100)))
		}
	}
	return nil
}

// isKeyFile reports whether a name is one of this package's. Fleets have
// <certificate>.key.
func isKeyFile(name string) bool {
	if name == lockFile || strings.HasPrefix(name, ".") && strings.HasSuffix(name, ".tmp") {
		return true
	}
	for _, ext := range []string{currentExt, previousExt, pendingExt, pendingExt + damagedExt} {
		if certID, ok := strings.CutSuffix(name, ext); ok && api.ValidID(certID) {
			return true
		}
	}
	return false
}

// isArtifact reports whether a file system, or what mounts it, makes files of
// this name in a directory: ext4, Kubernetes (..data), NFS, snapshots, macOS.
func isArtifact(name string) bool {
	return slices.Contains([]string{"lost+found", ".snapshot", ".snapshots", ".zfs", ".DS_Store", ".fseventsd", ".Spotlight-V100", ".Trashes"}, name) ||
		strings.HasPrefix(name, "..") || strings.HasPrefix(name, ".nfs")
}

// readByOthers reports whether the mode of a file shows that somebody else uses
// it: no agent has made such a key. A group of the agent's own may be that of a
// volume.
func readByOthers(root *os.Root, name string) bool {
	info, err := root.Stat(name)
	if err != nil {
		return false
	}
	groups, _ := os.Getgroups()
	_, gid := hostfile.Owner(info)
	others := info.Mode().Perm()&0o040 != 0 && gid != 0 && gid != os.Getegid() && !slices.Contains(groups, gid)
	return others || info.Mode().Perm()&0o004 != 0
}
