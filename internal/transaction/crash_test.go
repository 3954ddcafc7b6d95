package transaction

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
)

// A scenario is one course of a deployment. Tests crash it at every step.
type scenario struct {
	name  string
	kill  bool // for TestKilled too
	first bool // nothing was in place before
	tx    func(w world) Transaction
	fault func(w world) func(Step) error // nil: none
	want  string                         // condition at the end
}

var scenarios = []scenario{
	{name: "renewal", kill: true, tx: world.renewal, want: "new"},
	{name: "first", first: true, tx: world.renewal, want: "new"},
	{name: "rollback", want: "old", tx: func(w world) Transaction {
		tx := w.renewal()
		tx.Verify = func(context.Context) error { return errors.New("serves another certificate") }
		return tx
	}},
	{name: "mounted", tx: world.renewal, want: "new",
		fault: func(w world) func(Step) error { return mounted(w.path("private/key.pem")) }},
	{name: "mounted rollback", kill: true, want: "old",
		tx: func(w world) Transaction {
			tx := w.renewal()
			tx.Reload.Command = &policy.Command{Argv: []string{"fail"}}
			return tx
		},
		fault: func(w world) func(Step) error { return mounted(w.path("private/key.pem")) }},
	{name: "no backups", want: "new", tx: func(w world) Transaction {
		tx := w.renewal()
		tx.Backups = -1
		return tx
	}},
}

func (sc scenario) prepare(t testing.TB, w world) {
	t.Helper()
	if !sc.first {
		w.old(t)
	}
}

// run runs the scenario to its end, or until before returns an error.
func (sc scenario) run(w world, before func(Step) error) error {
	s, err := w.engine(sc.hook(w, before))
	if err != nil {
		return err
	}
	defer s.opts.State.Close()
	defer s.Close()
	_, err = s.deploy(context.Background(), sc.tx(w))
	return err
}

// hook calls before for each step that the scenario's own fault permits.
func (sc scenario) hook(w world, before func(Step) error) func(Step) error {
	return func(s Step) error {
		if sc.fault != nil {
			if err := sc.fault(w)(s); err != nil {
				return err
			}
		}
		return before(s)
	}
}

// recovered recovers a crashed world and checks the result. If again is set, it also checks the
// next deployment.
func (sc scenario) recovered(w world, again bool) error {
	s, err := w.engine(sc.hook(w, func(Step) error { return nil }))
	if err != nil {
		return err
	}
	defer s.opts.State.Close()
	defer s.Close()
	found, err := s.Recover(context.Background())
	if err != nil {
		return err
	}
	if len(found.Failed)+len(found.SetAside) > 0 {
		return fmt.Errorf("recovery of %v failed, %v set aside", found.Failed, found.SetAside)
	}
	if got := w.condition(sc.first); got != "old" && got != "new" {
		return fmt.Errorf("after recovery: %s", got)
	}
	if err := w.matches(sc.first); err != nil {
		return fmt.Errorf("after recovery: %w", err)
	}
	if left := w.leftovers(); len(left) > 0 {
		return fmt.Errorf("after recovery there is still %v", left)
	}
	if !again {
		return nil
	}
	tx := w.renewal()
	if _, err := s.deploy(context.Background(), tx); err != nil {
		return fmt.Errorf("second deployment: %w", err)
	}
	if got := w.condition(sc.first); got != "new" {
		return fmt.Errorf("after the second deployment: %s", got)
	}
	if left := w.leftovers(); len(left) > 0 {
		return fmt.Errorf("after the second deployment there is still %v", left)
	}
	if result, err := s.deploy(context.Background(), tx); err != nil || !result.Unchanged {
		return fmt.Errorf("third deployment: unchanged %t, error %w", result.Unchanged, err)
	}
	return nil
}

// TestKilled kills a process at each step of each scenario.
func TestKilled(t *testing.T) {
	var states atomic.Int64
	t.Run("at", func(t *testing.T) {
		for i, sc := range scenarios {
			if !sc.kill {
				continue // TestPowerCut covers what is different in it
			}
			steps := 0
			w := newWorld(t, needs.MemoryDir(t))
			sc.prepare(t, w)
			_ = sc.run(w, func(Step) error { steps++; return nil })
			if got := w.condition(sc.first); got != sc.want {
				t.Fatalf("%s without a crash: %s, want %s", sc.name, got, sc.want)
			}
			for n := 1; n <= steps; n += stride {
				t.Run(fmt.Sprintf("%s/%d", sc.name, n), func(t *testing.T) {
					t.Parallel()
					w := newWorld(t, needs.MemoryDir(t))
					sc.prepare(t, w)
					child := exec.Command(os.Args[0])
					child.Env = []string{"TRANSACTION_CHILD=kill", "BASE=" + w.base, "SCENARIO=" + strconv.Itoa(i), "STEP=" + strconv.Itoa(n),
						"OLD=" + pemOf(0), "NEW=" + pemOf(1)}
					out, err := child.CombinedOutput()
					if status, ok := child.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
						t.Fatalf("child ended with %v instead of a kill: %s", err, out)
					}
					states.Add(1)
					if err := sc.recovered(w, true); err != nil {
						t.Error(err)
					}
				})
			}
		}
	})
	t.Logf("killed a process at %d steps", states.Load())
}

// pemOf passes a pair to a child, which must not make its own.
func pemOf(which int) string {
	before, after := pairs()
	m := []material{before, after}[which]
	return strings.Join([]string{string(m.cert), string(m.chain), string(m.key)}, "|")
}

func materialFrom(text string) material {
	parts := strings.Split(text, "|")
	return material{[]byte(parts[0]), []byte(parts[1]), []byte(parts[2])}
}

// childMain is the child process of a test.
func childMain(part string) int {
	if text := os.Getenv("OLD"); text != "" {
		before, after := materialFrom(text), materialFrom(os.Getenv("NEW"))
		pairs = func() (material, material) { return before, after }
	}
	run, ok := childParts()[part]
	if !ok {
		fmt.Println("unknown part", part)
		return 1
	}
	return run()
}

func childKill() int {
	index, _ := strconv.Atoi(os.Getenv("SCENARIO"))
	last, _ := strconv.Atoi(os.Getenv("STEP"))
	n := 0
	err := scenarios[index].run(world{os.Getenv("BASE")}, func(Step) error {
		if n++; n == last {
			if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
				return err
			}
			select {} // the signal is on its way
		}
		return nil
	})
	fmt.Println("not killed:", err)
	return 1
}
