// Package statedir opens the directory in which an agent keeps its state. It makes sure that no
// other agent uses the directory, and detects when it has been copied from another machine.
package statedir

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"certctl-agent/internal/atomicfile"
	"certctl-agent/internal/filelock"
	"certctl-agent/internal/hostfile"
)

const (
	lockFile    = "lock"
	machineFile = "machine"

	// maxMachine bounds the size of machineFile, in bytes. It holds a hash.
	maxMachine = 1 << 10
)

// Dir is an open, locked state directory.
type Dir struct {
	Path string
	Root *os.Root

	// Cloned means that the state was written on another machine. This machine is probably a copy
	// of that one, and both act as the same agent.
	Cloned bool

	lock *filelock.Lock
}

// Open creates path and its missing parents durably, with mode 0700. It locks the directory and
// removes files that a crash left half-written. The kernel releases the lock when the process ends.
//
// machineID identifies this machine, for example the content of /etc/machine-id. It is stored only
// as a hash, together with agentID. If it is empty, the state is not tied to a machine.
func Open(path, agentID, machineID string) (*Dir, error) {
	if err := atomicfile.MkdirAll(path); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	if err := tighten(path); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("open the state directory: %w", err)
	}
	d := &Dir{Path: path, Root: root}
	err = d.acquire()
	if err == nil {
		err = atomicfile.Sweep(root) // safe: the lock keeps other writers out
	}
	if err == nil {
		err = d.identify(agentID, machineID)
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// tighten removes the access of other users, because backups hold private keys.
func tighten(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("look at the state directory: %w", err)
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	if err := os.Chmod(path, 0o700); err != nil {
		return fmt.Errorf("the state directory %s is open to others (%v) and cannot be closed: %w", path, info.Mode().Perm(), err)
	}
	return nil
}

func (d *Dir) acquire() (err error) {
	d.lock, err = filelock.Take(d.Root, lockFile, "")
	if _, held := errors.AsType[*filelock.HeldError](err); held {
		return fmt.Errorf("another agent is running with this state directory: %s; stop it first, or give this one its own state directory (CERTCTL_STATE_DIR)", d.Path)
	}
	if err != nil {
		return fmt.Errorf("lock the state directory %s: %w", d.Path, err)
	}
	return nil
}

// identify sets Cloned if another machine wrote the state. It records the machine if none is
// recorded.
func (d *Dir) identify(agentID, machineID string) error {
	machineID = strings.TrimSpace(machineID)
	if machineID == "" {
		return nil
	}
	want := fmt.Sprintf("%x", sha256.Sum256([]byte(machineID+"\n"+agentID)))
	was, _, err := hostfile.ReadIn(d.Root, machineFile, maxMachine)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && len(was) == 0:
		return atomicfile.WriteFile(d.Root, machineFile, []byte(want+"\n"), 0o600)
	case err != nil:
		return fmt.Errorf("read which machine wrote this state: %w", err)
	}
	d.Cloned = strings.TrimSpace(string(was)) != want
	return nil
}

// maxSiblings bounds the number of directories that Abandoned checks.
const maxSiblings = 100

// Abandoned lists the state directories beside path that no running agent uses: this host once had
// another agent id or control plane. It changes nothing.
func Abandoned(path string) []string {
	base, own := filepath.Split(path)
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil // not created yet
	}
	var left []string
	for _, entry := range entries[:min(len(entries), maxSiblings)] {
		other := filepath.Join(base, entry.Name())
		if entry.IsDir() && entry.Name() != own && filelock.Free(filepath.Join(other, lockFile)) {
			left = append(left, other)
		}
	}
	return left
}

// Close releases the lock and the directory.
func (d *Dir) Close() {
	d.lock.Close()
	d.Root.Close()
}
