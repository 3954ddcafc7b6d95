// Package crashstates derives from the system calls of a program the states in which a power cut
// could have left its directories, at each moment of the run. strace(1) records the calls, so a
// sync counts only if the program has really asked the kernel for it.
//
// The method is that of ALICE: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014,
// https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai
package crashstates

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"
)

// calls are the system calls that are recorded: those that change a file, the names in a directory
// or what of them is durable, and those that start commands. A "?" marks calls that not every
// architecture has. The model rejects those that it does not know.
const calls = "?open,openat,?openat2,?creat,write,pwrite64,writev,pwritev,?pwritev2,?sendfile,?copy_file_range,splice," +
	"?rename,renameat,?renameat2,?link,linkat,?symlink,symlinkat,?unlink,unlinkat,?rmdir,?mkdir,mkdirat,?mknod,mknodat," +
	"fsync,fdatasync,sync,syncfs,sync_file_range,truncate,ftruncate,fallocate," +
	"?chmod,fchmod,fchmodat,?chown,fchown,?lchown,fchownat,setxattr,lsetxattr,fsetxattr,removexattr,lremovexattr,fremovexattr," +
	"?fork,?vfork,clone,?clone3,execve"

// maxString is how much of a string strace prints, in bytes. No file that the program writes is
// longer.
const maxString = 1 << 20

// Command returns a command that runs a program under strace, which writes the calls to output. The
// caller closes output once the command has started. strace may exit after the program.
func Command(ctx context.Context, strace string, output *os.File, program string, args ...string) *exec.Cmd {
	// -f: all threads, in order, in one file. -y: descriptors with their paths. -xx: all strings in
	// hex, so that nothing in them looks like syntax. -D: the started process is the program, and
	// strace is its child.
	flags := []string{"-f", "--seccomp-bpf", "-qq", "-D", "-y", "-xx", "-ttt", "-s", strconv.Itoa(maxString),
		"-e", "trace=" + calls, "-e", "signal=none", "-o", "/dev/fd/3", "--", program}
	cmd := exec.CommandContext(ctx, strace, append(flags, args...)...)
	cmd.ExtraFiles = []*os.File{output}
	return cmd
}

// A Call is one system call that succeeded.
type Call struct {
	Time time.Time // when it was entered
	Name string

	thread  int
	foreign bool // made by a command that the program has started, or by a child before its exec
	args    []string
	result  string
	entered int // how many calls had returned when it was entered
}

// Parse parses the output of strace. It returns the calls in the order in which they returned.
func Parse(r io.Reader) ([]Call, error) {
	type begun struct {
		text    string
		time    time.Time
		entered int
	}
	var all []Call
	unfinished := make(map[int]begun)
	scanner := bufio.NewScanner(r)
	scanner.Buffer(nil, 16*maxString)
	for scanner.Scan() {
		line := scanner.Text()
		head, text, _ := strings.Cut(line, " ")
		thread, err := strconv.Atoi(head)
		if err != nil {
			return nil, fmt.Errorf("no thread: %.200q", line)
		}
		stamp, text, _ := strings.Cut(strings.TrimLeft(text, " "), " ")
		at, err := parseTime(stamp)
		if err != nil {
			return nil, fmt.Errorf("%w: %.600q", err, line)
		}
		// A call without a result had not returned when the process ended.
		if strings.HasPrefix(text, "+++") || strings.HasPrefix(text, "---") || strings.HasSuffix(text, "<detached ...>") {
			continue
		}
		if start, ok := strings.CutSuffix(text, "<unfinished ...>"); ok {
			unfinished[thread] = begun{strings.TrimRight(start, " "), at, len(all)}
			continue
		}
		b := begun{text, at, len(all)}
		if rest, ok := strings.CutPrefix(text, "<... "); ok {
			if b, ok = unfinished[thread]; !ok {
				return nil, fmt.Errorf("resumed without a beginning: %.200q", line)
			}
			delete(unfinished, thread)
			_, rest, _ = strings.Cut(rest, " resumed>")
			b.text += rest
		}
		c, ok, err := parseCall(b.text)
		if err != nil {
			return nil, fmt.Errorf("%w: %.600q", err, line)
		}
		if ok {
			c.Time, c.thread, c.entered = b.time, thread, b.entered
			all = append(all, c)
		}
	}
	markForeign(all)
	return all, scanner.Err()
}

// markForeign marks the calls of other processes. The calls of a child may precede the return of
// the call that created it, so it repeats until it finds no more.
func markForeign(all []Call) {
	foreign := make(map[int]bool)
	for again := true; again; {
		again = false
		for i := range all {
			c := &all[i]
			if c.foreign = foreign[c.thread]; !strings.Contains(c.Name, "fork") && !strings.HasPrefix(c.Name, "clone") {
				continue
			}
			child, _ := strconv.Atoi(c.result)
			thread := !c.foreign && slices.ContainsFunc(c.args, func(arg string) bool { return strings.Contains(arg, "CLONE_THREAD") })
			if !thread && !foreign[child] {
				foreign[child], again = true, true
			}
		}
	}
}

func parseTime(stamp string) (time.Time, error) {
	seconds, micros, ok := strings.Cut(stamp, ".")
	s, err := strconv.ParseInt(seconds, 10, 64)
	us, err2 := strconv.ParseInt(micros, 10, 64)
	if !ok || len(micros) != 6 || errors.Join(err, err2) != nil {
		return time.Time{}, errors.New("no time")
	}
	return time.Unix(s, us*1000), nil
}

// parseCall parses name(args) = result. ok is false if the call failed.
func parseCall(text string) (c Call, ok bool, err error) {
	// strace pads short calls before the equals sign. A result may be 3<path>, with the path in
	// hex.
	head, result, ok := cutLast(text, " = ")
	head, isCall := strings.CutSuffix(strings.TrimRight(head, " "), ")")
	name, args, found := strings.Cut(head, "(")
	if !ok || !isCall || !found {
		return c, false, errors.New("not a call")
	}
	if strings.HasPrefix(result, "-1") || strings.HasPrefix(result, "?") {
		return c, false, nil
	}
	return Call{Name: name, args: split(args), result: result}, true, nil
}

func cutLast(s, separator string) (before, after string, found bool) {
	i := strings.LastIndex(s, separator)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(separator):], true
}

// split splits arguments at the commas outside brackets.
func split(text string) (args []string) {
	depth, start := 0, 0
	for i := range len(text) {
		switch text[i] {
		case '[', '{', '(':
			depth++
		case ']', '}', ')':
			depth--
		case ',':
			if depth == 0 {
				args = append(args, strings.TrimSpace(text[start:i]))
				start = i + 1
			}
		}
	}
	return append(args, strings.TrimSpace(text[start:]))
}

// arg returns argument i, or "" if there is none.
func (c *Call) arg(i int) string {
	if i >= len(c.args) {
		return ""
	}
	return c.args[i]
}

// text returns argument i, a string.
func (c *Call) text(i int) (string, error) {
	s, ok := strings.CutPrefix(c.arg(i), `"`)
	s, whole := strings.CutSuffix(s, `"`)
	if !ok || !whole {
		return "", fmt.Errorf("%s: argument %d is not a whole string: %.80q", c.Name, i, c.arg(i))
	}
	return unhex(s)
}

func unhex(s string) (string, error) {
	var b strings.Builder
	for len(s) > 0 {
		if len(s) < 4 || s[:2] != `\x` {
			return "", fmt.Errorf("not in hex: %.80q", s)
		}
		n, err := strconv.ParseUint(s[2:4], 16, 8)
		if err != nil {
			return "", err
		}
		b.WriteByte(byte(n))
		s = s[4:]
	}
	return b.String(), nil
}

// descriptor parses 7<path>. It returns -1 for AT_FDCWD.
func descriptor(s string) (fd int, path string, err error) {
	number, rest, found := strings.Cut(s, "<")
	if number == "AT_FDCWD" {
		fd = -1
	} else if fd, err = strconv.Atoi(number); err != nil {
		return 0, "", fmt.Errorf("not a descriptor: %.80q", s)
	}
	if !found {
		return fd, "", nil
	}
	text, _, _ := strings.Cut(rest, ">")
	if path, err = unhex(text); err != nil {
		return fd, text, nil // such as "socket:[1]"
	}
	return fd, path, nil
}

// number returns argument i, a number in any base.
func (c *Call) number(i int) (int64, error) { return strconv.ParseInt(c.arg(i), 0, 64) }

// Output returns what the call wrote to standard output or standard error.
func (c *Call) Output() (text string, ok bool) {
	if fd, _, err := descriptor(c.arg(0)); c.Name != "write" || err != nil || fd != 1 && fd != 2 {
		return "", false
	}
	text, err := c.text(1)
	return text, err == nil
}

// String returns the call with its strings decoded.
func (c Call) String() string {
	var words []string
	for _, arg := range c.args {
		head, rest, found := strings.Cut(arg, `\x`)
		if found {
			if text, err := unhex(`\x` + strings.TrimRight(rest, `">`)); err == nil {
				arg = head + text
			}
		}
		words = append(words, fmt.Sprintf("%.80s", arg))
	}
	return fmt.Sprintf("%s(%s)", c.Name, strings.Join(words, ", "))
}
