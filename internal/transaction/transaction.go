// Package transaction is the engine that carries out deployments. A connector proposes a plan; the
// engine executes it, together with the promotion of the private key, as one transaction. Whatever
// fails or crashes on the way, the target ends up either entirely new or as it was before.
//
// # Protocol
//
// The journal record of a target names the phase of its deployment. What a crash means depends on
// that phase alone:
//
//	                                                        after a failure
//	settle    recover an earlier, interrupted deployment    or a crash here
//	plan      ask the connector
//	resolve   walk to each destination, trusting no link
//	lock      the directories and the changes               nothing was
//	inspect   read what is in place; stop if up to date     touched
//	   │
//	   ▼ journal: staging ────────────────────────────────┐
//	stage     write the new files beside the old ones     │ remove the
//	back up   save the old files and values, sync         │ temporaries
//	   │                                                  │
//	   ▼ journal: swapping ───────────────────────────────┤
//	swap      rename the new files into place, sync       │ roll back:
//	change    change everything that is not a local file  │ restore changes
//	validate  ask the server whether it accepts them      │ and files, then
//	reload    make the server load them                   │ "restored", and
//	verify    see that the server uses them               │ reload
//	   │                                                  │
//	   ▼ journal: committed ──────────────────────────────┤
//	clean up  surplus backups, then the journal record    │ clean up again
//	finish    let the changes remove their undo data      ┘
//
// The order follows from four rules:
//
//   - The record names a temporary file before the file exists, so no copy of a key is orphaned.
//   - Everything that a rollback needs is on disk, synced, before the first rename.
//   - A rollback is recorded ("restored") before the server reloads, because after a crash the
//     files show that they are old again, but not whether the server has loaded them.
//   - The record goes last, so that a crash during the cleanup repeats the cleanup.
//
// # Recovery
//
// Recover rolls files back from the journal and the backups alone: it needs neither the control
// plane nor a connector, and each of its steps may itself be interrupted and repeated. A Change, on
// the other hand, can be undone only with the target's configuration. The journal therefore keeps
// it as owed work, together with its backup, until the target's next deployment.
//
// A record that cannot be followed, because it is damaged or because someone has changed the
// files since the crash, is set aside for inspection. The target's next deployment then replaces
// every file.
//
// # Concurrency
//
// Deployments to the same target, into the same directory or with the same Change take turns; see
// Engine.lock and lockChanges. Deployments into one directory can share a reload; see sharing.
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

// DefaultRetention is the number of backup sets kept for a target.
const DefaultRetention = 3

// Options configures an Engine.
type Options struct {
	State     *os.Root // state directory; holds the backups and the journal
	StatePath string   // path of State, for messages
	Policy    *policy.Policy

	// Run executes a command. It must return soon after ctx ends or the command's timeout expires.
	Run func(ctx context.Context, c policy.Command) error

	Retention int // backup sets to keep; 0: DefaultRetention, -1: none after a success
	Log       *slog.Logger

	// Before, if not nil, is called before each change to the disk, each command and each call of
	// a connector. If it returns an error, the step is not performed and fails with that error.
	// Tests use it to stop or fail a deployment at any step.
	Before func(Step) error
}

// Engine carries out deployments. It is safe for concurrent use.
type Engine struct {
	opts    Options
	disk    disk
	journal *dir
	backups *dir

	targetLocks    namelock.Table // by target id
	directoryLocks namelock.Table // by device and inode: directories that deployments put files into
	changeLocks    namelock.Table // by ID of the Change
	reloadLock     namelock.Table // one name: the reloads after a recovery take turns
	sharing        sharing        // deployments that are ready to share a reload

	mu         sync.Mutex              // guards recoveries
	recoveries map[string]*recoveryRun // in progress, by target id
}

// Deployment describes one deployment to a target.
type Deployment struct {
	Target    api.ID
	Connector connector.Connector
	Material  *connector.Material

	// Promotion makes a pending key the current one. Its files are put in place before all others
	// and rolled back with them. It is empty if the key is already current.
	Promotion []keystore.Change

	Verify  func(ctx context.Context) error // nil: no verification
	Backups int                             // sets to keep; 0: the Engine's default, -1: none after a success

	// ReplaceAny allows files that hold neither certificates nor keys to be replaced, because the
	// owner of this host has said so.
	ReplaceAny bool

	// Yield, if not nil, is called to wait for other deployments, before this one has begun and for
	// a shared reload. It may be nil if the caller holds no resource that they need.
	Yield Yield
}

// A Yield frees the caller's job slot for other jobs, calls wait, and takes a slot again. The
// context passed to wait ends when the agent stops, because a deployment that has not begun has
// nothing to finish. Yield returns the error of wait, or why it could not get a slot again.
type Yield func(wait func(context.Context) error) error

// Result describes what a deployment did.
type Result struct {
	Unchanged bool     // everything was up to date: nothing was written, run or sent
	Warnings  []string // for the log, one line each

	// Serves is the endpoint that serves the certificate, as the plan says, or nil.
	Serves *tlsprobe.Endpoint
}

// BusyError means that a deployment did not begin, because other deployments have not ended.
// Nothing was touched, and a retry may succeed.
type BusyError struct {
	// Lock names the lock that another deployment has held for too long, if that is the reason.
	// Jobs that wait for the same Lock should be retried one at a time.
	Lock string
	Err  error
}

func (e *BusyError) Error() string { return e.Err.Error() }

func (e *BusyError) Unwrap() error { return e.Err }

// BrokenError is a failed rollback: the target needs attention.
type BrokenError struct {
	Cause    error  // why the deployment failed
	Rollback error  // why the rollback failed
	Backups  string // directory that holds the previous files and values
}

func (e *BrokenError) Error() string {
	return e.Cause.Error() + "; the rollback failed too, so this target needs attention: " +
		e.Rollback.Error() + "; what was there before is in " + e.Backups
}

// Unwrap returns both errors.
func (e *BrokenError) Unwrap() []error { return []error{e.Cause, e.Rollback} }

// Open returns an Engine and creates the directories that it needs.
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
