// Package trustedfile reads the files that decide what the agent does or who it is. It refuses
// files that other users could have written or replaced.
package trustedfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"certctl-agent/internal/hostfile"
)

// readTimeout bounds the reading of one file. If the server of a network file system does not
// answer, a read blocks forever, and with it a reload of the configuration or a stop of the agent.
const readTimeout = 10 * time.Second

// Read reads a file of at most limit bytes, within readTimeout. It refuses a file that other users
// can write or replace, and returns a warning if they can read it. It checks the file after opening
// it, so that nobody can swap it in between.
func Read(path string, limit int64) (data []byte, info fs.FileInfo, warning string, err error) {
	ok := within(readTimeout, func() func() {
		d, i, w, e := ReadWithoutTimeout(path, limit)
		return func() { data, info, warning, err = d, i, w, e }
	})
	if !ok {
		return nil, nil, "", fmt.Errorf("%s could not be read within %v: check its file system", path, readTimeout)
	}
	return data, info, warning, err
}

// within runs work in a goroutine, and then the function that work returns. If that takes longer
// than limit, within returns false and leaves the goroutine behind: nothing can stop a call that
// hangs in the kernel.
func within(limit time.Duration, work func() (finish func())) bool {
	done := make(chan func(), 1)
	go func() { done <- work() }()
	select {
	case finish := <-done:
		finish()
		return true
	case <-time.After(limit):
		return false
	}
}

// ReadWithoutTimeout is Read without the time limit, for a goroutine that nobody waits for.
func ReadWithoutTimeout(path string, limit int64) (data []byte, info fs.FileInfo, warning string, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return nil, nil, "", err
	}
	if err := checkPath(path, os.Geteuid()); err != nil {
		return nil, nil, "", err
	}
	data, info, err = hostfile.Read(path, limit)
	if errors.Is(err, fs.ErrPermission) {
		err = explainDenied(path, err)
	}
	if err != nil {
		return nil, nil, "", err
	}
	if warning, err = checkFile(info, os.Geteuid()); err != nil {
		return nil, nil, "", fmt.Errorf("%s %w", path, err)
	}
	if warning != "" {
		warning = path + " " + warning
	}
	return data, info, warning, nil
}

// ReadSecret is like Read, but also refuses a file that other users can read.
func ReadSecret(path string, limit int64) ([]byte, error) {
	data, _, warning, err := Read(path, limit)
	if err == nil && warning != "" {
		return nil, errors.New(warning)
	}
	return data, err
}

// explainDenied adds the owner and mode of a file that the agent may not read to err.
func explainDenied(path string, err error) error {
	info, statErr := os.Stat(path)
	if statErr != nil {
		return err
	}
	return fmt.Errorf("%w: it has mode %04o and belongs to user %d, and the agent runs as user %d%s",
		err, info.Mode().Perm(), owner(info), os.Geteuid(), inContainers)
}

// inContainers explains an owner that the operator did not choose.
const inContainers = " (a file that is mounted into a container keeps the owner that it has on the host)"

// checkPath checks the directories and symlinks on the path to a file. Anyone who can write to a
// directory can replace the file by another file of root's, or by a link to one. In a sticky
// directory, only the owner of the file or link can do that.
func checkPath(path string, euid int) error {
	shared := false
	_, err := hostfile.Follow(path, func(at string, info fs.FileInfo) error {
		switch {
		case info.IsDir():
			shared = info.Mode().Perm()&0o022 != 0
			if err := checkDir(at, info, euid); err != nil {
				return fmt.Errorf("%s %w", path, err)
			}
		case info.Mode().Type() == fs.ModeSymlink && shared && !ours(info, euid):
			return fmt.Errorf("%s is reached through the symlink %s of user %d, who is neither root nor the agent's user (%d): name the file itself", path, at, owner(info), euid)
		}
		return nil
	})
	return err
}

func checkDir(path string, info fs.FileInfo, euid int) error {
	if !ours(info, euid) {
		return fmt.Errorf("is in the directory %s of user %d, who is neither root nor the agent's user (%d) and can replace the file: chown the directory, or move the file", path, owner(info), euid)
	}
	mode := info.Mode()
	writable := mode.Perm() & 0o022
	// Only root is in root's group. With an access control list, though, the group bits are the
	// mask of what others have (acl(5)).
	if _, gid := hostfile.Owner(info); gid == 0 && !hasACL(path) {
		writable &= 0o002
	}
	if writable != 0 && mode&fs.ModeSticky == 0 && !isConfigMap(path) {
		return fmt.Errorf("is in the directory %s, which others can write to (mode %04o), so they can replace the file: chmod go-w the directory, or move the file", path, mode.Perm())
	}
	return nil
}

func ours(info fs.FileInfo, euid int) bool { return owner(info) == 0 || owner(info) == euid }

func owner(info fs.FileInfo) int {
	uid, _ := hostfile.Owner(info)
	return uid
}

// checkFile checks the owner and mode of a file. The agent's groups may read it: that is how an
// agent that is not root can use a file that it must not own. So may root's group: a systemd
// credential seems to permit that, because its group bits are the mask of an access control list.
func checkFile(info fs.FileInfo, euid int) (warning string, err error) {
	if info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("can be written by others (mode %04o): chmod go-w", info.Mode().Perm())
	}
	if !ours(info, euid) {
		return "", fmt.Errorf("belongs to user %d, who is neither root nor the agent's user (%d): chown it%s", owner(info), euid, inContainers)
	}
	_, gid := hostfile.Owner(info)
	if mode := info.Mode().Perm(); mode&0o004 != 0 || mode&0o040 != 0 && !hostfile.OwnGroup(gid) {
		return fmt.Sprintf("can be read by others (mode %04o): chmod it to 0600", info.Mode().Perm()), nil
	}
	return "", nil
}
