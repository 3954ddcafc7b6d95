package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A bench compiles and runs the tests that the mutants of one package should fail.
type bench struct {
	*target
	subject subject
	root    string
	out     io.Writer
	scratch string           // a temporary directory
	own     []test           // of the package
	further map[string]*test // suites, each as one test
}

// A test has run once without a mutant.
type test struct {
	name   string
	failed string // even then
	took   time.Duration
	blocks []block // of the mutated package
}

// A block is a sequence of statements, as coverage counts them.
type block struct {
	file       string
	start, end int // position
	ran        bool
}

// position orders the positions of a file.
func position(line, column int) int { return line<<16 + column }

// reaches reports whether the test may run the code at p. The innermost block decides: blocks of
// function literals lie within others. Conditions of cases are in no block.
func (t *test) reaches(p token.Position) bool {
	at := position(p.Line, p.Column)
	inner := block{ran: true}
	for _, b := range t.blocks {
		if b.file == p.Filename && b.start <= at && at < b.end && b.start > inner.start {
			inner = b
		}
	}
	return inner.ran
}

// quick tests run before the others.
const quick = 300 * time.Millisecond

// try runs the tests that should notice m. It returns the test that did, or an empty string if m
// survives.
func (b *bench) try(ctx context.Context, m *mutant) (by string, err error) {
	if b.own == nil {
		if err := b.profileTests(ctx); err != nil {
			return "", err
		}
	}
	mutated, overlay := filepath.Join(b.scratch, "mutated.go"), filepath.Join(b.scratch, "overlay.json")
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(b.root, m.start.Filename): mutated}})
	if err != nil {
		return "", err
	}
	if err := errors.Join(os.WriteFile(mutated, b.mutated(m), 0o600), os.WriteFile(overlay, replace, 0o600)); err != nil {
		return "", err
	}
	binary, err := b.compile(ctx, b.dir, overlay)
	if err != nil {
		return "", err
	}
	inProcesses := regexp.MustCompile(cmp.Or(b.subject.processes, "^$"))
	var early, late []test
	for _, t := range b.own {
		switch {
		case t.failed != "" || !t.reaches(m.start) && !inProcesses.MatchString(t.name):
		case t.took < quick:
			early = append(early, t)
		default:
			late = append(late, t)
		}
	}
	for _, batch := range [][]test{early, late} {
		if len(batch) == 0 {
			continue
		}
		var names []string
		var clean time.Duration
		for _, t := range batch {
			names, clean = append(names, t.name), clean+t.took
		}
		by, err := b.runTests(ctx, b.dir, binary, overlay, clean, "-test.run=^("+strings.Join(names, "|")+")$")
		if err != nil || by != "" {
			return by, err
		}
	}
	for _, further := range b.subject.further {
		whole, err := b.profileSuite(ctx, further)
		if err != nil {
			return "", err
		}
		if whole.failed != "" || !further.processes && !whole.reaches(m.start) {
			continue
		}
		binary, err := b.compile(ctx, further.dir, overlay)
		if err != nil {
			return "", err
		}
		by, err := b.runTests(ctx, further.dir, binary, overlay, whole.took, further.args...)
		if err != nil || by != "" {
			return further.dir + " " + by, err
		}
	}
	return "", nil
}

// profileTests runs each test of the package alone, without a mutant.
func (b *bench) profileTests(ctx context.Context) error {
	binary, err := b.compile(ctx, b.dir, "", "-cover")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, binary, "-test.list=^(Test|Fuzz|Example)")
	cmd.Dir = filepath.Join(b.root, b.dir)
	names, err := cmd.Output()
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(names)) {
		t, err := b.profile(ctx, b.dir, binary, "-test.run=^"+name+"$")
		if err != nil {
			return err
		}
		t.name = name
		if b.own = append(b.own, *t); t.failed != "" {
			fmt.Fprintf(b.out, "%s: skipping %s, which fails without a mutant\n", b.dir, name)
		}
	}
	return nil
}

// profileSuite runs a suite without a mutant when it is first needed.
func (b *bench) profileSuite(ctx context.Context, s suite) (*test, error) {
	key := s.dir + strings.Join(s.args, " ")
	if t := b.further[key]; t != nil {
		return t, nil
	}
	binary, err := b.compile(ctx, s.dir, "", "-cover", "-coverpkg="+b.importPath)
	if err != nil {
		return nil, err
	}
	t, err := b.profile(ctx, s.dir, binary, s.args...)
	if err != nil {
		return nil, err
	}
	if b.further[key] = t; t.failed != "" {
		fmt.Fprintf(b.out, "%s: skipping %s, which fails without a mutant: %s\n", b.dir, key, t.failed)
	}
	return t, nil
}

// profile runs tests without a mutant and records what they reach.
func (b *bench) profile(ctx context.Context, dir, binary string, args ...string) (*test, error) {
	profile := filepath.Join(b.scratch, "cover.out")
	start := time.Now()
	failed, err := b.runTests(ctx, dir, binary, "", time.Minute, append(slices.Clone(args), "-test.coverprofile="+profile)...)
	if err != nil {
		return nil, err
	} else if failed != "" {
		return &test{failed: failed}, nil
	}
	t := &test{took: time.Since(start)}
	text, err := os.ReadFile(profile)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) { // import/path/file.go:1.2,3.4 statements count
		name, rest, _ := strings.Cut(line, ":")
		file, ours := strings.CutPrefix(name, b.importPath+"/")
		var from, fromColumn, to, toColumn, statements, count int
		if n, _ := fmt.Sscanf(rest, "%d.%d,%d.%d %d %d", &from, &fromColumn, &to, &toColumn, &statements, &count); n != 6 || !ours {
			continue
		}
		t.blocks = append(t.blocks, block{path.Join(b.dir, file), position(from, fromColumn), position(to, toColumn), count > 0})
	}
	return t, nil
}

// compile builds the tests of a package, without debug information.
func (b *bench) compile(ctx context.Context, dir, overlay string, args ...string) (binary string, err error) {
	binary = filepath.Join(b.scratch, filepath.Base(dir)+".test") // the name that go test uses: some tests depend on it
	cmd := exec.CommandContext(ctx, "go", append(append([]string{"test", "-c", "-vet=off", "-ldflags=-s -w", "-o", binary}, args...), "./"+dir)...)
	cmd.Dir, cmd.Env = b.root, b.environment(overlay)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile: %w\n%s", err, out)
	}
	return binary, nil
}

// environment passes the overlay in GOFLAGS, for go commands that the tests run too.
func (b *bench) environment(overlay string) []string {
	if overlay == "" {
		return os.Environ()
	}
	return append(os.Environ(), "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -overlay="+overlay))
}

var failure = regexp.MustCompile(`(?m)^--- FAIL: (\S+)|^(panic: .*|fatal error: .*)`)

// runTests runs a test binary as go test does. The time limit is a multiple of clean, the time
// without a mutant. It returns what failed, and leaves no process and no temporary file behind.
func (b *bench) runTests(ctx context.Context, dir, binary, overlay string, clean time.Duration, args ...string) (failed string, err error) {
	environment := b.environment(overlay)
	for variable, parent := range map[string]string{"TMPDIR": "", "CERTCTL_TEST_MEMORY": "/dev/shm"} {
		temporary, err := temporary(parent)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no /dev/shm
		} else if err != nil {
			return "", err
		}
		defer os.RemoveAll(temporary)
		environment = append(environment, variable+"="+temporary)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second+4*clean)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, append([]string{"-test.failfast", "-test.count=1"}, args...)...)
	cmd.Dir = filepath.Join(b.root, dir)
	cmd.Env = environment
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = isolated()
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	killOrphans()
	switch {
	case err == nil:
		return "", nil
	case context.Cause(ctx) == context.DeadlineExceeded:
		return "timeout", nil
	case ctx.Err() != nil:
		return "", ctx.Err()
	}
	if match := failure.FindSubmatch(out.Bytes()); match != nil {
		return cmp.Or(string(match[1]), string(match[2])), nil
	}
	return err.Error(), nil
}

// temporary makes a directory. Tests that drop privileges read it too.
func temporary(parent string) (dir string, err error) {
	if dir, err = os.MkdirTemp(parent, "mutants"); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}
