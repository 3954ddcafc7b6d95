package transaction

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
)

// TestFailingStepIsReported: if any step fails, the deployment fails or has a warning.
func TestFailingStepIsReported(t *testing.T) {
	for _, inPlace := range []bool{false, true} { // a mounted file cannot be renamed over: it is overwritten in place
		for at := 1; ; at++ {
			w := newWorld(t, needs.MemoryDir(t))
			w.old(t)
			mount := func(Step) error { return nil }
			if inPlace {
				mount = mounted(w.path("site/cert.pem"))
			}
			n := 0
			var failed Step
			e := w.mustEngine(t, nil)
			e.disk.before = func(s Step) error {
				if n++; n == at {
					failed = s
					return syscall.EIO
				}
				return mount(s)
			}
			tx := w.renewal()
			tx.Verify = func(context.Context) error { return nil }
			result, err := e.deploy(t.Context(), tx)
			if n < at {
				if at < 50 {
					t.Errorf("a deployment has %d steps: the test does not see them any more", n)
				}
				break
			}
			if err == nil && len(result.Warnings) == 0 {
				t.Errorf("in place %t, step %d, %s of %s: it failed, and there is neither an error nor a warning", inPlace, at, failed.Op, failed.Path)
			}
		}
	}
}

// TestDescriptors: an idle agent must not depend on the garbage collector to close files.
func TestDescriptors(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("counts descriptors in /proc")
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		check(t, err)
		return len(list)
	}
	w := newWorld(t, needs.MemoryDir(t))
	w.old(t)
	before := count()
	for _, steps := range []int{0, 5, 20, 40, 60} {
		n := 0
		state, err := w.engine(func(Step) error {
			if n++; n == steps {
				return syscall.EIO
			}
			return nil
		})
		check(t, err)
		state.deploy(t.Context(), w.renewal())
		state.disk.before = nil
		if _, err := state.Recover(t.Context()); err != nil {
			t.Errorf("failure of step %d: %v", steps, err)
		}
		check(t, state.Close())
		check(t, state.opts.State.Close())
		w.old(t)
		if after := count(); after != before {
			t.Errorf("failure of step %d: %d descriptors are open, %d were before", steps, after, before)
		}
	}
}

// TestSetThatStays: if an old backup set cannot be removed, a warning names it, and the next start
// tries again.
func TestSetThatStays(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	busy := "state/backups/t1/00000007-20260101T000000Z"
	check(t, os.MkdirAll(filepath.Join(w.path(busy), "not", "empty"), 0o700))
	e := w.mustEngine(t, nil)
	result, err := e.deploy(t.Context(), w.renewal())
	if err != nil || len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], busy) {
		t.Errorf("got %v, %q, want a warning about %s", err, result.Warnings, busy)
	}
	if len(w.journal(t)) == 0 {
		t.Error("the journal has no record of the cleanup that is left")
	}
	check(t, os.RemoveAll(w.path(busy)))
	if _, err := e.Recover(t.Context()); err != nil {
		t.Error(err)
	}
	if left := w.journal(t); len(left) > 0 {
		t.Errorf("the journal still has %v", left)
	}
	if got := w.condition(false); got != "new" {
		t.Errorf("in place: %s", got)
	}
}

// TestFailingStepOfRecovery: a recovery of which a step fails is reported as failed, and succeeds
// when it is tried again.
func TestFailingStepOfRecovery(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		for at := 1; ; at++ {
			w := newWorld(t, needs.MemoryDir(t))
			w.old(t)
			w.crash(t, afterSwap)
			if damaged {
				w.write(t, "state/journal/t1.json", []byte("{}"), 0o600)
			}
			n := 0
			var failed, last Step
			e := w.mustEngine(t, func(s Step) error {
				last = s
				if n++; n == at {
					failed = s
					return syscall.EIO
				}
				return nil
			})
			n = 0
			found, err := e.Recover(t.Context())
			if n < at {
				if at < 2 {
					t.Errorf("damaged %t: a recovery has %d steps", damaged, n)
				}
				if last.Op != "syncdir" {
					t.Errorf("damaged %t: the last step is %s of %s: a power cut could take it back", damaged, last.Op, last.Path)
				}
				break
			}
			if err == nil && len(found.Failed) == 0 {
				t.Errorf("damaged %t, step %d, %s of %s: it failed, and the recovery did not", damaged, at, failed.Op, failed.Path)
			}
			e.disk.before = nil
			if err := e.Repair(t.Context(), t.Context()); err != nil {
				t.Errorf("damaged %t, step %d: %v", damaged, at, err)
			}
		}
	}
}

// TestRepairDuringRecovery: Repair waits for a recovery that does not reload, and reloads then.
func TestRepairDuringRecovery(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	synctest.Test(t, func(t *testing.T) {
		e := w.mustEngine(t, nil)
		e.disk.before = func(Step) error { time.Sleep(100 * time.Millisecond); return nil }
		reloads := 0
		e.opts.Run = func(_ context.Context, c policy.Command) error {
			if c.Argv[0] == "reload" {
				reloads++
			}
			return nil
		}
		f := e.startRecovery(t.Context(), t.Context(), "t1", false)
		time.Sleep(10 * time.Millisecond)
		check(t, e.Repair(t.Context(), t.Context()))
		<-f.done
		if reloads != 1 {
			t.Errorf("%d reloads, want 1", reloads)
		}
		if left := w.journal(t); len(left) > 0 {
			t.Errorf("the journal still has %v", left)
		}
		w.want(t, false, "old")
	})
}

// TestConcernsNothing: another deployment has settled the record in the meantime.
func TestConcernsNothing(t *testing.T) {
	w := newWorld(t, t.TempDir())
	e := w.mustEngine(t, nil)
	for _, recorded := range []string{"t1", "t2"} {
		if e.concerns(recorded, "t1", w.path("keys/c1.key")) {
			t.Errorf("the record of %s concerns t1, and is not there", recorded)
		}
	}
}

func TestPatience(t *testing.T) {
	if got := maxHeld(nil); got != lockWait {
		t.Errorf("without yield it waits %v, want %v", got, lockWait)
	}
	if got := maxHeld(func(func(context.Context) error) error { return nil }); got != stuckAfter {
		t.Errorf("with yield it waits %v, want %v", got, stuckAfter)
	}
}

// TestReloadOnceWhileChangesWait: the record of a change elsewhere stays until the next deployment,
// but the reload after the rollback of the files runs only once.
func TestReloadOnceWhileChangesWait(t *testing.T) {
	w, _ := interrupted(t, "run")
	reloads := 0
	for range 3 { // starts of the agent
		e := w.mustEngine(t, nil)
		e.opts.Run = func(_ context.Context, c policy.Command) error {
			if c.Argv[0] == "reload" {
				reloads++
			}
			return nil
		}
		if _, err := e.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		check(t, e.Repair(t.Context(), t.Context()))
		if len(w.journal(t)) == 0 {
			t.Error("the record of the change elsewhere is gone")
		}
	}
	if reloads != 1 {
		t.Errorf("%d reloads, want 1", reloads)
	}
}

// TestCancelledReloadIsOwed: if the agent stops before the reload, a later Repair reloads.
func TestCancelledReloadIsOwed(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	e := w.mustEngine(t, nil)
	reloads := 0
	e.opts.Run = func(_ context.Context, c policy.Command) error {
		if c.Argv[0] == "reload" {
			reloads++
		}
		return nil
	}
	if _, err := e.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := e.Repair(t.Context(), ended); err == nil || reloads > 0 {
		t.Errorf("while the agent ends: %v, %d reloads", err, reloads)
	}
	if err := e.command(ended, &policy.Command{Argv: []string{"reload"}}); err == nil || reloads > 0 {
		t.Errorf("a command after the end: %v, %d reloads", err, reloads)
	}
	check(t, e.Repair(t.Context(), t.Context()))
	if reloads != 1 {
		t.Errorf("%d reloads, want 1", reloads)
	}
}
