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
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A bench compiles and runs the tests that a package's mutants should fail.
type bench struct {
	root    string
	out     io.Writer
	scratch string           // directory, removed at the end
	memory  string           // the same, in memory
	own     []test           // of the package
	further map[string]*test // suites, each as one test
}

// A test is a test that has run while nothing was broken.
type test struct {
	name    string
	failed  string // before anything was broken: it says nothing about a mutant
	took    time.Duration
	all     []block // of the package that is mutated
	reached []block // those that the test runs
}

// A block is a run of statements, as coverage counts them.
type block struct {
	file       string
	start, end int // position
}

// position orders the positions of a file.
func position(line, column int) int { return line<<16 + column }

// reaches reports whether the test runs the code at p. The block that begins last
// decides, since those of function literals lie within others.
func (t *test) reaches(file string, p token.Position) bool {
	at := position(p.Line, p.Column)
	inner := -1
	for i, b := range t.all {
		if b.file == file && b.start <= at && at < b.end && (inner < 0 || b.start > t.all[inner].start) {
			inner = i
		}
	}
	return inner < 0 || slices.Contains(t.reached, t.all[inner])
}

// quick tests run together before the others.
const quick = 300 * time.Millisecond

// try runs the tests that should notice m. It returns which did, or an empty
// string if m survives.
func (b *bench) try(ctx context.Context, s subject, p *target, m *mutant) (by string, err error) {
	if b.own == nil {
		if err := b.profileTests(ctx, p); err != nil {
			return "", err
		}
	}
	mutated, overlay := filepath.Join(b.scratch, "mutated.go"), filepath.Join(b.scratch, "overlay.json")
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(b.root, p.dir, m.file): mutated}})
	if err != nil {
		return "", err
	}
	if err := errors.Join(os.WriteFile(mutated, p.mutated(m), 0o600), os.WriteFile(overlay, replace, 0o600)); err != nil {
		return "", err
	}
	binary, err := b.compile(ctx, s.dir, overlay)
	if err != nil {
		return "", err
	}
	inProcesses := regexp.MustCompile(cmp.Or(s.processes, "^$"))
	batches := make([][]test, 3)
	for _, t := range b.own {
		switch {
		case t.failed != "":
		case t.reaches(m.file, m.reached) && t.took < quick:
			batches[0] = append(batches[0], t)
		case t.reaches(m.file, m.reached):
			batches[1] = append(batches[1], t)
		case inProcesses.MatchString(t.name):
			batches[2] = append(batches[2], t)
		}
	}
	for _, batch := range batches {
		if len(batch) == 0 {
			continue
		}
		var names []string
		var clean time.Duration
		for _, t := range batch {
			names, clean = append(names, t.name), clean+t.took
		}
		by, err := b.runTests(ctx, s.dir, binary, overlay, clean, "-test.run=^("+strings.Join(names, "|")+")$")
		if err != nil || by != "" {
			return by, err
		}
	}
	for _, further := range s.further {
		whole, err := b.profileSuite(ctx, p, further)
		if err != nil {
			return "", err
		}
		if whole.failed != "" || !further.processes && !whole.reaches(m.file, m.reached) {
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

// profileTests runs each test of the package alone.
func (b *bench) profileTests(ctx context.Context, p *target) error {
	binary, err := b.compile(ctx, p.dir, "", "-cover")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, binary, "-test.list=^(Test|Fuzz|Example)")
	cmd.Dir = filepath.Join(b.root, p.dir)
	names, err := cmd.Output()
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(names)) {
		t, err := b.profile(ctx, p, p.dir, binary, "-test.run=^"+name+"$")
		if err != nil {
			return err
		}
		t.name = name
		if b.own = append(b.own, *t); t.failed != "" {
			fmt.Fprintf(b.out, "%s: %s fails before anything is broken and is left out\n", p.dir, name)
		}
	}
	return nil
}

// profileSuite runs a suite when it is first needed.
func (b *bench) profileSuite(ctx context.Context, p *target, s suite) (*test, error) {
	key := s.dir + strings.Join(s.args, " ")
	if t := b.further[key]; t != nil {
		return t, nil
	}
	binary, err := b.compile(ctx, s.dir, "", "-cover", "-coverpkg="+p.importPath)
	if err != nil {
		return nil, err
	}
	t, err := b.profile(ctx, p, s.dir, binary, s.args...)
	if err != nil {
		return nil, err
	}
	if b.further[key] = t; t.failed != "" {
		fmt.Fprintf(b.out, "%s: %s fails before anything is broken (%s) and is left out\n", p.dir, key, t.failed)
	}
	return t, nil
}

// profile runs tests while nothing is broken.
func (b *bench) profile(ctx context.Context, p *target, dir, binary string, args ...string) (*test, error) {
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
		file, ours := strings.CutPrefix(name, p.importPath+"/")
		var from, fromColumn, to, toColumn, statements, count int
		if n, _ := fmt.Sscanf(rest, "%d.%d,%d.%d %d %d", &from, &fromColumn, &to, &toColumn, &statements, &count); n != 6 || !ours {
			continue
		}
		found := block{file: file, start: position(from, fromColumn), end: position(to, toColumn)}
		if t.all = append(t.all, found); count > 0 {
			t.reached = append(t.reached, found)
		}
	}
	return t, nil
}

// compile builds the tests of a package without what only debuggers read.
func (b *bench) compile(ctx context.Context, dir, overlay string, args ...string) (binary string, err error) {
	binary = filepath.Join(b.scratch, filepath.Base(dir)+".test") // as go test calls it: some tests look for that
	cmd := exec.CommandContext(ctx, "go", append(append([]string{"test", "-c", "-vet=off", "-ldflags=-s -w", "-o", binary}, args...), "./"+dir)...)
	cmd.Dir, cmd.Env = b.root, b.environment(overlay)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile: %w\n%s", err, out)
	}
	return binary, nil
}

// environment has the overlay for the go commands that tests run as well.
func (b *bench) environment(overlay string) []string {
	if overlay == "" {
		return os.Environ()
	}
	return append(os.Environ(), "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -overlay="+overlay))
}

var failure = regexp.MustCompile(`(?m)^--- FAIL: (\S+)|^(panic: .*|fatal error: .*)`)

// runTests runs a test binary as go test would, for a multiple of what it takes
// when nothing is broken. It returns what failed, and leaves no process and no
// temporary file behind.
func (b *bench) runTests(ctx context.Context, dir, binary, overlay string, clean time.Duration, args ...string) (failed string, err error) {
	for _, dir := range []string{b.scratch, b.memory} {
		if err := os.MkdirAll(filepath.Join(dir, "t"), 0o755); err != nil {
			return "", err
		}
		defer os.RemoveAll(filepath.Join(dir, "t"))
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second+4*clean)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, append([]string{"-test.failfast", "-test.count=1"}, args...)...)
	cmd.Dir = filepath.Join(b.root, dir)
	cmd.Env = append(b.environment(overlay), "TMPDIR="+filepath.Join(b.scratch, "t"), "CERTCTL_TEST_MEMORY="+filepath.Join(b.memory, "t"))
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
	return err.Error() + " " + strconv.Quote(lastLine(out.String())), nil
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndexByte(text, '\n')+1:]
}
