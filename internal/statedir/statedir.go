// Package statedir opens the directory in which one agent keeps its state, and
// makes sure that it is the only one there and on the machine that it was.
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

	// maxMachine bounds what is read of the latter: a hash.
	maxMachine = 1 << 10
)

// Dir is an open, locked state directory.
type Dir struct {
	Path string
	Root *os.Root

	// Cloned tells that the state was written on another machine: this one is
	// probably a copy of that one, and both now act as the same agent.
	Cloned bool

	lock *filelock.Lock
}

// Open makes path and everything above it that is missing, 0700 and durably,
// locks it, and removes what a crash left half written. The lock ends with the
// process, however that ends.
//
// machineID identifies this machine, such as the content of /etc/machine-id;
// it is kept only as a hash together with agentID. Empty: not known, and the
// state is not tied to a machine.
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
		err = atomicfile.Sweep(root) // under the lock nobody else writes here
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

// tighten takes access from everybody else: backups hold private keys.
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
		return fmt.Errorf("another agent is running with this state directory: %s; stop it first, or give this one a state directory of its own (CERTCTL_STATE_DIR)", d.Path)
	}
	if err != nil {
		return fmt.Errorf("lock the state directory %s: %w", d.Path, err)
	}
	return nil
}

// identify compares the machine with the one that wrote the state.
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
		return fmt.Errorf("read whose state this is: %w", err)
	}
	d.Cloned = strings.TrimSpace(string(was)) != want
	return nil
}

// maxSiblings bounds the directories that Abandoned looks at.
const maxSiblings = 100

// Abandoned lists the state directories beside path with which no agent runs: of
// an agent id or a control plane that this host had before. It changes nothing.
func Abandoned(path string) []string {
	base, own := filepath.Split(path)
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil // there is none yet
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

func (d *Dir) Close() {
	d.lock.Close()
	d.Root.Close()
}
