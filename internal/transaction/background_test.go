package transaction

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
)

// locked locks a directory as another program would.
func locked(t *testing.T, path string) (unlock func()) {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	check(t, syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB))
	return func() { f.Close() }
}

// torn leaves the world as a crash between two renames would: with a new key and an old
// certificate.
func (w world) torn(t *testing.T) {
	t.Helper()
	w.crash(t, func(s Step) bool { return s.Op == "rename" && s.to == w.path("site/cert.pem") })
	if w.matches(false) == nil {
		t.Fatal("the pair is not torn")
	}
}

// TestRecoverUntilSettled starts the agent while a directory is locked. Jobs of the target wait
// until it is recovered, and that takes neither a restart nor a job.
func TestRecoverUntilSettled(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	synctest.Test(t, func(t *testing.T) {
		s := w.mustEngine(t, nil)
		var ran []string
		s.opts.Run = func(_ context.Context, c policy.Command) error {
			ran = append(ran, c.Argv[0])
			return nil
		}
		unlock := locked(t, w.path("site"))
		began := time.Now()
		found, err := s.Recover(t.Context())
		if err != nil || !slices.Equal(found.Failed, []string{"t1"}) || time.Since(began) > startWait {
			t.Errorf("found %+v, %v after %v", found, err, time.Since(began))
		}
		for range 2 {
			_, err = s.deploy(t.Context(), w.renewal())
			if _, busy := errors.AsType[*BusyError](err); !busy {
				t.Errorf("a deployment on top of it: %v, want a BusyError", err)
			}
			err = s.Settle(t.Context(), "t1", "")
			if _, busy := errors.AsType[*BusyError](err); !busy || !strings.Contains(err.Error(), "site") {
				t.Errorf("before a deployment: %v, want a BusyError", err)
			}
			if err := s.Repair(t.Context(), t.Context()); err == nil || !strings.Contains(err.Error(), "another deployment or another program holds it") {
				t.Errorf("while the lock is held: %v", err)
			}
		}
		unlock()
		check(t, s.Repair(t.Context(), t.Context()))
		w.want(t, false, "old")
		if !slices.Equal(ran, []string{"reload"}) || len(w.journal(t)) > 0 {
			t.Errorf("ran %q, journal %v", ran, w.journal(t))
		}
		check(t, s.Settle(t.Context(), "t1", ""))
	})
}

// TestSettleDuringReload checks that a slow reload command, after the files are back in place, is
// not taken for a dead mount.
func TestSettleDuringReload(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	synctest.Test(t, func(t *testing.T) {
		s := w.mustEngine(t, nil)
		s.opts.Run = func(context.Context, policy.Command) error {
			time.Sleep(time.Minute)
			return nil
		}
		repaired := make(chan error)
		go func() { repaired <- s.Repair(t.Context(), t.Context()) }()
		time.Sleep(time.Second)
		err := s.Settle(t.Context(), "t1", "")
		if _, busy := errors.AsType[*BusyError](err); !busy || !errors.Is(err, errReloads) {
			t.Errorf("while the reload runs: %v", err)
		}
		check(t, <-repaired)
		check(t, s.Settle(t.Context(), "t1", ""))
		w.want(t, false, "old")
	})
}

// TestRepairAfterInputError checks that recovery is retried after a disk has failed once.
func TestRepairAfterInputError(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	s := w.mustEngine(t, nil)
	s.disk.before = func(s Step) error {
		if s.Op == "rename" {
			return syscall.EIO
		}
		return nil
	}
	found, err := s.Recover(t.Context())
	if err != nil || !slices.Equal(found.Failed, []string{"t1"}) {
		t.Errorf("found %+v, %v", found, err)
	}
	if err := s.Repair(t.Context(), t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("the second try: %v", err)
	}
	s.disk.before = nil
	check(t, s.Repair(t.Context(), t.Context()))
	w.want(t, false, "old")
}

func TestTransient(t *testing.T) {
	for _, test := range []struct {
		err  error
		want bool
	}{
		{&os.PathError{Err: syscall.EIO}, true}, {syscall.EMFILE, true}, {fmt.Errorf("x: %w", syscall.ENOMEM), true},
		{&os.PathError{Err: syscall.ENOENT}, false}, {errNotRegular, false}, {errors.New("it is larger"), false}, {nil, false},
	} {
		if got := transient(test.err); got != test.want {
			t.Errorf("%v: got %v", test.err, got)
		}
	}
}

// TestDeadMount has one target on a file system that does not answer. The agent starts, other
// targets are deployed, that one waits, and it is recovered once the file system answers again.
func TestDeadMount(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	synctest.Test(t, func(t *testing.T) {
		answer := make(chan struct{})
		var hangs atomic.Int64
		s := w.mustEngine(t, func(st Step) error {
			if strings.HasPrefix(st.Path, w.path("site")) && st.Op != "run" {
				hangs.Add(1)
				<-answer
			}
			return nil
		})
		began := time.Now()
		found, err := s.Recover(t.Context())
		if took := time.Since(began); err != nil || !slices.Equal(found.Failed, []string{"t1"}) || took != startWait {
			t.Errorf("found %+v, %v after %v, want the start to go on after %v", found, err, took, startWait)
		}
		for range 2 {
			if err := s.Repair(t.Context(), t.Context()); !errors.Is(err, errNoAnswer) {
				t.Errorf("Repair: %v", err)
			}
		}
		if got := hangs.Load(); got != 1 {
			t.Errorf("%d goroutines hang, want one for the target", got)
		}
		began = time.Now()
		err = s.Settle(t.Context(), "t1", "")
		if _, busy := errors.AsType[*BusyError](err); !busy || time.Since(began) != settleWait+closeWait {
			t.Errorf("a job for it: %v after %v", err, time.Since(began))
		}
		err = s.Settle(t.Context(), "t2", w.path("keys/c1.key"))
		if _, busy := errors.AsType[*BusyError](err); !busy {
			t.Errorf("a job with the key that it promoted: %v", err)
		}
		check(t, s.Settle(t.Context(), "t2", w.path("keys/c2.key")))
		check(t, os.Mkdir(w.path("other"), 0o755))
		s.opts.Policy.Paths = append(s.opts.Policy.Paths, w.path("other"))
		tx := w.renewal()
		tx.Target, tx.Promotion, tx.Files = "t2", nil, []connector.File{{Path: w.path("other/cert.pem"), Data: []byte("x"), DefaultMode: 0o644}}
		if _, err := s.deploy(t.Context(), tx); err != nil {
			t.Errorf("another target: %v", err)
		}

		// The agent stops without waiting for it.
		stopped, stop := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, stop)
		began = time.Now()
		if err := s.Repair(stopped, t.Context()); !errors.Is(err, errNoAnswer) || time.Since(began) != time.Second+closeWait {
			t.Errorf("Repair of an agent that stops: %v after %v", err, time.Since(began))
		}

		close(answer)
		synctest.Wait()
		check(t, s.Repair(t.Context(), t.Context()))
		w.want(t, false, "old")
		if got := w.journal(t); len(got) > 0 {
			t.Errorf("journal %v", got)
		}
	})
}

// TestInterrupted checks that Interrupted lists another agent's deployment and changes nothing.
func TestInterrupted(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	if got, err := Interrupted(w.path("state")); err != nil || len(got) > 0 {
		t.Errorf("before the first start: %v, %v", got, err)
	}
	w.torn(t)
	w.write(t, "state/journal/t2.json", []byte("rotten"), 0o600)
	for range 2 {
		if got, err := Interrupted(w.path("state")); err != nil || !slices.Equal(got, []string{"t1", "t2"}) {
			t.Errorf("got %v, %v", got, err)
		}
	}
	s := w.mustEngine(t, nil)
	s.opts.Run = func(context.Context, policy.Command) error { return errors.New("not now") }
	if err := s.Repair(t.Context(), t.Context()); err == nil {
		t.Fatal("the reload did not fail")
	}
	if got, err := Interrupted(w.path("state")); err != nil || len(got) > 0 {
		t.Errorf("when the files are in place: %v, %v", got, err)
	}
}

// TestContested checks that a file that the recovery of another target has yet to restore is not
// replaced: that recovery would take it for a manual change.
func TestContested(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	s := w.mustEngine(t, nil)
	tx := w.renewal()
	tx.Target, tx.Promotion = "t2", nil
	_, err := s.deploy(t.Context(), tx)
	if _, busy := errors.AsType[*BusyError](err); !busy || !strings.Contains(err.Error(), "target t1 was interrupted") {
		t.Errorf("got %v, want a BusyError", err)
	}
	check(t, s.Repair(t.Context(), t.Context()))
	w.want(t, false, "old")
	if _, err := s.deploy(t.Context(), tx); err != nil {
		t.Error(err)
	}
}

// TestRepairPanics checks that a panic fails one try and does not end the agent.
func TestRepairPanics(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	s := w.mustEngine(t, func(Step) error { panic("bug") })
	if err := s.Repair(t.Context(), t.Context()); err == nil || !strings.Contains(err.Error(), "panic: bug") {
		t.Errorf("got %v", err)
	}
	s.disk.before = nil
	check(t, s.Repair(t.Context(), t.Context()))
	w.want(t, false, "old")
}

// TestYield checks that a deployment that waits for a directory yields its job slot, and waits with
// the context that it gets for that.
func TestYield(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	synctest.Test(t, func(t *testing.T) {
		s := w.mustEngine(t, nil)
		yields := 0
		tx := w.renewal()
		tx.Yield = func(wait func(context.Context) error) error {
			yields++
			return wait(t.Context())
		}

		// Nobody fails who waits for a deployment of the same process.
		d, err := resolveDir(w.path("site"))
		check(t, err)
		defer d.Close()
		h, err := s.lock(t.Context(), []*dir{d}, nil)
		check(t, err)
		began := time.Now()
		_, err = s.deploy(t.Context(), tx)
		if _, busy := errors.AsType[*BusyError](err); !busy || yields != 1 || time.Since(began) != stuckAfter {
			t.Errorf("got %v after %v, yielded %d times", err, time.Since(began), yields)
		}
		began = time.Now()
		if _, err := s.deploy(t.Context(), tx); err == nil || yields != 2 || time.Since(began) != 0 {
			t.Errorf("the second: got %v after %v, yielded %d times", err, time.Since(began), yields)
		}
		h.release()
		h, err = s.lock(t.Context(), []*dir{d}, nil)
		check(t, err)
		yields--
		time.AfterFunc(stuckAfter/2, h.release)
		began = time.Now()
		if _, err := s.deploy(t.Context(), tx); err != nil || yields != 2 || time.Since(began) != stuckAfter/2 {
			t.Errorf("got %v after %v, yielded %d times", err, time.Since(began), yields)
		}

		// Another program may hold the lock forever.
		unlock := locked(t, w.path("site"))
		defer unlock()
		tx.Files[0].Data = []byte("another") // otherwise everything would be up to date
		began = time.Now()
		_, err = s.deploy(t.Context(), tx)
		if _, busy := errors.AsType[*BusyError](err); busy || err == nil || yields != 3 || time.Since(began) != lockWait {
			t.Errorf("got %v after %v, yielded %d times", err, time.Since(began), yields)
		}

		tx.Yield = func(wait func(context.Context) error) error {
			ctx, stop := context.WithTimeout(t.Context(), time.Second)
			defer stop()
			return wait(ctx)
		}
		began = time.Now()
		_, err = s.deploy(t.Context(), tx)
		if _, busy := errors.AsType[*BusyError](err); !busy || time.Since(began) != time.Second {
			t.Errorf("when the agent stops: got %v after %v", err, time.Since(began))
		}

		tx.Yield = func(wait func(context.Context) error) error {
			time.AfterFunc(time.Minute, unlock)
			check(t, wait(t.Context()))
			return context.Canceled
		}
		_, err = s.deploy(t.Context(), tx)
		if _, busy := errors.AsType[*BusyError](err); !busy || !errors.Is(err, context.Canceled) {
			t.Errorf("when the agent stops before the deployment has a slot again: got %v", err)
		}
	})
}

// holding makes another process lock a directory until the test ends. With PASS, the process that
// took the lock has exited when holding returns.
func holding(t *testing.T, environment ...string) {
	t.Helper()
	in, end, err := os.Pipe()
	check(t, err)
	answer, out, err := os.Pipe()
	check(t, err)
	child := exec.Command(os.Args[0])
	child.Env = append(environment, "TRANSACTION_CHILD=lock")
	child.Stdin, child.Stdout = in, out
	check(t, child.Start())
	in.Close()
	out.Close()
	t.Cleanup(func() {
		end.Close()
		io.Copy(io.Discard, answer) // until all of them have exited
		answer.Close()
	})
	if line, err := bufio.NewReader(answer).ReadString('\n'); line != "locked\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
	if slices.Contains(environment, "PASS=1") {
		check(t, child.Wait())
	} else {
		t.Cleanup(func() { end.Close(); child.Wait() })
	}
}
