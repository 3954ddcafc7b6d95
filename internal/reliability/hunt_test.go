package reliability_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

var huntFlag = flag.Duration("hunt", 0, "how long TestHunt looks for faults")

// hunted is a test, or all fuzz targets, and the result of its turns.
type hunted struct {
	name, unit string
	count      string // regexp of its output
	turns, n   int
}

// hunt runs turns and keeps the commands that repeat the failed ones.
type hunt struct {
	t        *testing.T
	failures []string
}

// A fuzzTarget is in dir, below the module.
type fuzzTarget struct{ dir, name string }

// TestHunt looks for faults with fresh seeds until its time is up or it is interrupted. It shows a
// failure with the command that repeats it, and goes on. Each turn is a process of its own, so a
// panic ends only that turn.
func TestHunt(t *testing.T) {
	if *huntFlag <= 0 {
		t.Skip("see make hunt")
	}
	begun := time.Now()
	ctx, cancel := context.WithTimeout(interrupted, *huntFlag)
	defer cancel()
	h := &hunt{t: t}
	virtual := &hunted{name: "TestVirtualNetwork", unit: "runs", count: `: (\d+) runs (?:in|with) `}
	network := &hunted{name: "TestNetworkFaults", unit: "runs", count: `: (\d+) runs (?:in|with) `}
	trace := &hunted{name: "TestTrace", unit: "states", count: `recovered from (\d+) in `}
	fuzz := &hunted{name: "fuzz targets", unit: "executions", count: `execs: (\d+)`}
	targets, err := fuzzTargets(os.DirFS("../.."))
	if err != nil || len(targets) == 0 {
		t.Fatalf("no fuzz targets: %v", err)
	}
	// One turn of all targets should take no more than a quarter of the hunt.
	slice := min(max(*huntFlag/time.Duration(4*len(targets)), time.Second), 10*time.Second).Round(time.Second)
	h.say("%d fuzz targets, %v each in a turn", len(targets), slice)
	rand.Shuffle(len(targets), func(i, j int) { targets[i], targets[j] = targets[j], targets[i] })
	for ctx.Err() == nil {
		h.test(ctx, virtual, "-runs", 1000)
		h.test(ctx, network, "-runs", 24)
		h.test(ctx, trace, "-states", 1500)
		for range 12 {
			if ctx.Err() != nil || len(targets) == 0 {
				break
			}
			first := targets[0]
			targets = targets[1:]
			if h.fuzz(ctx, fuzz, first, slice) {
				targets = append(targets, first) // a failed one would fail again at once
			}
		}
	}
	h.say("%v, ended by %v", time.Since(begun).Round(time.Second), context.Cause(ctx))
	for _, x := range []*hunted{virtual, network, trace, fuzz} {
		h.say("%-20s %4d turns %12d %s", x.name, x.turns, x.n, x.unit)
	}
	h.say("failures: %d", len(h.failures))
	for _, f := range h.failures {
		t.Error(f)
	}
}

func (h *hunt) say(format string, args ...any) {
	fmt.Fprintf(h.t.Output(), time.Now().UTC().Format("15:04:05 ")+format+"\n", args...)
}

// test takes a turn of a test of this package.
func (h *hunt) test(ctx context.Context, x *hunted, flag string, n int) {
	if ctx.Err() != nil {
		return
	}
	args := []string{"-seed", fmt.Sprint(1 + rand.Uint64N(1<<40)), flag, strconv.Itoa(n)}
	self, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, self, append([]string{"-turn", "-test.v", "-test.timeout=30m", "-test.run", "^" + x.name + "$"}, args...)...)
	// Interrupt only the test: it stops its agents itself.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	h.turn(ctx, x, cmd, fmt.Sprintf("go test ./internal/reliability -run '^%s$' %s", x.name, strings.Join(args, " ")))
}

// fuzz takes a turn of a fuzz target, and reports whether it passed.
func (h *hunt) fuzz(ctx context.Context, x *hunted, target fuzzTarget, slice time.Duration) bool {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-fuzz", "^"+target.name+"$", "-fuzztime", slice.String(), "-fuzzminimizetime", "100x", "./"+target.dir)
	cmd.Dir = "../.."
	// Interrupt the whole group, as a terminal does: the go command does not pass the signal on.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	return h.turn(ctx, x, cmd, "go test ./"+target.dir+" -run '^"+target.name+"$'")
}

// turn runs a process to its end, or to the hunt's.
func (h *hunt) turn(ctx context.Context, x *hunted, cmd *exec.Cmd, again string) bool {
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C reaches only the hunt, which passes it on
	cmd.WaitDelay = 5 * time.Minute
	begun := time.Now()
	err := cmd.Run()
	x.turns++
	count := 0
	if all := regexp.MustCompile(x.count).FindAllSubmatch(output.Bytes(), -1); all != nil {
		count, _ = strconv.Atoi(string(all[len(all)-1][1]))
	}
	x.n += count
	cutShort := ctx.Err() != nil && !bytes.Contains(output.Bytes(), []byte("FAIL"))
	failed := err != nil && !cutShort && !endedByTime(output.Bytes())
	verdict := "ok"
	if failed {
		verdict = "FAILED"
		h.failures = append(h.failures, again)
	}
	h.say("%-6s %s: %d %s in %v", verdict, again, count, x.unit, time.Since(begun).Round(time.Second))
	if failed {
		h.say("%v\n%s", err, output.Bytes())
	}
	return !failed
}

// endedByTime reports whether go test failed only because of a race at the end of its time
// (go.dev/issue/75804, fixed in Go 1.27).
func endedByTime(output []byte) bool {
	return bytes.Contains(output, []byte("\n    context deadline exceeded\nFAIL")) && !bytes.Contains(output, []byte("Failing input"))
}

func fuzzTargets(module fs.FS) (found []fuzzTarget, err error) {
	declaration := regexp.MustCompile(`(?m)^func (Fuzz\w*)`)
	err = fs.WalkDir(module, ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(name, "_test.go") {
			return err
		}
		text, err := fs.ReadFile(module, name)
		for _, m := range declaration.FindAllSubmatch(text, -1) {
			found = append(found, fuzzTarget{path.Dir(name), string(m[1])})
		}
		return err
	})
	return found, err
}
