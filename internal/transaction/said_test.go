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

// TestFailingStepIsSaid: no step that fails is passed over in silence, be it one
// that a deployment could do without.
func TestFailingStepIsSaid(t *testing.T) {
	for _, inPlace := range []bool{false, true} { // where a file is mounted alone, it is overwritten
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
				t.Errorf("in place %t, step %d, %s of %s: it failed, and nobody was told", inPlace, at, failed.Op, failed.Path)
			}
		}
	}
}

// TestDescriptors: the garbage collector would close what is forgotten, and an
// agent that does little collects little.
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

// TestSetThatStays: an old backup set that cannot be removed is named, and tried
// again.
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
		t.Error("the journal says that all is done")
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

// TestFailingStepOfRecovery: a step that fails while an interrupted deployment is
// undone, or set aside, keeps it from being called settled.
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
				t.Errorf("damaged %t, step %d, %s of %s: it failed, and the target counts as settled", damaged, at, failed.Op, failed.Path)
			}
			e.disk.before = nil
			if err := e.Repair(t.Context(), t.Context()); err != nil {
				t.Errorf("damaged %t, step %d: %v", damaged, at, err)
			}
		}
	}
}

// TestRepairDuringRecovery: a recovery that is under way without the reload is
// waited for, and the reload follows.
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

// TestConcernsNothing: a record that another deployment has settled meanwhile.
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
		t.Errorf("without a place to give away it waits %v, want %v", got, lockWait)
	}
	if got := maxHeld(func(func(context.Context) error) error { return nil }); got != stuckAfter {
		t.Errorf("with one it waits %v, want %v", got, stuckAfter)
	}
}

// TestReloadOnceWhileChangesWait: what an interrupted deployment changed elsewhere
// waits for the next one, and the reload that its files needed is done once.
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
			t.Error("nothing knows any more of what was changed elsewhere")
		}
	}
	if reloads != 1 {
		t.Errorf("%d reloads, want 1", reloads)
	}
}

// TestCancelledReloadIsOwed: a reload that the end of the agent prevents is not done.
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
