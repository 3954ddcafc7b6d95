// Package transaction is the engine that deploys. A connector proposes a plan;
// the engine carries it out, together with the promotion of the key, so that
// whatever happens in between the target ends up either all new or as it was.
//
//	resume    what an earlier deployment of the target left, after a crash
//	plan      ask the connector
//	resolve   walk to every destination directory by handle, trusting no link
//	lock      flock the directories, so that two agents on a host take turns
//	inspect   read what is there; done if nothing would change
//	journal   "staging": the names of the temporaries about to be made
//	stage     new files beside their destinations: mode, owner, attributes, sync
//	back up   old files and what undoes the changes, in the state directory, sync
//	journal   "swapping": from here on a crash is undone
//	swap      rename everything into place, sync the directories
//	change    what is not a file of this host
//	command   validate, reload, verify
//	journal   "committed": from here on a crash is finished at the next start
//	prune     surplus backups, then the journal record
//	finish    remove what only an undo of the changes needed
//
// A failure before "swapping" removes the temporaries. A later one takes the
// changes back, puts the old files back, records that ("restored") and reloads
// again. Recover does so for files from the journal alone, so every step may be
// the last before a crash. A change takes a connector to be undone: the journal
// keeps what that needs, and the next deployment of the target goes on from it.
package transaction

import (
	"context"
	"log/slog"
	"os"
	"sync"

	"certctl-agent/internal/api"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/namelock"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/tlsprobe"
)

// DefaultRetention is how many backup sets of a target are kept.
const DefaultRetention = 3

// Options is what an Engine works with.
type Options struct {
	State     *os.Root // backups and journal are made below it
	StatePath string   // of State, for messages
	Policy    *policy.Policy

	// Run executes a command. It must return soon after ctx ends or the
	// command's own timeout is over.
	Run func(ctx context.Context, c policy.Command) error

	Retention int // backup sets to keep; 0: DefaultRetention, -1: none after success
	Log       *slog.Logger

	// Before is called before each change to the disk, each command and each
	// call of a connector; its error stands for theirs. With it a test stops or
	// fails a deployment at any step. Nil: nothing.
	Before func(Step) error
}

// Engine carries out deployments. It is safe for concurrent use; deployments to
// one target, into one directory, or with one Change, wait for each other. Those of one directory
// can share a reload.
type Engine struct {
	opts    Options
	disk    disk
	journal *dir
	backups *dir
	targets namelock.Table // by target id
	dirs    namelock.Table // by device and inode: what a deployment puts files into
	changes namelock.Table // by ID
	reloads namelock.Table // one name: the reloads after recovery take turns
	sharing sharing        // deployments of one directory that are ready to reload

	mu      sync.Mutex         // guards flights
	flights map[string]*flight // by target id: recoveries under way; see flight.go
}

// Deployment is one use of a connector.
type Deployment struct {
	Target    api.ID
	Connector connector.Connector
	Material  *connector.Material

	// Promotion makes a pending key the current one. Its files are put in place
	// before all others and are undone with them. Empty: the key is current.
	Promotion []keystore.Change

	Verify  func(ctx context.Context) error // nil: none
	Backups int                             // sets to keep; 0: the Engine's default, -1: none after success

	// ReplaceAny lets files replace files that hold neither certificates nor
	// keys: this host's owner has said so.
	ReplaceAny bool

	// Yield is called while the deployment waits for others, before it has begun and
	// for a shared reload. Nil: it holds nothing that they need.
	Yield Yield
}

// A Yield calls wait, which waits for other deployments, and gives others this
// deployment's place meanwhile. The context that wait gets ends when the agent
// stops: a deployment that has not begun has nothing to finish. The error is
// wait's, or says that the place could not be had again.
type Yield func(wait func(context.Context) error) error

// Result says what a deployment did.
type Result struct {
	Unchanged bool     // everything was in place: nothing written, run or sent
	Warnings  []string // for the log, one line each

	// Serves is the plan's: where the certificate can be seen. Nil: nowhere.
	Serves *tlsprobe.Endpoint
}

// BusyError means that a deployment did not begin because others have not
// ended. Nothing was touched, and another try may succeed.
type BusyError struct {
	// Place names what one of them has had for long. Who tries again for it had
	// better not come with all that wait for it. Empty: nothing of that kind.
	Place string
	Err   error
}

func (e *BusyError) Error() string { return e.Err.Error() }

func (e *BusyError) Unwrap() error { return e.Err }

// BrokenError is a failed rollback: the target needs a person.
type BrokenError struct {
	Cause    error  // what failed first
	Rollback error  // what failed while undoing it
	Backups  string // directory that holds what was there before
}

func (e *BrokenError) Error() string {
	return e.Cause.Error() + "; undoing it failed as well, so this target needs a person: " +
		e.Rollback.Error() + "; what was there before is in " + e.Backups
}

// Unwrap gives both failures.
func (e *BrokenError) Unwrap() []error { return []error{e.Cause, e.Rollback} }

// Open makes an Engine, and the directories it needs.
func Open(opts Options) (*Engine, error) {
	if opts.Retention == 0 {
		opts.Retention = DefaultRetention
	}
	e := &Engine{opts: opts, disk: disk{before: opts.Before}}
	return e, e.openDirs()
}

func (e *Engine) openDirs() (err error) {
	state := &dir{Root: e.opts.State, path: e.opts.StatePath}
	if e.backups, err = e.disk.subdir(state, "backups"); err != nil {
		return err
	}
	if e.journal, err = e.disk.subdir(state, "journal"); err != nil {
		e.backups.Close()
	}
	return err
}
