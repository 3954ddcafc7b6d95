// Package command runs the commands that operators configure, such as nginx -t,
// without a shell and within bounds: of time, of output, and of what the child
// is given.
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
	// defaultTimeout is the deadline of a command that has none configured.
	defaultTimeout = 60 * time.Second

	// maxLine is the longest command line, in bytes.
	maxLine = 1024

	// metacharacters mean something to a shell. There is none here, but the
	// author of the command expected one.
	metacharacters = ";|&$(){}<>\\\"'`\r\n\x00"

	// maxOutput bounds what is kept of the output for errors, in bytes.
	maxOutput = 8 << 10

	// maxAnswer bounds the standard output of Query: nginx -T prints the whole
	// configuration, which on hosts with thousands of sites is a few MiB.
	maxAnswer = 16 << 20

	// drainDelay is how long output is still read after the child has ended. A
	// reload may leave a daemon behind that never closes it.
	drainDelay = time.Second

	// searchPath is the PATH of commands, and where a plain name is looked for:
	// the agent's own PATH may have been anybody's.
	searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// Split splits a command line into words at white space. There is no quoting:
// a line that is empty, longer than 1,024 bytes, or has a character that means
// something to a shell is refused.
func Split(line string) ([]string, error) {
	if len(line) > maxLine {
		return nil, fmt.Errorf("the command has %d bytes, more than %d", len(line), maxLine)
	}
	if i := strings.IndexAny(line, metacharacters); i >= 0 {
		return nil, fmt.Errorf("the command has the character %q, which is refused: it runs without a shell, so put pipes, quotes and variables into a script", line[i])
	}
	words := strings.Fields(line)
	if len(words) == 0 {
		return nil, errors.New("the command is empty")
	}
	return words, nil
}

// Run runs a command to its end and returns what it printed, both streams
// together, in at most 8 KiB on one printable line, without what looks like key
// material. The error of one that cannot be started, exits with another status than 0, is ended by a signal, or
// is not done when timeout has passed (or ctx ends) names the program and
// includes that output. In the last case the command has been killed, together
// with what it started, except for what has left its process group.
//
// A timeout of 0 means defaultTimeout.
func Run(ctx context.Context, argv []string, timeout time.Duration) (string, error) {
	return RunIn(ctx, "/", argv, timeout)
}

// RunIn is Run for a command that finds its files in a directory.
func RunIn(ctx context.Context, dir string, argv []string, timeout time.Duration) (string, error) {
	var output clipped
	err := run(ctx, dir, argv, timeout, &output, &output)
	return output.String(), explain(argv, err, &output)
}

// Query is Run for a command that answers on standard output: that alone is
// returned, as it is, and more than 16 MiB of it are an error. Standard error
// is part of the error only. The answer is for parsing; nothing of it may go
// into an error but the names that it was asked for. Env goes on top of the
// environment.
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
		return errors.New("there is no command")
	}
	path, err := Find(argv[0])
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
	// The negative number is the group, which has the child's number. SIGKILL at
	// once: the deadline was the time to end in.
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
		return nil // the latter: successful, but what it left behind keeps the output open
	case ctx.Err() == nil:
		return err
	case cmd.Process == nil:
		return fmt.Errorf("not started: %w", context.Cause(ctx))
	}
	return fmt.Errorf("killed: %w", context.Cause(ctx))
}

// Environment is all that a command finds in its environment.
func Environment() []string {
	return []string{"PATH=" + searchPath, "LANG=C", "HOME=" + home()}
}

// Find returns the path of the program that Run would run under this name: an
// absolute path, or a plain name that is looked for in the system's directories.
func Find(name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("there is no command")
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
	return "", fmt.Errorf("not found in %s: install it, or give its absolute path", searchPath)
}

// home is the home directory of the agent's user by the user database, since
// the environment may be another user's.
func home() string {
	if u, err := user.LookupId(strconv.Itoa(os.Geteuid())); err == nil && filepath.IsAbs(u.HomeDir) {
		return u.HomeDir
	}
	return "/"
}

// explain adds to an error which program it was and what it said.
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

// program is what messages call the command: words after the first may be
// anything.
func program(argv []string) string {
	if len(argv) == 0 {
		return "command"
	}
	return printable.Line(argv[0], 200)
}

// clipped keeps the beginning and the end of what is written, since either may
// say what went wrong.
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

// String is at most maxOutput bytes on one line, without key material.
func (c *clipped) String() string {
	if !c.cut {
		return printable.Line(redact(string(c.head)+string(c.tail), true, true), maxOutput)
	}
	return printable.Line(redact(string(c.head), true, false)+cutMark+redact(string(c.tail), false, true), maxOutput)
}

// limited keeps maxAnswer bytes and discards what follows, so that the writer
// is not held up.
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
