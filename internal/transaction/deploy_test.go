package transaction

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
)

// deploy carries out one deployment.
func (w world) deploy(t *testing.T, tx Transaction) (Result, error) {
	t.Helper()
	return w.mustEngine(t, nil).deploy(t.Context(), tx)
}

func (w world) want(t *testing.T, first bool, want string) {
	t.Helper()
	if got := w.condition(first); got != want {
		t.Errorf("in place: %s; want %s", got, want)
	}
	if err := w.matches(first); err != nil {
		t.Error(err)
	}
	if left := w.leftovers(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestDeploy(t *testing.T) {
	for _, first := range []bool{true, false} {
		w := newWorld(t, t.TempDir())
		if !first {
			w.old(t)
		}
		var ran []string
		s := w.mustEngine(t, func(s Step) error {
			if s.Op == "run" {
				ran = append(ran, s.Path+" sees "+w.condition(first))
			}
			return nil
		})
		tx := w.renewal()
		tx.Verify = func(context.Context) error { return nil }
		result, err := s.deploy(t.Context(), tx)
		if err != nil || result.Unchanged || len(result.Warnings) > 0 {
			t.Fatalf("got %+v, %v", result, err)
		}
		w.want(t, first, "new")
		if want := []string{"validate sees new", "reload sees new", "connector sees new"}; !slices.Equal(ran, want) {
			t.Errorf("ran %q, want %q", ran, want)
		}
		if got := w.journal(t); len(got) > 0 {
			t.Errorf("journal still holds %v", got)
		}

		// The second time, nothing is written and only the verification runs.
		ran = nil
		wrote := 0
		s.disk.before = func(s Step) error {
			if s.Op != "run" {
				wrote++
			}
			ran = append(ran, s.Path)
			return nil
		}
		result, err = s.deploy(t.Context(), tx)
		if err != nil || !result.Unchanged || wrote > 0 || !slices.Equal(ran, []string{"connector"}) {
			t.Errorf("again: %+v, %v, %d writes, ran %q", result, err, wrote, ran)
		}
	}
}

// TestUnchangedButNotServed checks that files that are up to date but not in use lead to a reload,
// and not to endless failures.
func TestUnchangedButNotServed(t *testing.T) {
	w := newWorld(t, t.TempDir())
	s := w.mustEngine(t, nil)
	if _, err := s.deploy(t.Context(), w.renewal()); err != nil {
		t.Fatal(err)
	}
	served := false
	s.opts.Run = func(_ context.Context, c policy.Command) error { served = c.Argv[0] == "reload"; return nil }
	tx := w.renewal()
	tx.Verify = func(context.Context) error {
		if !served {
			return errors.New("serves another certificate")
		}
		return nil
	}
	result, err := s.deploy(t.Context(), tx)
	if err != nil || result.Unchanged || !served {
		t.Errorf("got %+v, %v, reloaded %t", result, err, served)
	}
}

func TestRollBack(t *testing.T) {
	broken := errors.New("is broken")
	fail := func(context.Context) error { return broken }
	tests := []struct {
		name   string
		change func(w world, tx *Transaction)
		first  bool
		want   string
		runs   string // commands, in order
	}{
		{"validate", func(w world, tx *Transaction) { tx.Validate = &policy.Command{Argv: []string{"fail-v"}} }, false,
			"validate failed: exit status 1; the previous certificate is back in place", "fail-v reload"},
		{"reload", func(w world, tx *Transaction) { tx.Reload.Command = &policy.Command{Argv: []string{"fail-r"}} }, false,
			"reload failed: exit status 1; the previous certificate is back in place, but the server could not be reloaded, for the same reason", "validate fail-r fail-r"},
		{"reload, then otherwise", func(w world, tx *Transaction) {
			calls := 0
			tx.Reload.Command = nil
			tx.Reload.Call = func(context.Context) error {
				calls++
				return fmt.Errorf("failure %d", calls)
			}
		}, false,
			"reload failed: failure 1; the previous certificate is back in place, but the server could not be reloaded: failure 2", "validate connector connector"},
		{"verify", func(w world, tx *Transaction) { tx.Verify = fail }, false,
			"verification failed: is broken; the previous certificate is back in place", "validate reload connector reload"},
		{"reload by call", func(w world, tx *Transaction) {
			calls := 0
			tx.Reload.Call = func(context.Context) error {
				if calls++; calls == 1 {
					return broken
				}
				return nil
			}
		}, false,
			"reload failed: is broken; the previous certificate is back in place", "validate reload connector reload connector"},
		{"panic", func(w world, tx *Transaction) { tx.Verify = func(context.Context) error { panic("oh") } }, false,
			"verification failed: panic: oh", "validate reload connector reload"},
		{"first", func(w world, tx *Transaction) { tx.Verify = fail }, true,
			"verification failed: is broken; there was no certificate before, so the new files were removed", "validate reload connector reload"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			if !test.first {
				w.old(t)
			}
			var runs []string
			s := w.mustEngine(t, func(s Step) error {
				if s.Op == "run" {
					runs = append(runs, s.Path)
				}
				return nil
			})
			tx := w.renewal()
			test.change(w, &tx)
			_, err := s.deploy(t.Context(), tx)
			if err == nil || !strings.HasPrefix(err.Error(), test.want) || test.name != "panic" && err.Error() != test.want {
				t.Errorf("got error %q, want %q", err, test.want)
			}
			w.want(t, test.first, "old")
			if got := strings.Join(runs, " "); got != test.runs {
				t.Errorf("ran %q, want %q", got, test.runs)
			}
			if got := w.backups(t); len(got) > 0 {
				t.Errorf("backups left after the rollback: %v", got)
			}
		})
	}
}

// TestReloadOwed checks that a reload that failed after a rollback is remembered, and that the
// target is not clean until it is done.
func TestReloadOwed(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	s := w.mustEngine(t, nil)
	reloads := 0
	s.opts.Run = func(_ context.Context, c policy.Command) error {
		if reloads++; c.Argv[0] == "reload" && reloads < 5 {
			return errors.New("server is down")
		}
		return nil
	}
	tx := w.renewal()
	tx.Validate = nil
	if _, err := s.deploy(t.Context(), tx); err == nil || reloads != 2 {
		t.Fatalf("got error %v after %d reloads", err, reloads)
	}
	if err := s.Repair(t.Context(), t.Context()); err == nil {
		t.Error("no error for a failed reload")
	}

	// A deployment that fails before it changes anything keeps the reload owed.
	s.disk.before = func(s Step) error {
		if s.Op == "create" && strings.HasPrefix(s.Path, w.path("site")) {
			return errors.New("disk is gone")
		}
		return nil
	}
	if _, err := s.deploy(t.Context(), tx); err == nil || !strings.HasSuffix(err.Error(), "disk is gone; nothing was changed") {
		t.Errorf("got error %v", err)
	}
	s.disk.before = nil
	if err := s.Repair(t.Context(), t.Context()); err == nil || reloads != 4 {
		t.Errorf("got error %v after %d reloads, want the one that was owed", err, reloads)
	}
	if err := s.Repair(t.Context(), t.Context()); err != nil || reloads != 5 {
		t.Errorf("got error %v after %d reloads", err, reloads)
	}
	if err := s.Repair(t.Context(), t.Context()); err != nil || reloads != 5 {
		t.Errorf("got error %v, reloaded once more: %d", err, reloads)
	}
	w.want(t, false, "old")
}

// TestCancelled cancels the context at each step. Afterwards either everything is old, or
// everything is new and Deploy has reported success.
func TestCancelled(t *testing.T) {
	cause := errors.New("the agent is stopping")
	for at := 1; ; at++ {
		w := newWorld(t, needs.MemoryDir(t))
		w.old(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		n := 0
		s := w.mustEngine(t, func(Step) error {
			if n++; n == at {
				cancel(cause)
			}
			return nil
		})
		_, err := s.deploy(ctx, w.renewal())
		cancel(nil)
		if n < at {
			t.Logf("cancelled at %d steps", at-1)
			return
		}
		want := "old"
		if err == nil {
			want = "new"
		} else if !errors.Is(err, cause) && !errors.Is(err, context.Canceled) {
			t.Errorf("step %d: error %v does not say why", at, err)
		}
		w.want(t, false, want)
		if got := w.journal(t); len(got) > 0 {
			t.Errorf("step %d: journal still holds %v", at, got)
		}
	}
}

// TestFailingStep makes each step fail, alone and together with all later ones. In the second case
// the rollback fails too, and the error names the backups.
func TestFailingStep(t *testing.T) {
	for _, forever := range []bool{false, true} {
		for at := 1; ; at++ {
			w := newWorld(t, needs.MemoryDir(t))
			w.old(t)
			n := 0
			s := w.mustEngine(t, nil)
			s.disk.before = func(s Step) error {
				if n++; n == at || forever && n > at && s.Op != "run" {
					return errors.New("input/output error")
				}
				return nil
			}
			tx := w.renewal()
			tx.Verify = func(context.Context) error { return nil }
			_, err := s.deploy(t.Context(), tx)
			if n < at {
				break
			}
			s.disk.before = nil
			broken, isBroken := errors.AsType[*BrokenError](err)
			switch got := w.condition(false); {
			case err == nil && got != "new" || err != nil && !isBroken && got != "old":
				t.Errorf("step %d, forever %t: error %v, in place: %s", at, forever, err, got)
			case isBroken && !forever:
				t.Errorf("step %d: a single failure broke the rollback: %v", at, err)
			case isBroken:
				for _, name := range []string{"1-c1.key", "2-key.pem", "3-cert.pem", "manifest.json"} {
					if _, err := os.Stat(broken.Backups + "/" + name); err != nil {
						t.Errorf("step %d: %v", at, err)
					}
				}
			}
			// In both cases the next start recovers.
			if err := (scenario{}).recovered(w, true); err != nil {
				t.Errorf("step %d, forever %t: %v", at, forever, err)
			}
		}
	}
}

func TestRefusedBeforeAnythingIsTouched(t *testing.T) {
	secret := func(path string) connector.File {
		return connector.File{Path: path, Kind: connector.KeyFile, Data: []byte("x"), DefaultMode: 0o600}
	}
	tests := []struct {
		name   string
		change func(t *testing.T, w world, tx *Transaction)
		want   string
	}{
		{"policy", func(t *testing.T, w world, tx *Transaction) { tx.Files[0].Path = w.path("state/key.pem") }, "CERTCTL_ALLOWED_PATHS"},
		{"policy behind a symlink", func(t *testing.T, w world, tx *Transaction) {
			check(t, os.Symlink("../state/x", w.path("site/link.pem")))
			tx.Files[1].Path = w.path("site/link.pem")
		}, "CERTCTL_ALLOWED_PATHS"},
		{"same file", func(t *testing.T, w world, tx *Transaction) {
			tx.Files[1].Path = w.path("private/../private/key.pem")
		}, "are the same file: give each its own"},
		{"same file behind a symlink", func(t *testing.T, w world, tx *Transaction) {
			check(t, os.Symlink("../private/key.pem", w.path("site/link.pem")))
			tx.Files[1].Path = w.path("site/link.pem")
		}, "are the same file: give each its own"},
		{"directory", func(t *testing.T, w world, tx *Transaction) { check(t, os.Mkdir(w.path("site/chain.pem"), 0o755)) },
			"site/chain.pem: it is not a regular file"},
		{"mode", func(t *testing.T, w world, tx *Transaction) { tx.Files[0].Mode = new(fs.FileMode(0o644)) },
			"mode 0644 would let every user access a private key: at most 0770 is allowed"},
		{"set-user-id", func(t *testing.T, w world, tx *Transaction) { tx.Files[1].Mode = new(fs.ModeSetuid | 0o755) }, "has more than permission bits"},
		{"owner", func(t *testing.T, w world, tx *Transaction) { tx.Files[0].Owner = "nobody-of-that-name" }, "owner: user: unknown user"},
		{"group", func(t *testing.T, w world, tx *Transaction) { tx.Files[0].Group = "nobody-of-that-name" }, "group: group: unknown group"},
		{"missing directory", func(t *testing.T, w world, tx *Transaction) { tx.Files[0] = secret(w.path("site/new/key.pem")) },
			"site/new does not exist: create it"},
		{"not absolute", func(t *testing.T, w world, tx *Transaction) { tx.Files[0] = secret("site/key.pem") }, "is not an absolute path"},
		{"huge", func(t *testing.T, w world, tx *Transaction) {
			check(t, os.Truncate(w.path("site/cert.pem"), maxFile+1))
		}, "larger than 4 MiB"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			w.old(t)
			tx := w.renewal()
			test.change(t, w, &tx)
			s := w.mustEngine(t, nil)
			s.disk.before = func(s Step) error { t.Errorf("%s %s", s.Op, s.Path); return nil }
			if _, err := s.deploy(t.Context(), tx); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want %q", err, test.want)
			}
		})
	}
}

// TestFirstWithKey deploys to a server that has nothing, while the key store has a key. A rollback
// leaves no backup of that key.
func TestFirstWithKey(t *testing.T) {
	w := newWorld(t, t.TempDir())
	before, _ := pairs()
	w.write(t, "keys/c1.key", before.key, 0o600)
	tx := w.renewal()
	tx.Verify = func(context.Context) error { return errors.New("is broken") }
	_, err := w.deploy(t, tx)
	if err == nil || !strings.HasSuffix(err.Error(), "there was no certificate before, so the new files were removed") {
		t.Errorf("got error %v", err)
	}
	if got, _ := os.ReadFile(w.path("keys/c1.key")); !bytes.Equal(got, before.key) {
		t.Error("the current key has changed")
	}
	if sets, left := w.backups(t), w.leftovers(); len(sets)+len(left) > 0 {
		t.Errorf("left behind: %v %v", sets, left)
	}
}

// TestKeepOthers checks that the blocks that a renewal keeps come from the file as it is under the
// lock, and never through a link that others have made.
func TestKeepOthers(t *testing.T) {
	const others = "-----BEGIN DH PARAMETERS-----\nMAA=\n-----END DH PARAMETERS-----\n"
	before, after := pairs()
	w := newWorld(t, t.TempDir())
	tx := Transaction{Deployment{Target: "t1"}, proposal{Files: []connector.File{{Path: w.path("site/cert.pem"), Kind: connector.CertificateFile, Data: after.cert, KeepOthers: true}}}}
	for old, want := range map[string]string{"": "", string(before.cert): "", others + string(before.cert): others} {
		w.write(t, "site/cert.pem", []byte(old), 0o644)
		for _, unchanged := range []bool{false, true} {
			result, err := w.deploy(t, tx)
			if err != nil || result.Unchanged != unchanged {
				t.Errorf("%+v, %v", result, err)
			}
			if got, err := os.ReadFile(w.path("site/cert.pem")); err != nil || string(got) != string(after.cert)+want {
				t.Errorf("got\n%s, %v", got, err)
			}
		}
	}

	// Another program replaces the file while the deployment waits.
	w.write(t, "site/cert.pem", before.cert, 0o644)
	s := w.mustEngine(t, nil)
	release, err := acquire(t.Context(), &s.targetLocks, "t1", lockWait, nil)
	check(t, err)
	tx.Yield = func(wait func(context.Context) error) error {
		w.write(t, "site/cert.pem", []byte(others), 0o644)
		release()
		return wait(t.Context())
	}
	_, err = s.deploy(t.Context(), tx)
	check(t, err)
	if got, err := os.ReadFile(w.path("site/cert.pem")); err != nil || string(got) != string(after.cert)+others {
		t.Errorf("got\n%s, %v", got, err)
	}
}

// TestKeep checks that a file that a server only watches is replaced by a copy of itself.
func TestKeep(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.write(t, "site/watched", []byte("an operator's own"), 0o604)
	before, err := os.Stat(w.path("site/watched"))
	check(t, err)
	tx := w.renewal()
	tx.Files = append(tx.Files, connector.File{Path: w.path("site/watched"), Kind: connector.ConfigFile, Data: []byte("ours"), Keep: true,
		Written: func(old []byte) bool { return string(old) == "ours" }})
	_, err = w.deploy(t, tx)
	check(t, err)
	after, err := os.Stat(w.path("site/watched"))
	check(t, err)
	if got, _ := os.ReadFile(w.path("site/watched")); string(got) != "an operator's own" || after.Mode() != before.Mode() || os.SameFile(before, after) {
		t.Errorf("holds %q, mode %v, same file %t", got, after.Mode(), os.SameFile(before, after))
	}
	if result, err := w.deploy(t, tx); err != nil || !result.Unchanged {
		t.Errorf("again: %+v, %v", result, err)
	}
	check(t, os.Remove(w.path("site/watched")))
	for _, data := range []string{"ours", "ours too"} {
		tx.Files[len(tx.Files)-1].Data = []byte(data)
		if _, err := w.deploy(t, tx); err != nil {
			t.Errorf("without a file of the operator: %v", err)
		}
		if got, _ := os.ReadFile(w.path("site/watched")); string(got) != data {
			t.Errorf("holds %q, want %q", got, data)
		}
	}
}

// TestWarnings checks that the warnings of a successful deployment are returned.
func TestWarnings(t *testing.T) {
	w := newWorld(t, t.TempDir())
	s := w.mustEngine(t, func(s Step) error {
		if s.Op == "remove" && strings.HasSuffix(s.Path, ".json") {
			return errors.New("input/output error")
		}
		return nil
	})
	result, err := s.deploy(t.Context(), w.renewal())
	if err != nil || len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], "cleaning up") {
		t.Errorf("got %+v, %v", result, err)
	}
}

// TestWarningsOfUnchanged checks that a plan's warnings are returned even if nothing changes, but
// not its caveats, which concern the change.
func TestWarningsOfUnchanged(t *testing.T) {
	w := newWorld(t, t.TempDir())
	tx := w.renewal()
	tx.Warnings, tx.Caveats = []string{"nobody has compared"}, []string{"nobody is told"}
	for _, unchanged := range []bool{false, true} {
		want := tx.Warnings
		if !unchanged {
			want = slices.Concat(want, tx.Caveats)
		}
		result, err := w.deploy(t, tx)
		if err != nil || result.Unchanged != unchanged || !slices.Equal(result.Warnings, want) {
			t.Errorf("got %+v, %v, want unchanged %t and the warnings %q", result, err, unchanged, want)
		}
	}
}

// TestChangedMeanwhile checks that a file that another program writes between inspect and swap is
// not lost.
func TestChangedMeanwhile(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	mine := []byte("edited by hand meanwhile")
	s := w.mustEngine(t, nil)
	s.disk.before = func(s Step) error {
		if s.Op == "mkdir" { // of the backup set
			w.write(t, "site/cert.pem", mine, 0o640)
		}
		return nil
	}
	_, err := s.deploy(t.Context(), w.renewal())
	if !errors.Is(err, errReplaced) {
		t.Errorf("got error %v", err)
	}
	if got, _ := os.ReadFile(w.path("site/cert.pem")); !bytes.Equal(got, mine) {
		t.Errorf("in place is %q", got)
	}

	// After the rename it is not the deployment's file that the server would load.
	w = newWorld(t, t.TempDir())
	w.old(t)
	s = w.mustEngine(t, nil)
	_, after := pairs()
	s.disk.before = func(s Step) error {
		if now, _ := os.ReadFile(w.path("site/cert.pem")); s.Op == "syncdir" && s.Path == w.path("site") && bytes.Equal(now, after.cert) {
			w.write(t, "site/mine", mine, 0o640)
			return os.Rename(w.path("site/mine"), w.path("site/cert.pem"))
		}
		return nil
	}
	_, err = s.deploy(t.Context(), w.renewal())
	if _, broken := errors.AsType[*BrokenError](err); !broken || !errors.Is(err, errReplaced) {
		t.Errorf("replaced after the rename: got error %v", err)
	}
	if got, _ := os.ReadFile(w.path("site/cert.pem")); !bytes.Equal(got, mine) {
		t.Errorf("replaced after the rename: in place is %q", got)
	}
}

// TestForeignFiles checks that a rollback restores nothing if another program has written one of
// the new files meanwhile, and that the next start and the next deployment go on from there.
func TestForeignFiles(t *testing.T) {
	before, after := pairs()
	mine := []byte("what another program wrote meanwhile")
	rename := func(name string, data []byte) func(*testing.T, world) {
		return func(t *testing.T, w world) {
			w.write(t, "site/mine", data, 0o640)
			check(t, os.Rename(w.path("site/mine"), w.path(name)))
		}
	}
	tests := map[string]struct {
		file   string
		change func(*testing.T, world)
		broken bool
	}{
		"certificate replaced":    {"site/cert.pem", rename("site/cert.pem", mine), true},
		"key replaced":            {"private/key.pem", rename("private/key.pem", mine), true},
		"first chain replaced":    {"site/chain.pem", rename("site/chain.pem", mine), true},
		"certificate overwritten": {"site/cert.pem", func(t *testing.T, w world) { check(t, os.WriteFile(w.path("site/cert.pem"), mine, 0o640)) }, true},
		"certificate replaced by a link": {"site/cert.pem", func(t *testing.T, w world) {
			w.write(t, "mine", mine, 0o640)
			check(t, os.Remove(w.path("site/cert.pem")))
			check(t, os.Symlink(w.path("mine"), w.path("site/cert.pem")))
		}, true},
		"first chain replaced by itself": {"site/chain.pem", rename("site/chain.pem", after.chain), false},
		"old certificate put back":       {"site/cert.pem", rename("site/cert.pem", before.cert), false},
		"certificate removed":            {"site/cert.pem", func(t *testing.T, w world) { check(t, os.Remove(w.path("site/cert.pem"))) }, false},
	}
	for name, test := range tests {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, restart %t", name, restart), func(t *testing.T) {
				w := newWorld(t, t.TempDir())
				w.old(t)
				s := w.mustEngine(t, nil)
				tx := w.renewal()
				tx.Verify = func(context.Context) error {
					test.change(t, w)
					return errors.New("serves another certificate")
				}
				_, err := s.deploy(t.Context(), tx)
				_, broken := errors.AsType[*BrokenError](err)
				if broken != test.broken || broken && (!errors.Is(err, errReplaced) || !strings.Contains(err.Error(), w.path(test.file))) {
					t.Fatalf("got error %v", err)
				}
				if stray := w.leftovers(); len(stray) > 0 {
					t.Errorf("left: %q", stray)
				}
				if !broken {
					if got := w.condition(false); got != "old" {
						t.Errorf("after the rollback: %s", got)
					}
					return
				}
				foreign := func() {
					t.Helper()
					if got, _ := os.ReadFile(w.path(test.file)); !bytes.Equal(got, mine) {
						t.Errorf("%s is %q", test.file, got)
					}
					for _, name := range []string{"site/cert.pem", "private/key.pem", "site/chain.pem"} {
						if got, _ := os.ReadFile(w.path(name)); name != test.file && !bytes.Equal(got, map[string][]byte{
							"site/cert.pem": after.cert, "private/key.pem": after.key, "site/chain.pem": after.chain}[name]) {
							t.Errorf("%s is %q", name, got)
						}
					}
				}
				foreign()
				if restart {
					s = w.mustEngine(t, nil)
					found, err := s.Recover(t.Context())
					if err != nil || !slices.Equal(found.SetAside, []string{"t1"}) {
						t.Errorf("Recover: got %+v, %v", found, err)
					}
					foreign()
				}
				if test.file == "site/cert.pem" {
					if info, err := os.Lstat(w.path(test.file)); err == nil && !info.Mode().IsRegular() {
						check(t, os.Remove(w.path(test.file))) // a person must: the policy refuses what it points to
					}
				}
				served := false
				s.opts.Run = func(_ context.Context, c policy.Command) error { served = served || c.Argv[0] == "reload"; return nil }
				if result, err := s.deploy(t.Context(), w.renewal()); err != nil || result.Unchanged || !served {
					t.Errorf("next deployment: got %+v, %v, reloaded %t", result, err, served)
				}
				if err := w.matches(false); err != nil {
					t.Error(err)
				}
				if left := w.journal(t); len(left) > 0 {
					t.Errorf("the journal still has %q", left)
				}
			})
		}
	}
}

// TestUncertainCommit: the disk does not say whether the record of the commit would
// outlive a power cut.
func TestUncertainCommit(t *testing.T) {
	const commits = 3 // which sync of the journal
	for _, crash := range []bool{false, true} {
		w := newWorld(t, needs.MemoryDir(t))
		w.old(t)
		syncs, replaced := 0, 0
		s := w.mustEngine(t, nil)
		s.disk.before = func(s Step) error {
			if s.Op == "syncdir" && s.Path == w.path("state/journal") {
				syncs++
			}
			if syncs >= commits && s.Op == "rename" && !strings.HasPrefix(s.Path, w.path("state")) {
				replaced++
			}
			if s.Op == "syncdir" && s.Path == w.path("state/journal") && (syncs == commits || !crash && syncs > commits) || replaced > 1 {
				return errors.New("input/output error")
			}
			return nil
		}
		_, err := s.deploy(t.Context(), w.renewal())
		s.disk.before = nil
		if _, broken := errors.AsType[*BrokenError](err); !broken || syncs < commits {
			t.Errorf("crash %t: got error %v after %d syncs of the journal", crash, err, syncs)
		}
		// Where nothing else can be recorded, nothing may be undone.
		if got := w.condition(false); !crash && got != "new" {
			t.Errorf("in place: %s", got)
		}
		// A crash in the middle of the rollback.
		if err := (scenario{}).recovered(w, true); err != nil {
			t.Errorf("crash %t: %v", crash, err)
		}
	}
}

// TestOneAtATime checks that a second deployment to a target waits, and gives up when its context
// ends.
func TestOneAtATime(t *testing.T) {
	w := newWorld(t, t.TempDir())
	s := w.mustEngine(t, nil)
	tx := w.renewal()
	tx.Verify = func(context.Context) error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err := s.deploy(ctx, w.renewal())
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "another deployment of target t1") {
			t.Errorf("got error %v", err)
		}
		return nil
	}
	if _, err := s.deploy(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkDeploy(b *testing.B) {
	for _, unchanged := range []bool{true, false} {
		b.Run(map[bool]string{true: "unchanged", false: "renewal"}[unchanged], func(b *testing.B) {
			w := newWorld(b, b.TempDir())
			s := w.mustEngine(b, nil)
			tx := w.renewal()
			tx.ReplaceAny = true // the chain holds a number
			for i := 0; b.Loop(); i++ {
				if !unchanged {
					tx.Files[2].Data = []byte{byte(i), byte(i >> 8)}
				}
				if _, err := s.deploy(b.Context(), tx); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
