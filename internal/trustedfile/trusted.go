// Package trustedfile reads files that decide what the agent does, or who it
// is: none that somebody else could have written, or put there.
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

// readTimeout is how long a file may take. A network file system whose server
// does not answer holds a read for ever, and a reload or a stop with it.
const readTimeout = 10 * time.Second

// Read reads a file of at most limit bytes. It refuses one that others can
// write, or put another one in the place of, and warns of one that others can
// read. What counts is the file that was opened, so that nobody can swap it in
// between. It takes ten seconds at most.
func Read(path string, limit int64) (data []byte, info fs.FileInfo, warning string, err error) {
	ok := within(readTimeout, func() func() {
		d, i, w, e := ReadWithoutTimeout(path, limit)
		return func() { data, info, warning, err = d, i, w, e }
	})
	if !ok {
		return nil, nil, "", fmt.Errorf("%s could not be read within %v: look at the file system that it is on", path, readTimeout)
	}
	return data, info, warning, err
}

// within runs work, and what that returns if it is done in time. Work that is
// not goes on: nothing ends a call that hangs in the kernel.
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

// ReadWithoutTimeout is Read, however long that takes: it is for a goroutine that
// nobody waits for.
func ReadWithoutTimeout(path string, limit int64) (data []byte, info fs.FileInfo, warning string, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return nil, nil, "", err
	}
	if err := trustWay(path, os.Geteuid()); err != nil {
		return nil, nil, "", err
	}
	data, info, err = hostfile.Read(path, limit)
	if errors.Is(err, fs.ErrPermission) {
		err = explainDenied(path, err)
	}
	if err != nil {
		return nil, nil, "", err
	}
	if warning, err = trust(info, os.Geteuid()); err != nil {
		return nil, nil, "", fmt.Errorf("%s %w", path, err)
	}
	if warning != "" {
		warning = path + " " + warning
	}
	return data, info, warning, nil
}

// ReadSecret is Read for a file that nobody else may be able to read.
func ReadSecret(path string, limit int64) ([]byte, error) {
	data, _, warning, err := Read(path, limit)
	if err == nil && warning != "" {
		return nil, errors.New(warning)
	}
	return data, err
}

// explainDenied says whose a file is that the agent may not read.
func explainDenied(path string, err error) error {
	info, statErr := os.Stat(path)
	if statErr != nil {
		return err
	}
	return fmt.Errorf("%w: it has mode %04o and belongs to user %d, and the agent runs as user %d%s",
		err, info.Mode().Perm(), owner(info), os.Geteuid(), inContainers)
}

// inContainers explains an owner that the operator did not choose.
const inContainers = " (a file that is mounted into a container keeps its owner on the host)"

// trustWay judges the directories on the way to a file, link by link: who can
// write one can put another file of root's, or a link to one, in its place. In
// a sticky directory only the owner of the file or link can.
func trustWay(path string, euid int) error {
	shared := false
	_, err := hostfile.Follow(path, func(at string, info fs.FileInfo) error {
		switch {
		case info.IsDir():
			shared = info.Mode().Perm()&0o022 != 0
			if err := trustDir(at, info, euid); err != nil {
				return fmt.Errorf("%s %w", path, err)
			}
		case info.Mode().Type() == fs.ModeSymlink && shared && !ours(info, euid):
			return fmt.Errorf("%s is reached by the link %s of user %d, neither root nor the agent's own (%d): name the file itself", path, at, owner(info), euid)
		}
		return nil
	})
	return err
}

func trustDir(path string, info fs.FileInfo, euid int) error {
	if !ours(info, euid) {
		return fmt.Errorf("is in the directory %s of user %d, neither root nor the agent's own (%d), who can replace it: chown that, or move the file", path, owner(info), euid)
	}
	mode := info.Mode()
	writable := mode.Perm() & 0o022
	// Nobody but root is in root's group. With an access control list, though, its
	// bits are the mask of what others have.
	if _, gid := hostfile.Owner(info); gid == 0 && !hasACL(path) {
		writable &= 0o002
	}
	if writable != 0 && mode&fs.ModeSticky == 0 && !isConfigMap(path) {
		return fmt.Errorf("is in the directory %s, which others can write (mode %04o), so that they can replace it: chmod go-w that, or move the file", path, mode.Perm())
	}
	return nil
}

func ours(info fs.FileInfo, euid int) bool { return owner(info) == 0 || owner(info) == euid }

func owner(info fs.FileInfo) int {
	uid, _ := hostfile.Owner(info)
	return uid
}

// trust judges a file by its owner and mode. A group that the agent itself is
// in may read it: that is how an agent that is not root gets at a file that it
// must not own. So may root's: a systemd credential looks as if it did, its
// group bits being the mask of an access list.
func trust(info fs.FileInfo, euid int) (warning string, err error) {
	if info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("can be written by others (mode %04o): chmod go-w", info.Mode().Perm())
	}
	if !ours(info, euid) {
		return "", fmt.Errorf("belongs to user %d, neither root nor the agent's own (%d): chown it%s", owner(info), euid, inContainers)
	}
	_, gid := hostfile.Owner(info)
	if mode := info.Mode().Perm(); mode&0o004 != 0 || mode&0o040 != 0 && !hostfile.OwnGroup(gid) {
		return fmt.Sprintf("can be read by others (mode %04o): chmod it to 0600", info.Mode().Perm()), nil
	}
	return "", nil
}
