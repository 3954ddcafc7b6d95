package fileset

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// Recovery is what Recover found. Each list holds target ids.
type Recovery struct {
	RolledBack []string // the old files are in place again
	Finished   []string // the new files were in place for good already
	SetAside   []string // the record cannot be followed: a person should look
	Failed     []string // to be tried again by the next Recover or Deploy
	Reloads    int      // how many reloads ReloadRecovered has to do
}

// Recover undoes or finishes every transaction that a crash interrupted. It
// must run before the first Deploy. What it finds in a single target is logged
// and never an error, since it must not keep the agent from serving others.
func (s *Store) Recover(ctx context.Context) (Recovery, error) {
	var found Recovery
	if err := s.sweep(s.journal); err != nil {
		return found, err
	}
	ids, err := s.recorded()
	if err != nil {
		return found, err
	}
	for _, id := range ids {
		if ctx.Err() != nil {
			return found, context.Cause(ctx)
		}
		s.recoverTarget(ctx, id, &found)
	}
	return found, nil
}

// recorded lists the targets that have a journal record.
func (s *Store) recorded() ([]string, error) {
	entries, err := fs.ReadDir(s.journal.FS(), ".")
	if err != nil {
		return nil, fmt.Errorf("list the journal in %s: %w", s.journal.path, reason(err))
	}
	var ids []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), recordSuffix); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func (s *Store) recoverTarget(ctx context.Context, id string, found *Recovery) {
	log := s.opts.Log.With("target", id)
	release, err := s.acquire(ctx, id)
	if err != nil {
		log.Error("journal record is not usable", "file", s.journal.join(id+recordSuffix), "error", err)
		found.Failed = append(found.Failed, id)
		return
	}
	defer release()
	r, err := s.load(id)
	list := &found.Failed
	outcome, err := s.recoverLoaded(ctx, id, r, err)
	switch {
	case err != nil:
		log.Error("an interrupted deployment could not be undone and will be tried again", "error", err)
	case outcome == setAside:
		list = &found.SetAside
	case outcome == finished:
		list = &found.Finished
		log.Info("finished an interrupted deployment: the new files are in place")
	default:
		list = &found.RolledBack
		log.Warn("undid an interrupted deployment: the old files are in place")
	}
	*list = append(*list, id)
	if r, err := s.load(id); err == nil && r != nil && r.Phase == restored && r.Reload != nil {
		found.Reloads++
	}
}

// An outcome is how recovery of one target ended.
type outcome int

const (
	rolledBack outcome = iota
	finished
	setAside
)

// recoverLoaded brings one target to all-old or all-new. The error is one that
// another try may not have.
func (s *Store) recoverLoaded(ctx context.Context, id string, r *record, loadErr error) (outcome, error) {
	err := loadErr
	if err == nil {
		switch r.Phase {
		case restored:
			return rolledBack, s.dropSet(r)
		case committed:
			return finished, s.finish(r)
		}
		err = s.undo(ctx, r)
	}
	if _, damaged := errors.AsType[*damagedError](err); !damaged {
		return rolledBack, err
	}
	s.opts.Log.Error("an interrupted deployment needs a person: its journal record was set aside, and nothing else was touched; the next deployment replaces every file",
		"target", id, "error", err, "record", s.journal.join(id+asideSuffix), "backups", s.backups.join(id))
	return setAside, s.setAside(id)
}

// undo puts the old files of an interrupted transaction back.
func (s *Store) undo(ctx context.Context, r *record) error {
	files, moved, err := reopen(r)
	defer closeAll(files)
	if err != nil {
		return err
	}
	unlock, err := lock(ctx, directories(files), recoverWait, s.opts.Log)
	if err != nil {
		return err
	}
	defer unlock()
	if r.Phase == staging {
		return s.discard(files, r)
	}
	// Whatever else is to be done: these hold keys.
	if err := s.removeTemporaries(files); err != nil {
		return err
	}
	if moved != nil {
		return &damagedError{moved}
	}
	if err := s.compare(r, files); err != nil {
		return err
	}
	if err := s.putAllBack(r, files); err != nil {
		return fmt.Errorf("put the old files back from %s: %w", s.setPath(r), err)
	}
	return s.settleOld(r)
}

// settleOld records that every old file is in place, and that the server has
// to be told. Where there was no old file it has nothing to go back to.
func (s *Store) settleOld(r *record) error {
	if !r.hadFiles() {
		if err := s.dropSet(r); err != nil {
			return err
		}
		return s.forget(r.Target)
	}
	r.Phase, r.Owed = restored, nil
	if err := s.save(r); err != nil {
		return err
	}
	return s.dropSet(r)
}

// hadFiles reports whether the target had any of its files before.
func (r *record) hadFiles() bool {
	return slices.ContainsFunc(r.Files, func(e entry) bool { return !e.Private && e.Old != nil })
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
		files = append(files, &dest{entry: e, at: at})
		if at.path != e.Dir {
			moved = fmt.Errorf("directory %s is now %s", e.Dir, at.path)
		}
	}
	return files, moved, nil
}

// compare finds out which files have to be put back, and gets their bytes. If
// a file is neither the old nor the new one, a person was here: what they did
// is not undone.
func (s *Store) compare(r *record, files []*dest) error {
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
	return s.fetch(r, files)
}

// fetch reads the old files that have to be put back from their backups.
func (s *Store) fetch(r *record, files []*dest) error {
	for _, f := range files {
		if !f.placed || f.Old == nil {
			continue
		}
		set, err := s.openSet(r)
		if err != nil {
			return &damagedError{err}
		}
		f.old, _, _, err = read(set, f.Old.Backup)
		set.Close()
		if err != nil {
			return &damagedError{fmt.Errorf("backup of %s: %w", f.Path, reason(err))}
		}
		if digestOf(f.old) != f.Old.Digest {
			return &damagedError{fmt.Errorf("backup of %s is damaged", f.Path)}
		}
	}
	return nil
}

// ReloadRecovered runs the reloads that recovery made necessary. Those that
// fail are in the error, and are tried again by the next call.
func (s *Store) ReloadRecovered(ctx context.Context) error {
	ids, err := s.recorded()
	errs := []error{err}
	for _, id := range ids {
		if err := s.reloadOwed(ctx, id); err != nil {
			errs = append(errs, fmt.Errorf("reload target %s after recovery: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Store) reloadOwed(ctx context.Context, id string) error {
	release, err := s.acquire(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	r, err := s.load(id)
	// Without a command only the next deployment can tell the server, and it
	// will, as long as the record is there.
	if err != nil || r == nil || r.Phase != restored || r.Reload == nil {
		return err
	}
	files, _, err := reopen(r)
	defer closeAll(files)
	if err != nil {
		return err
	}
	// Another agent could be half-way through the same directories.
	unlock, err := lock(ctx, directories(files), lockWait, s.opts.Log)
	if err != nil {
		return err
	}
	defer unlock()
	// What may run could have been narrowed since, for the sake of this very
	// command.
	c, err := s.opts.Policy.Command(strings.Join(r.Reload.Argv, " "), r.Reload.Timeout)
	if err != nil {
		return err
	}
	if err := s.command(ctx, &c); err != nil {
		return err
	}
	return s.forget(id)
}
