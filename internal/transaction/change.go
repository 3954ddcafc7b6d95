package transaction

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"certctl-agent/internal/connector"
)

// change is one Change of a deployment that is under way. The first part is
// journalled.
type change struct {
	changeRecord
	connector.Change
	was     []byte // what undoes it; nil: there was nothing
	same    bool   // there is nothing to write
	written bool   // it may have been made, by this deployment or an interrupted one
}

// matchOwed finds the changes of the plan that an interrupted deployment may
// have made. What it saved wins over what is there now.
func (a *attempt) matchOwed() {
	for _, planned := range a.plan.Changes {
		c := &change{Change: planned, changeRecord: changeRecord{Name: planned.ID()}}
		a.changes = append(a.changes, c)
		if a.record.Owed == nil {
			continue
		}
		i := slices.IndexFunc(a.record.Owed.Changes, func(r changeRecord) bool { return r.Name == c.Name })
		if i < 0 {
			continue
		}
		was, err := a.readSaved(a.Target, a.record.Owed, a.record.Owed.Changes[i])
		if err != nil {
			a.log.Error("what would undo an interrupted deployment cannot be read: the next rollback goes back to what is there now",
				"change", c.Name, "error", err)
			continue
		}
		c.was, c.written = was, true
	}
	if a.record.Owed == nil {
		return
	}
	for _, r := range a.record.Owed.Changes {
		if !slices.ContainsFunc(a.changes, func(c *change) bool { return c.Name == r.Name }) {
			a.log.Error("an interrupted deployment may have changed what the configuration no longer names: it stays as it is",
				"change", r.Name, "backups", a.backups.join(a.Target))
		}
	}
}

// readSaved reads what undoes a change of an interrupted deployment.
func (e *Engine) readSaved(id string, o *owed, r changeRecord) ([]byte, error) {
	if r.Backup == "" {
		return nil, nil
	}
	set, err := e.openSet(id, o.Set)
	if err != nil {
		return nil, err
	}
	defer set.Close()
	was, _, _, err := read(set, r.Backup)
	if err == nil && digestOf(was) != r.Digest {
		err = errors.New("it is damaged")
	}
	return was, reason(err)
}

// readChanges looks at what the changes are about to replace.
func (a *attempt) readChanges(ctx context.Context) error {
	for i, c := range a.changes {
		var was []byte
		err := contain(func() (err error) {
			was, c.same, err = c.Read(ctx)
			return err
		})
		if err != nil {
			return fmt.Errorf("look at %s: %w", c.Name, err)
		}
		if !c.written {
			c.was = was
		}
		if c.was != nil {
			c.Backup, c.Digest = backupName(len(a.files)+i, strings.ReplaceAll(c.Name, "/", "_")), digestOf(c.was)
		}
	}
	return nil
}

// writeChanges makes the changes. What undoes them is on disk.
func (a *attempt) writeChanges(ctx context.Context) error {
	for _, c := range a.changes {
		if c.same {
			continue
		}
		if err := cancelled(ctx); err != nil {
			return err
		}
		if err := a.disk.step(Step{Op: "change", Path: c.Name}); err != nil {
			return err
		}
		c.written = true
		if err := contain(func() error { return c.Write(ctx) }); err != nil {
			return fmt.Errorf("change %s: %w", c.Name, err)
		}
	}
	return nil
}

// restoreChanges takes back, the last first, what may have been changed. It goes
// on after an error, so that as much as possible is right.
func (a *attempt) restoreChanges(ctx context.Context) error {
	var errs []error
	for _, c := range slices.Backward(a.changes) {
		if !c.written {
			continue
		}
		err := a.disk.step(Step{Op: "restore", Path: c.Name})
		if err == nil {
			err = a.restore(ctx, c)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.Name, err))
			continue
		}
		c.written = false
	}
	return errors.Join(errs...)
}

func (a *attempt) restore(ctx context.Context, c *change) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWait)
	defer cancel()
	return contain(func() error { return c.Restore(ctx, c.was) })
}

// finishChanges lets the changes remove what only an undo needed.
func (a *attempt) finishChanges(ctx context.Context) {
	for _, c := range a.changes {
		err := a.disk.step(Step{Op: "finish", Path: c.Name})
		if err == nil {
			err = a.finishChange(ctx, c)
		}
		if err != nil {
			a.result.Warnings = append(a.result.Warnings, fmt.Sprintf("cleaning up after the deployment, %s: %v", c.Name, err))
		}
	}
}

func (a *attempt) finishChange(ctx context.Context, c *change) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishWait)
	defer cancel()
	return contain(func() error { return c.Finish(ctx) })
}
