package transaction

import (
	"cmp"
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

const (
	// lateWait bounds what a rollback, or a deployment behind its commit, asks of
	// others, which no cancelled context stops: each Restore and Finish, and the
	// reload beyond what its command may take by itself.
	lateWait = time.Minute

	// maxPlans bounds how often a plan is made again because somebody else
	// changed what it was made from.
	maxPlans = 3
)

// attempt is one deployment under way.
type attempt struct {
	*Engine
	Deployment
	last   bool // no plan is made after this one
	alone  bool // it shares no reload
	log    *slog.Logger
	plan   *connector.Plan
	result Result

	record  record
	files   []*dest    // in the order of record.Files
	changes []*change  // in the order of the plan
	hold    *hold      // the directories of the files
	ready   *readiness // nil: it shares no reload, or not yet
	clean   bool       // the target's last deployment ended clean
	loaded  bool       // the server may have read the new files
}

// Deploy carries out one deployment. When it fails, the target is as it was
// before, unless the error is a BrokenError. A cancelled context rolls back.
func (e *Engine) Deploy(ctx context.Context, d Deployment) (Result, error) {
	release, err := acquire(ctx, &e.targets, string(d.Target), patience(d.Yield), d.Yield)
	if err != nil {
		return Result{}, &BusyError{Place: "target " + string(d.Target), Err: fmt.Errorf("wait for another deployment of target %s: %w", d.Target, err)}
	}
	defer release()
	for try, alone := 1, false; ; {
		a := &attempt{Engine: e, Deployment: d, last: try == maxPlans-1, alone: alone, log: e.opts.Log.With("target", d.Target)}
		err := a.deploy(ctx)
		together, failedTogether := errors.AsType[*togetherError](err)
		_, broken := errors.AsType[*BrokenError](err)
		switch {
		case errors.Is(err, errConflictEnded):
		case failedTogether && !broken && a.waitForAll(ctx, together) == nil:
			a.log.Info("a reload for several deployments failed: trying each by itself", "error", err)
			alone = true
		case errors.Is(err, errStale) && !a.last:
			try++
		default:
			return a.result, err
		}
	}
}

func (a *attempt) deploy(ctx context.Context) error {
	if err := a.resume(ctx); err != nil {
		return err
	}
	var err error
	if a.plan, err = a.Connector.Plan(ctx, a.Material); err != nil {
		a.plan = new(connector.Plan)
	}
	a.result = Result{Warnings: slices.Clone(a.plan.Warnings), Serves: a.plan.Serves}
	if err := cmp.Or(a.adopt(), err); err != nil {
		return a.abandon(ctx, err)
	}
	defer func() { closeAll(a.files) }()
	if err := a.resolve(); err != nil {
		return a.abandon(ctx, err)
	}
	if a.hold, err = a.lock(ctx, directories(a.files), a.Yield); err != nil {
		return a.abandon(ctx, err)
	}
	defer a.leave()
	releaseChanges, err := a.lockChanges(ctx)
	defer releaseChanges()
	if err != nil {
		return a.abandon(ctx, err)
	}
	if other := a.conflicting(); other != nil {
		return a.waitForEnd(ctx, other)
	}
	if err := a.contested(); err != nil {
		return err
	}
	err = a.inspect(ctx)
	if errors.Is(err, errStale) && !a.last {
		err = a.planAgain(ctx, err)
	}
	if err != nil {
		return a.abandon(ctx, err)
	}
	if a.unchanged() {
		err := a.verify(ctx)
		if err == nil {
			a.result.Unchanged = true
			a.finishChanges(ctx)
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
		// The files are right and the server does not serve them: it was never
		// told, and telling it is what a deployment does.
		a.log.Info("files are in place but not in use: deploying again", "error", err)
	}
	return a.run(ctx)
}

// planAgain makes the plan again under the lock of its directories, where no
// other deployment can change what it is made from: several targets may have one
// key store. A plan of other files is for the next attempt.
func (a *attempt) planAgain(ctx context.Context, stale error) error {
	plan, err := a.Connector.Plan(ctx, a.Material)
	if err != nil {
		return err
	}
	files := a.files[len(a.Promotion):]
	if len(a.changes) > 0 || len(plan.Changes) > 0 ||
		!slices.EqualFunc(files, plan.Files, func(f *dest, again connector.File) bool { return f.Path == again.Path }) {
		return stale
	}
	for i, file := range plan.Files {
		files[i].file, files[i].data, files[i].New = file, file.Data, digestOf(file.Data)
	}
	a.plan = plan
	a.result = Result{Warnings: slices.Clone(plan.Warnings), Serves: plan.Serves}
	return a.inspect(ctx)
}

// resume ends the target's earlier deployment, if it did not end.
func (a *attempt) resume(ctx context.Context) error {
	r, err := a.load(string(a.Target))
	if r != nil && r.Phase != restored || err != nil {
		if _, err := a.recoverLoaded(ctx, a.Target, r, err); err != nil {
			return unsettledError(string(a.Target), err)
		}
		if r, err = a.load(string(a.Target)); err != nil {
			return err
		}
	}
	if r != nil {
		a.record.Owed = &owed{Command: r.Reload, Changes: r.Changes, Set: r.Set}
	}
	a.clean = r == nil && !a.isAside(a.Target)
	return nil
}

// contested refuses files that the recovery of another target has yet to put
// back: it would find there what it does not know, or take the new ones away.
func (a *attempt) contested() error {
	ids, err := a.recorded()
	if err != nil {
		return err
	}
	for _, id := range ids {
		if id == string(a.Target) {
			continue
		}
		if r, err := a.load(id); err != nil || r == nil || r.Phase != swapping || !r.shares(a.files) {
			continue
		}
		return unsettledError(id, errors.New("it has a file in common with this one"))
	}
	return nil
}

// shares reports whether one of the files is the record's too.
func (r *record) shares(files []*dest) bool {
	return slices.ContainsFunc(files, func(f *dest) bool {
		return slices.ContainsFunc(r.Files, func(e fileRecord) bool { return e.Dir == f.Dir && e.Name == f.Name })
	})
}

// unsettledError holds a deployment back until the one of target id that a
// crash or a failure interrupted is settled.
func unsettledError(id string, err error) error {
	return &BusyError{Err: fmt.Errorf("an earlier deployment of target %s was interrupted and is not undone yet: %w", id, err)}
}

func (a *attempt) resolve() error {
	for _, promoted := range a.Promotion {
		f, err := openPrivate(promoted)
		if err != nil {
			return err
		}
		a.files = append(a.files, f)
	}
	rules := a.opts.Policy.Look()
	for _, file := range a.plan.Files {
		f, err := openFile(file, rules)
		if err != nil {
			return err
		}
		a.files = append(a.files, f)
	}
	return nil
}

// inspect reads what is in place, and drafts the journal record.
func (a *attempt) inspect(ctx context.Context) error {
	a.record.Target, a.record.Reload = a.Target, a.plan.Reload.Command
	if a.record.Keep = a.Backups; a.record.Keep == 0 {
		a.record.Keep = a.opts.Retention
	}
	for i, f := range a.files {
		warning, err := f.inspect(i)
		if err != nil {
			return err
		}
		if warning != "" {
			a.result.Warnings = append(a.result.Warnings, warning)
		}
	}
	if err := distinct(a.files); err != nil {
		return err
	}
	for _, f := range a.files {
		if err := a.guard(f); err != nil {
			return err
		}
	}
	if err := a.readChanges(ctx); err != nil {
		return err
	}
	if !slices.ContainsFunc(a.files, func(f *dest) bool { return f.Old != nil }) &&
		!slices.ContainsFunc(a.changes, func(c *change) bool { return c.was != nil }) {
		return nil
	}
	var err error
	a.record.Set, err = a.nextSet(a.Target)
	return err
}

// unchanged reports whether there is nothing to do.
func (a *attempt) unchanged() bool {
	return a.clean && !slices.ContainsFunc(a.files, func(f *dest) bool { return !f.upToDate() }) &&
		!slices.ContainsFunc(a.changes, func(c *change) bool { return !c.same })
}

// run does everything that changes something.
func (a *attempt) run(ctx context.Context) error {
	if err := a.stage(ctx); err != nil {
		return a.abort(ctx, err)
	}
	for _, step := range []func(context.Context) error{a.swap, a.writeChanges, a.activate, a.commit} {
		if err := step(ctx); err != nil {
			return a.rollBack(ctx, err)
		}
	}
	if err := a.cleanUp(&a.record); err != nil {
		// Whatever is left is removed by the next deployment or start.
		a.result.Warnings = append(a.result.Warnings, "cleaning up after the deployment: "+err.Error())
	}
	a.finishChanges(ctx)
	a.result.Warnings = append(a.result.Warnings, a.plan.Caveats...)
	return nil
}

// commit makes the new files final. When it fails, the journal says for
// certain that they are not.
func (a *attempt) commit(context.Context) error {
	err := a.mark(committed)
	if unsure, ok := errors.AsType[*unsureError](err); ok {
		if again := a.mark(swapping); again != nil {
			// A rollback under a record that may say "committed" could end
			// in a mix. So the new files stay, which are good ones.
			return &BrokenError{Cause: unsure, Rollback: again, Backups: a.setPath(&a.record)}
		}
	}
	return err
}

// mark moves the deployment to another phase, durably.
func (a *attempt) mark(p phase) error {
	r := a.record
	r.Phase = p
	r.Files, r.Changes = nil, nil
	for _, f := range a.files {
		r.Files = append(r.Files, f.fileRecord)
	}
	for _, c := range a.changes {
		if c.written || !c.same {
			r.Changes = append(r.Changes, c.changeRecord)
		}
	}
	if err := a.save(&r); err != nil {
		return err
	}
	a.record = r
	return nil
}

// cleanUp ends the journal of a committed deployment.
func (e *Engine) cleanUp(r *record) error {
	if err := e.prune(r.Target, r.Keep); err != nil {
		return err
	}
	// A record that could not be followed is settled: every file is new.
	if err := e.disk.remove(e.journal, asideName(r.Target)); err != nil {
		return err
	}
	return e.forget(r.Target)
}

// activate makes the server use the new files.
func (a *attempt) activate(ctx context.Context) error {
	if a.plan.Validate != nil {
		if err := a.command(ctx, a.plan.Validate); err != nil {
			return fmt.Errorf("validate failed: %w", err)
		}
	}
	if a.plan.Reload.Command != nil || a.plan.Reload.Call != nil {
		a.loaded = true
		if err := a.reloadShared(ctx); err != nil {
			return fmt.Errorf("reload failed: %w", err)
		}
	}
	if a.Verify == nil {
		time.Sleep(a.plan.Reload.Wait) // no cancellation cuts it short: a rollback changes the files too
		return cancelled(ctx)
	}
	err := a.verify(ctx)
	if err != nil {
		time.Sleep(a.plan.Reload.Wait)
	}
	return err
}

func (a *attempt) reload(ctx context.Context) error {
	if a.plan.Reload.Command != nil {
		if err := a.command(ctx, a.plan.Reload.Command); err != nil {
			return err
		}
	}
	return a.call(ctx, a.plan.Reload.Call)
}

func (a *attempt) verify(ctx context.Context) error {
	if err := a.call(ctx, a.Verify); err != nil {
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
func (e *Engine) command(ctx context.Context, c *policy.Command) error {
	if err := cancelled(ctx); err != nil {
		return err
	}
	if err := e.disk.step(Step{Op: "run", Path: c.Argv[0]}); err != nil {
		return err
	}
	return e.opts.Run(ctx, *c)
}

// call runs a function that is not the engine's, if there is one.
func (a *attempt) call(ctx context.Context, f func(context.Context) error) error {
	if f == nil {
		return nil
	}
	if err := cancelled(ctx); err != nil {
		return err
	}
	if err := a.disk.step(Step{Op: "run", Path: "connector"}); err != nil {
		return err
	}
	return contain(func() error { return f(ctx) })
}

// regardless calls f, which ends by wait and not by the end of ctx.
func regardless(ctx context.Context, wait time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), wait)
	defer cancel()
	return contain(func() error { return f(ctx) })
}

// contain makes an error of a panic, which must not leave anything in place
// unproven.
func contain(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

// abandon ends a deployment that has not begun. One before it may have been
// interrupted by a crash between its changes and their undo: they are undone
// now, since the job is over. One that is to be tried again leaves them owed.
func (a *attempt) abandon(ctx context.Context, cause error) error {
	owed := a.record.Owed
	_, busy := errors.AsType[*BusyError](cause)
	again := busy || ctx.Err() != nil || errors.Is(cause, errStale) && !a.last
	if again || owed == nil || len(owed.Changes) == 0 {
		return cause
	}
	r := &record{Target: a.Target, Phase: restored, Set: owed.Set, Reload: owed.Command}
	if err := a.restoreChanges(ctx); err != nil {
		return &BrokenError{Cause: cause, Rollback: err, Backups: a.setPath(r)}
	}
	if owed.Command == nil && a.plan.Reload.Call == nil {
		return errors.Join(cause, a.forget(a.Target), a.dropSets(a.Target, r.Set))
	}
	return errors.Join(cause, a.save(r), a.dropSets(a.Target, r.Set))
}

// abort ends a deployment that has put nothing in place.
func (a *attempt) abort(ctx context.Context, cause error) error {
	cause = fmt.Errorf("%w; nothing was changed", cause)
	if err := a.discard(a.files, &a.record); err != nil {
		return errors.Join(cause, err)
	}
	return a.abandon(ctx, cause)
}

// rollBack undoes everything after cause, unless that is beyond it.
func (a *attempt) rollBack(ctx context.Context, cause error) error {
	if _, broken := errors.AsType[*BrokenError](cause); broken {
		return cause
	}
	a.turnBack(ctx)
	err := errors.Join(a.restoreChanges(ctx), a.putAllBack(&a.record, a.files))
	if err != nil {
		return &BrokenError{Cause: cause, Rollback: err, Backups: a.setPath(&a.record)}
	}
	cause = fmt.Errorf("%w; %s", cause, a.rolledBackTo())
	// Whatever of the rest fails is done once more at the next start.
	if err := a.recordRestored(&a.record, nil); err != nil {
		a.log.Warn("cleaning up after a rollback failed", "error", err)
	}
	if err := a.reloadOld(ctx); err != nil {
		return fmt.Errorf("%w, but the server could not be made to load that: %w", cause, err)
	}
	if err := a.forget(a.Target); err != nil {
		a.log.Warn("cleaning up after a rollback failed", "error", err)
	}
	return cause
}

// reloadOld makes the server use the old files again.
func (a *attempt) reloadOld(ctx context.Context) error {
	if !a.loaded && !slices.ContainsFunc(a.files, func(f *dest) bool { return f.placed }) {
		return nil
	}
	wait := lateWait
	if a.plan.Reload.Command != nil {
		wait += a.plan.Reload.Command.Timeout
	}
	err := regardless(ctx, wait, a.reload)
	if err == nil {
		time.Sleep(a.plan.Reload.Wait)
	}
	return err
}

// rolledBackTo says what a rollback left, for the end of an error.
func (a *attempt) rolledBackTo() string {
	switch {
	case a.record.hadAny():
		return "the previous certificate is back in place"
	case len(a.plan.Changes) > 0:
		return "there was no certificate before, so the new one was removed"
	}
	return "there was no certificate before, so the new files were removed"
}
