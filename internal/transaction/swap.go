package transaction

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
)

// stage writes the new files beside their destinations, and the old ones to the backup set. When it
// returns, nothing is in place yet, and all bytes are durable that the swap or a rollback needs.
// The temporary names are not synced: the swap renames them, and recovery does not need them.
func (a *attempt) stage(ctx context.Context) error {
	if err := a.setPhase(staging); err != nil {
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
		if f.staged, err = a.disk.create(f.at, f.Stage, f.data, f.want); err != nil {
			return fmt.Errorf("write the new %s: %w", f.Path, withoutPath(err))
		}
	}
	if err := a.backUp(); err != nil {
		return err
	}
	return a.setPhase(swapping)
}

// syncAll syncs the directories of files.
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

// discard removes what a deployment has staged, and restores the record of the work that it owed.
func (e *Engine) discard(files []*dest, r *record) error {
	if err := e.removeTemporaries(files); err != nil {
		return err
	}
	if err := e.dropSets(r.Target, r.Set); err != nil {
		return err
	}
	if r.Owed == nil {
		return e.removeRecord(r.Target)
	}
	return e.save(&record{Target: r.Target, Phase: restored, Reload: r.Owed.Command, Changes: r.Owed.Changes, Set: r.Owed.Set})
}

// removeTemporaries removes the temporaries of files durably, if they exist.
func (e *Engine) removeTemporaries(files []*dest) error {
	for _, f := range files {
		for _, name := range []string{f.Stage, f.Restore} {
			if err := e.disk.remove(f.at, name); err != nil {
				return fmt.Errorf("remove temporary %s, which may hold a key: %w", f.at.join(name), withoutPath(err))
			}
		}
	}
	return e.syncAll(files)
}

// sweepOrphans removes the temporaries of a deployment whose record is lost. The lock on a
// directory proves that nobody uses them. It skips the key directory, which is not locked.
func (a *attempt) sweepOrphans() error {
	for _, d := range directories(a.files) {
		if err := a.sweep(d); err != nil {
			return err
		}
	}
	return nil
}

// sweep removes this package's temporaries from a directory.
func (e *Engine) sweep(d *dir) error {
	names, err := d.names()
	if err != nil {
		return fmt.Errorf("list %s: %w", d.path, withoutPath(err))
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
			return fmt.Errorf("look at temporary %s, which may hold a key: %w", d.join(name), withoutPath(err))
		}
		if err := e.disk.remove(d, name); err != nil {
			return fmt.Errorf("remove temporary %s, which may hold a key: %w", d.join(name), withoutPath(err))
		}
	}
	return nil
}

// names lists a directory without a stat of each file: there may be thousands.
func (d *dir) names() ([]string, error) {
	file, err := d.Open(".")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return file.Readdirnames(-1)
}

// swap puts the new files in place durably.
func (a *attempt) swap(ctx context.Context) error {
	for _, f := range a.files {
		if err := cancelled(ctx); err != nil {
			return err
		}
		if err := a.place(f); err != nil {
			return fmt.Errorf("replace %s: %w", f.Path, withoutPath(err))
		}
	}
	if err := a.syncAll(a.files); err != nil {
		return err
	}
	for _, f := range a.files {
		if err := f.checkInPlace(); err != nil {
			return fmt.Errorf("replace %s: %w", f.Path, withoutPath(err))
		}
	}
	return nil
}

// place puts one new file in place, unless the old one has changed since it was inspected.
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

// same reports whether a and b are the same file, with the same size and modification time.
func same(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// overwrite replaces the content of a file that cannot be renamed over, such as a single file
// mounted into a container. A crash may leave it torn, so overwrite first records that in the
// journal.
func (a *attempt) overwrite(f *dest) error {
	if err := f.mayOverwrite(); err != nil {
		return err
	}
	a.log.Warn("file cannot be replaced by a rename, perhaps because it is a mount point: overwriting it in place", "file", f.at.join(f.Name))
	if err := a.journalInPlace(&a.record, f); err != nil {
		return err
	}
	f.placed = true
	if err := a.disk.overwrite(f.at, f.Name, f.now, f.data, f.want); err != nil {
		return err
	}
	return a.disk.remove(f.at, f.Stage)
}

// mayOverwrite returns an error if another user could have linked the file there: it could be any
// file of the host.
func (f *dest) mayOverwrite() error {
	if f.at.untrusted != "" || f.at.worldWritable() || links(f.now) != 1 {
		return fmt.Errorf("it cannot be replaced by a rename (%w), and it is not overwritten in place, because other users can write to its directory or it has several hard links", syscall.EBUSY)
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

// checkInPlace returns an error if the destination is no longer the file that this deployment put
// there.
func (f *dest) checkInPlace() error {
	info, err := f.at.Lstat(f.Name)
	if err == nil && !os.SameFile(info, f.now) {
		err = errReplaced
	}
	return err
}

// foreignFiles returns an error that names the new files which another program has replaced or
// overwritten since, with bytes that are neither the old nor the new ones. As recovery does
// (compare), a rollback leaves its work alone.
func foreignFiles(files []*dest) error {
	var foreign []string
	for _, f := range files {
		if f.placed && f.foreign() {
			foreign = append(foreign, f.Path)
		}
	}
	if len(foreign) == 0 {
		return nil
	}
	return fmt.Errorf("no file was restored, because of %s: %w; let only the agent write there, and deploy again", strings.Join(foreign, ", "), errReplaced)
}

// foreign reports whether the bytes in place are those of another program. If the file itself is
// another one, but has the right bytes, the rollback may replace it.
func (f *dest) foreign() bool {
	inPlace := f.checkInPlace()
	if errors.Is(inPlace, fs.ErrNotExist) || inPlace == nil && f.InPlace { // InPlace: it may be torn
		return false
	}
	data, info, _, err := read(f.at, f.Name)
	if err != nil {
		// A link may have the inode number of the new file if that was removed before.
		return inPlace != nil || errors.Is(err, errNotRegular)
	}
	found := digestOf(data)
	clear(data)
	if found != f.New && (f.Old == nil || found != f.Old.Digest) {
		return true
	}
	f.now = info
	return false
}

// restoreFiles puts the old files back in place durably. The order is that of the swap, so that the
// file that a server watches comes last again. After an error it goes on with the others, to
// restore as much as possible.
func (e *Engine) restoreFiles(r *record, files []*dest) error {
	var errs []error
	for _, f := range files {
		if !f.placed {
			continue
		}
		if err := e.restoreFile(r, f); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.Path, withoutPath(err)))
		}
	}
	errs = append(errs, e.removeTemporaries(files))
	return errors.Join(errs...)
}

// restoreFile puts one old file back in place, or removes the new one if there was none.
func (e *Engine) restoreFile(r *record, f *dest) error {
	if f.Old == nil {
		if err := f.checkInPlace(); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		return e.disk.remove(f.at, f.Name)
	}
	_, err := e.disk.create(f.at, f.Restore, f.oldData, f.Old.attributes)
	if err == nil {
		err = e.disk.rename(f.at, f.Restore, f.Name)
	}
	full := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
	if !full && !errors.Is(err, syscall.EBUSY) {
		return err
	}
	// Even on a full disk, the existing file has blocks that can be overwritten. That is safe if
	// this deployment created the file.
	if f.staged == nil || !os.SameFile(f.now, f.staged) {
		if mayNot := f.mayOverwrite(); mayNot != nil {
			return errors.Join(withoutPath(err), mayNot)
		}
	}
	// If the disk is too full for the journal as well, a crash now would make the file look as if an
	// operator had changed it. Giving up would be worse.
	if err := e.journalInPlace(r, f); err != nil && !full {
		return err
	}
	return e.disk.overwrite(f.at, f.Name, f.now, f.oldData, f.Old.attributes)
}

// journalInPlace records in the journal that a file is about to be overwritten in place.
func (e *Engine) journalInPlace(r *record, f *dest) error {
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
