// Command mutants asks whether the tests would notice a mistake. It breaks one thing at a time in
// the packages that matter most, such as a condition, a sync or an option, and runs the tests that
// should fail. A mutant that no test notices survives: a test is missing, or the code does nothing.
//
// It does not touch the tree: the go command sees the change through an overlay.
package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A subject is a package that is mutated.
type subject struct {
	dir string
	// processes matches the tests that run the package's code in other processes, where coverage
	// does not see it.
	processes string
	further   []suite // they run if the package's own tests do not notice
}

// A suite is a selection of the tests of another package.
type suite struct {
	dir       string
	args      []string // of the test binary
	processes bool     // it runs the code in other processes, where coverage does not see it
}

var (
	agent   = suite{dir: "internal/agent"}
	app     = suite{dir: "internal/app"}
	deploy  = suite{dir: "internal/deploy"}
	engine  = suite{dir: "internal/transaction", args: []string{"-test.short"}}
	nginx   = suite{dir: "internal/connector/nginx"}
	scan    = suite{dir: "internal/discovery", args: []string{"-test.short"}}
	virtual = suite{dir: "internal/reliability", args: []string{"-test.run=^TestVirtualNetwork$", "-runs=20"}}
	trace   = suite{dir: "internal/reliability", args: []string{"-test.run=^TestTrace$", "-states=40"}, processes: true}
	daemon  = suite{dir: "cmd/certctl-agent", args: []string{"-test.skip=^(TestRecoveredLater|TestStuckDaemon)$"}, processes: true}
)

var subjects = []subject{
	{dir: "internal/transaction", processes: "Kill|PowerCut|Lock|Fault|Flight", further: []suite{deploy, virtual, agent, trace}},
	{dir: "internal/keystore", processes: "Killed|Owner", further: []suite{deploy, virtual, agent, trace}},
	{dir: "internal/ledger", processes: "Killed", further: []suite{virtual, agent, trace}},
	{dir: "internal/deploy", processes: "Killed", further: []suite{virtual, agent, daemon}},
	{dir: "internal/enroll", further: []suite{virtual, agent, daemon}},
	{dir: "internal/agent", further: []suite{app, virtual, daemon}},
	{dir: "internal/controlplane", further: []suite{agent, daemon}},
	{dir: "internal/policy", further: []suite{engine, nginx, daemon}},
	{dir: "internal/targetconf", further: []suite{deploy, nginx, daemon}},
	{dir: "internal/hostfile", further: []suite{{dir: "internal/trustedfile"}, {dir: "internal/config"}, scan, engine}},
	{dir: "internal/app", further: []suite{virtual, daemon}},
	{dir: "internal/discovery", processes: "Memory", further: []suite{app, daemon}},
	{dir: "internal/discovery/certfile", further: []suite{scan}},
}

// A result is a line of the results file.
type result struct {
	ID  string // of the mutant
	Sum string // of the file that was mutated
	By  string // the test that noticed; empty for a survivor
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	flags.SetOutput(stderr)
	t := &tester{out: stdout}
	flags.StringVar(&t.root, "C", ".", "the `directory` of the module")
	flags.StringVar(&t.packages, "packages", "", "mutate these packages, such as `ledger,discovery/certfile` (default: those that matter most)")
	flags.IntVar(&t.n, "n", 20, "how many mutants of each package to run")
	flags.Uint64Var(&t.seed, "seed", 1, "selects them")
	flags.StringVar(&t.only, "only", "", "run again the mutants whose output line matches this `regexp`, or the `survivors` in the results file")
	flags.StringVar(&t.results, "results", "mutants.out", "append results to this `file`, and resume an interrupted run from it")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := t.run(ctx); err != nil {
		fmt.Fprintln(stderr, "mutants:", err)
		return 1
	}
	return 0
}

type tester struct {
	root, packages, only, results string
	n                             int
	seed                          uint64
	out                           io.Writer

	scratch string            // a temporary directory
	known   map[string]result // from the results file, by ID
}

func (t *tester) run(ctx context.Context) (err error) {
	if t.root, err = filepath.Abs(t.root); err != nil {
		return err
	}
	if err := adoptOrphans(); err != nil {
		return err
	}
	if t.scratch, err = temporary(""); err != nil {
		return err
	}
	defer os.RemoveAll(t.scratch)
	defer killOrphans() // an interrupted go command leaves compilers
	if err := t.readResults(); err != nil {
		return err
	}
	var summary []string
	for _, s := range choose(t.packages) {
		line, err := t.mutate(ctx, s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.dir, err)
		}
		summary = append(summary, line)
	}
	fmt.Fprintf(t.out, "\n%-28s %8s %8s %8s\n%s\n", "package", "mutants", "noticed", "survived", strings.Join(summary, "\n"))
	return nil
}

// choose returns the subjects with these names. A package that is not in the table has only its own
// tests.
func choose(packages string) []subject {
	if packages == "" {
		return subjects
	}
	var chosen []subject
	for name := range strings.SplitSeq(packages, ",") {
		i := slices.IndexFunc(subjects, func(s subject) bool { return s.dir == "internal/"+name || s.dir == name })
		if i < 0 {
			chosen = append(chosen, subject{dir: name})
		} else {
			chosen = append(chosen, subjects[i])
		}
	}
	return chosen
}

// mutate runs the mutants of one package and returns its line of the summary.
func (t *tester) mutate(ctx context.Context, s subject) (string, error) {
	p, err := load(ctx, t.root, s.dir)
	if err != nil {
		return "", err
	}
	sample, err := t.sample(p)
	if err != nil {
		return "", err
	}
	b := &bench{target: p, subject: s, root: t.root, out: t.out, scratch: t.scratch, further: make(map[string]*test)}
	var survivors []string
	for i, m := range sample {
		sum := fmt.Sprintf("%x", sha256.Sum256(p.text[m.start.Filename]))[:12]
		r := t.known[m.id()]
		if r.Sum != sum || t.only != "" {
			start := time.Now()
			by, err := b.try(ctx, m)
			if err != nil {
				return "", err
			}
			r = result{ID: m.id(), Sum: sum, By: by}
			if err := t.record(r); err != nil {
				return "", err
			}
			fmt.Fprintf(t.out, "%s %d/%d %.0fs %s: %s\n", s.dir, i+1, len(sample), time.Since(start).Seconds(), m.id(), cmp.Or(by, "SURVIVED"))
		}
		if r.By == "" {
			survivors = append(survivors, "  survived: "+m.id())
		}
	}
	line := fmt.Sprintf("%-28s %8d %8d %8d", s.dir, len(sample), len(sample)-len(survivors), len(survivors))
	return strings.Join(append([]string{line}, survivors...), "\n"), nil
}

// sample returns the mutants of p to run, in the order of the text. The same seed selects the same
// ones from the same code.
func (t *tester) sample(p *target) ([]*mutant, error) {
	all := p.mutants()
	wanted := func(m *mutant) bool { return true }
	n := len(all)
	switch t.only {
	case "":
		n = t.n
		random := rand.New(rand.NewPCG(t.seed, 0))
		random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	case "survivors":
		wanted = func(m *mutant) bool { r, ok := t.known[m.id()]; return ok && r.By == "" }
	default:
		pattern, err := regexp.Compile(t.only)
		if err != nil {
			return nil, err
		}
		wanted = func(m *mutant) bool { return pattern.MatchString(m.id()) }
	}
	var sample []*mutant
	for _, m := range all {
		if len(sample) < n && wanted(m) && p.compiles(m) {
			sample = append(sample, m)
		}
	}
	slices.SortFunc(sample, func(a, b *mutant) int {
		return cmp.Or(strings.Compare(a.start.Filename, b.start.Filename), cmp.Compare(a.start.Offset, b.start.Offset), strings.Compare(a.change, b.change))
	})
	return sample, nil
}

func (t *tester) readResults() error {
	t.known = make(map[string]result)
	f, err := os.Open(t.results)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var r result
		if err := json.Unmarshal(lines.Bytes(), &r); err == nil { // the last line of a killed run may be half a line
			t.known[r.ID] = r
		}
	}
	return nil
}

func (t *tester) record(r result) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(t.results, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Close())
}
