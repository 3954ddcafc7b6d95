// Package command runs the commands that operators configure, such as nginx -t: without a shell,
// with a deadline, limited output and a fixed environment.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/printable"
)

const (
	// defaultTimeout is the deadline of a command without a configured one.
	defaultTimeout = 60 * time.Second

	// maxLine is the longest command line, in bytes.
	maxLine = 1024

	// metacharacters have a meaning in a shell, which the author of such a command expects.
	metacharacters = ";|&$(){}<>\\\"'`\r\n\x00"

	// maxOutput is how much output an error quotes, in bytes.
	maxOutput = 8 << 10

	// maxAnswer bounds the standard output of Query, in bytes: nginx -T prints the whole
	// configuration, a few MiB for thousands of sites.
	maxAnswer = 16 << 20

	// drainDelay is how long output is still read after the child has exited. A reload may start a
	// daemon that keeps it open.
	drainDelay = time.Second

	// searchPath is the PATH of commands, and where plain names are looked up. The agent's own PATH
	// is not used: an operator's shell may have set it.
	searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// Split splits a command line into words at white space. There is no quoting: it refuses lines that
// are empty, longer than 1,024 bytes or contain shell metacharacters.
func Split(line string) ([]string, error) {
	if len(line) > maxLine {
		return nil, fmt.Errorf("the command has %d bytes, more than %d", len(line), maxLine)
	}
	if i := strings.IndexAny(line, metacharacters); i >= 0 {
		return nil, fmt.Errorf("the command contains %q, which is not allowed: commands run without a shell, so put pipes, quotes and variables into a script", line[i])
	}
	words := strings.Fields(line)
	if len(words) == 0 {
		return nil, errors.New("the command is empty")
	}
	return words, nil
}

// Run runs a command and returns its output: both streams together, at most 8 KiB, on one printable
// line and without anything that looks like key material. It fails if the command cannot be
// started, exits with a non-zero status, is ended by a signal, or is still running when the timeout
// has passed or ctx ends. The error names the program and includes the output. On a timeout Run
// kills the command and its whole process group.
//
// A timeout of 0 means defaultTimeout.
func Run(ctx context.Context, argv []string, timeout time.Duration) (string, error) {
	return RunIn(ctx, "/", argv, timeout)
}

// RunIn is like Run, in the working directory dir.
func RunIn(ctx context.Context, dir string, argv []string, timeout time.Duration) (string, error) {
	var output clipped
	err := run(ctx, dir, argv, timeout, &output, &output)
	return output.String(), explain(argv, err, &output)
}

// Query is like Run, but returns only the standard output, unchanged, and fails if that is more
// than 16 MiB. The output may contain secrets: callers parse it and put nothing into errors but the
// names they asked for. Env is added to the environment.
func Query(ctx context.Context, argv []string, timeout time.Duration, env ...string) ([]byte, error) {
	var answer limited
	var diagnostics clipped
	if err := explain(argv, run(ctx, "/", argv, timeout, &answer, &diagnostics, env...), &diagnostics); err != nil {
		return nil, err
	}
	if answer.over {
		return nil, fmt.Errorf("%s printed more than %d MiB", program(argv), maxAnswer>>20)
	}
	return answer.data, nil
}

func run(ctx context.Context, dir string, argv []string, timeout time.Duration, stdout, stderr io.Writer, env ...string) error {
	if len(argv) == 0 {
		return errors.New("no command given")
	}
	path, err := Find(argv[0])
	if errors.Is(err, errNotFound) {
		return fmt.Errorf("%w: install it, or give its absolute path", err)
	}
	if err != nil {
		return err
	}
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not done after %v", timeout))
	defer cancel()

	cmd := exec.CommandContext(ctx, path)
	cmd.Args = argv
	cmd.Dir = dir
	cmd.Env = append(Environment(), env...)
	cmd.Stdout, cmd.Stderr = stdout, stderr // and no Stdin: /dev/null
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// The negative number means the child's process group. SIGKILL at once: the timeout was the
	// grace period.
	cmd.Cancel = func() error {
		err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		if errors.Is(err, syscall.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	}
	cmd.WaitDelay = drainDelay

	err = cmd.Run()
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return nil // ErrWaitDelay: it succeeded, but a process that it started keeps the output open
	case ctx.Err() == nil:
		return err
	case cmd.Process == nil:
		return fmt.Errorf("not started: %w", context.Cause(ctx))
	}
	return fmt.Errorf("killed: %w", context.Cause(ctx))
}

// Environment returns the whole environment of a command.
func Environment() []string {
	return []string{"PATH=" + searchPath, "LANG=C", "HOME=" + home()}
}

// Find returns the path of the program that Run would run for name: an absolute path, or a plain
// name that is looked up in searchPath.
func Find(name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("no command given")
	case filepath.IsAbs(name):
		path, err := exec.LookPath(name)
		if wrapped, ok := errors.AsType[*exec.Error](err); ok {
			err = wrapped.Err // callers name the program
		}
		return path, err
	case strings.Contains(name, "/"):
		return "", errors.New("expected an absolute path or a plain name")
	}
	for _, dir := range filepath.SplitList(searchPath) {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w in %s", errNotFound, searchPath)
}

var errNotFound = errors.New("not found")

// home returns the home directory of the agent's user. It asks the user database, since HOME may be
// another user's.
func home() string {
	if u, err := user.LookupId(strconv.Itoa(os.Geteuid())); err == nil && filepath.IsAbs(u.HomeDir) {
		return u.HomeDir
	}
	return "/"
}

// explain adds the program and its output to an error.
func explain(argv []string, err error, output *clipped) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", program(argv), err)
	if text := output.String(); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// program returns the name of the command for messages. The arguments are left out: they may be
// secret.
func program(argv []string) string {
	if len(argv) == 0 {
		return "command"
	}
	return printable.Line(argv[0], 200)
}

// clipped keeps the beginning and the end of the output, since either may say why the command
// failed.
type clipped struct {
	head, tail []byte
	cut        bool
}

const (
	cutMark = " [...] "
	half    = (maxOutput - len(cutMark)) / 2
)

func (c *clipped) Write(data []byte) (int, error) {
	room := min(half-len(c.head), len(data))
	c.head = append(c.head, data[:room]...)
	c.tail = append(c.tail, data[room:]...)
	if over := len(c.tail) - half; over > 0 {
		c.tail = append(c.tail[:0], c.tail[over:]...)
		c.cut = true
	}
	return len(data), nil
}

// String returns the output on one line of at most maxOutput bytes, without key material.
func (c *clipped) String() string {
	if !c.cut {
		return printable.Line(redact(string(c.head)+string(c.tail), true, true), maxOutput)
	}
	return printable.Line(redact(string(c.head), true, false)+cutMark+redact(string(c.tail), false, true), maxOutput)
}

// limited keeps maxAnswer bytes and discards the rest, so that the command does not block.
type limited struct {
	data []byte
	over bool
}

func (l *limited) Write(data []byte) (int, error) {
	room := maxAnswer - len(l.data)
	if len(data) > room {
		l.over = true
	}
	l.data = append(l.data, data[:min(room, len(data))]...)
	return len(data), nil
}
