package transaction

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
)

// interrupted returns a world whose deployment was killed at the first step op, and whose files
// have been recovered since.
func interrupted(t *testing.T, op string) (world, *elsewhere) {
	t.Helper()
	w := newWorld(t, needs.MemoryDir(t))
	w.old(t)
	at := &elsewhere{values: map[string]string{"/a/one": "old"}}
	w.killed(t, w.remoteRenewal(at, "new"), op)
	return w, at
}

// killed kills a deployment at its first step op, and restarts the agent.
func (w world) killed(t *testing.T, tx Transaction, op string) {
	t.Helper()
	s, dead := w.mustEngine(t, nil), false
	s.disk.before = func(s Step) error {
		if dead = dead || s.Op == op; dead {
			return errKilled
		}
		return nil
	}
	if _, err := s.deploy(t.Context(), tx); !dead {
		t.Fatalf("not killed: %v", err)
	}
	_, err := w.mustEngine(t, nil).Recover(t.Context())
	check(t, err)
	w.want(t, false, "old")
}

var errRefused = errors.New("serves another certificate")

func refuse(tx Transaction) Transaction {
	tx.Verify = func(context.Context) error { return errRefused }
	return tx
}

func isBroken(err error) bool {
	_, broken := errors.AsType[*BrokenError](err)
	return broken
}

// TestOwedAndNotPlanned changes the configuration between a crash and the next deployment, so that
// nobody can undo the change. The error says so, and the change is undone once that is possible.
func TestOwedAndNotPlanned(t *testing.T) {
	t.Run("fails", func(t *testing.T) {
		w, at := interrupted(t, "run")
		s := w.mustEngine(t, nil)
		for range 2 {
			_, err := s.deploy(t.Context(), refuse(w.renewal()))
			if !isBroken(err) || !errors.Is(err, errRefused) || !strings.Contains(err.Error(), "/a/one: ") || !strings.Contains(err.Error(), w.path("state/backups/t1/")) {
				t.Errorf("got %v, want an error that names what is still changed and the backup", err)
			}
			w.want(t, false, "old")
			check(t, s.Repair(t.Context(), t.Context()))
		}
		_, err := s.deploy(t.Context(), refuse(w.remoteRenewal(at, "newer")))
		if err == nil || isBroken(err) || !maps.Equal(at.values, map[string]string{"/a/one": "old"}) {
			t.Errorf("planned again: %v, %v", err, at.values)
		}
		if left := append(w.journal(t), w.backups(t)...); len(left) > 0 {
			t.Errorf("left behind %q", left)
		}
	})
	t.Run("another one fails", func(t *testing.T) {
		w, at := interrupted(t, "run")
		tx := w.renewal()
		tx.Changes = []connector.Change{&remote{at, "two", "newer"}}
		if _, err := w.mustEngine(t, nil).deploy(t.Context(), refuse(tx)); !isBroken(err) || !maps.Equal(at.values, map[string]string{"/a/one": "new"}) {
			t.Errorf("got %v, %v", err, at.values)
		}
		if _, err := w.mustEngine(t, nil).deploy(t.Context(), refuse(w.remoteRenewal(at, "newer"))); err == nil || at.values["/a/one"] != "old" {
			t.Errorf("planned again: %v, %v", err, at.values)
		}
	})
	t.Run("is refused", func(t *testing.T) {
		w, at := interrupted(t, "run")
		tx := w.renewal()
		tx.Files[0].Path = "/etc/passwd"
		if _, err := w.mustEngine(t, nil).deploy(t.Context(), tx); !isBroken(err) || !strings.Contains(err.Error(), "/a/one: ") {
			t.Errorf("got %v, want an error that names what is still changed", err)
		}
		if _, err := w.mustEngine(t, nil).deploy(t.Context(), refuse(w.remoteRenewal(at, "newer"))); err == nil || at.values["/a/one"] != "old" {
			t.Errorf("planned again: %v, %v", err, at.values)
		}
	})
	t.Run("cannot plan", func(t *testing.T) {
		w, at := interrupted(t, "run")
		broken := errors.New("no answer")
		_, err := w.mustEngine(t, nil).Deploy(t.Context(), Deployment{Target: "t1", Connector: planError{broken}})
		if !isBroken(err) || !errors.Is(err, broken) || !strings.Contains(err.Error(), "/a/one: ") {
			t.Errorf("got %v, want an error that names what is still changed", err)
		}
		if _, err := w.mustEngine(t, nil).deploy(t.Context(), refuse(w.remoteRenewal(at, "newer"))); err == nil || at.values["/a/one"] != "old" {
			t.Errorf("planned again: %v, %v", err, at.values)
		}
	})
	t.Run("is killed", func(t *testing.T) {
		for _, op := range []string{"create", "write", "syncdir", "rename", "run"} {
			w, at := interrupted(t, "run")
			tx := w.renewal()
			tx.Verify = func(context.Context) error { return errRefused }
			w.killed(t, tx, op)
			if _, err := w.mustEngine(t, nil).deploy(t.Context(), refuse(w.remoteRenewal(at, "newer"))); err == nil || at.values["/a/one"] != "old" {
				t.Errorf("killed at %s, planned again: %v, %v", op, err, at.values)
			}
		}
	})
	t.Run("succeeds", func(t *testing.T) {
		w, _ := interrupted(t, "run")
		result, err := w.mustEngine(t, nil).deploy(t.Context(), w.renewal())
		check(t, err)
		w.want(t, false, "new")
		sets := w.backups(t)
		last := w.path("state/backups/t1/" + sets[len(sets)-1])
		if said := strings.Join(result.Warnings, " "); !strings.Contains(said, "/a/one") || !strings.Contains(said, last) {
			t.Errorf("warnings %q, want one that names the change and %s", said, last)
		}
		saved, err := filepath.Glob(last + "/*_a_one")
		check(t, err)
		if len(saved) != 1 {
			t.Errorf("its old value is not in the set: %q", saved)
		}
		if result, err := w.mustEngine(t, nil).deploy(t.Context(), w.renewal()); err != nil || !result.Unchanged {
			t.Errorf("once more: %+v, %v", result, err)
		}
	})
}

type planError struct{ error }

func (e planError) Plan(context.Context, *connector.Material) (*connector.Plan, error) {
	return nil, e.error
}

// TestOwedAndLost damages the backup of a change. The rollback then reports that it has failed.
func TestOwedAndLost(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"removed": os.Remove,
		"damaged": func(path string) error { return os.WriteFile(path, []byte("else"), 0o600) },
		"set":     func(path string) error { return os.RemoveAll(filepath.Dir(path)) },
	} {
		t.Run(name, func(t *testing.T) {
			w, at := interrupted(t, "run")
			saved, err := filepath.Glob(w.path("state/backups/t1/*/*_a_one"))
			check(t, err)
			check(t, damage(saved[0]))
			for range 2 {
				s := w.mustEngine(t, nil)
				_, err := s.deploy(t.Context(), refuse(w.remoteRenewal(at, "newer")))
				if !isBroken(err) || !strings.Contains(err.Error(), "/a/one: ") || strings.Contains(err.Error(), "back in place") {
					t.Errorf("got %v, want a failed rollback", err)
				}
				check(t, s.Repair(t.Context(), t.Context()))
				w.want(t, false, "old")
			}
			if _, err := w.mustEngine(t, nil).deploy(t.Context(), w.remoteRenewal(at, "newer")); err != nil || at.values["/a/one"] != "newer" {
				t.Errorf("the next one: %v, %v", err, at.values)
			}
			if left := w.journal(t); len(left) > 0 {
				t.Errorf("left behind %q", left)
			}
		})
	}
}

// TestOwedAndStale checks that the last stale plan ends the deployment like any other refusal.
func TestOwedAndStale(t *testing.T) {
	w, at := interrupted(t, "run")
	tx := w.remoteRenewal(at, "newer")
	tx.Files[1].From = []byte("what is not there")
	if _, err := w.mustEngine(t, nil).deploy(t.Context(), tx); !errors.Is(err, errStale) || at.values["/a/one"] != "old" {
		t.Errorf("got %v, %v", err, at.values)
	}
}

// TestOwedIsSaid checks that each start logs the changes that are still owed, because the control
// plane may never send the job again.
func TestOwedIsSaid(t *testing.T) {
	w, at := interrupted(t, "run")
	for range 2 {
		log := new(bytes.Buffer)
		s := w.mustEngine(t, nil)
		s.opts.Log = slog.New(slog.NewTextHandler(log, nil))
		_, err := s.Recover(t.Context())
		check(t, err)
		if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "/a/one") || !strings.Contains(log.String(), w.path("state/backups/t1/")) {
			t.Errorf("the start logs %q", log)
		}
		check(t, s.Repair(t.Context(), t.Context())) // the reload; the change stays owed
	}
	if ids, err := Interrupted(w.path("state")); err != nil || !slices.Equal(ids, []string{"t1"}) {
		t.Errorf("interrupted: %q, %v", ids, err)
	}
	if _, err := w.mustEngine(t, nil).deploy(t.Context(), refuse(w.remoteRenewal(at, "newer"))); err == nil || at.values["/a/one"] != "old" {
		t.Errorf("got %v, %v", err, at.values)
	}
}

// TestNoSetStays checks that the backup set of an interrupted deployment, which holds old keys, is
// removed after the rollback.
func TestNoSetStays(t *testing.T) {
	for name, alter := range map[string]func(*Transaction){
		"fails":      func(tx *Transaction) { *tx = refuse(*tx) },
		"is refused": func(tx *Transaction) { tx.Files[0].Path = "/etc/passwd" },
	} {
		w, at := interrupted(t, "run")
		tx := w.remoteRenewal(at, "newer")
		alter(&tx)
		s := w.mustEngine(t, nil)
		if _, err := s.deploy(t.Context(), tx); err == nil || at.values["/a/one"] != "old" {
			t.Errorf("%s: %v, %v", name, err, at.values)
		}
		check(t, s.Repair(t.Context(), t.Context()))
		if left := append(w.journal(t), w.backups(t)...); len(left) > 0 {
			t.Errorf("%s: left behind %q", name, left)
		}
	}
}

// TestUndoIsBounded checks that an old value that is too large to be read back from its backup is
// refused.
func TestUndoIsBounded(t *testing.T) {
	w := newWorld(t, needs.MemoryDir(t))
	w.old(t)
	at := &elsewhere{values: map[string]string{"/a/one": strings.Repeat("x", maxFile+1)}}
	_, err := w.mustEngine(t, nil).deploy(t.Context(), w.remoteRenewal(at, "new"))
	if err == nil || !strings.Contains(err.Error(), "/a/one") || !strings.Contains(err.Error(), "4 MiB") || len(at.calls) > 0 {
		t.Errorf("got %v after %q", err, at.calls)
	}
	w.want(t, false, "old")
}

// TestChangeIDs checks that a plan is refused if the journal could not store the IDs of its changes
// or tell them apart.
func TestChangeIDs(t *testing.T) {
	for name, ids := range map[string][]string{
		"equal": {"two", "two"}, "empty": {""}, "of two lines": {"a\nb"}, "with a zero": {"a\x00b"},
		"not UTF-8": {"a\xff"}, "long": {strings.Repeat("x", maxID+1)},
	} {
		w, at := interrupted(t, "run")
		tx := w.remoteRenewal(at, "newer")
		at.calls = nil
		for _, id := range ids {
			tx.Changes = append(tx.Changes, &remote{at, id, "newer"})
		}
		_, err := w.mustEngine(t, nil).deploy(t.Context(), tx)
		if err == nil || isBroken(err) || !slices.Equal(at.calls, []string{"restore two", "restore /a/one"}) {
			t.Errorf("%s: %v after %q", name, err, at.calls)
		}
		w.want(t, false, "old")
	}
}

// TestReloadAfterChange checks that a server is reloaded after the undo of a change, even if there
// were no files before.
func TestReloadAfterChange(t *testing.T) {
	w := newWorld(t, needs.MemoryDir(t))
	at := &elsewhere{values: map[string]string{"/a/one": "old"}}
	tx := Transaction{Deployment: Deployment{Target: "t1"}}
	tx.Changes = []connector.Change{&remote{at, "/a/one", "new"}}
	tx.Reload.Command = &policy.Command{Argv: []string{"reload"}}
	s, restored, reloads := w.mustEngine(t, nil), false, 0
	s.disk.before = func(s Step) error {
		restored = restored || s.Op == "restore"
		if restored && s.Op == "run" {
			return errKilled
		}
		return nil
	}
	if _, err := s.deploy(t.Context(), refuse(tx)); err == nil || at.values["/a/one"] != "old" {
		t.Errorf("got %v, %v", err, at.values)
	}
	s = w.mustEngine(t, func(s Step) error {
		if s.Op == "run" {
			reloads++
		}
		return nil
	})
	check(t, s.Repair(t.Context(), t.Context()))
	if left := append(w.journal(t), w.backups(t)...); reloads != 1 || len(left) > 0 {
		t.Errorf("%d reloads, left behind %q", reloads, left)
	}
}

// TestOlderAgentAndChanges checks that an older agent, which does not know changes and would drop
// their backups, cannot read a record that has some.
func TestOlderAgentAndChanges(t *testing.T) {
	for _, op := range []string{"run", "create"} {
		w, at := interrupted(t, "run")
		w.killed(t, w.remoteRenewal(at, "newer"), op)
		data, err := os.ReadFile(w.path("state/journal/t1.json"))
		check(t, err)
		if !strings.HasPrefix(string(data), `{"version":2,`) {
			t.Errorf("the record is %.40s", data)
		}
	}
	data, err := encode(someRecord())
	check(t, err)
	if !strings.HasPrefix(string(data), `{"version":1,`) {
		t.Errorf("a record without changes is %.40s", data)
	}
}

// TestChangesKilledTwice kills a deployment after a change, and the next one at every step. The
// third one fails, and restores everything as it was before the first or as the second had
// committed it.
func TestChangesKilledTwice(t *testing.T) {
	for i, value := range []string{"new", "newer"} {
		for j, alter := range []func(Transaction) Transaction{refuse, func(tx Transaction) Transaction { return tx }} {
			for n := 2*i + j; ; n += 4 {
				w, at := interrupted(t, "run")
				s, kill, dead := w.mustEngine(t, nil), killAt(n), false
				s.disk.before = func(s Step) error {
					err := kill(s)
					dead = err != nil
					return err
				}
				_, _ = s.deploy(t.Context(), alter(w.remoteRenewal(at, value)))
				if !dead {
					break
				}
				s = w.mustEngine(t, nil)
				s.disk.before = killAt(n % 7)
				_, _ = s.Recover(t.Context())
				s = w.mustEngine(t, nil)
				_, err := s.Recover(t.Context())
				check(t, err)
				want := map[string]string{"/a/one": "old"}
				if w.condition(false) == "new" {
					want = map[string]string{"/a/one": value, "two": value}
				}
				_, err = s.deploy(t.Context(), refuse(w.remoteRenewal(at, "newest")))
				if err == nil || isBroken(err) || !maps.Equal(at.values, want) {
					t.Errorf("step %d: %v, %v, want %v", n, err, at.values, want)
				}
				check(t, s.Repair(t.Context(), t.Context()))
				if left := append(w.leftovers(), w.journal(t)...); len(left) > 0 {
					t.Errorf("step %d: left behind %q", n, left)
				}
			}
		}
	}
}

// TestFinish checks that Finish runs after the commit, even if the agent is killed in between.
func TestFinish(t *testing.T) {
	for _, op := range []string{"remove", "finish"} { // the first step after the commit, and the last
		w := newWorld(t, needs.MemoryDir(t))
		w.old(t)
		at := &elsewhere{values: map[string]string{"/a/one": "old"}}
		s, changed, dead := w.mustEngine(t, nil), false, false
		s.disk.before = func(s Step) error {
			changed = changed || s.Op == "change"
			if dead = dead || changed && s.Op == op && w.condition(false) == "new"; dead {
				return errKilled
			}
			return nil
		}
		_, err := s.deploy(t.Context(), w.remoteRenewal(at, "new"))
		check(t, err)
		if finished := slices.ContainsFunc(at.calls, func(c string) bool { return strings.HasPrefix(c, "finish") }); !dead || finished {
			t.Errorf("killed at %s: %v after %q", op, dead, at.calls)
		}
		s = w.mustEngine(t, nil)
		_, err = s.Recover(t.Context())
		check(t, err)
		at.calls = nil
		if result, err := s.deploy(t.Context(), w.remoteRenewal(at, "new")); err != nil || !result.Unchanged {
			t.Errorf("killed at %s: the next one: %+v, %v", op, result, err)
		}
		if want := []string{"finish /a/one", "finish two"}; !slices.Equal(at.calls, want) {
			t.Errorf("killed at %s: calls %q, want %q", op, at.calls, want)
		}
	}
}

// TestChangePanics checks that a panic of a connector fails its deployment, and that a panic of
// Finish is a warning.
func TestChangePanics(t *testing.T) {
	for op, value := range map[string]string{"read": "old", "write": "old", "finish": "new"} {
		w := newWorld(t, needs.MemoryDir(t))
		w.old(t)
		at := &elsewhere{values: map[string]string{"/a/one": "old"}}
		tx := w.remoteRenewal(at, "new")
		tx.Changes = append(tx.Changes, &panicking{remote{at, "three", "new"}, op})
		result, err := w.mustEngine(t, nil).deploy(t.Context(), tx)
		if said := fmt.Sprint(err, result.Warnings); isBroken(err) || (err == nil) != (value == "new") || !strings.Contains(said, "three: panic: a bug") {
			t.Errorf("%s: %s", op, said)
		}
		if w.want(t, false, value); at.values["/a/one"] != value {
			t.Errorf("%s: %v", op, at.values)
		}
	}
}

type panicking struct {
	remote
	op string
}

func (p *panicking) Read(ctx context.Context) ([]byte, bool, error) {
	if p.op == "read" {
		panic("a bug")
	}
	return p.remote.Read(ctx)
}

func (p *panicking) Write(ctx context.Context) error {
	if p.op == "write" {
		panic("a bug")
	}
	return p.remote.Write(ctx)
}

func (p *panicking) Finish(ctx context.Context) error {
	if p.op == "finish" {
		panic("a bug")
	}
	return p.remote.Finish(ctx)
}

// TestIrrevocableIsLast checks that an irrevocable change is written after all others. If a later
// step fails, everything else is undone, and the error has what the connector says to the person
// who must do the rest.
func TestIrrevocableIsLast(t *testing.T) {
	w := newWorld(t, needs.MemoryDir(t))
	w.old(t)
	at := &elsewhere{values: map[string]string{"/a/one": "old"},
		fail: map[string]error{"restore two": fmt.Errorf("%w: remove version 7 by hand", connector.ErrIrrevocable)}}
	s := w.mustEngine(t, nil)
	for range 2 {
		_, err := s.deploy(t.Context(), refuse(w.remoteRenewal(at, "new")))
		if !isBroken(err) || !errors.Is(err, connector.ErrIrrevocable) || !errors.Is(err, errRefused) || !strings.Contains(err.Error(), "remove version 7 by hand") {
			t.Errorf("got %v", err)
		}
		check(t, s.Repair(t.Context(), t.Context()))
		if w.want(t, false, "old"); !maps.Equal(at.values, map[string]string{"/a/one": "old", "two": "new"}) {
			t.Errorf("values %v", at.values)
		}
	}
	if _, err := s.deploy(t.Context(), w.remoteRenewal(at, "newer")); err != nil || at.values["two"] != "newer" || len(w.journal(t)) > 0 {
		t.Errorf("the next one: %v, %v, %q", err, at.values, w.journal(t))
	}
}

// TestOwedAndCancelled checks that a deployment that is cancelled because the agent stops leaves
// the owed work to its retry, and does not need attention.
func TestOwedAndCancelled(t *testing.T) {
	for name, begin := range map[string]func(ctx context.Context, s *Engine, tx Transaction) error{
		"plan": func(ctx context.Context, s *Engine, tx Transaction) error {
			tx.Deployment.Connector = planError{ctx.Err()}
			_, err := s.Deploy(ctx, tx.Deployment)
			return err
		},
		"look": func(ctx context.Context, s *Engine, tx Transaction) error {
			tx.Changes[0].(*remote).at.fail = map[string]error{"read two": ctx.Err()}
			_, err := s.deploy(ctx, tx)
			return err
		},
		"stage": func(ctx context.Context, s *Engine, tx Transaction) error {
			_, err := s.deploy(ctx, tx)
			return err
		},
	} {
		w, at := interrupted(t, "run")
		s := w.mustEngine(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		at.calls = nil
		if err := begin(ctx, s, w.remoteRenewal(at, "newer")); !errors.Is(err, context.Canceled) || isBroken(err) || len(at.calls) > 0 {
			t.Errorf("%s: got %v after %q", name, err, at.calls)
		}
		at.fail = nil
		if _, err := s.deploy(t.Context(), refuse(w.remoteRenewal(at, "newer"))); err == nil || isBroken(err) || at.values["/a/one"] != "old" {
			t.Errorf("%s, then once more: %v, %v", name, err, at.values)
		}
	}
}

// TestOwedAndNoSet has nothing but a damaged backup, so that the next deployment makes no backup
// set.
func TestOwedAndNoSet(t *testing.T) {
	w := newWorld(t, needs.MemoryDir(t))
	at := &elsewhere{values: map[string]string{"one": "old"}}
	tx := Transaction{Deployment: Deployment{Target: "t1"}}
	tx.Changes = []connector.Change{&remote{at, "one", "new"}}
	s, changed := w.mustEngine(t, nil), false
	s.disk.before = func(s Step) error {
		if changed {
			return errKilled
		}
		changed = s.Op == "change"
		return nil
	}
	if _, err := s.deploy(t.Context(), tx); err == nil || at.values["one"] != "new" {
		t.Fatal(err, at.values)
	}
	check(t, errors.Join(os.RemoveAll(w.path("state/backups/t1")), os.Mkdir(w.path("state/backups/t1"), 0o700)))
	for range 3 {
		s := w.mustEngine(t, nil)
		_, err := s.Recover(t.Context())
		check(t, err)
		if _, err := s.deploy(t.Context(), refuse(tx)); !isBroken(err) {
			t.Errorf("got %v, want a failed rollback", err)
		}
	}
	if _, err := w.mustEngine(t, nil).deploy(t.Context(), tx); err != nil || len(w.journal(t)) > 0 {
		t.Errorf("the next one: %v, %q", err, w.journal(t))
	}
}
