package transaction

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"certctl-agent/internal/connector"
)

// maxID bounds the ID of a Change, in bytes, because the ID is part of the journal record and of a
// file's name.
const maxID = 512

// change is one Change of a deployment in progress. Its changeRecord goes to the journal.
type change struct {
	changeRecord
	connector.Change        // nil: an interrupted deployment may have made it, but it is no longer planned
	was              []byte // old value; nil: there was none
	noUndo           error  // why it cannot be undone, or nil
	same             bool   // the value is up to date
	written          bool   // this or an interrupted deployment may have written it
}

// errNotPlanned is why a Change that is no longer planned cannot be undone. Its undo data is copied
// from backup set to backup set until a plan contains the Change again or a deployment succeeds.
var errNotPlanned = errors.New("an interrupted deployment changed it, and only a deployment that changes it too can undo that")

// collectChanges collects the changes of the plan and those that an interrupted deployment may
// have made. The value that the interrupted deployment saved wins over the present one.
func (a *attempt) collectChanges() error {
	var refused error
	for _, planned := range a.plan.Changes {
		id := planned.ID()
		switch {
		case id == "" || len(id) > maxID || !utf8.ValidString(id) || strings.ContainsFunc(id, func(r rune) bool { return !unicode.IsPrint(r) }):
			refused = fmt.Errorf("a planned change has the invalid id %.100q", id)
		case a.changeWithID(id) != nil:
			refused = fmt.Errorf("two planned changes have the id %q", id)
		default:
			a.changes = append(a.changes, &change{Change: planned, changeRecord: changeRecord{Name: id}})
		}
	}
	if a.record.Owed == nil {
		return refused
	}
	for _, r := range a.record.Owed.Changes {
		c := a.changeWithID(r.Name)
		if c == nil {
			c = &change{noUndo: errNotPlanned, same: true}
			a.changes = append(a.changes, c)
		}
		c.changeRecord, c.written = r, true
		if r.Backup == "" {
			continue // it did not exist before
		}
		var err error
		if c.was, err = a.readBackup(a.Target, a.record.Owed.Set, r.Backup, r.Digest, r.Name); transient(err) {
			return unsettledError(string(a.Target), err)
		} else if err != nil {
			c.noUndo = fmt.Errorf("its backup cannot be read: %w", err)
		}
	}
	return refused
}

// lockChanges locks the IDs of the changes, so that deployments of several targets that write the
// same remote object take turns.
func (a *attempt) lockChanges(ctx context.Context) (release func(), err error) {
	var ids []string
	for _, c := range a.changes {
		ids = append(ids, c.Name)
	}
	slices.Sort(ids) // so that two deployments cannot deadlock
	var releases []func()
	release = func() {
		for _, release := range slices.Backward(releases) {
			release()
		}
	}
	for _, id := range ids {
		unlock, err := acquire(ctx, &a.changeLocks, id, maxHeld(a.Yield), a.Yield)
		if err != nil {
			return release, &BusyError{Lock: "change " + id, Err: fmt.Errorf("wait for another deployment that changes %s: %w", id, err)}
		}
		releases = append(releases, unlock)
	}
	return release, nil
}

// changeWithID returns the change with the given ID, or nil.
func (a *attempt) changeWithID(id string) *change {
	i := slices.IndexFunc(a.changes, func(c *change) bool { return c.Name == id })
	if i < 0 {
		return nil
	}
	return a.changes[i]
}

// inspect reads the present value. It does not replace the value that an interrupted deployment
// saved.
func (c *change) inspect(ctx context.Context) error {
	if c.Change == nil {
		return nil
	}
	var was []byte
	err := catchPanic(func() (err error) {
		was, c.same, err = c.Read(ctx)
		return err
	})
	if err == nil && len(was) > maxFile {
		err = fmt.Errorf("its present value is larger than %d MiB, too large to back up", maxFile>>20)
	}
	if err == nil && !c.written {
		c.was = was
	}
	return err
}

// inspectChanges reads the values that the changes are about to replace.
func (a *attempt) inspectChanges(ctx context.Context) error {
	for i, c := range a.changes {
		if err := c.inspect(ctx); err != nil {
			return fmt.Errorf("look at %s: %w", c.Name, err)
		}
		if c.was != nil {
			c.Backup, c.Digest = backupName(len(a.files)+i, strings.ReplaceAll(c.Name, "/", "_")), digestOf(c.was)
		}
	}
	return nil
}

// writeChanges writes the changes. The old values are in the backup set already. An interrupted
// Change is written again even if Read says same: its Write may have been killed halfway, and Read
// may not see the missing half.
func (a *attempt) writeChanges(ctx context.Context) error {
	for _, c := range a.changes {
		if c.Change == nil || c.same && !c.written {
			continue
		}
		if err := cancelled(ctx); err != nil {
			return err
		}
		if err := a.disk.step(Step{Op: "change", Path: c.Name}); err != nil {
			return err
		}
		c.written = true
		if err := catchPanic(func() error { return c.Write(ctx) }); err != nil {
			return fmt.Errorf("change %s: %w", c.Name, err)
		}
	}
	return nil
}

// restoreChanges undoes the changes that may have been made, the last one first. After an error it
// goes on with the others, to restore as much as possible.
func (a *attempt) restoreChanges(ctx context.Context) error {
	var errs []error
	for _, c := range slices.Backward(a.changes) {
		if !c.written {
			continue
		}
		err := a.disk.step(Step{Op: "restore", Path: c.Name})
		if err == nil {
			err = c.noUndo
		}
		if err == nil {
			err = detached(ctx, lateWait, func(ctx context.Context) error { return c.Restore(ctx, c.was) })
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.Name, err))
			continue
		}
		c.written = false
	}
	return errors.Join(errs...)
}

// finishChanges lets the changes remove what was kept only for an undo.
func (a *attempt) finishChanges(ctx context.Context) {
	for _, c := range a.changes {
		if c.Change == nil {
			warning := c.Name + " stays as an interrupted deployment left it, because it is no longer in the configuration"
			if a.record.Keep > 0 {
				warning += "; what was there before is in " + a.setPath(&a.record)
			}
			a.result.Warnings = append(a.result.Warnings, warning)
			continue
		}
		err := a.disk.step(Step{Op: "finish", Path: c.Name})
		if err == nil {
			err = detached(ctx, lateWait, c.Finish)
		}
		if err != nil {
			a.result.Warnings = append(a.result.Warnings, fmt.Sprintf("cleaning up after the deployment, %s: %v", c.Name, err))
		}
	}
}
