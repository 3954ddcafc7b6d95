package keystore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"certctl-agent/internal/api"
	"certctl-agent/internal/filelock"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/printable"
)

const (
	// lockFile is locked while an agent runs, and holds a description of that agent.
	lockFile = ".lock"

	// stateName is the default name of the state directory.
	stateName = ".state"
)

// Owner identifies the agent that opens a key directory.
type Owner struct {
	Agent    string // agent id, for the error of another agent that finds the directory locked
	StateDir string // absolute; may be in the key directory
}

// acquire takes the lock, which the kernel releases when the process ends. Two agents in the same
// directory would overwrite, promote and prune each other's keys.
func (s *Store) acquire(agent string) (err error) {
	hostname, _ := os.Hostname()
	s.lock, err = filelock.Take(s.root, lockFile, fmt.Sprintf("agent %s, process %d on host %s", agent, os.Getpid(), hostname))
	if held, ok := errors.AsType[*filelock.HeldError](err); ok {
		return fmt.Errorf("another agent uses this key directory: %s is %w; stop that agent first, or give this one its own key directory (-key-dir, CERTCTL_KEY_DIR)",
			s.dir, held)
	}
	switch {
	case err == nil, errors.Is(err, syscall.EROFS): // nobody can write to a read-only directory
		return nil
	case filelock.Unsupported(err), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		s.log.Warn("the key directory cannot be locked: make sure that no second agent uses it", "dir", s.dir, "error", err)
		return nil
	}
	return fmt.Errorf("lock the key directory %s: %w", s.dir, err)
}

// systemDirs count as used by others even if they are empty.
var systemDirs = []string{"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/media", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin",
	"/srv", "/sys", "/tmp", "/usr", "/var", "/etc/certctl", "/etc/nginx", "/etc/pki", "/etc/pki/tls", "/etc/pki/tls/private", "/etc/ssl",
	"/etc/ssl/certs", "/etc/ssl/private", "/private", "/private/etc", "/private/tmp", "/private/var", "/run/lock", "/run/secrets", "/usr/local",
	"/usr/local/etc", "/usr/share", "/var/lib", "/var/lock", "/var/run", "/var/tmp", "/Library", "/Users", "/Volumes"}

// Inspect returns an error if Open would refuse the key directory, because closing it would lock
// out other users. A directory that is closed already or does not exist is fine.
func Inspect(dir string, owner Owner) error {
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm()&0o077 == 0 {
		return nil // Open reports any other problem
	}
	refuse := func(what string) error {
		return fmt.Errorf("the key directory %s is open to others (mode %04o) and %s, and the agent would close it to everyone else: give the agent its own directory (-key-dir, CERTCTL_KEY_DIR), or, if nobody else uses this one, run chmod 0700 on it",
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
			return refuse(fmt.Sprintf("holds %q, which is not the agent's", printable.Line(name, 100)))
		case readByOthers(root, name):
			return refuse(fmt.Sprintf("others can read the key %q in it", printable.Line(name, 100)))
		}
	}
	return nil
}

// isKeyFile reports whether name is one of this package's file names.
func isKeyFile(name string) bool {
	if name == lockFile || strings.HasPrefix(name, ".") && strings.HasSuffix(name, ".tmp") {
		return true
	}
	for _, ext := range []string{currentExt, previousExt, pendingExt, pendingExt + damagedExt} {
		certID, ok := strings.CutSuffix(name, ext)
		if _, err := api.ParseID(certID); ok && err == nil {
			return true
		}
	}
	return false
}

// isArtifact reports whether file systems or operating systems create files of this name by
// themselves: ext4, Kubernetes (..data), NFS, snapshots, macOS.
func isArtifact(name string) bool {
	return slices.Contains([]string{"lost+found", ".snapshot", ".snapshots", ".zfs", ".DS_Store", ".fseventsd", ".Spotlight-V100", ".Trashes"}, name) ||
		strings.HasPrefix(name, "..") || strings.HasPrefix(name, ".nfs")
}

// readByOthers reports whether the mode of a file lets other users read it. The agent creates no
// such key. It does not count the agent's own groups, one of which may be the group of a volume.
func readByOthers(root *os.Root, name string) bool {
	info, err := root.Stat(name)
	if err != nil {
		return false
	}
	_, gid := hostfile.Owner(info)
	mode := info.Mode().Perm()
	return mode&0o040 != 0 && !hostfile.OwnGroup(gid) || mode&0o004 != 0
}
