package transaction

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/testing/needs"
)

// elsewhere is a target that is not a file of this host. It has values by name.
type elsewhere struct {
	values map[string]string
	calls  []string

	fail map[string]error // by call, such as "write one"
}

func (s *elsewhere) call(name string) error {
	s.calls = append(s.calls, name)
	return s.fail[name]
}

// remote replaces one value. Each deployment gets a new one, as from a connector.
type remote struct {
	at        *elsewhere
	name, new string
}

func (r *remote) ID() string { return r.name }

func (r *remote) Read(context.Context) ([]byte, bool, error) {
	value, ok := r.at.values[r.name]
	if err := r.at.fail["read "+r.name]; err != nil || !ok {
		return nil, false, err
	}
	return []byte(value), value == r.new, nil
}

func (r *remote) Write(context.Context) error {
	err := r.at.call("write " + r.name)
	r.at.values[r.name] = r.new // even if it fails: the answer to a successful request may be lost
	return err
}

func (r *remote) Restore(_ context.Context, was []byte) error {
	if err := r.at.call("restore " + r.name); err != nil {
		return err
	}
	if r.at.values[r.name] = string(was); was == nil {
		delete(r.at.values, r.name)
	}
	return nil
}

func (r *remote) Finish(context.Context) error { return r.at.call("finish " + r.name) }

// remoteRenewal returns the renewal with two changes after its files.
func (w world) remoteRenewal(at *elsewhere, value string) Transaction {
	tx := w.renewal()
	tx.Changes = []connector.Change{&remote{at, "/a/one", value}, &remote{at, "two", value}}
	return tx
}

func TestChanges(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	at := &elsewhere{values: map[string]string{"/a/one": "old"}}
	s := w.mustEngine(t, nil)
	if _, err := s.deploy(t.Context(), w.remoteRenewal(at, "new")); err != nil {
		t.Fatal(err)
	}
	w.want(t, false, "new")
	if want := []string{"write /a/one", "write two", "finish /a/one", "finish two"}; !slices.Equal(at.calls, want) {
		t.Errorf("calls %q, want %q", at.calls, want)
	}
	at.calls = nil
	wrote := 0
	s.disk.before = func(s Step) error {
		if s.Op != "finish" {
			wrote++
		}
		return nil
	}
	result, err := s.deploy(t.Context(), w.remoteRenewal(at, "new"))
	if err != nil || !result.Unchanged || wrote > 0 {
		t.Errorf("again: %+v, %v, %d steps", result, err, wrote)
	}
	if want := []string{"finish /a/one", "finish two"}; !slices.Equal(at.calls, want) {
		t.Errorf("again: calls %q, want %q", at.calls, want)
	}
	s.disk.before = nil
	at.values["two"] = "someone else's"
	at.calls = nil
	if result, err := s.deploy(t.Context(), w.remoteRenewal(at, "new")); err != nil || result.Unchanged {
		t.Errorf("a change only: %+v, %v", result, err)
	}
	if slices.Contains(at.calls, "write /a/one") || !slices.Contains(at.calls, "write two") {
		t.Errorf("a change only: calls %q", at.calls)
	}
}

func TestChangeRollBack(t *testing.T) {
	broken := errors.New("is broken")
	for _, test := range []struct {
		name  string
		fail  map[string]error
		alter func(tx *Transaction)
		says  string
		calls string
		want  map[string]string // values at the end
		final bool              // BrokenError
	}{
		{"second write", map[string]error{"write two": broken}, nil, "change two: is broken; the previous certificate is back in place",
			"write /a/one, write two, restore two, restore /a/one", map[string]string{"/a/one": "old"}, false},
		{"verification", nil, func(tx *Transaction) { tx.Verify = func(context.Context) error { return broken } },
			"verification failed: is broken; the previous certificate is back in place",
			"write /a/one, write two, restore two, restore /a/one", map[string]string{"/a/one": "old"}, false},
		{"look", map[string]error{"read two": broken}, nil, "look at two: is broken", "", map[string]string{"/a/one": "old"}, false},
		{"restore", map[string]error{"write two": broken, "restore /a/one": broken}, nil, "needs attention: /a/one: is broken",
			"write /a/one, write two, restore two, restore /a/one", map[string]string{"/a/one": "new"}, true},
		{"cannot be undone", map[string]error{"write two": broken, "restore two": fmt.Errorf("%w: remove it", connector.ErrIrrevocable)}, nil,
			"needs attention: two: it cannot be undone: remove it",
			"write /a/one, write two, restore two, restore /a/one", map[string]string{"/a/one": "old", "two": "new"}, true},
		{"finish", map[string]error{"finish two": broken}, nil, "", "write /a/one, write two, finish /a/one, finish two",
			map[string]string{"/a/one": "new", "two": "new"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			w.old(t)
			at := &elsewhere{values: map[string]string{"/a/one": "old"}, fail: test.fail}
			tx := w.remoteRenewal(at, "new")
			if test.alter != nil {
				test.alter(&tx)
			}
			result, err := w.deploy(t, tx)
			if _, final := errors.AsType[*BrokenError](err); final != test.final || (err == nil) != (test.says == "") ||
				err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %q", err, test.says)
			}
			if got := strings.Join(at.calls, ", "); got != test.calls {
				t.Errorf("calls %s, want %s", got, test.calls)
			}
			if !maps.Equal(at.values, test.want) {
				t.Errorf("values %v, want %v", at.values, test.want)
			}
			if err != nil {
				w.want(t, false, "old")
				return
			}
			w.want(t, false, "new")
			if got := strings.Join(result.Warnings, " "); !strings.Contains(got, "two: is broken") {
				t.Errorf("warnings %q", got)
			}
		})
	}
}

// TestUndoIsSaved checks that the old value of a change is on disk, readable by the agent alone,
// before the change is made.
func TestUndoIsSaved(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	at := &elsewhere{values: map[string]string{"/a/one": "a secret"}}
	saved := func() string {
		sets := w.backups(t)
		if len(sets) == 0 {
			return ""
		}
		entries, err := os.ReadDir(w.path("state/backups/t1/" + sets[len(sets)-1]))
		check(t, err)
		for _, entry := range entries {
			path := w.path("state/backups/t1/" + sets[len(sets)-1] + "/" + entry.Name())
			data, err := os.ReadFile(path)
			check(t, err)
			info, err := entry.Info()
			check(t, err)
			if string(data) == "a secret" && info.Mode().Perm() == 0o600 {
				return entry.Name()
			}
		}
		return ""
	}
	looked := false
	s := w.mustEngine(t, func(s Step) error {
		if s.Op == "change" && s.Path == "/a/one" {
			if looked = true; saved() == "" {
				t.Error("the change is made before its old value is saved")
			}
			journal, err := os.ReadFile(w.path("state/journal/t1.json"))
			if err != nil || !strings.Contains(string(journal), "/a/one") || strings.Contains(string(journal), "a secret") {
				t.Errorf("the journal holds %s, %v", journal, err)
			}
		}
		return nil
	})
	if _, err := s.deploy(t.Context(), w.remoteRenewal(at, "new")); err != nil || !looked {
		t.Fatal(err, looked)
	}
}

// errKilled stands for the end of the process: no later step happens.
var errKilled = errors.New("killed")

// killAt returns a hook that lets nothing happen from the n-th step on.
func killAt(n int) func(Step) error {
	return func(Step) error {
		if n--; n < 0 {
			return errKilled
		}
		return nil
	}
}

// TestChangesKilled kills a deployment with changes at every step. The next deployment either
// succeeds, or fails and restores everything as it was before the first.
func TestChangesKilled(t *testing.T) {
	killed, owed := 0, 0
	for n := 0; ; n++ {
		ended := false
		for _, then := range []string{"succeeds", "is refused", "fails", "cannot look"} {
			base := newWorld(t, needs.MemoryDir(t))
			base.old(t)
			at := &elsewhere{values: map[string]string{"/a/one": "old"}}
			s := base.mustEngine(t, nil)
			s.disk.before = killAt(n)
			_, err := s.deploy(t.Context(), base.remoteRenewal(at, "new"))
			if err == nil {
				ended = true
				break
			}
			killed++
			at.calls, at.fail = nil, nil

			s = base.mustEngine(t, nil)
			if _, err := s.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			if at.values["/a/one"] == "new" {
				owed++
			}
			tx := base.remoteRenewal(at, "newer")
			want, condition := map[string]string{"/a/one": "old"}, "old"
			switch then {
			case "succeeds":
				want, condition = map[string]string{"/a/one": "newer", "two": "newer"}, "new"
			case "is refused":
				tx.Files[0].Path = "/etc/passwd"
			case "fails":
				tx.Verify = func(context.Context) error { return errors.New("serves another certificate") }
			case "cannot look":
				at.fail = map[string]error{"read two": errors.New("no answer")}
			}
			committed := base.condition(false) == "new"
			_, err = s.deploy(t.Context(), tx)
			if (err == nil) != (then == "succeeds") {
				t.Fatalf("step %d, then %s: %v", n, then, err)
			}
			if committed && then != "succeeds" {
				want, condition = map[string]string{"/a/one": "new", "two": "new"}, "new" // before the second one
			}
			if !maps.Equal(at.values, want) {
				t.Errorf("step %d, then %s (%v): values %v, want %v", n, then, err, at.values, want)
			}
			if got := base.condition(false); got != condition {
				t.Errorf("step %d, then %s (%v): %s, want %s", n, then, err, got, condition)
			}
			if left := base.leftovers(); len(left) > 0 {
				t.Errorf("step %d, then %s: left behind %v", n, then, left)
			}
			if err := s.Repair(t.Context(), t.Context()); err != nil {
				t.Errorf("step %d, then %s: repair: %v", n, then, err)
			}
			at.fail = nil
			if _, err := s.deploy(t.Context(), base.remoteRenewal(at, "newer")); err != nil || at.values["two"] != "newer" {
				t.Errorf("step %d, then %s, then once more: %v, %v", n, then, err, at.values)
			}
			if got := base.journal(t); len(got) > 0 {
				t.Errorf("step %d, then %s: the journal still holds %v", n, then, got)
			}
		}
		if ended {
			break
		}
	}
	t.Logf("killed %d deployments, %d of them with a change made", killed, owed)
	if owed == 0 {
		t.Error("no deployment was killed after a change")
	}
}

// inPart is a Change that takes two calls. Read sees only the first.
type inPart struct {
	remote
	between func() error
}

func (c *inPart) Write(context.Context) error {
	c.at.values[c.name] = c.new
	if err := c.between(); err != nil {
		return err
	}
	c.at.values["saved"] = c.new
	return nil
}

// TestChangeInPart checks that a Change that was killed halfway is made again, although Read finds
// nothing to do.
func TestChangeInPart(t *testing.T) {
	for _, was := range []map[string]string{{"one": "old"}, {}} {
		w := newWorld(t, t.TempDir())
		w.old(t)
		at := &elsewhere{values: maps.Clone(was)}
		killed := false
		deploy := func(between func() error) (Result, error) {
			s := w.mustEngine(t, nil)
			s.disk.before = func(Step) error {
				if killed {
					return errKilled
				}
				return nil
			}
			tx := w.renewal()
			tx.Changes = []connector.Change{&inPart{remote{at, "one", "new"}, between}}
			return s.deploy(t.Context(), tx)
		}
		_, err := deploy(func() error { killed = true; return errKilled })
		if err == nil || at.values["one"] != "new" || at.values["saved"] != "" {
			t.Fatalf("from %v: %v, %v", was, err, at.values)
		}
		killed = false
		if _, err := deploy(func() error { return nil }); err != nil || at.values["saved"] != "new" {
			t.Errorf("from %v: %v, %v", was, err, at.values)
		}
		if result, err := deploy(func() error { return errors.New("is made again") }); err != nil || !result.Unchanged {
			t.Errorf("from %v, once more: %+v, %v", was, result, err)
		}
	}
}

// TestStale checks that a plan is made again if the file that it was made from has changed, but not
// forever.
func TestStale(t *testing.T) {
	const maxPlans = 3 // of one deployment
	for _, times := range []int{1, maxPlans} {
		w := newWorld(t, t.TempDir())
		w.write(t, "site/store", []byte("0"), 0o644)
		plans := 0
		tx := Transaction{Deployment: Deployment{Target: "t1"}}
		tx.Connector = planFunc(func() *connector.Plan {
			was, err := os.ReadFile(w.path("site/store"))
			check(t, err)
			if plans++; plans <= times {
				w.write(t, "site/store", fmt.Append(nil, plans), 0o644)
			}
			return &connector.Plan{Files: []connector.File{{Path: w.path("site/store"), Data: append(was, " and ours"...), From: was}}}
		})
		tx.ReplaceAny = true
		_, err := w.mustEngine(t, nil).Deploy(t.Context(), tx.Deployment)
		got, _ := os.ReadFile(w.path("site/store"))
		if times < maxPlans && (err != nil || string(got) != "1 and ours") {
			t.Errorf("changed once: %v, %s", err, got)
		}
		if times == maxPlans && (!errors.Is(err, errStale) || plans != maxPlans) {
			t.Errorf("changed again and again: %v after %d plans", err, plans)
		}
	}
}

// TestOneStore deploys many targets at once that have entries in the same file.
func TestOneStore(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.write(t, "site/store", []byte("store:"), 0o644)
	e := w.mustEngine(t, nil)
	const targets = 8
	errs := make(chan error, targets)
	for i := range targets {
		go func() {
			_, err := e.Deploy(t.Context(), Deployment{Target: api.ID(fmt.Sprint("t", i)), ReplaceAny: true, Connector: planFunc(func() *connector.Plan {
				was, _ := os.ReadFile(w.path("site/store"))
				return &connector.Plan{Files: []connector.File{{Path: w.path("site/store"), Data: fmt.Append(bytes.Clone(was), i), From: was}}}
			})})
			errs <- err
		}()
	}
	for range targets {
		check(t, <-errs)
	}
	if got, err := os.ReadFile(w.path("site/store")); err != nil || len(got) != len("store:")+targets {
		t.Errorf("the store has %q, %v, want an entry of each", got, err)
	}
}

// TestOneChange deploys several targets at once that replace the same remote value.
func TestOneChange(t *testing.T) {
	w := newWorld(t, t.TempDir())
	e := w.mustEngine(t, nil)
	at := &elsewhere{values: make(map[string]string)} // without its own lock
	const targets = 8
	errs := make(chan error, targets)
	for i := range targets {
		go func() {
			_, err := e.Deploy(t.Context(), Deployment{Target: api.ID(fmt.Sprint("t", i)), Connector: planFunc(func() *connector.Plan {
				return &connector.Plan{Changes: []connector.Change{&remote{at, "two", fmt.Sprint(i)}, &remote{at, "one", fmt.Sprint(i)}}}
			})})
			errs <- err
		}()
	}
	for range targets {
		check(t, <-errs)
	}
	if len(at.calls) != 4*targets {
		t.Fatalf("calls %q", at.calls)
	}
	for i, want := range slices.Repeat([]string{"write two", "write one", "finish two", "finish one"}, targets) {
		if at.calls[i] != want {
			t.Fatalf("calls %q: two deployments overlap", at.calls)
		}
	}
	if at.values["one"] != at.values["two"] {
		t.Errorf("a mix: %v", at.values)
	}
}

type planFunc func() *connector.Plan

func (f planFunc) Plan(context.Context, *connector.Material) (*connector.Plan, error) {
	return f(), nil
}
