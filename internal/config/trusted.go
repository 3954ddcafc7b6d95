package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"
)

// readTrusted reads a file that decides what the agent does, or who it is. It
// refuses one that others can write, or one of more than limit bytes, and
// warns of one that others can read. What counts is the file that was opened,
// so that nobody can swap it in between.
func readTrusted(path string, limit int64) (data []byte, info fs.FileInfo, warning string, err error) {
	// Without O_NONBLOCK opening a named pipe would wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, "", err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return nil, nil, "", err
	}
	if warning, err = trust(info, os.Geteuid()); err != nil {
		return nil, nil, "", fmt.Errorf("%s %w", path, err)
	}
	if warning != "" {
		warning = path + " " + warning
	}
	if data, err = io.ReadAll(io.LimitReader(f, limit+1)); err != nil {
		return nil, nil, "", err
	}
	if int64(len(data)) > limit {
		return nil, nil, "", fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return data, info, warning, nil
}

// trust judges a file by its owner and mode. A group that the agent itself is
// in may read it: that is how an agent that is not root gets at a file that it
// must not own. So may root's: a systemd credential looks as if it did, its
// group bits being the mask of an access list. The directory is not looked at: who can replace the file would
// have to be its owner.
func trust(info fs.FileInfo, euid int) (warning string, err error) {
	if !info.Mode().IsRegular() {
		return "", errors.New("is no regular file")
	}
	if info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("can be written by others (mode %04o): chmod go-w", info.Mode().Perm())
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", errors.New("has no owner")
	}
	if owner.Uid != 0 && int(owner.Uid) != euid {
		return "", fmt.Errorf("belongs to user %d, neither root nor the agent's own (%d): chown it", owner.Uid, euid)
	}
	world := info.Mode().Perm()&0o004 != 0
	group := info.Mode().Perm()&0o040 != 0 && !trustedGroup(int(owner.Gid))
	if world || group {
		return fmt.Sprintf("can be read by others (mode %04o): chmod it to 0600", info.Mode().Perm()), nil
	}
	return "", nil
}

func trustedGroup(gid int) bool {
	groups, err := os.Getgroups()
	return gid == 0 || gid == os.Getegid() || err == nil && slices.Contains(groups, gid)
}
