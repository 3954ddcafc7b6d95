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

// locked holds the lock of a directory as another program would.
func locked(t *testing.T, path string) (unlock func()) {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	check(t, syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB))
	return func() { f.Close() }
}

// torn leaves a world as a crash between two renames does: its key is new, its
// certificate old.
func (w world) torn(t *testing.T) {
	t.Helper()
	w.crash(t, func(s Step) bool { return s.Op == "rename" && s.to == w.path("site/cert.pem") })
	if w.matches(false) == nil {
		t.Fatal("the pair is not torn")
	}
}

// TestRecoverUntilSettled: a directory is locked while the agent starts. Until
// its target is settled jobs for it wait, and it is settled without another
// start or job.
func TestRecoverUntilSettled(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	synctest.Test(t, func(t *testing.T) {
		s := w.mustStore(t, nil)
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
				t.Errorf("a deployment on top of it: %v, want one that can be tried again", err)
			}
			err = s.Settle(t.Context(), "t1", "")
			if _, busy := errors.AsType[*BusyError](err); !busy || !strings.Contains(err.Error(), "site") {
				t.Errorf("before a deployment: %v, want one that can be tried again", err)
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

// TestSettleDuringReload: the files are in place again, and the server's command
// takes its time. That is no dead mount.
func TestSettleDuringReload(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	synctest.Test(t, func(t *testing.T) {
		s := w.mustStore(t, nil)
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

// TestRepairAfterInputError: so does a disk that failed once.
func TestRepairAfterInputError(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	s := w.mustStore(t, nil)
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

// TestDeadMount: one target's file system does not answer. The start goes on,
// other targets too, its own waits, and all is well when it answers again.
func TestDeadMount(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	synctest.Test(t, func(t *testing.T) {
		answer := make(chan struct{})
		var hangs atomic.Int64
		s := w.mustStore(t, func(st Step) error {
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
			t.Errorf("a job with the key that it put in place: %v", err)
		}
		check(t, s.Settle(t.Context(), "t2", w.path("keys/c2.key")))
		check(t, os.Mkdir(w.path("other"), 0o755))
		s.opts.Policy.Paths = append(s.opts.Policy.Paths, w.path("other"))
		tx := w.renewal()
		tx.Target, tx.Promotion, tx.Files = "t2", nil, []connector.File{{Path: w.path("other/cert.pem"), Data: []byte("x"), DefaultMode: 0o644}}
		if _, err := s.deploy(t.Context(), tx); err != nil {
			t.Errorf("another target: %v", err)
		}

		// The agent stops, and does not wait for it.
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

// TestInterrupted: it tells of another agent's transaction, and leaves it alone.
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
	s := w.mustStore(t, nil)
	s.opts.Run = func(context.Context, policy.Command) error { return errors.New("not now") }
	if err := s.Repair(t.Context(), t.Context()); err == nil {
		t.Fatal("the reload did not fail")
	}
	if got, err := Interrupted(w.path("state")); err != nil || len(got) > 0 {
		t.Errorf("when the files are in place: %v, %v", got, err)
	}
}

// TestContested: a file that the recovery of another target has yet to put back
// is not replaced: recovery would take it for somebody's own.
func TestContested(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	s := w.mustStore(t, nil)
	tx := w.renewal()
	tx.Target, tx.Promotion = "t2", nil
	_, err := s.deploy(t.Context(), tx)
	if _, busy := errors.AsType[*BusyError](err); !busy || !strings.Contains(err.Error(), "target t1 was interrupted") {
		t.Errorf("got %v, want one that can be tried again", err)
	}
	check(t, s.Repair(t.Context(), t.Context()))
	w.want(t, false, "old")
	if _, err := s.deploy(t.Context(), tx); err != nil {
		t.Error(err)
	}
}

// TestRepairPanics: a bug costs one try, not the agent.
func TestRepairPanics(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	w.torn(t)
	s := w.mustStore(t, func(Step) error { panic("bug") })
	if err := s.Repair(t.Context(), t.Context()); err == nil || !strings.Contains(err.Error(), "panic: bug") {
		t.Errorf("got %v", err)
	}
	s.disk.before = nil
	check(t, s.Repair(t.Context(), t.Context()))
	w.want(t, false, "old")
}

// TestYield: a transaction that waits for a directory gives its place away, and
// ends its wait with what it is given for that.
func TestYield(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	synctest.Test(t, func(t *testing.T) {
		s := w.mustStore(t, nil)
		yields := 0
		tx := w.renewal()
		tx.Yield = func(wait func(context.Context) error) error {
			yields++
			return wait(t.Context())
		}

		// In the line of this process nobody fails.
		d, err := resolveDir(w.path("site"))
		check(t, err)
		defer d.Close()
		h, err := s.lock(t.Context(), []*dir{d}, nil)
		check(t, err)
		began := time.Now()
		_, err = s.deploy(t.Context(), tx)
		if _, busy := errors.AsType[*BusyError](err); !busy || yields != 1 || time.Since(began) != stuckAfter {
			t.Errorf("got %v after %v, gave its place away %d times", err, time.Since(began), yields)
		}
		began = time.Now()
		if _, err := s.deploy(t.Context(), tx); err == nil || yields != 2 || time.Since(began) != 0 {
			t.Errorf("the second: got %v after %v, gave its place away %d times", err, time.Since(began), yields)
		}
		h.release()
		h, err = s.lock(t.Context(), []*dir{d}, nil)
		check(t, err)
		yields--
		time.AfterFunc(stuckAfter/2, h.release)
		began = time.Now()
		if _, err := s.deploy(t.Context(), tx); err != nil || yields != 2 || time.Since(began) != stuckAfter/2 {
			t.Errorf("got %v after %v, gave its place away %d times", err, time.Since(began), yields)
		}

		// Somebody else may never end.
		unlock := locked(t, w.path("site"))
		defer unlock()
		tx.Files[0].Data = []byte("another") // or nothing is to be done
		began = time.Now()
		_, err = s.deploy(t.Context(), tx)
		if _, busy := errors.AsType[*BusyError](err); busy || err == nil || yields != 3 || time.Since(began) != lockWait {
			t.Errorf("got %v after %v, gave its place away %d times", err, time.Since(began), yields)
		}

		tx.Yield = func(wait func(context.Context) error) error {
			ctx, stop := context.WithTimeout(t.Context(), time.Second)
			defer stop()
			return wait(ctx)
		}
		began = time.Now()
		_, err = s.deploy(t.Context(), tx)
		if _, busy := errors.AsType[*BusyError](err); !busy || time.Since(began) != time.Second {
			t.Errorf("the agent stops: got %v after %v", err, time.Since(began))
		}

		tx.Yield = func(wait func(context.Context) error) error {
			time.AfterFunc(time.Minute, unlock)
			check(t, wait(t.Context()))
			return context.Canceled
		}
		_, err = s.deploy(t.Context(), tx)
		if _, busy := errors.AsType[*BusyError](err); !busy || !errors.Is(err, context.Canceled) {
			t.Errorf("the agent stops before the transaction has its place again: got %v", err)
		}
	})
}

// holding has another process lock a directory until the test ends. With PASS
// the process that took the lock is gone when it returns.
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
		io.Copy(io.Discard, answer) // until all have ended
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
