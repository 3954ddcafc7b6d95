package transaction

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"
)

// stage writes the new files beside their destinations, and the old ones to
// the backup directory. Nothing is in place when it returns, and the bytes
// that are needed to go on or to go back are durable. (The names of the new
// files become so with the renames.)
func (a *attempt) stage(ctx context.Context) error {
	if err := a.mark(staging); err != nil {
		return err
	}
	if a.isAside(a.Target) {
		if err := a.sweepOrphans(); err != nil {
			return err
		}
	}
	for _, f := range a.files {
		if err := cancelled(ctx); err != nil {
			return err
		}
		var err error
		if f.staged, err = a.disk.put(f.at, f.Stage, f.data, f.want); err != nil {
			return fmt.Errorf("write the new %s: %w", f.Path, reason(err))
		}
	}
	if err := a.backUp(); err != nil {
		return err
	}
	return a.mark(swapping)
}

// syncAll makes the names in all directories of files durable.
func (e *Engine) syncAll(files []*dest) error {
	var done []*dir
	for _, f := range files {
		if slices.ContainsFunc(done, func(d *dir) bool { return os.SameFile(d.info, f.at.info) }) {
			continue
		}
		if err := e.disk.syncDir(f.at); err != nil {
			return err
		}
		done = append(done, f.at)
	}
	return nil
}

// discard ends a transaction that has put nothing in place: no copy of a key
// stays behind.
func (e *Engine) discard(files []*dest, r *record) error {
	if err := e.removeTemporaries(files); err != nil {
		return err
	}
	if err := e.dropSets(r.Target, r.Set); err != nil {
		return err
	}
	if r.Owed == nil {
		return e.forget(r.Target)
	}
	return e.save(&record{Target: r.Target, Phase: restored, Reload: r.Owed.Command, Changes: r.Owed.Changes, Set: r.Owed.Set})
}

// removeTemporaries removes whatever of them is there, durably.
func (e *Engine) removeTemporaries(files []*dest) error {
	for _, f := range files {
		for _, name := range []string{f.Stage, f.Restore} {
			if err := e.disk.remove(f.at, name); err != nil {
				return fmt.Errorf("remove temporary %s, which may hold a key: %w", f.at.join(name), reason(err))
			}
		}
	}
	return e.syncAll(files)
}

// sweepOrphans removes the temporaries of a transaction whose record is lost.
// The lock on a directory says that they are in nobody's use; the key
// directory is not locked, and left alone.
func (a *attempt) sweepOrphans() error {
	for _, d := range directories(a.files) {
		if err := a.sweep(d); err != nil {
			return err
		}
	}
	return nil
}

// sweep removes every temporary of this package from a directory.
func (e *Engine) sweep(d *dir) error {
	names, err := d.names()
	if err != nil {
		return fmt.Errorf("list %s: %w", d.path, reason(err))
	}
	for _, name := range names {
		if !isTemporaryName(name) {
			continue
		}
		info, err := d.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
			continue
		}
		if err != nil {
			return fmt.Errorf("look at temporary %s, which may hold a key: %w", d.join(name), reason(err))
		}
		if err := e.disk.remove(d, name); err != nil {
			return fmt.Errorf("remove temporary %s, which may hold a key: %w", d.join(name), reason(err))
		}
	}
	return nil
}

// names lists a directory without looking at its files: there may be thousands.
func (d *dir) names() ([]string, error) {
	file, err := d.Open(".")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return file.Readdirnames(-1)
}

// swap puts every new file in place, durably.
func (a *attempt) swap(ctx context.Context) error {
	for _, f := range a.files {
		if err := cancelled(ctx); err != nil {
			return err
		}
		if err := a.place(f); err != nil {
			return fmt.Errorf("replace %s: %w", f.Path, reason(err))
		}
	}
	if err := a.syncAll(a.files); err != nil {
		return err
	}
	for _, f := range a.files {
		if err := f.isInPlace(); err != nil {
			return fmt.Errorf("replace %s: %w", f.Path, reason(err))
		}
	}
	return nil
}

// place puts one new file in place of what was there when it was inspected.
func (a *attempt) place(f *dest) error {
	info, err := f.at.Lstat(f.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if f.now != nil {
			return errReplaced
		}
	case err != nil:
		return err
	case f.now == nil || !same(info, f.now):
		return errReplaced
	}
	err = a.disk.rename(f.at, f.Stage, f.Name)
	if errors.Is(err, syscall.EBUSY) && f.now != nil {
		return a.overwrite(f)
	}
	if err != nil {
		return err
	}
	f.placed, f.now = true, f.staged
	return nil
}

// same reports whether nobody wrote to a file between two looks.
func same(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// overwrite replaces the bytes of a file that cannot be renamed over, such as
// a single file mounted into a container. That it may be torn after a crash is
// journalled first.
func (a *attempt) overwrite(f *dest) error {
	if err := f.mayOverwrite(); err != nil {
		return err
	}
	a.log.Warn("file cannot be renamed over, as if it were mounted there: overwriting it in place", "file", f.at.join(f.Name))
	if err := a.noteInPlace(&a.record, f); err != nil {
		return err
	}
	f.placed = true
	if err := a.disk.overwrite(f.at, f.Name, f.now, f.data, f.want); err != nil {
		return err
	}
	return a.disk.remove(f.at, f.Stage)
}

// mayOverwrite refuses to write into a file that someone else could have
// linked there: in their directory it may be any file of the host.
func (f *dest) mayOverwrite() error {
	if f.at.foreign != "" || f.at.anyone() || links(f.now) != 1 {
		return fmt.Errorf("it cannot be replaced as a whole (%w), and is not overwritten in a directory that others can change, or with several names", syscall.EBUSY)
	}
	return nil
}

func links(info fs.FileInfo) uint64 {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return uint64(stat.Nlink)
}

// isInPlace reports an error when the destination is not the file that this
// transaction put there.
func (f *dest) isInPlace() error {
	info, err := f.at.Lstat(f.Name)
	if err == nil && !os.SameFile(info, f.now) {
		err = errReplaced
	}
	return err
}

// putAllBack puts the old files back, durably, in the order in which the new
// ones were put in place: the file that a server watches is the last in both
// directions. It goes on after an error, so that as much as possible is right.
func (e *Engine) putAllBack(r *record, files []*dest) error {
	var errs []error
	for _, f := range files {
		if !f.placed {
			continue
		}
		if err := e.putBack(r, f); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.Path, reason(err)))
		}
	}
	errs = append(errs, e.removeTemporaries(files))
	return errors.Join(errs...)
}

// putBack puts one old file back, or removes the new one.
func (e *Engine) putBack(r *record, f *dest) error {
	if f.Old == nil {
		if err := f.isInPlace(); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		return e.disk.remove(f.at, f.Name)
	}
	_, err := e.disk.put(f.at, f.Restore, f.oldData, f.Old.attributes)
	if err == nil {
		err = e.disk.rename(f.at, f.Restore, f.Name)
	}
	full := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
	if !full && !errors.Is(err, syscall.EBUSY) {
		return err
	}
	// On a full disk the file that is there still has its blocks. If this
	// transaction made it, writing to it harms nobody else.
	if f.staged == nil || !os.SameFile(f.now, f.staged) {
		if mayNot := f.mayOverwrite(); mayNot != nil {
			return errors.Join(reason(err), mayNot)
		}
	}
	// With no space for the journal either, a crash in the next moment would
	// make this file look changed by a person. Giving up would be worse.
	if err := e.noteInPlace(r, f); err != nil && !full {
		return err
	}
	return e.disk.overwrite(f.at, f.Name, f.now, f.oldData, f.Old.attributes)
}

// noteInPlace journals that one file is about to be overwritten.
func (e *Engine) noteInPlace(r *record, f *dest) error {
	if f.InPlace {
		return nil
	}
	f.InPlace = true
	noted := *r
	noted.Files = slices.Clone(r.Files)
	for i := range noted.Files {
		if noted.Files[i].Stage == f.Stage {
			noted.Files[i].InPlace = true
		}
	}
	if err := e.save(&noted); err != nil {
		return err
	}
	*r = noted
	return nil
}
