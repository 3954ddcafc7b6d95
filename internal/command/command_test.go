package command_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/command"
	"certctl-agent/internal/testing/needs"
)

func TestSplit(t *testing.T) {
	tests := []struct {
		line string
		want []string
		err  string
	}{
		{"nginx -t", []string{"nginx", "-t"}, ""},
		{"  /usr/sbin/nginx \t -c  /etc/nginx.conf ", []string{"/usr/sbin/nginx", "-c", "/etc/nginx.conf"}, ""},
		{"systemctl reload nginx@a.service", []string{"systemctl", "reload", "nginx@a.service"}, ""},
		{"a %b ~ # ! * ? [x] = +", []string{"a", "%b", "~", "#", "!", "*", "?", "[x]", "=", "+"}, ""},
		{"", nil, "empty"},
		{" \t\v ", nil, "empty"},
		{strings.Repeat("a", 1024), []string{strings.Repeat("a", 1024)}, ""},
		{strings.Repeat("a", 1025), nil, "1025 bytes"},
		{strings.Repeat(" ", 1024) + "a", nil, "1025 bytes"},
	}
	for _, c := range ";|&$(){}<>\\\"'`\r\n\x00" {
		tests = append(tests, struct {
			line string
			want []string
			err  string
		}{"nginx -t" + string(c), nil, strconv.QuoteRune(c)})
	}
	for _, test := range tests {
		got, err := command.Split(test.line)
		switch {
		case test.err != "":
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("Split(%.40q): error = %v, want one with %q", test.line, err, test.err)
			}
		case err != nil || !slices.Equal(got, test.want):
			t.Errorf("Split(%.40q) = %q, %v, want %q", test.line, got, err, test.want)
		}
	}
}

func FuzzSplit(f *testing.F) {
	f.Add("nginx -t -c /etc/nginx/nginx.conf")
	f.Add("sh -c 'id'")
	f.Add("a\u00a0b\u2028c\x00")
	f.Fuzz(func(t *testing.T, line string) {
		words, err := command.Split(line)
		if err != nil {
			return
		}
		if len(words) == 0 || len(line) > 1024 || strings.ContainsAny(line, ";|&$(){}<>\\\"'`\r\n\x00") {
			t.Errorf("Split(%q) = %q", line, words)
		}
		again, err := command.Split(strings.Join(words, " "))
		if len(strings.Join(words, " ")) <= 1024 && (err != nil || !slices.Equal(again, words)) {
			t.Errorf("Split(%q) = %q, and of that %q, %v", line, words, again, err)
		}
	})
}

// sh returns the argv of a shell script with the arguments words.
func sh(script string, words ...string) []string {
	return append([]string{"/bin/sh", "-c", script, "sh"}, words...)
}

func TestRun(t *testing.T) {
	tests := []struct {
		name   string
		argv   []string
		output string
		err    []string // parts of the error; nil for none
	}{
		{"both streams", sh("echo out; echo err >&2"), "out err", nil},
		{"no output", sh("true"), "", nil},
		{"no shell expands words", []string{"echo", "$HOME", "*", "a  b"}, "$HOME * a b", nil},
		{"stdin is empty", []string{"cat"}, "", nil},
		{"directory", []string{"pwd"}, "/", nil},
		{"terminal escapes", sh(`printf 'a\033[2Jb\000c\377'`), "a\ufffd[2Jb\ufffdc\ufffd", nil},
		{"exit status", sh("echo no such file; exit 3"), "no such file", []string{"/bin/sh: ", "exit status 3", ": no such file"}},
		{"signal", sh("kill -TERM $$"), "", []string{"signal: terminated"}},
		{"not found", []string{"no-such-program"}, "", []string{"no-such-program: ", "not found in /usr/local/sbin", "absolute path"}},
		{"absolute and not found", []string{"/no/such/program"}, "", []string{"/no/such/program: ", "no such file"}},
		{"a directory", []string{"/etc"}, "", []string{"/etc: is a directory"}},
		{"not executable", []string{"/etc/passwd"}, "", []string{"/etc/passwd: permission denied"}},
		{"relative path", []string{"./program"}, "", []string{"absolute path or a plain name"}},
		{"dot dot", []string{"../bin/sh"}, "", []string{"absolute path or a plain name"}},
		{"nothing", nil, "", []string{"no command"}},
		{"empty word", []string{""}, "", []string{"no command"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			output, err := command.Run(t.Context(), test.argv, 10*time.Second)
			if output != test.output {
				t.Errorf("output = %q, want %q", output, test.output)
			}
			if (err != nil) != (test.err != nil) {
				t.Errorf("error = %v, want %q", err, test.err)
			}
			for _, part := range test.err {
				if err != nil && !strings.Contains(err.Error(), part) {
					t.Errorf("error = %v, want one with %q", err, part)
				}
			}
		})
	}
}

func TestFind(t *testing.T) {
	t.Setenv("PATH", "") // must not matter
	path, err := command.Find("sh")
	if err != nil || !filepath.IsAbs(path) {
		t.Errorf("Find(sh) = %q, %v, want an absolute path", path, err)
	}
	if again, err := command.Find(path); err != nil || again != path {
		t.Errorf("Find(%s) = %q, %v, want it unchanged", path, again, err)
	}
	if _, err := command.Find("no-such-program"); err == nil || strings.Contains(err.Error(), "absolute path") {
		t.Errorf("got error %v, want no advice: not every program's path is a setting", err)
	}
	for _, name := range []string{"", "no-such-program", "bin/sh", "/no/such/program", "/etc"} {
		if path, err := command.Find(name); err == nil {
			t.Errorf("Find(%q) = %q, want an error", name, path)
		}
	}
}

// TestEnvironment: a command does not see the agent's environment, which may contain its API key.
func TestEnvironment(t *testing.T) {
	t.Setenv("CERTCTL_API_KEY", "hunter2")
	t.Setenv("PATH", t.TempDir())
	t.Setenv("HOME", "/somebody/else")
	output, err := command.Query(t.Context(), []string{"env"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(output)) {
		name, _, _ := strings.Cut(line, "=")
		names = append(names, name)
	}
	slices.Sort(names)
	if want := []string{"HOME", "LANG", "PATH"}; !slices.Equal(names, want) {
		t.Errorf("variables = %q, want %q", names, want)
	}
	for _, bad := range []string{"somebody", os.Getenv("PATH")} {
		if bytes.Contains(output, []byte(bad)) {
			t.Errorf("the environment contains the agent's %q:\n%s", bad, output)
		}
	}
}

// waitGone waits until the process whose pid is in the file has ended, or is a zombie.
func waitGone(t *testing.T, pidFile string) {
	t.Helper()
	data, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err := syscall.Kill(pid, 0); errors.Is(err, syscall.ESRCH) {
			return
		}
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && bytes.Contains(stat, []byte(") Z ")) {
			return
		}
	}
	t.Errorf("process %d is still running", pid)
	syscall.Kill(pid, syscall.SIGKILL)
}

func TestDeadline(t *testing.T) {
	tests := []struct{ name, script string }{
		{"hangs", `echo $$ >"$1"; echo started; exec sleep 60`},
		{"ignores SIGTERM", `trap "" TERM INT HUP; echo $$ >"$1"; echo started; while :; do sleep 60; done`},
		{"waits for a child", `sleep 60 & echo $! >"$1"; echo started; wait`},
		{"floods its output", `echo $$ >"$1"; echo started; exec yes`},
		{"closes its output", `echo $$ >"$1"; echo started; exec sleep 60 >/dev/null 2>&1`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			pidFile := filepath.Join(t.TempDir(), "pid")
			// The timeout must be long enough for the script to start on a busy machine.
			var output string
			var err error
			for timeout := 200 * time.Millisecond; output == "" && timeout < time.Minute; timeout *= 4 {
				began := time.Now()
				output, err = command.Run(t.Context(), sh(test.script, pidFile), timeout)
				if err == nil || !strings.Contains(err.Error(), "killed: not done after "+timeout.String()) {
					t.Errorf("error = %v, want the deadline", err)
				}
				if took := time.Since(began) - timeout; took > 30*time.Second {
					t.Errorf("took %v longer than the timeout", took)
				}
			}
			if !strings.HasPrefix(output, "started") || err != nil && !strings.Contains(err.Error(), "started") {
				t.Errorf("output = %.100q, error = %.200v: neither may lose what was printed", output, err)
			}
			waitGone(t, pidFile)
		})
	}
}

func TestCancel(t *testing.T) {
	cause := errors.New("the agent stops")
	ctx, cancel := context.WithCancelCause(t.Context())
	pidFile := filepath.Join(t.TempDir(), "pid")
	stop := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			if text, _ := os.ReadFile(pidFile); bytes.HasSuffix(text, []byte("\n")) {
				cancel(cause)
				return
			}
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	})
	defer watch.Wait()
	defer close(stop)
	if _, err := command.Run(ctx, sh(`echo $$ >"$1"; exec sleep 60`, pidFile), time.Minute); !errors.Is(err, cause) {
		t.Errorf("error = %v, want the cause of the cancellation", err)
	}
	waitGone(t, pidFile)

	began := filepath.Join(t.TempDir(), "began")
	_, err := command.Run(ctx, []string{"touch", began}, 0)
	if !errors.Is(err, cause) || !strings.Contains(err.Error(), "not started") {
		t.Errorf("error = %v, want \"not started\" and the cause", err)
	}
	if _, err := os.Stat(began); err == nil {
		t.Error("the command ran although its context had ended")
	}
}

// TestDaemonLeftBehind: a successful reload may start a daemon that keeps the output open. Run must
// not fail, wait for the daemon or kill it.
func TestDaemonLeftBehind(t *testing.T) {
	needs.Need(t, "setsid")
	for _, test := range []struct{ name, script string }{
		{"in the group", `sleep 60 & echo $! >"$1"; echo reloaded`},
		{"in a separate session", `setsid sleep 60 & echo $! >"$1"; echo reloaded`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			pidFile := filepath.Join(t.TempDir(), "pid")
			began := time.Now()
			output, err := command.Run(t.Context(), sh(test.script, pidFile), 30*time.Second)
			if err != nil || output != "reloaded" {
				t.Errorf("Run = %q, %v, want success", output, err)
			}
			if took := time.Since(began); took > 30*time.Second {
				t.Errorf("took %v: waited for the daemon", took)
			}
			data, err := os.ReadFile(pidFile)
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Errorf("the daemon was killed: %v", err)
			}
		})
	}
}

// TestDetachedAfterFailure: a process that left the group is not killed, and must not block Run.
func TestDetachedAfterFailure(t *testing.T) {
	needs.Need(t, "setsid")
	pidFile := filepath.Join(t.TempDir(), "pid")
	began := time.Now()
	_, err := command.Run(t.Context(), sh(`setsid sleep 60 & echo $! >"$1"; sleep 60`, pidFile), 100*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("error = %v, want killed", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("took %v", took)
	}
	if data, err := os.ReadFile(pidFile); err == nil {
		if pid, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// TestLongOutput: the beginning and the end are kept, and the rest does not block the command.
func TestLongOutput(t *testing.T) {
	output, err := command.Run(t.Context(), sh(`echo first; head -c 5000000 /dev/zero | tr '\0' x; echo; echo last; exit 1`), 30*time.Second)
	if err == nil {
		t.Fatal("exit status 1 is not an error")
	}
	if len(output) > 8<<10 || len(output) < 8000 {
		t.Errorf("%d bytes of output were kept, want nearly 8192", len(output))
	}
	if !strings.HasPrefix(output, "first ") || !strings.HasSuffix(output, " last") || !strings.Contains(output, "x [...] x") {
		t.Errorf("output = %.20q ... %q", output, output[max(0, len(output)-20):])
	}
	if !strings.HasSuffix(err.Error(), output) {
		t.Error("the error does not include the output")
	}
}

func TestQuery(t *testing.T) {
	output, err := command.Query(t.Context(), sh(`printf 'a\n\tb\n'; echo noise >&2`), 0)
	if err != nil || string(output) != "a\n\tb\n" {
		t.Errorf("Query = %q, %v, want standard output as it is", output, err)
	}
	output, err = command.Query(t.Context(), sh("echo answer; echo reason >&2; exit 1"), 0)
	if output != nil || err == nil || !strings.HasSuffix(err.Error(), "exit status 1: reason") {
		t.Errorf("Query = %q, %v, want no answer and the reason", output, err)
	}
	output, err = command.Query(t.Context(), sh("head -c 17000000 /dev/zero"), 0)
	if output != nil || err == nil || !strings.Contains(err.Error(), "more than 16 MiB") {
		t.Errorf("Query = %d bytes, %v, want too much", len(output), err)
	}
}
