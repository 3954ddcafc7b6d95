package transaction

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/policy"
)

var errCrash = errors.New("crash")

// crash leaves the world as a crash before the given step would: that step and all later ones fail.
func (w world) crash(t *testing.T, at func(Step) bool) {
	t.Helper()
	crashed := false
	s := w.mustEngine(t, nil)
	s.disk.before = func(s Step) error {
		if crashed = crashed || at(s); crashed {
			return errCrash
		}
		return nil
	}
	if _, err := s.deploy(t.Context(), w.renewal()); !errors.Is(err, errCrash) {
		t.Fatalf("no crash: %v", err)
	}
}

// afterSwap is the moment at which every file is new and nothing has been validated.
func afterSwap(s Step) bool { return s.Op == "run" }

func TestRecover(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.crash(t, afterSwap)
	w.want(t, false, "new")

	s := w.mustEngine(t, nil)
	var ran []string
	s.opts.Run = func(_ context.Context, c policy.Command) error {
		ran = append(ran, strings.Join(c.Argv, " "))
		return nil
	}
	found, err := s.Recover(t.Context())
	if err != nil || !slices.Equal(found.RolledBack, []string{"t1"}) || found.Reloads != 1 {
		t.Errorf("found %+v, %v", found, err)
	}
	w.want(t, false, "old")
	if len(ran) > 0 {
		t.Errorf("ran %q before the agent was ready", ran)
	}
	check(t, s.Repair(t.Context(), t.Context()))
	if !slices.Equal(ran, []string{"reload"}) || len(w.journal(t)) > 0 {
		t.Errorf("ran %q, journal %v", ran, w.journal(t))
	}
}

// TestRecoveredReloadIsRefused checks that a reload is refused if the policy has been tightened
// since.
func TestRecoveredReloadIsRefused(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.crash(t, afterSwap)
	s := w.mustEngine(t, nil)
	s.opts.Policy.Commands = [][]string{{"true"}}
	s.opts.Run = func(context.Context, policy.Command) error { t.Error("it ran"); return nil }
	_, err := s.Recover(t.Context())
	check(t, err)
	if err := s.Repair(t.Context(), t.Context()); err == nil || !strings.Contains(err.Error(), "CERTCTL_ALLOWED_COMMANDS") {
		t.Errorf("got error %v", err)
	}
}

// TestDeployRecovers checks that a deployment recovers its target, without a restart of the agent.
func TestDeployRecovers(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.crash(t, afterSwap)
	reloads := 0
	s := w.mustEngine(t, func(s Step) error {
		if s.Op == "run" && s.Path == "reload" {
			reloads++
		}
		return nil
	})
	// This is so even if the old certificate is deployed: its files are in place, but the server
	// must reload.
	before, _ := pairs()
	tx := w.renewal()
	tx.Promotion = nil
	tx.Files = tx.Files[:2]
	tx.Files[0].Data, tx.Files[1].Data = before.key, before.cert
	result, err := s.deploy(t.Context(), tx)
	if err != nil || result.Unchanged || reloads != 1 {
		t.Errorf("got %+v, %v, %d reloads", result, err, reloads)
	}
	w.want(t, false, "old")
}

func TestSetAside(t *testing.T) {
	tests := []struct {
		name   string
		damage func(t *testing.T, w world)
		want   string // in the error line
		keep   string // a file that must be left as it is
	}{
		{"record", func(t *testing.T, w world) { w.write(t, "state/journal/t1.json", []byte("{}"), 0o600) }, "version 0", ""},
		{"person", func(t *testing.T, w world) { w.write(t, "site/cert.pem", []byte("by hand"), 0o644) }, "changed by someone else since", "site/cert.pem"},
		{"removed", func(t *testing.T, w world) { check(t, os.Remove(w.path("site/cert.pem"))) }, "site/cert.pem", ""},
		{"backup", func(t *testing.T, w world) {
			set := "state/backups/t1/" + w.backups(t)[0]
			w.write(t, set+"/3-cert.pem", []byte("rotten"), 0o600)
		}, "cert.pem is damaged", ""},
		{"no backup", func(t *testing.T, w world) { check(t, os.RemoveAll(w.path("state/backups/t1"))) }, "state/backups/t1", ""},
		{"directory", func(t *testing.T, w world) { check(t, os.RemoveAll(w.path("private"))) }, "private does not exist", ""},
		{"moved", func(t *testing.T, w world) {
			check(t, os.Rename(w.path("private"), w.path("elsewhere")))
			check(t, os.Symlink("elsewhere", w.path("private")))
		}, "elsewhere", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			w.old(t)
			w.crash(t, afterSwap)
			test.damage(t, w)
			var kept []byte
			if test.keep != "" {
				kept, _ = os.ReadFile(w.path(test.keep))
			}
			var log bytes.Buffer
			s := w.mustEngine(t, nil)
			s.opts.Log = slog.New(slog.NewTextHandler(&log, nil))
			found, err := s.Recover(t.Context())
			if err != nil || !slices.Equal(found.SetAside, []string{"t1"}) {
				t.Errorf("found %+v, %v", found, err)
			}
			for _, want := range []string{"level=ERROR", test.want, "backups=" + w.path("state/backups/t1"), "t1.aside"} {
				if !strings.Contains(log.String(), want) {
					t.Errorf("the log does not say %q: %s", want, &log)
				}
			}
			if test.keep != "" {
				if got, _ := os.ReadFile(w.path(test.keep)); !bytes.Equal(got, kept) {
					t.Errorf("%s was changed", test.keep)
				}
			}

			// The next deployment replaces everything and removes the record.
			if test.name == "directory" {
				check(t, os.Mkdir(w.path("private"), 0o755))
			}
			if test.name == "moved" {
				s.opts.Policy.Paths = append(s.opts.Policy.Paths, w.path("elsewhere"))
			}
			result, err := s.deploy(t.Context(), w.renewal())
			if err != nil || result.Unchanged {
				t.Errorf("the next deployment: %+v, %v", result, err)
			}
			if got := w.journal(t); len(got) > 0 {
				t.Errorf("journal still holds %v", got)
			}
			if err := w.matches(false); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDirectoryGone checks that the temporaries in the other directories, which hold keys too, are
// removed if one directory is gone.
func TestDirectoryGone(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.crash(t, func(s Step) bool { return s.Op == "rename" && strings.HasPrefix(s.Path, w.path("private")) })
	check(t, os.RemoveAll(w.path("site")))
	found, err := w.mustEngine(t, nil).Recover(t.Context())
	if err != nil || !slices.Equal(found.SetAside, []string{"t1"}) {
		t.Errorf("found %+v, %v", found, err)
	}
	if left := w.leftovers(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestOrphans checks that the next deployment removes the temporaries of a lost record.
func TestOrphans(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.crash(t, func(s Step) bool { return s.Op == "rename" && strings.HasPrefix(s.Path, w.path("site")) })
	if left := w.leftovers(); len(left) == 0 {
		t.Fatal("the crash left nothing")
	}
	w.write(t, "state/journal/t1.json", []byte("rotten"), 0o600)
	s := w.mustEngine(t, nil)
	_, err := s.Recover(t.Context())
	check(t, err)
	_, err = s.deploy(t.Context(), w.renewal())
	check(t, err)
	w.want(t, false, "new")
}

// TestRecoverAgain checks that a rollback that is not possible yet is retried.
func TestRecoverAgain(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.crash(t, afterSwap)
	s := w.mustEngine(t, nil)
	s.disk.before = func(s Step) error {
		if s.Op == "rename" {
			return errors.New("input/output error")
		}
		return nil
	}
	found, err := s.Recover(t.Context())
	if err != nil || !slices.Equal(found.Failed, []string{"t1"}) {
		t.Errorf("found %+v, %v", found, err)
	}
	if _, err := s.deploy(t.Context(), w.renewal()); err == nil || !strings.Contains(err.Error(), "an earlier deployment of target t1 was interrupted") {
		t.Errorf("a deployment on top of it: %v", err)
	}
	s.disk.before = nil
	found, err = s.Recover(t.Context())
	if err != nil || !slices.Equal(found.RolledBack, []string{"t1"}) {
		t.Errorf("found %+v, %v", found, err)
	}
	w.want(t, false, "old")
}

// TestStrayJournalFiles checks that the agent tolerates other files in the journal directory.
func TestStrayJournalFiles(t *testing.T) {
	w := newWorld(t, t.TempDir())
	s := w.mustEngine(t, nil)
	w.write(t, "state/journal/no id.json", []byte("x"), 0o600)
	w.write(t, "state/journal/README", []byte("x"), 0o600)
	w.write(t, "state/journal/"+temporaryName(), []byte("x"), 0o600)
	check(t, os.Mkdir(w.path("state/journal/t2.json"), 0o700))
	found, err := s.Recover(t.Context())
	if err != nil || len(found.Failed) != 2 {
		t.Errorf("found %+v, %v", found, err)
	}
	if left := w.leftovers(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := s.Repair(t.Context(), t.Context()); err == nil {
		t.Error("no error for an unreadable record")
	}
}
