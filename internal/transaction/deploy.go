package transaction

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
)

// undoWait bounds telling the server about the old files, which no cancelled
// context stops, beyond what its reload command may take by itself.
const undoWait = time.Minute

// transaction is one Deploy under way.
type transaction struct {
	*Store
	tx     Transaction
	log    *slog.Logger
	result connector.Result

	record record
	files  []*dest // in the order of record.Files
	clean  bool    // the target's last transaction ended clean
	told   bool    // the server may know of the new files
}

// Deploy runs one transaction. When it fails, the target is as it was before,
// unless the error is a connector.BrokenError. A cancelled context rolls back.
func (s *Store) Deploy(ctx context.Context, tx Transaction) (connector.Result, error) {
	release, err := s.acquire(ctx, tx.Target, tx.Yield)
	if err != nil {
		return connector.Result{}, err
	}
	defer release()
	t := &transaction{Store: s, tx: tx, log: s.opts.Log.With("target", tx.Target)}
	if err := t.settle(ctx); err != nil {
		return connector.Result{}, err
	}
	defer func() { closeAll(t.files) }()
	if err := t.resolve(); err != nil {
		return connector.Result{}, err
	}
	unlock, err := s.lock(ctx, directories(t.files), tx.Yield)
	if err != nil {
		return connector.Result{}, err
	}
	defer unlock()
	if err := t.contested(); err != nil {
		return connector.Result{}, err
	}
	if err := t.inspect(); err != nil {
		return connector.Result{}, err
	}
	if t.unchanged() {
		err := t.verify(ctx)
		if t.result.Unchanged = err == nil; err == nil || ctx.Err() != nil {
			return t.result, err
		}
		// The files are right and the server does not serve them: it was never
		// told, and telling it is what a transaction does.
		t.log.Info("files are in place but not in use: deploying again", "error", err)
	}
	err = t.run(ctx)
	return t.result, err
}

// settle ends the target's earlier transaction, if it did not end.
func (t *transaction) settle(ctx context.Context) error {
	r, err := t.load(t.tx.Target)
	if r != nil && r.Phase != restored || err != nil {
		if _, err := t.recoverLoaded(ctx, t.tx.Target, r, err); err != nil {
			return unsettledError(t.tx.Target, err)
		}
		if r, err = t.load(t.tx.Target); err != nil {
			return err
		}
	}
	if r != nil {
		t.record.Owed = &owed{r.Reload}
	}
	t.clean = r == nil && !t.isAside(t.tx.Target)
	return nil
}

// contested refuses files that the recovery of another target has yet to put
// back: it would find there what it does not know, or take the new ones away.
func (t *transaction) contested() error {
	ids, err := t.recorded()
	if err != nil {
		return err
	}
	for _, id := range ids {
		if id == t.tx.Target {
			continue
		}
		if r, err := t.load(id); err != nil || r == nil || r.Phase != swapping || !r.shares(t.files) {
			continue
		}
		return unsettledError(id, errors.New("it has a file in common with this one"))
	}
	return nil
}

// shares reports whether one of the files is the record's too.
func (r *record) shares(files []*dest) bool {
	return slices.ContainsFunc(files, func(f *dest) bool {
		return slices.ContainsFunc(r.Files, func(e entry) bool { return e.Dir == f.Dir && e.Name == f.Name })
	})
}

// unsettledError holds a deployment back until the one of target id that a
// crash or a failure interrupted is settled.
func unsettledError(id string, err error) error {
	return &connector.BusyError{Err: fmt.Errorf("an earlier deployment of target %s was interrupted and is not undone yet: %w", id, err)}
}

// wanted are the files of the transaction in the order in which they are put
// in place.
func (t *transaction) wanted() []connector.File {
	if t.tx.Material == nil {
		return t.tx.Files
	}
	return slices.Concat(t.tx.Material.KeyFiles, t.tx.Files)
}

func (t *transaction) resolve() error {
	for _, file := range t.wanted() {
		f, err := t.open(file)
		if err != nil {
			return err
		}
		t.files = append(t.files, f)
	}
	return nil
}

// inspect reads what is in place, and drafts the journal record.
func (t *transaction) inspect() error {
	t.record.Target, t.record.Reload = t.tx.Target, t.tx.Reload
	if t.record.Keep = t.tx.Backups; t.record.Keep == 0 {
		t.record.Keep = t.opts.Retention
	}
	old := false
	for i, file := range t.wanted() {
		warning, err := t.files[i].inspect(file, i)
		if err != nil {
			return err
		}
		if warning != "" {
			t.result.Warnings = append(t.result.Warnings, warning)
		}
		old = old || t.files[i].Old != nil
	}
	if err := distinct(t.files); err != nil {
		return err
	}
	if err := t.guard(); err != nil {
		return err
	}
	if !old {
		return nil
	}
	var err error
	t.record.Set, err = t.nextSet(t.tx.Target)
	return err
}

// unchanged reports whether there is nothing to do. A transaction without
// files is all in its Apply, whose effect cannot be seen here.
func (t *transaction) unchanged() bool {
	return t.clean && len(t.tx.Files) > 0 && !slices.ContainsFunc(t.files, func(f *dest) bool { return !f.upToDate() })
}

// run does everything that changes something.
func (t *transaction) run(ctx context.Context) error {
	if err := t.stage(ctx); err != nil {
		return t.abort(err)
	}
	err := t.swap(ctx)
	if err == nil {
		err = t.activate(ctx)
	}
	if err == nil {
		err = t.commit()
	}
	if _, broken := errors.AsType[*connector.BrokenError](err); broken {
		return err
	}
	if err != nil {
		return t.rollBack(ctx, err)
	}
	if err := t.finish(&t.record); err != nil {
		// Whatever is left is removed by the next deployment or start.
		t.result.Warnings = append(t.result.Warnings, "cleaning up after the deployment: "+err.Error())
	}
	return nil
}

// commit makes the new files final. When it fails, the journal says for
// certain that they are not.
func (t *transaction) commit() error {
	err := t.mark(committed)
	if unsure, ok := errors.AsType[*unsureError](err); ok {
		if again := t.mark(swapping); again != nil {
			// A rollback under a record that may say "committed" could end
			// in a mix. So the new files stay, which are good ones.
			return &connector.BrokenError{Cause: unsure, Rollback: again, Backups: t.setPath(&t.record)}
		}
	}
	return err
}

// mark moves the transaction to another phase, durably.
func (t *transaction) mark(p phase) error {
	r := t.record
	r.Phase = p
	r.Files = nil
	for _, f := range t.files {
		r.Files = append(r.Files, f.entry)
	}
	if err := t.save(&r); err != nil {
		return err
	}
	t.record = r
	return nil
}

// finish cleans up behind a committed transaction.
func (s *Store) finish(r *record) error {
	if err := s.prune(r.Target, r.Keep); err != nil {
		return err
	}
	// A record that could not be followed is settled: every file is new.
	if err := s.disk.remove(s.journal, r.Target+asideSuffix); err != nil {
		return err
	}
	return s.forget(r.Target)
}

// activate makes the server use the new files.
func (t *transaction) activate(ctx context.Context) error {
	if t.tx.Validate != nil {
		if err := t.command(ctx, t.tx.Validate); err != nil {
			return fmt.Errorf("validate failed: %w", err)
		}
	}
	if t.tx.Reload != nil || t.tx.Apply != nil {
		t.told = true
	}
	if t.tx.Reload != nil {
		if err := t.command(ctx, t.tx.Reload); err != nil {
			return fmt.Errorf("reload failed: %w", err)
		}
	}
	if err := t.call(ctx, t.tx.Apply); err != nil {
		return fmt.Errorf("reload failed: %w", err)
	}
	return t.verify(ctx)
}

func (t *transaction) verify(ctx context.Context) error {
	if err := t.call(ctx, t.tx.Verify); err != nil {
		return fmt.Errorf("verification failed: %w", err)
	}
	// The last moment at which a cancelled deployment is undone.
	return cancelled(ctx)
}

func cancelled(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return fmt.Errorf("deployment cancelled: %w", context.Cause(ctx))
}

// command runs one command. The policy was asked when it was made.
func (s *Store) command(ctx context.Context, c *policy.Command) error {
	if err := cancelled(ctx); err != nil {
		return err
	}
	if err := s.disk.step(step{op: "run", path: c.Argv[0]}); err != nil {
		return err
	}
	return s.opts.Run(ctx, *c)
}

// call runs a connector's function, if there is one. A panic in it must not
// leave the new files in place unproven.
func (t *transaction) call(ctx context.Context, f func(context.Context) error) (err error) {
	if f == nil {
		return nil
	}
	if err := cancelled(ctx); err != nil {
		return err
	}
	if err := t.disk.step(step{op: "run", path: "connector"}); err != nil {
		return err
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f(ctx)
}

// abort ends a transaction that has put nothing in place.
func (t *transaction) abort(cause error) error {
	return errors.Join(fmt.Errorf("%w; nothing was changed", cause), t.discard(t.files, &t.record))
}

// rollBack puts the old files back after cause.
func (t *transaction) rollBack(ctx context.Context, cause error) error {
	if err := t.putAllBack(&t.record, t.files); err != nil {
		return &connector.BrokenError{Cause: cause, Rollback: err, Backups: t.setPath(&t.record)}
	}
	// Whatever of the rest fails is done once more at the next start.
	if err := t.settleOld(&t.record); err != nil {
		t.log.Warn("cleaning up after a rollback failed", "error", err)
	}
	cause = fmt.Errorf("%w; %s", cause, t.outcome())
	if err := t.tellOld(ctx); err != nil {
		return fmt.Errorf("%w, but the server could not be made to load that: %w", cause, err)
	}
	if err := t.forget(t.tx.Target); err != nil {
		t.log.Warn("cleaning up after a rollback failed", "error", err)
	}
	return cause
}

// tellOld makes the server use the old files again.
func (t *transaction) tellOld(ctx context.Context) error {
	if !t.told && !slices.ContainsFunc(t.files, func(f *dest) bool { return f.placed }) {
		return nil
	}
	wait := undoWait
	if t.tx.Reload != nil {
		wait += t.tx.Reload.Timeout
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), wait)
	defer cancel()
	if t.tx.Reload != nil {
		if err := t.command(ctx, t.tx.Reload); err != nil {
			return err
		}
	}
	if t.tx.Undo != nil {
		return t.call(ctx, t.tx.Undo)
	}
	return t.call(ctx, t.tx.Apply)
}

// outcome says what a rollback left, for the end of an error.
func (t *transaction) outcome() string {
	switch {
	case t.record.hadFiles():
		return "the previous certificate is back in place"
	case len(t.tx.Files) > 0:
		return "there was no certificate before, so the new files were removed"
	}
	return "the files are as before"
}
