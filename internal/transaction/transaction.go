// Package transaction replaces the files of one target as a single transaction:
// after it, whatever happened in between, the target has either all its new
// files or all its old ones.
//
//	resolve   walk to every destination directory by handle, trusting no link
//	lock      flock the directories, so that two agents on a host take turns
//	inspect   read what is there; done if nothing would change
//	journal   "staging": the names of the temporaries about to be made
//	stage     new files beside their destinations: mode, owner, attributes, sync
//	back up   old files below the state directory, sync
//	journal   "swapping": from here on a crash is undone at the next start
//	swap      rename everything into place, sync the directories
//	command   validate, reload, apply, verify
//	journal   "committed": from here on a crash is finished at the next start
//	prune     surplus backups, then the journal record
//
// A failure before "swapping" removes the temporaries. A later one puts the old
// files back, records that ("restored") and reloads again. Recover does the
// same from the journal alone, so every step may be the last before a crash.
package transaction

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"certctl-agent/internal/api"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/namelock"
	"certctl-agent/internal/policy"
)

// DefaultRetention is how many backup sets of a target are kept.
const DefaultRetention = 3

// Options is what a Store works with.
type Options struct {
	State     *os.Root // backups and journal are made below it
	StatePath string   // of State, for messages
	Policy    *policy.Policy

	// Run executes a command. It must return soon after ctx ends or the
	// command's own timeout is over.
	Run func(ctx context.Context, c policy.Command) error

	Retention int // backup sets to keep; 0: DefaultRetention, -1: none after success
	Log       *slog.Logger
}

// Store runs transactions. It is safe for concurrent use; transactions of one
// target, or into one directory, wait for each other.
type Store struct {
	opts    Options
	disk    disk
	journal *dir
	backups *dir
	targets namelock.Table // by target id
	dirs    namelock.Table // by device and inode: what a transaction puts files into
	reloads namelock.Table // one name: the reloads after recovery take turns

	mu      sync.Mutex         // guards flights
	flights map[string]*flight // by target id: recoveries under way; see flight.go
}

// Transaction is one deployment.
type Transaction struct {
	Target string // id, valid as api.ValidID has it

	// Material's KeyFiles are put in place before Files. Nil: there are none.
	Material *connector.Material
	Files    []connector.File

	Validate *policy.Command // nil: none
	Reload   *policy.Command // nil: none

	// Apply tells a server about the new files after Reload, or instead of
	// it, where that takes more than a command. Nil: nothing.
	Apply func(ctx context.Context) error

	// Undo tells it about the old files once they are back. Nil: Apply again.
	Undo func(ctx context.Context) error

	Verify func(ctx context.Context) error // nil: none

	Backups int // sets to keep; 0: the Store's default, -1: none after success

	// ReplaceAny lets Files replace files that hold neither certificates nor
	// keys: this host's owner has said so.
	ReplaceAny bool

	Yield connector.Yield // called while the transaction waits for others; may be nil
}

// NewTransaction begins the Transaction of one deployment with what all connectors have in
// common. The connector adds its files and commands.
func NewTransaction(p connector.Params, m *connector.Material) Transaction {
	return Transaction{
		Target:     p.TargetID,
		Material:   m,
		Verify:     p.Common.Verify(m.Leaf),
		Backups:    p.Common.Retention,
		ReplaceAny: p.Common.ReplaceAny,
		Yield:      p.Yield,
	}
}

// Open makes a Store, and the directories it needs.
func Open(opts Options) (*Store, error) {
	if opts.Retention == 0 {
		opts.Retention = DefaultRetention
	}
	s := &Store{opts: opts}
	return s, s.openDirs()
}

func (s *Store) openDirs() (err error) {
	state := &dir{Root: s.opts.State, path: s.opts.StatePath}
	if s.backups, err = s.disk.subdir(state, "backups"); err != nil {
		return err
	}
	if s.journal, err = s.disk.subdir(state, "journal"); err != nil {
		s.backups.Close()
	}
	return err
}

// acquire waits for the target and returns how to release it.
func (s *Store) acquire(ctx context.Context, id string, yield connector.Yield) (release func(), err error) {
	if !api.ValidID(id) {
		return nil, fmt.Errorf("target id %q is not valid", id)
	}
	if release, ok := s.targets.Try(id); ok {
		return release, nil
	}
	err = waitFor(ctx, yield, func(ctx context.Context) (err error) {
		release, err = s.targets.Acquire(ctx, id)
		return err
	})
	if err != nil {
		if release != nil {
			release()
		}
		return nil, &connector.BusyError{Err: fmt.Errorf("wait for another deployment of target %s: %w", id, err)}
	}
	return release, nil
}
