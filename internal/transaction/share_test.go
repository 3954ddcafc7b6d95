package transaction

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
)

// crowd is a number of deployments into one directory that are ready at the same time: the
// validation of the first one lasts until all others wait for their turn. It runs in a synctest
// bubble.
type crowd struct {
	world
	t      *testing.T
	engine *Engine

	// command, if not nil, runs after the command has been counted, and returns its error.
	command func(ctx context.Context, name string) error

	mu  sync.Mutex
	ran map[string]int // commands, by name
}

func newCrowd(t *testing.T, before func(Step) error) *crowd {
	t.Helper()
	c := &crowd{world: newWorld(t, t.TempDir()), t: t, ran: make(map[string]int)}
	c.engine = c.mustEngine(t, before)
	c.engine.opts.Run = func(ctx context.Context, command policy.Command) error {
		c.mu.Lock()
		c.ran[command.Argv[0]]++
		c.mu.Unlock()
		if c.command == nil {
			return nil
		}
		return c.command(ctx, command.Argv[0])
	}
	return c
}

func (c *crowd) count(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ran[name]
}

// deployment returns one of the crowd, with its own file.
func (c *crowd) deployment(i int) Transaction {
	before, _ := pairs()
	name := fmt.Sprintf("site/%d.pem", i)
	c.write(c.t, name, before.cert, 0o644)
	_, after := pairs()
	return Transaction{
		Deployment: Deployment{
			Target: api.ID(fmt.Sprintf("t%d", i)),
			Yield: func(wait func(context.Context) error) error {
				return wait(c.t.Context())
			},
		},
		proposal: proposal{
			Files:    []connector.File{{Path: c.path(name), Kind: connector.CertificateFile, Data: after.cert}},
			Validate: &policy.Command{Argv: []string{"validate"}},
			Reload:   connector.Reload{Command: &policy.Command{Argv: []string{"reload"}}},
		},
	}
}

// deploy runs the deployments, and returns their errors in order.
func (c *crowd) deploy(all []Transaction) []error {
	c.t.Helper()
	return c.deployWith(all, func(int) context.Context { return c.t.Context() })
}

// deployWith is deploy with a context for each deployment.
func (c *crowd) deployWith(all []Transaction, ctx func(i int) context.Context) []error {
	c.t.Helper()
	errs := make([]error, len(all))
	var group sync.WaitGroup
	run := c.command
	first := make(chan struct{})
	once := sync.OnceFunc(func() {
		close(first)
		synctest.Wait()
	})
	c.command = func(ctx context.Context, name string) error {
		once()
		if run == nil {
			return nil
		}
		return run(ctx, name)
	}
	for i, tx := range all {
		group.Go(func() { _, errs[i] = c.engine.deploy(ctx(i), tx) })
		if i == 0 {
			<-first
		}
	}
	group.Wait()
	return errs
}

// holds returns which certificate a deployment's file holds.
func (c *crowd) holds(i int) string {
	c.t.Helper()
	before, after := pairs()
	data, err := os.ReadFile(c.path(fmt.Sprintf("site/%d.pem", i)))
	check(c.t, err)
	switch string(data) {
	case string(before.cert):
		return "old"
	case string(after.cert):
		return "new"
	}
	return "strange"
}

// settled checks that no deployment has left anything behind.
func (c *crowd) settled() {
	c.t.Helper()
	if left := c.leftovers(); len(left) > 0 {
		c.t.Errorf("left over: %v", left)
	}
	if left := c.journal(c.t); len(left) > 0 {
		c.t.Errorf("in the journal: %v", left)
	}
	if n := len(c.engine.sharing.ready) + len(c.engine.sharing.flocks); n > 0 {
		c.t.Errorf("%d locks or deployments are remembered", n)
	}
}

func TestSharedReload(t *testing.T) { synctest.Test(t, testSharedReload) }

func testSharedReload(t *testing.T) {
	const n = 12
	c := newCrowd(t, nil)
	var all []Transaction
	for i := range n {
		all = append(all, c.deployment(i))
	}
	all[5].Reload.Command = &policy.Command{Argv: []string{"reload-other"}}
	all[6].Validate = nil
	for i, err := range c.deploy(all) {
		if err != nil || c.holds(i) != "new" {
			t.Errorf("deployment %d: %v, its file is %s", i, err, c.holds(i))
		}
	}
	// One reload for the ten, and one for the deployment without a validation.
	if c.count("reload") != 2 || c.count("reload-other") != 1 || c.count("validate") != n-1 {
		t.Errorf("ran %v", c.ran)
	}
	c.settled()
}

// TestSharedReloadFails checks that only a deployment at fault is rolled back, whichever of them
// ran the command that failed.
func TestSharedReloadFails(t *testing.T) {
	const n, bad = 8, 3
	for _, step := range []string{"validate", "reload", "verify"} {
		t.Run(step, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCrowd(t, nil)
				var all []Transaction
				for i := range n {
					all = append(all, c.deployment(i))
				}
				if step == "verify" {
					all[bad].Verify = func(context.Context) error { return errors.New("serves another certificate") }
				}
				c.command = func(_ context.Context, name string) error {
					if name == step && c.holds(bad) == "new" {
						return errors.New("exit status 1")
					}
					return nil
				}
				for i, err := range c.deploy(all) {
					want := "new"
					if i == bad {
						want = "old"
					}
					if (err == nil) != (want == "new") || c.holds(i) != want {
						t.Errorf("deployment %d: %v, its file is %s", i, err, c.holds(i))
					}
				}
				c.settled()
			})
		})
	}
}

// TestSharedReloadFailsSlowly checks that a slow rollback after a shared reload has failed does not
// make others fail again, nor deployments that come later.
func TestSharedReloadFailsSlowly(t *testing.T) { synctest.Test(t, testSharedReloadFailsSlowly) }

func testSharedReloadFailsSlowly(t *testing.T) {
	const n, bad = 5, 3
	c := newCrowd(t, nil)
	var all []Transaction
	for i := range n {
		all = append(all, c.deployment(i))
	}
	all[bad].Yield = func(wait func(context.Context) error) error {
		err := wait(t.Context())
		time.Sleep(time.Second) // until it has its turn
		return err
	}
	late := c.deployment(n)
	ended := make(chan error, 1)
	comes := sync.OnceFunc(func() {
		go func() {
			_, err := c.engine.deploy(t.Context(), late)
			ended <- err
		}()
	})
	c.command = func(_ context.Context, name string) error {
		if name == "reload" && c.holds(bad) == "new" {
			comes()
			return errors.New("exit status 1")
		}
		return nil
	}
	errs := c.deploy(all)
	for i, err := range append(errs, <-ended) {
		want := "new"
		if i == bad {
			want = "old"
		}
		if (err == nil) != (want == "new") || c.holds(i) != want {
			t.Errorf("deployment %d: %v, its file is %s", i, err, c.holds(i))
		}
	}
	c.settled()
}

// TestSharedReloadBehindASlowOne checks that ready deployments wait for as long as a slow one
// takes.
func TestSharedReloadBehindASlowOne(t *testing.T) {
	synctest.Test(t, testSharedReloadBehindASlowOne)
}

func testSharedReloadBehindASlowOne(t *testing.T) {
	const n, slow = 5, 2
	c := newCrowd(t, nil)
	var all []Transaction
	for i := range n {
		all = append(all, c.deployment(i))
	}
	all[slow].Validate = nil // so that it does not share
	all[slow].Verify = func(context.Context) error {
		time.Sleep(2 * stuckAfter)
		return nil
	}
	for i, err := range c.deploy(all) {
		if busy, ok := errors.AsType[*BusyError](err); ok && i > 0 && busy.Lock != "" {
			continue // it had not begun, and will be retried
		}
		if err != nil || c.holds(i) != "new" {
			t.Errorf("deployment %d: %v, its file is %s", i, err, c.holds(i))
		}
	}
	c.settled()
}

// TestSharedReloadCancelled checks that a deployment that is cancelled while another reloads for it
// is rolled back, and no other.
func TestSharedReloadCancelled(t *testing.T) {
	const n, gone = 6, 4
	for _, by := range []string{"leader", "follower"} {
		t.Run(by, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCrowd(t, nil)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				who := map[string]int{"leader": 0, "follower": gone}[by]
				var all []Transaction
				for i := range n {
					all = append(all, c.deployment(i))
				}
				c.command = func(own context.Context, name string) error {
					if name == "reload" {
						cancel()
					}
					return own.Err()
				}
				errs := c.deployWith(all, func(i int) context.Context {
					if i == who {
						return ctx
					}
					return t.Context()
				})
				for i, err := range errs {
					want := "new"
					if i == who {
						want = "old"
					}
					if (err == nil) != (want == "new") || c.holds(i) != want {
						t.Errorf("deployment %d: %v, its file is %s", i, err, c.holds(i))
					}
				}
				// One for the deployments, and one for the rollback.
				if want := map[string]int{"leader": 3, "follower": 2}[by]; c.count("reload") != want {
					t.Errorf("%d reloads, want %d", c.count("reload"), want)
				}
				c.settled()
			})
		})
	}
}

// TestSharedFile checks that two deployments with a file in common are carried out one after the
// other.
func TestSharedFile(t *testing.T) {
	for _, fails := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) { testSharedFile(t, fails) })
	}
}

func testSharedFile(t *testing.T, fails bool) {
	c := newCrowd(t, nil)
	all := []Transaction{c.deployment(0), c.deployment(1), c.deployment(2)}
	before, after := pairs()
	c.write(t, "site/common.pem", before.cert, 0o644)
	for i := range all[:2] {
		all[i].Files = append(all[i].Files, connector.File{Path: c.path("site/common.pem"), Kind: connector.CertificateFile,
			Data: slices.Concat(after.cert, fmt.Appendln(nil, "of", i))})
	}
	inPlace := ""
	all[0].Verify = func(context.Context) error {
		data, err := os.ReadFile(c.path("site/common.pem"))
		check(t, err)
		inPlace = string(data)
		if fails {
			return errors.New("serves another certificate")
		}
		return nil
	}
	errs := c.deploy(all)
	if (errs[0] != nil) != fails || errs[1] != nil || errs[2] != nil {
		t.Errorf("got %v", errs)
	}
	if !strings.Contains(inPlace, "of 0") {
		t.Error("the second deployment replaced a file of the first one before that had ended")
	}
	if data, _ := os.ReadFile(c.path("site/common.pem")); !strings.Contains(string(data), "of 1") {
		t.Errorf("the second deployment's file is not in place: %q", data)
	}
	c.settled()
}

// TestSharedReloadCrashes checks that each deployment is recovered after a crash during a shared
// reload.
func TestSharedReloadCrashes(t *testing.T) { synctest.Test(t, testSharedReloadCrashes) }

func testSharedReloadCrashes(t *testing.T) {
	const n = 5
	var crashed atomic.Bool
	c := newCrowd(t, func(Step) error {
		if crashed.Load() {
			return errors.New("crashed")
		}
		return nil
	})
	var all []Transaction
	for i := range n {
		all = append(all, c.deployment(i))
	}
	c.command = func(_ context.Context, name string) error {
		if name == "reload" {
			crashed.Store(true)
			return errors.New("crashed")
		}
		return nil
	}
	c.deploy(all)
	for i := range n {
		if c.holds(i) != "new" {
			t.Errorf("deployment %d was not in place at the reload", i)
		}
	}
	again := c.mustEngine(t, nil)
	found, err := again.Recover(t.Context())
	check(t, err)
	if len(found.RolledBack) != n || found.Reloads != n {
		t.Errorf("recovery found %+v", found)
	}
	check(t, again.Repair(t.Context(), t.Context()))
	for i := range n {
		if c.holds(i) != "old" {
			t.Errorf("deployment %d: its file is %s", i, c.holds(i))
		}
	}
	c.settled()
	if temporaries, _ := filepath.Glob(c.path("site/.certctl-*")); len(temporaries) > 0 {
		t.Errorf("left over: %v", temporaries)
	}
}
