package sftp

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/testing/needs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// process is a server process with its streams.
type process struct {
	io.Reader
	io.WriteCloser
	command *exec.Cmd
	once    sync.Once
}

func (p *process) Close() error {
	p.once.Do(func() { _ = p.command.Process.Kill(); _ = p.command.Wait() })
	return nil
}

// openssh returns a session with OpenSSH's server.
func openssh(t *testing.T) *Client {
	for _, path := range []string{"/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/libexec/sftp-server", "/usr/lib/ssh/sftp-server"} {
		if _, err := os.Stat(path); err != nil {
			continue
		}
		cmd := exec.Command(path)
		stdin, err := cmd.StdinPipe()
		must(t, err)
		stdout, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		c, err := New(t.Context(), &process{Reader: stdout, WriteCloser: stdin, command: cmd}, 10*time.Second)
		must(t, err)
		t.Cleanup(func() { c.Close() })
		return c
	}
	needs.Missing(t, "OpenSSH's sftp-server is not installed")
	return nil
}

func TestOpenSSH(t *testing.T) {
	c, ctx := openssh(t), t.Context()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	path := filepath.Join(dir, "a")
	f, err := c.Create(ctx, path, 0o600)
	must(t, err)
	data := []byte(strings.Repeat("0123456789", 10_000)) // several requests
	must(t, f.Write(ctx, data))
	must(t, f.Chmod(ctx, 0o640))
	must(t, f.Chown(ctx, uint32(os.Geteuid()), uint32(os.Getegid())))
	must(t, f.SetModified(ctx, 1e9))
	must(t, f.Sync(ctx))
	a, err := f.Stat(ctx)
	must(t, err)
	if want := (Attrs{Size: 100_000, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), Mode: 0o640, Modified: 1e9, complete: true}); a != want {
		t.Errorf("attributes %+v, want %+v", a, want)
	}
	must(t, f.Close(ctx))
	if got, err := os.ReadFile(path); err != nil || string(got) != string(data) {
		t.Errorf("the file has %d bytes, %v", len(got), err)
	}
	if _, err := c.Create(ctx, path, 0o600); err == nil {
		t.Error("Create replaced an existing file")
	}
	f, err = c.OpenToRead(ctx, path)
	must(t, err)
	if got, err := f.Read(ctx, 5, 200_000); err != nil || string(got) != string(data[5:]) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	if got, err := f.Read(ctx, 3, 4); err != nil || string(got) != "3456" {
		t.Errorf("read %q, %v", got, err)
	}
	must(t, f.Close(ctx))

	must(t, c.Link(ctx, path, filepath.Join(dir, "b")))
	if err := c.Link(ctx, path, filepath.Join(dir, "b")); err == nil {
		t.Error("a link replaced a file")
	}
	must(t, os.WriteFile(filepath.Join(dir, "c"), nil, 0o600))
	must(t, c.Rename(ctx, path, filepath.Join(dir, "c")))
	names, err := c.Names(ctx, dir, func(name string) bool { return !strings.HasPrefix(name, ".") })
	slices.Sort(names)
	if err != nil || !slices.Equal(names, []string{"b", "c"}) {
		t.Errorf("names %q, %v", names, err)
	}
	must(t, os.Symlink("c", filepath.Join(dir, "d")))
	if got, err := c.RealPath(ctx, filepath.Join(dir, "d")); err != nil || got != filepath.Join(dir, "c") {
		t.Errorf("real path %q, %v", got, err)
	}
	for name, mode := range map[string]fs.FileMode{"d": fs.ModeSymlink, ".": fs.ModeDir} {
		if a, err := c.Lstat(ctx, filepath.Join(dir, name)); err != nil || a.Mode.Type() != mode {
			t.Errorf("%s is %v, %v", name, a.Mode, err)
		}
	}
	must(t, c.Remove(ctx, filepath.Join(dir, "d")))
	if _, err := c.Lstat(ctx, filepath.Join(dir, "d")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a removed file: %v", err)
	}
	if c.Err() != nil {
		t.Error(c.Err())
	}
}

// answering returns a session with a server that sends these packets in turn.
func answering(t testing.TB, timeout time.Duration, answers ...string) (*Client, error) {
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	go func() {
		for _, answer := range answers {
			if _, err := theirs.Read(make([]byte, 64<<10)); err != nil {
				return
			}
			if _, err := io.WriteString(theirs, answer); err != nil {
				return
			}
		}
		_, _ = io.Copy(io.Discard, theirs)
	}()
	return New(t.Context(), ours, timeout)
}

const hello = "\x00\x00\x00\x05\x02\x00\x00\x00\x03"

func TestNonsense(t *testing.T) {
	for _, test := range []struct{ name, answer, says string }{
		{"text", "Welcome to the machine", "begins with \"Welco\""},
		{"too long", "\x7f\x00\x00\x00\x02", "expected SFTP"},
		{"empty", "\x00\x00\x00\x00\x02", "expected SFTP"},
		{"version", "\x00\x00\x00\x05\x02\x00\x00\x00\x02", "version 2"},
		{"type", "\x00\x00\x00\x05\x03\x00\x00\x00\x03", "packet type 3"},
		{"extensions", "\x00\x00\x00\x09\x02\x00\x00\x00\x03\x00\x00\x00\x09", "truncated"},
	} {
		if _, err := answering(t, time.Minute, test.answer); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %q", test.name, err, test.says)
		}
	}
	for _, test := range []struct{ name, answer, says string }{
		{"another request's", "\x00\x00\x00\x09\x65\x00\x00\x00\x07\x00\x00\x00\x00", "does not match the request"},
		{"no id", "\x00\x00\x00\x01\x65", "does not match the request"},
		{"no code", "\x00\x00\x00\x05\x65\x00\x00\x00\x01", "truncated"},
		{"another type", "\x00\x00\x00\x05\x66\x00\x00\x00\x01", "packet type 102"},
		{"success for nothing", "\x00\x00\x00\x09\x65\x00\x00\x00\x01\x00\x00\x00\x00", "no reason"},
		{"few attributes", "\x00\x00\x00\x09\x69\x00\x00\x00\x01\x00\x00\x00\x00", "type, owner and size"},
	} {
		c, err := answering(t, time.Minute, hello, test.answer)
		must(t, err)
		if _, err := c.Lstat(t.Context(), "/x"); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %q", test.name, err, test.says)
		}
	}
}

// TestEndlessList checks that empty lists of names end the session.
func TestEndlessList(t *testing.T) {
	answers := []string{hello, "\x00\x00\x00\x0a\x66\x00\x00\x00\x01\x00\x00\x00\x01d"}
	for id := byte(2); id < 100; id++ {
		answers = append(answers, "\x00\x00\x00\x09\x68\x00\x00\x00"+string(rune(id))+"\x00\x00\x00\x00")
	}
	c, err := answering(t, time.Second, answers...)
	must(t, err)
	if _, err := c.Names(t.Context(), "/x", func(string) bool { return true }); err == nil || !strings.Contains(err.Error(), "empty list") {
		t.Errorf("got %v", err)
	}
}

// TestSilence checks that a missing answer ends the session.
func TestSilence(t *testing.T) {
	c, err := answering(t, 10*time.Millisecond, hello)
	must(t, err)
	for range 2 {
		_, err = c.Lstat(t.Context(), "/x")
		if _, lost := errors.AsType[*LostError](err); !lost || !strings.Contains(err.Error(), "no answer for 10ms") {
			t.Errorf("got %v, want a lost connection", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	if c, err = answering(t, time.Hour, hello); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(time.Millisecond, cancel)
	if _, err := c.Lstat(ctx, "/x"); !errors.Is(err, context.Canceled) || c.Err() == nil {
		t.Errorf("cancelled: got %v", err)
	}
}

// TestCancelledBefore checks that New closes the stream even if the context ended before anything
// was sent.
func TestCancelledBefore(t *testing.T) {
	ours, theirs := net.Pipe()
	must(t, theirs.SetReadDeadline(time.Now().Add(10*time.Second)))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(ctx, ours, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the other end reads %v, want %v", err, io.EOF)
	}
}

// FuzzAnswers checks that every answer of a server is either valid or an error.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte("\x69\x00\x00\x00\x01\x00\x00\x00\x0f"))
	f.Add([]byte("\x68\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x01a\x00\x00\x00\x00\x80\x00\x00\x00\xff\xff\xff\xff"))
	f.Add([]byte("\x65\x00\x00\x00\x01\x00\x00\x00\x01"))
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(body) == 0 || len(body) > 1000 {
			return
		}
		answer := string([]byte{0, 0, byte(len(body) >> 8), byte(len(body))}) + string(body)
		for _, ask := range []func(c *Client) error{
			func(c *Client) error { _, err := c.Lstat(t.Context(), "/x"); return err },
			func(c *Client) error { _, err := c.RealPath(t.Context(), "/x"); return err },
			func(c *Client) error { return c.Remove(t.Context(), "/x") },
			func(c *Client) error {
				_, err := (&File{client: c}).Read(t.Context(), 0, 10)
				return err
			},
		} {
			c, err := answering(t, time.Second, hello, answer)
			if err != nil {
				t.Fatal(err)
			}
			if err := ask(c); err != nil && len(err.Error()) > 1000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			c.Close()
		}
	})
}
