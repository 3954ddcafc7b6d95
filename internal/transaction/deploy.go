package transaction

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
)

// lateWait bounds each step of a rollback, and each step after the commit, because cancelling the
// deployment does not stop them: Restore, Finish, and the reload on top of the timeout of its
// command.
const lateWait = time.Minute

// attempt is one try to carry out a deployment. Its method deploy has the steps in their order.
type attempt struct {
	*Engine
	Deployment
	last   bool // a stale plan is final: it is not made again, and no further attempt follows
	alone  bool // does not share a reload
	log    *slog.Logger
	plan   *connector.Plan
	result Result

	record  record
	files   []*dest    // in the order of record.Files
	changes []*change  // in the order of the plan
	locked  *dirLocks  // on the directories of the files
	ready   *readiness // nil until the attempt is ready to share a reload
	clean   bool       // the target's last deployment left nothing to do
	loaded  bool       // the server may have loaded the new files
}

// Deploy carries out one deployment. If it fails, the target is as it was before, unless the error
// is a BrokenError. Cancelling ctx before the commit rolls the deployment back.
func (e *Engine) Deploy(ctx context.Context, d Deployment) (Result, error) {
	release, err := acquire(ctx, &e.targetLocks, string(d.Target), maxHeld(d.Yield), d.Yield)
	if err != nil {
		return Result{}, &BusyError{Lock: "target " + string(d.Target), Err: fmt.Errorf("wait for another deployment of target %s: %w", d.Target, err)}
	}
	defer release()
	for last, alone := false, false; ; {
		a := &attempt{Engine: e, Deployment: d, last: last, alone: alone, log: e.opts.Log.With("target", d.Target)}
		err := a.deploy(ctx)
		together, failedTogether := errors.AsType[*sharedReloadError](err)
		_, broken := errors.AsType[*BrokenError](err)
		switch {
		case errors.Is(err, errConflictOver):
			// The other deployment may have changed the files, so the plan is made again.
		case failedTogether && !broken && a.waitForAll(ctx, together) == nil:
			a.log.Info("a reload shared by several deployments failed: trying each one alone", "error", err)
			alone = true
		case errors.Is(err, errStale) && !a.last:
			// This attempt has made the plan twice (see replan). One more bounds the work if others
			// keep changing the files that it is made from.
			last = true
		default:
			return a.result, err
		}
	}
}

func (a *attempt) deploy(ctx context.Context) error {
	if err := a.settle(ctx); err != nil {
		return err
	}
	if err := a.makePlan(ctx); err != nil {
		return a.abandon(ctx, err)
	}
	defer func() { closeAll(a.files) }()
	err := a.resolve()
	if err != nil {
		return a.abandon(ctx, err)
	}
	if a.locked, err = a.lock(ctx, directories(a.files), a.Yield); err != nil {
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
	if err := a.checkUnsettled(); err != nil {
		return err
	}
	err = a.inspect(ctx)
	if errors.Is(err, errStale) && !a.last {
		err = a.replan(ctx, err)
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
		// The server has never loaded the files. A deployment makes it do so.
		a.log.Info("files are up to date but not in use: deploying again", "error", err)
	}
	return a.run(ctx)
}

// makePlan asks the connector for the plan. If the connector refuses, the plan is empty, but it
// still has the changes that an interrupted deployment owes: abandon may have to undo them.
func (a *attempt) makePlan(ctx context.Context) error {
	plan, refused := a.Connector.Plan(ctx, a.Material)
	if refused != nil {
		plan = new(connector.Plan)
	}
	a.setPlan(plan)
	// The first error decides: with a BusyError the job is retried, and the changes stay owed.
	return cmp.Or(a.collectChanges(), refused)
}

func (a *attempt) setPlan(plan *connector.Plan) {
	a.plan = plan
	a.result = Result{Warnings: slices.Clone(plan.Warnings), Serves: plan.Serves}
}

// replan makes the plan again while the directories are locked, so that no other deployment can
// change the files that it depends on: several targets may share a key store. If the new plan has
// other files or any changes, it returns stale, and the next attempt starts from the beginning.
func (a *attempt) replan(ctx context.Context, stale error) error {
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
	a.setPlan(plan)
	return a.inspect(ctx)
}

// settle recovers the target's earlier deployment, if that was interrupted, and takes over the
// work that it still owes.
func (a *attempt) settle(ctx context.Context) error {
	r, err := a.load(string(a.Target))
	if r != nil && r.Phase != restored || err != nil {
		if _, err := a.recoverRecord(ctx, a.Target, r, err); err != nil {
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

// checkUnsettled refuses files that the recovery of another target has yet to restore: that
// recovery would remove the new files, or fail because it does not know them.
func (a *attempt) checkUnsettled() error {
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
		return unsettledError(id, errors.New("it shares a file with this deployment"))
	}
	return nil
}

// shares reports whether the record has one of the files, too.
func (r *record) shares(files []*dest) bool {
	return slices.ContainsFunc(files, func(f *dest) bool {
		return slices.ContainsFunc(r.Files, func(e fileRecord) bool { return e.Dir == f.Dir && e.Name == f.Name })
	})
}

// unsettledError returns the error of a deployment that must wait until an interrupted deployment
// of target id is settled.
func unsettledError(id string, err error) error {
	return &BusyError{Err: fmt.Errorf("an earlier deployment of target %s was interrupted and has not been recovered yet: %w", id, err)}
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

// inspect reads what is in place and fills in the journal record.
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
	if err := checkDistinct(a.files); err != nil {
		return err
	}
	for _, f := range a.files {
		if err := a.guard(f); err != nil {
			return err
		}
	}
	if err := a.inspectChanges(ctx); err != nil {
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

// unchanged reports whether everything is up to date.
func (a *attempt) unchanged() bool {
	return a.clean && !slices.ContainsFunc(a.files, func(f *dest) bool { return !f.upToDate() }) &&
		!slices.ContainsFunc(a.changes, func(c *change) bool { return !c.same })
}

// run carries out the steps that change the target.
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
		// The next deployment or the next start removes the rest.
		a.result.Warnings = append(a.result.Warnings, "cleaning up after the deployment: "+err.Error())
	}
	a.finishChanges(ctx)
	a.result.Warnings = append(a.result.Warnings, a.plan.Caveats...)
	return nil
}

// commit makes the new files final. If it fails, a rollback follows, so it makes sure that the
// journal does not say "committed".
func (a *attempt) commit(context.Context) error {
	err := a.setPhase(committed)
	if unsure, ok := errors.AsType[*unsyncedError](err); ok {
		if again := a.setPhase(swapping); again != nil {
			// The journal may say "committed". If a crash interrupted a rollback now, recovery
			// would leave a mix of old and new files. So the new files stay: they work.
			return &BrokenError{Cause: unsure, Rollback: again, Backups: a.setPath(&a.record)}
		}
	}
	return err
}

// setPhase records durably that the deployment has entered a phase.
func (a *attempt) setPhase(p phase) error {
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

// cleanUp removes what a committed deployment no longer needs: surplus backups and its record.
func (e *Engine) cleanUp(r *record) error {
	if err := e.prune(r.Target, r.Keep); err != nil {
		return err
	}
	// Every file is new, so an earlier record that was set aside does not matter any more.
	if err := e.disk.remove(e.journal, asideName(r.Target)); err != nil {
		return err
	}
	return e.removeRecord(r.Target)
}

// activate makes the server use the new files, and verifies that it does.
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
		time.Sleep(a.plan.Reload.Wait) // not cancellable: a rollback, too, must not change files during a reload
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
	// This is the last point at which cancelling the deployment rolls it back.
	return cancelled(ctx)
}

func cancelled(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return fmt.Errorf("deployment cancelled: %w", context.Cause(ctx))
}

// command runs one command. The policy has allowed it, or there would be no policy.Command.
func (e *Engine) command(ctx context.Context, c *policy.Command) error {
	if err := cancelled(ctx); err != nil {
		return err
	}
	if err := e.disk.step(Step{Op: "run", Path: c.Argv[0]}); err != nil {
		return err
	}
	return e.opts.Run(ctx, *c)
}

// call runs f, a function of the connector or of the caller, unless it is nil.
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
	return catchPanic(func() error { return f(ctx) })
}

// detached calls f with a context that ends after wait, even if ctx has been cancelled.
func detached(ctx context.Context, wait time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), wait)
	defer cancel()
	return catchPanic(func() error { return f(ctx) })
}

// catchPanic calls f and turns a panic into an error, so that a bug in a connector causes a
// rollback too.
func catchPanic(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

// abandon ends a deployment that has not begun. If the job is over, it undoes the changes that an
// earlier, interrupted deployment still owes. If the job will be retried, they stay owed.
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
		return errors.Join(cause, a.removeRecord(a.Target), a.dropSets(a.Target, r.Set))
	}
	// The reload is still owed: Repair or the next deployment runs it.
	return errors.Join(cause, a.save(r), a.dropSets(a.Target, r.Set))
}

// abort ends a deployment whose staging failed: nothing is in place yet.
func (a *attempt) abort(ctx context.Context, cause error) error {
	cause = fmt.Errorf("%w; nothing was changed", cause)
	if err := a.discard(a.files, &a.record); err != nil {
		return errors.Join(cause, err)
	}
	return a.abandon(ctx, cause)
}

// rollBack undoes everything that the deployment has done. It returns cause, with the result of
// the rollback added.
func (a *attempt) rollBack(ctx context.Context, cause error) error {
	if _, broken := errors.AsType[*BrokenError](cause); broken {
		return cause
	}
	a.retakeTurn(ctx)
	err := a.restoreChanges(ctx)
	if foreign := foreignFiles(a.files); foreign != nil {
		err = errors.Join(err, foreign, a.removeTemporaries(a.files))
	} else {
		err = errors.Join(err, a.restoreFiles(&a.record, a.files))
	}
	if err != nil {
		return &BrokenError{Cause: cause, Rollback: err, Backups: a.setPath(&a.record)}
	}
	cause = fmt.Errorf("%w; %s", cause, a.rolledBackTo())
	// The next start repeats what fails from here on.
	if err := a.recordRestored(&a.record, nil); err != nil {
		a.log.Warn("cleaning up after a rollback failed", "error", err)
	}
	if err := a.reloadOld(ctx); err != nil {
		cause = fmt.Errorf("%w, but the server could not be reloaded", cause)
		if strings.HasPrefix(cause.Error(), "reload failed: "+err.Error()+";") {
			return fmt.Errorf("%w, for the same reason", cause) // the reason may be long
		}
		return fmt.Errorf("%w: %w", cause, err)
	}
	if err := a.removeRecord(a.Target); err != nil {
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
	err := detached(ctx, wait, a.reload)
	if err == nil {
		time.Sleep(a.plan.Reload.Wait)
	}
	return err
}

// rolledBackTo describes the state after a rollback, for the error.
func (a *attempt) rolledBackTo() string {
	switch {
	case a.record.hadAny():
		return "the previous certificate is back in place"
	case len(a.plan.Changes) > 0:
		return "there was no certificate before, so the new one was removed"
	}
	return "there was no certificate before, so the new files were removed"
}
