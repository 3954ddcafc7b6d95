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

// recoverWait bounds the wait for the directories of a target that is to be
// recovered. Another try comes later.
const recoverWait = 10 * time.Second

// Recovery is what Recover found. Each list holds target ids.
type Recovery struct {
	RolledBack []string // the old files are in place again
	Finished   []string // the new files were in place for good already
	SetAside   []string // the record cannot be followed: a person should look
	Failed     []string // to be tried again by Repair, and before a deployment
	Reloads    int      // how many reloads Repair has to do
}

// Recover undoes or finishes every transaction that a crash interrupted, as far
// as that is possible within startWait. It must run before the first Deploy.
// What it finds in a single target is logged and never an error, since it must
// not keep the agent from serving others.
func (e *Engine) Recover(ctx context.Context) (Recovery, error) {
	var found Recovery
	if err := e.sweep(e.journal); err != nil {
		return found, err
	}
	err := e.recoverAll(ctx, ctx, startWait, false, func(id string, f *flight, err error) {
		list := &found.Failed
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			e.opts.Log.Error("an interrupted deployment could not be undone and will be tried again: until then nothing is deployed to its target", "target", id, "error", err)
		case f.outcome == wasSetAside:
			list = &found.SetAside
		case f.outcome == wasFinished:
			list = &found.Finished
		default:
			list = &found.RolledBack
		}
		*list = append(*list, id)
		if err == nil && f.owing {
			found.Reloads++
		}
	})
	return found, cmp.Or(context.Cause(ctx), err)
}

// Repair does what interrupted transactions still need: it undoes or finishes
// those that could not be before, and runs the reloads that this made
// necessary. What fails is in the error, and is tried again by the next call.
// Calls ends when the agent stops and bounds waiting; work bounds the reloads.
func (e *Engine) Repair(calls, work context.Context) error {
	var errs []error
	err := e.recoverAll(calls, work, repairWait, true, func(id string, _ *flight, err error) {
		if err != nil && !errors.Is(err, errUnderWay) {
			errs = append(errs, fmt.Errorf("recover target %s: %w", id, err))
		}
	})
	return errors.Join(append(errs, err)...)
}

// recoverAll recovers every target that has a record, all at once, and tells
// ended of each in turn. It waits for their files no longer than wait.
func (e *Engine) recoverAll(calls, work context.Context, wait time.Duration, reload bool, ended func(id string, f *flight, err error)) error {
	ids, err := e.recorded()
	if err != nil {
		return err
	}
	until, cancel := deadline(calls, wait)
	defer cancel()
	flights := make([]*flight, len(ids))
	for i, id := range ids {
		flights[i] = e.fly(calls, work, id, reload)
	}
	for i, id := range ids {
		f := flights[i]
		answered := f.await(until)
		for answered && reload && !f.reload { // it was under way already
			f = e.fly(calls, work, id, true)
			answered = f.await(until)
		}
		err := errNoAnswer
		if answered {
			err = f.err
		}
		ended(id, f, err)
	}
	return nil
}

// Settle makes sure that no interrupted transaction can undo, later, what a
// deployment to target is about to do with the key at keyPath: those of the
// target and those that put that key in place. An error is a BusyError.
func (e *Engine) Settle(ctx context.Context, target api.ID, keyPath string) error {
	ids, err := e.recorded()
	if err != nil {
		return &BusyError{Err: err}
	}
	until, enough := deadline(ctx, settleWait+closeWait)
	defer enough()
	ctx, cancel := context.WithTimeoutCause(ctx, settleWait, fmt.Errorf("given up after %s", settleWait))
	defer cancel()
	for _, other := range ids {
		if !e.concerns(other, string(target), keyPath) {
			continue
		}
		f := e.fly(ctx, ctx, other, false)
		select {
		case <-f.done:
		case <-until:
			return unsettledError(other, f.late())
		}
		if f.err != nil {
			return unsettledError(other, f.err)
		}
	}
	return nil
}

// concerns reports whether the record of a target has to be settled before a
// deployment to target id.
func (e *Engine) concerns(recorded, id, keyPath string) bool {
	if recorded == id && e.flying(id) {
		return true
	}
	r, err := e.load(recorded)
	if recorded == id {
		return err != nil || r != nil && r.Phase != restored
	}
	return err == nil && r != nil && r.Phase == swapping &&
		slices.ContainsFunc(r.Files, func(e fileRecord) bool { return e.Private && e.Path == keyPath })
}

// Interrupted lists the targets whose transactions another agent, with the state
// directory at path, did not bring to an end. It changes nothing.
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
		return nil, fmt.Errorf("list the journal in %s: %w", e.journal.path, reason(err))
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

// recoverTarget is one flight, of the target that a record's file names.
func (e *Engine) recoverTarget(calls, work context.Context, name string, f *flight) error {
	id, err := api.ParseID(name)
	if err != nil {
		return fmt.Errorf("journal record is not usable: %s: target %w", e.journal.join(name+recordSuffix), err)
	}
	release, ok := e.targets.Try(name)
	if !ok {
		return errUnderWay
	}
	defer release()
	ctx, cancel := context.WithTimeoutCause(calls, recoverWait, fmt.Errorf("given up after %s", recoverWait))
	defer cancel()
	r, err := e.load(name)
	if r == nil && err == nil {
		return nil // settled meanwhile
	}
	known := r != nil && r.Phase == restored
	if f.outcome, err = e.recoverLoaded(ctx, id, r, err); err != nil {
		return err
	}
	log := e.opts.Log.With("target", id)
	switch {
	case known || f.outcome == wasSetAside: // which has a line of its own
	case f.outcome == wasFinished:
		log.Info("finished an interrupted deployment: the new files are in place")
	default:
		log.Warn("undid an interrupted deployment: the old files are in place")
	}
	if r != nil && r.Phase == restored && len(r.Changes) > 0 && !(known && f.reload) {
		log.Warn("an interrupted deployment may have changed what only another deployment of the target can undo: deploy to it again",
			"changes", names(r.Changes), "backups", e.setPath(r))
	}
	if r, err = e.load(name); err != nil || r == nil || r.Phase != restored || r.Reload == nil {
		// Without a command only the next deployment can tell the server, and
		// it will, as long as the record is there.
		return err
	}
	if f.owing = true; !f.reload {
		return nil
	}
	return e.reloadOwed(ctx, work, r, f)
}

// An outcome is how recovery of one target ended.
type outcome int

const (
	wasUndone outcome = iota
	wasFinished
	wasSetAside
)

// recoverLoaded brings one target to all-old or all-new. The error is one that
// another try may not have.
func (e *Engine) recoverLoaded(ctx context.Context, id api.ID, r *record, loadErr error) (outcome, error) {
	err := loadErr
	if err == nil {
		switch r.Phase {
		case restored:
			if len(r.Changes) > 0 {
				return wasUndone, nil // the next deployment needs the set
			}
			return wasUndone, e.dropSets(id, r.Set)
		case committed:
			return wasFinished, e.cleanUp(r)
		}
		err = e.undo(ctx, r)
	}
	if _, damaged := errors.AsType[*damagedError](err); !damaged {
		return wasUndone, err
	}
	log := e.opts.Log.With("target", id, "error", err, "record", e.journal.join(asideName(id)), "backups", e.backups.join(string(id)))
	if r != nil && len(r.allChanges()) > 0 {
		log = log.With("changes", names(r.allChanges()))
	}
	log.Error("an interrupted deployment needs a person: its journal record was set aside, and nothing else was touched; the next deployment replaces every file")
	return wasSetAside, e.setAside(id)
}

// undo puts the old files of an interrupted transaction back.
func (e *Engine) undo(ctx context.Context, r *record) error {
	files, moved, err := reopen(r)
	defer closeAll(files)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, recoverWait, fmt.Errorf("given up after %s", recoverWait))
	defer cancel()
	h, err := e.lock(ctx, directories(files), nil)
	if err != nil {
		return err
	}
	defer h.release()
	if r.Phase == staging {
		return e.discard(files, r)
	}
	// Whatever else is to be done: these hold keys.
	if err := e.removeTemporaries(files); err != nil {
		return err
	}
	if moved != nil {
		return &damagedError{moved}
	}
	if err := e.compare(r, files); err != nil {
		return err
	}
	if err := e.putAllBack(r, files); err != nil {
		return fmt.Errorf("put the old files back from %s: %w", e.setPath(r), err)
	}
	return e.recordRestored(r, r.Changes)
}

// recordRestored records that every old file is in place, that the server has to
// reload, and which changes are still to be undone. If the target had nothing
// before, there is nothing to reload.
func (e *Engine) recordRestored(r *record, changes []changeRecord) error {
	sets := []string{r.Set}
	if len(changes) > 0 {
		sets = nil // they need it
	}
	if r.Owed != nil {
		sets = append(sets, r.Owed.Set)
	}
	if !r.hadAny() && len(changes) == 0 {
		if err := e.dropSets(r.Target, sets...); err != nil {
			return err
		}
		return e.forget(r.Target)
	}
	r.Phase, r.Owed, r.Changes = restored, nil, changes
	if err := e.save(r); err != nil {
		return err
	}
	return e.dropSets(r.Target, sets...)
}

// hadAny reports whether there was anything of the target before.
func (r *record) hadAny() bool {
	return slices.ContainsFunc(r.Files, func(e fileRecord) bool { return !e.Private && e.Old != nil }) ||
		slices.ContainsFunc(r.Changes, func(c changeRecord) bool { return c.Backup != "" })
}

// reopen opens the directories of a record. A file whose directory is gone is
// gone too, and is left out. The first error is that directories are not where
// they were, the second that one could not be opened.
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

// compare finds out which files have to be put back, and gets their bytes. If
// a file is neither the old nor the new one, a person was here: what they did
// is not undone.
func (e *Engine) compare(r *record, files []*dest) error {
	var strange []string
	for _, f := range files {
		data, info, has, err := read(f.at, f.Name)
		found := digestOf(data)
		f.now = info
		switch {
		case errors.Is(err, fs.ErrNotExist) && f.Old == nil:
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotRegular):
			strange = append(strange, f.at.join(f.Name))
		case err != nil:
			return fmt.Errorf("%s: %w", f.Path, reason(err))
		case f.Old != nil && found == f.Old.Digest && has.equal(f.Old.attributes):
		case found == f.New || f.InPlace || f.Old != nil && found == f.Old.Digest:
			f.placed = true
		default:
			strange = append(strange, f.at.join(f.Name))
		}
	}
	if len(strange) > 0 {
		return &damagedError{fmt.Errorf("changed by someone else since: %s", strings.Join(strange, ", "))}
	}
	return e.fetch(r, files)
}

// transient reports whether another try to read a backup may succeed: there was
// an input error or were too many open files, and not no such file.
func transient(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	return ok && errno != syscall.ENOENT && errno != syscall.ENOTDIR
}

// fetch reads the old files that have to be put back from their backups.
func (e *Engine) fetch(r *record, files []*dest) error {
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

// reloadOwed runs the reload that a record asks for. Ctx bounds the wait for the
// directories.
func (e *Engine) reloadOwed(ctx, work context.Context, r *record, f *flight) error {
	files, _, err := reopen(r)
	defer closeAll(files)
	if err != nil {
		return err
	}
	// Another agent could be half-way through the same directories.
	h, err := e.lock(ctx, directories(files), nil)
	if err != nil {
		return err
	}
	defer h.release()
	f.land()
	release, err := e.reloads.Acquire(work, "")
	if err != nil {
		return err
	}
	defer release()
	// What may run could have been narrowed since, for the sake of this very
	// command.
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
	return e.forget(r.Target)
}
