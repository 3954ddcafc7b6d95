package main

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

const toy = `package toy

import (
	"errors"
	"log/slog"
	"os"
)

type options struct {
	Limit int
	Log   *slog.Logger
}

func Adult(age int) bool { return age >= 18 }

func adults(ages []int, log *slog.Logger) (n int, err error) {
	o := options{Limit: 100, Log: log}
	for _, age := range ages {
		if age < 0 {
			return 0, errors.New("an age is negative")
		}
		if Adult(age) && n < o.Limit {
			n += 1
		}
	}
	o.Log.Info("counted", "adults", n)
	return n, os.Chmod("adults", 0o600)
}
`

// writeToy writes a module with the package toy and its tests.
func writeToy(t *testing.T, tests string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module example.net/m\n\ngo 1.26\n", "toy/toy.go": toy, "toy/toy_test.go": "package toy\n" + tests} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestMutants(t *testing.T) {
	p, err := load(t.Context(), writeToy(t, ""), "toy")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range p.mutants() {
		if !p.compiles(m) {
			t.Errorf("does not compile: %s\n%s", m.id(), p.mutated(m))
		}
		got = append(got, strings.TrimPrefix(m.id(), "toy/toy.go:"))
	}
	want := []string{
		"14: > for >=: age >= 18",
		"17: leave out: Limit: 100",
		"17: leave out: Log: log",
		"19: never: age < 0",
		"19: always: age < 0",
		"19: <= for <: age < 0",
		"19: one more: 0",
		`20: return no error: errors.New("an age is negative")`,
		"20: one more: 0",
		"22: never: Adult(age) && n < o.Limit",
		"22: always: Adult(age) && n < o.Limit",
		"22: || for &&: Adult(age) && n < o.Limit",
		"22: <= for <: n < o.Limit",
		"23: remove: n += 1",
		"23: one more: 1",
		`27: return no error: os.Chmod("adults", 0o600)`,
		`27: skip: os.Chmod("adults", 0o600)`,
		"27: readable: 0o600",
	}
	if !slices.Equal(got, want) {
		t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestRun(t *testing.T) {
	const (
		good = `
import "testing"

func TestAdult(t *testing.T) {
	if Adult(17) || !Adult(18) {
		t.Fatal()
	}
}
`
		bad = `
import "testing"

func TestAdult(t *testing.T) {
	if Adult(2) || !Adult(50) {
		t.Fatal()
	}
}
`
		leaves = `
import (
	"os"
	"os/exec"
	"strconv"
	"testing"
)

func TestAdult(t *testing.T) {
	if !Adult(18) {
		left := exec.Command("setsid", "sleep", "1000")
		left.Start()
		os.WriteFile("pid", []byte(strconv.Itoa(left.Process.Pid)), 0o600)
		t.Fatal()
	}
}
`
	)
	for _, test := range []struct{ name, tests, want string }{
		{"good", good, "toy/toy.go:14: > for >=: age >= 18: TestAdult\n"},
		{"bad", bad, "toy/toy.go:14: > for >=: age >= 18: SURVIVED\n"},
		{"unreached", "", "toy/toy.go:14: > for >=: age >= 18: SURVIVED\n"},
		{"leaves a process", leaves, "toy/toy.go:14: > for >=: age >= 18: TestAdult\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := writeToy(t, test.tests)
			results := filepath.Join(t.TempDir(), "results")
			before, err := os.ReadFile(filepath.Join(dir, "toy", "toy.go"))
			if err != nil {
				t.Fatal(err)
			}
			var out, problems bytes.Buffer
			if status := run([]string{"-C", dir, "-packages", "toy", "-only", ":14:", "-results", results}, &out, &problems); status != 0 {
				t.Fatalf("status %d: %s", status, problems.String())
			}
			if !strings.Contains(out.String(), test.want) {
				t.Errorf("printed\n%s\nwant\n%s", out.String(), test.want)
			}
			after, err := os.ReadFile(filepath.Join(dir, "toy", "toy.go"))
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("the tree was changed (%v)", err)
			}
			if text, err := os.ReadFile(filepath.Join(dir, "toy", "pid")); err == nil && runtime.GOOS == "linux" {
				if pid, err := strconv.Atoi(string(text)); err != nil || syscall.Kill(pid, 0) != syscall.ESRCH {
					t.Errorf("process %s is still running (%v)", text, err)
				}
			}
			out.Reset()
			if status := run([]string{"-C", dir, "-packages", "toy", "-only", "survivors", "-results", results}, &out, &problems); status != 0 {
				t.Fatalf("status %d: %s", status, problems.String())
			}
			if again := strings.Contains(out.String(), test.want); again != strings.Contains(test.want, "SURVIVED") {
				t.Errorf("-only survivors printed\n%s", out.String())
			}
		})
	}
}

func TestResume(t *testing.T) {
	dir := writeToy(t, "")
	args := []string{"-C", dir, "-packages", "toy", "-n", "1", "-results", filepath.Join(t.TempDir(), "results")}
	runs := func() bool {
		t.Helper()
		var out, problems bytes.Buffer
		if status := run(args, &out, &problems); status != 0 {
			t.Fatalf("status %d: %s", status, problems.String())
		}
		if !strings.Contains(out.String(), "  survived: toy/toy.go:") {
			t.Errorf("the summary has no survivor:\n%s", out.String())
		}
		return strings.Contains(out.String(), "SURVIVED")
	}
	if !runs() || runs() {
		t.Error("a mutant was not run exactly once")
	}
	if err := os.WriteFile(filepath.Join(dir, "toy", "toy.go"), []byte(toy+"\n// changed\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !runs() {
		t.Error("a mutant of a changed file was not run again")
	}
}
