package transaction

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/api"
)

// recoverWait bounds how long the recovery of a target waits for its directories. It is retried
// later.
const recoverWait = 10 * time.Second

// Recovery is the result of Recover. Each list holds target ids.
type Recovery struct {
	RolledBack []string // the old files are back in place
	Finished   []string // committed already: the new files are in place
	SetAside   []string // the record cannot be followed: the target needs attention
	Failed     []string // retried by Repair, and before a deployment to the target
	Reloads    int      // number of reloads that are left to Repair
}

// Recover rolls back or finishes every deployment that a crash interrupted, as far as that is
// possible within startWait. It must run before the first Deploy. It logs the failures of single
// targets and does not return them, because they must not keep the agent from serving the others.
func (e *Engine) Recover(ctx context.Context) (Recovery, error) {
	var found Recovery
	if err := e.sweep(e.journal); err != nil {
		return found, err
	}
	err := e.recoverAll(ctx, ctx, startWait, false, func(id string, run *recoveryRun, err error) {
		list := &found.Failed
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			e.opts.Log.Error("an interrupted deployment could not be rolled back and will be retried: until then nothing is deployed to its target", "target", id, "error", err)
		case run.outcome == outcomeSetAside:
			list = &found.SetAside
		case run.outcome == outcomeFinished:
			list = &found.Finished
		default:
			list = &found.RolledBack
		}
		*list = append(*list, id)
		if err == nil && run.reloadPending {
			found.Reloads++
		}
	})
	return found, cmp.Or(context.Cause(ctx), err)
}

// Repair does what Recover left: it rolls back or finishes the remaining deployments, and runs the
// reloads that the rollbacks require. It returns the failures; the next call retries them. calls
// ends when the agent stops and bounds the waiting; work bounds the reloads.
func (e *Engine) Repair(calls, work context.Context) error {
	var errs []error
	err := e.recoverAll(calls, work, repairWait, true, func(id string, _ *recoveryRun, err error) {
		if err != nil && !errors.Is(err, errInProgress) {
			errs = append(errs, fmt.Errorf("recover target %s: %w", id, err))
		}
	})
	return errors.Join(append(errs, err)...)
}

// recoverAll recovers all targets that have a record, concurrently, and calls ended for each in
// turn. It waits for their files no longer than wait.
func (e *Engine) recoverAll(calls, work context.Context, wait time.Duration, reload bool, ended func(id string, run *recoveryRun, err error)) error {
	ids, err := e.recorded()
	if err != nil {
		return err
	}
	until, cancel := deadline(calls, wait)
	defer cancel()
	runs := make([]*recoveryRun, len(ids))
	for i, id := range ids {
		runs[i] = e.startRecovery(calls, work, id, reload)
	}
	for i, id := range ids {
		run := runs[i]
		answered := run.wait(until)
		for answered && reload && !run.reload { // it was in progress already, without a reload
			run = e.startRecovery(calls, work, id, true)
			answered = run.wait(until)
		}
		err := errNoAnswer
		if answered {
			err = run.err
		}
		ended(id, run, err)
	}
	return nil
}

// Settle recovers the interrupted deployments whose rollback could later take back what a deployment
// to target is about to do: those of the target, and those that promoted the key at keyPath. Its
// error is always a BusyError.
func (e *Engine) Settle(ctx context.Context, target api.ID, keyPath string) error {
	ids, err := e.recorded()
	if err != nil {
		return &BusyError{Err: err}
	}
	until, cancelDeadline := deadline(ctx, settleWait+closeWait)
	defer cancelDeadline()
	ctx, cancel := context.WithTimeoutCause(ctx, settleWait, fmt.Errorf("gave up after %s", settleWait))
	defer cancel()
	for _, other := range ids {
		if !e.concerns(other, string(target), keyPath) {
			continue
		}
		run := e.startRecovery(ctx, ctx, other, false)
		select {
		case <-run.done:
		case <-until:
			return unsettledError(other, run.lateError())
		}
		if run.err != nil {
			return unsettledError(other, run.err)
		}
	}
	return nil
}

// concerns reports whether the record of target recorded must be settled before a deployment to
// target id with the key at keyPath.
func (e *Engine) concerns(recorded, id, keyPath string) bool {
	if recorded == id && e.recovering(id) {
		return true
	}
	r, err := e.load(recorded)
	if recorded == id {
		return err != nil || r != nil && r.Phase != restored
	}
	return err == nil && r != nil && r.Phase == swapping &&
		slices.ContainsFunc(r.Files, func(e fileRecord) bool { return e.Private && e.Path == keyPath })
}

// Interrupted lists the targets with an interrupted deployment in another agent's state directory,
// at path. It changes nothing.
func Interrupted(path string) ([]string, error) {
	root, err := os.OpenRoot(filepath.Join(path, "journal"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the journal: %w", err)
	}
	defer root.Close()
	e := &Engine{journal: &dir{Root: root, path: root.Name()}}
	ids, err := e.recorded()
	return slices.DeleteFunc(ids, func(id string) bool {
		r, err := e.load(id)
		return err == nil && (r == nil || r.Phase == restored && len(r.Changes) == 0 || r.Phase == committed)
	}), err
}

// recorded lists the targets that have a journal record, sorted.
func (e *Engine) recorded() ([]string, error) {
	names, err := e.journal.names()
	if err != nil {
		return nil, fmt.Errorf("list the journal in %s: %w", e.journal.path, withoutPath(err))
	}
	var ids []string
	for _, name := range names {
		if id, ok := strings.CutSuffix(name, recordSuffix); ok {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// recoverTarget recovers the target with the given name, for run.
func (e *Engine) recoverTarget(calls, work context.Context, name string, run *recoveryRun) error {
	id, err := api.ParseID(name)
	if err != nil {
		return fmt.Errorf("journal record is not usable: %s: target %w", e.journal.join(name+recordSuffix), err)
	}
	release, ok := e.targetLocks.Try(name)
	if !ok {
		return errInProgress
	}
	defer release()
	ctx, cancel := context.WithTimeoutCause(calls, recoverWait, fmt.Errorf("gave up after %s", recoverWait))
	defer cancel()
	r, err := e.load(name)
	if r == nil && err == nil {
		return nil // settled in the meantime
	}
	wasRestored := r != nil && r.Phase == restored
	if run.outcome, err = e.recoverRecord(ctx, id, r, err); err != nil {
		return err
	}
	log := e.opts.Log.With("target", id)
	switch {
	case wasRestored || run.outcome == outcomeSetAside: // logged before
	case run.outcome == outcomeFinished:
		log.Info("finished an interrupted deployment: the new files are in place")
	default:
		log.Warn("rolled back an interrupted deployment: the old files are back in place")
	}
	// Recover has logged that at the start, so Repair, which comes back to it, does not.
	logged := wasRestored && run.reload
	if r != nil && r.Phase == restored && len(r.Changes) > 0 && !logged {
		log.Warn("an interrupted deployment may have left changes that only another deployment of the target can undo: deploy to it again",
			"changes", idsOf(r.Changes), "backups", e.setPath(r))
	}
	if r, err = e.load(name); err != nil || r == nil || r.Phase != restored || r.Reload == nil {
		// Without a reload command only the next deployment can reload the server. The record
		// makes it do so.
		return err
	}
	if run.reloadPending = true; !run.reload {
		return nil
	}
	return e.reloadOwed(ctx, work, r, run)
}

// An outcome is how the recovery of one target ended.
type outcome int

const (
	outcomeRolledBack outcome = iota
	outcomeFinished
	outcomeSetAside
)

// recoverRecord makes the files of one target all old or all new, as its record says. loadErr is
// the error of loading r. An error that it returns may be temporary: a record that can never be
// followed is set aside.
func (e *Engine) recoverRecord(ctx context.Context, id api.ID, r *record, loadErr error) (outcome, error) {
	err := loadErr
	if err == nil {
		switch r.Phase {
		case restored:
			if len(r.Changes) > 0 {
				return outcomeRolledBack, nil // the next deployment needs the set
			}
			return outcomeRolledBack, e.dropSets(id, r.Set)
		case committed:
			return outcomeFinished, e.cleanUp(r)
		}
		err = e.rollBackFiles(ctx, r)
	}
	if _, damaged := errors.AsType[*damagedError](err); !damaged {
		return outcomeRolledBack, err
	}
	log := e.opts.Log.With("target", id, "error", err, "record", e.journal.join(asideName(id)), "backups", e.backups.join(string(id)))
	if r != nil && len(r.allChanges()) > 0 {
		log = log.With("changes", idsOf(r.allChanges()))
	}
	log.Error("an interrupted deployment needs attention: its journal record was set aside, and nothing else was touched; the next deployment replaces every file")
	return outcomeSetAside, e.setAside(id)
}

// rollBackFiles rolls back the files of an interrupted deployment. If that leaves a reload, or
// changes to undo, r is then in the phase restored.
func (e *Engine) rollBackFiles(ctx context.Context, r *record) error {
	files, moved, err := reopen(r)
	defer closeAll(files)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, recoverWait, fmt.Errorf("gave up after %s", recoverWait))
	defer cancel()
	locked, err := e.lock(ctx, directories(files), nil)
	if err != nil {
		return err
	}
	defer locked.release()
	if r.Phase == staging {
		return e.discard(files, r)
	}
	// They hold keys, so they go first, whatever happens next.
	if err := e.removeTemporaries(files); err != nil {
		return err
	}
	if moved != nil {
		return &damagedError{moved}
	}
	if err := e.compare(r, files); err != nil {
		return err
	}
	if err := e.restoreFiles(r, files); err != nil {
		return fmt.Errorf("restore the old files from %s: %w", e.setPath(r), err)
	}
	return e.recordRestored(r, r.Changes)
}

// recordRestored records that every old file is back in place, that the server must reload, and
// which changes must still be undone. If the target had nothing before, there is nothing to reload,
// and without such changes the record goes.
func (e *Engine) recordRestored(r *record, changes []changeRecord) error {
	sets := []string{r.Set}
	if len(changes) > 0 {
		sets = nil // the changes need it
	}
	if r.Owed != nil {
		sets = append(sets, r.Owed.Set)
	}
	if !r.hadAny() && len(changes) == 0 {
		if err := e.dropSets(r.Target, sets...); err != nil {
			return err
		}
		return e.removeRecord(r.Target)
	}
	r.Phase, r.Owed, r.Changes = restored, nil, changes
	if err := e.save(r); err != nil {
		return err
	}
	return e.dropSets(r.Target, sets...)
}

// hadAny reports whether the target had any file or value before.
func (r *record) hadAny() bool {
	return slices.ContainsFunc(r.Files, func(e fileRecord) bool { return !e.Private && e.Old != nil }) ||
		slices.ContainsFunc(r.Changes, func(c changeRecord) bool { return c.Backup != "" })
}

// reopen opens the directories of a record's files. It leaves out files whose directory is gone.
// moved is not nil if a directory is gone or elsewhere than the record says; err, if one could not
// be opened.
func reopen(r *record) (files []*dest, moved, err error) {
	for _, e := range r.Files {
		at, err := resolveDir(e.Dir)
		if errors.Is(err, fs.ErrNotExist) {
			if e.Old != nil {
				moved = err
			}
			continue
		}
		if err != nil {
			return files, moved, err
		}
		files = append(files, &dest{fileRecord: e, at: at})
		if at.path != e.Dir {
			moved = fmt.Errorf("directory %s is now %s", e.Dir, at.path)
		}
	}
	return files, moved, nil
}

// compare finds out which files must be restored and reads their backups. If a file is neither the
// old nor the new one, someone has changed it since, and compare returns a damagedError: recovery
// does not undo manual changes.
func (e *Engine) compare(r *record, files []*dest) error {
	var unknown []string
	for _, f := range files {
		data, info, has, err := read(f.at, f.Name)
		found := digestOf(data)
		f.now = info
		switch {
		case errors.Is(err, fs.ErrNotExist) && f.Old == nil:
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotRegular):
			unknown = append(unknown, f.at.join(f.Name))
		case err != nil:
			return fmt.Errorf("%s: %w", f.Path, withoutPath(err))
		case f.Old != nil && found == f.Old.Digest && has.equal(f.Old.attributes):
		case found == f.New || f.InPlace || f.Old != nil && found == f.Old.Digest:
			f.placed = true
		default:
			unknown = append(unknown, f.at.join(f.Name))
		}
	}
	if len(unknown) > 0 {
		return &damagedError{fmt.Errorf("changed by someone else since: %s", strings.Join(unknown, ", "))}
	}
	return e.readOldFiles(r, files)
}

// transient reports whether reading a backup again may succeed, as after an input error or with too
// many open files. It returns false if there is no such file.
func transient(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	return ok && errno != syscall.ENOENT && errno != syscall.ENOTDIR
}

// readOldFiles reads the backups of the files that must be restored.
func (e *Engine) readOldFiles(r *record, files []*dest) error {
	for _, f := range files {
		if !f.placed || f.Old == nil {
			continue
		}
		var err error
		if f.oldData, err = e.readBackup(r.Target, r.Set, f.Old.Backup, f.Old.Digest, f.Path); transient(err) {
			return err
		} else if err != nil {
			return &damagedError{err}
		}
	}
	return nil
}

// reloadOwed runs the reload that a record owes. ctx bounds the wait for the directories, work the
// rest.
func (e *Engine) reloadOwed(ctx, work context.Context, r *record, run *recoveryRun) error {
	files, _, err := reopen(r)
	defer closeAll(files)
	if err != nil {
		return err
	}
	// Another agent may be halfway through a swap in the same directories.
	locked, err := e.lock(ctx, directories(files), nil)
	if err != nil {
		return err
	}
	defer locked.release()
	run.setFilesDone()
	release, err := e.reloadLock.Acquire(work, "")
	if err != nil {
		return err
	}
	defer release()
	// Ask the policy again: the owner of this host may have forbidden the command since.
	c, err := e.opts.Policy.Command(strings.Join(r.Reload.Argv, " "), r.Reload.Timeout)
	if err != nil {
		return err
	}
	if err := e.command(work, &c); err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	if len(r.Changes) > 0 {
		r.Reload = nil
		return e.save(r)
	}
	return e.removeRecord(r.Target)
}
