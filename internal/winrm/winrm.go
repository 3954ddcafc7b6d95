// Package winrm runs commands on Windows hosts over WS-Management [MS-WSMV]: it creates a shell,
// starts a command in it, sends its input and receives its output.
//
// Clause numbers refer to https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-wsmv/.
package winrm

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"certctl-agent/internal/secret"
	"certctl-agent/internal/vendorapi"
)

// Methods of authentication.
const (
	NTLM        = "ntlm"
	Basic       = "basic"       // over HTTPS only
	Certificate = "certificate" // over HTTPS only
)

const (
	// defaultTimeout bounds one call.
	defaultTimeout = time.Minute

	// longestRun bounds a command whose context has no earlier deadline. The commands of connectors
	// take seconds.
	longestRun = 15 * time.Minute

	// cleanUpTimeout bounds the calls after a command. It is also how long a cancelled creation of
	// a shell still waits for its answer, which alone has the id needed to delete the shell.
	cleanUpTimeout = 10 * time.Second

	// patience is how long a client keeps asking a restarting or busy host for a shell. The pauses
	// double from firstPause to maxPause.
	patience   = time.Minute
	firstPause = 500 * time.Millisecond
	maxPause   = 10 * time.Second

	// maxOutput bounds the output of a command, in bytes. A list of certificates takes some hundred
	// kilobytes.
	maxOutput = 8 << 20

	// maxCommand bounds a command line, in bytes. It is the limit of cmd.exe:
	// https://learn.microsoft.com/en-us/troubleshoot/windows-client/shell-experience/command-line-string-limitation.
	maxCommand = 8191
)

// Options configure the address of a host and the account to log on with.
type Options struct {
	// Dial connects to an address, host:port, after consulting the policy.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	Host  string // name or address, IPv6 without brackets
	Port  int    // 0 means 5986, or 5985 without HTTPS
	HTTPS bool

	CAFile      string // this and the next two: see vendorapi.Trust
	Fingerprint string
	Insecure    bool

	Auth        string        // "" means NTLM
	User        string        // user, DOMAIN\user or user@domain; for NTLM and Basic
	Password    secret.String // of NTLM and Basic
	Certificate *tls.Certificate

	Timeout time.Duration // of one call; 0 means a minute
}

// Client runs commands on a host, one at a time. It keeps its connection, because NTLM
// authenticates connections.
type Client struct {
	options Options
	trust   vendorapi.Trust

	mu      sync.Mutex // guards the fields below; held while a command runs
	conn    *connection
	refused error // set once the host has refused a logon: there is no second attempt
}

// New returns a client, or an error if the options are invalid. It does not connect.
func New(o Options) (*Client, error) {
	if o.Auth == "" {
		o.Auth = NTLM
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.Port == 0 {
		o.Port = 5985
		if o.HTTPS {
			o.Port = 5986
		}
	}
	switch {
	case o.Auth != NTLM && o.Auth != Basic && o.Auth != Certificate:
		return nil, fmt.Errorf("expected ntlm, basic or certificate as the authentication method, got %q", o.Auth)
	case o.Auth != NTLM && !o.HTTPS:
		return nil, fmt.Errorf("authentication with %s requires HTTPS: over plain HTTP only NTLM encrypts messages", o.Auth)
	case o.Auth == Certificate && o.Certificate == nil:
		return nil, errors.New("no certificate to log on with")
	case o.Auth != Certificate && (o.User == "" || o.Password.IsZero()):
		return nil, errors.New("no user or no password to log on with")
	case o.Auth == Basic && strings.Contains(o.User, ":"): // RFC 7617, 2
		return nil, errors.New("with basic authentication the user name must not contain a colon")
	}
	c := &Client{options: o, trust: vendorapi.Trust{CAFile: o.CAFile, Fingerprint: o.Fingerprint, Insecure: o.Insecure}}
	return c, c.trust.Check()
}

// Result is the result of a command. Output in UTF-16 is converted to UTF-8 without a byte order
// mark.
type Result struct {
	Stdout, Stderr []byte
	ExitCode       int
}

// ErrLogon is wrapped by errors of hosts that refuse the logon.
var ErrLogon = errors.New("the host refuses the logon")

// LostError means that a command may or may not have run to its end.
type LostError struct{ err error }

func (e *LostError) Error() string { return e.err.Error() + " (the command may have been carried out)" }

// Unwrap returns the cause.
func (e *LostError) Unwrap() error { return e.err }

// Run runs a command with stdin as its input. It deletes the shell in any case, even after a
// cancellation. Once the command may have started, errors are of type *LostError.
//
// The words of commandLine are interpreted by cmd.exe, so they may only consist of
// [A-Za-z0-9._/\:=,+-]. All other data must be passed on stdin.
func (c *Client) Run(ctx context.Context, commandLine []string, stdin []byte) (*Result, error) {
	if err := checkCommand(commandLine); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithTimeoutCause(ctx, longestRun, fmt.Errorf("the command did not end within %v", longestRun))
	defer cancel()
	result, err := c.run(ctx, commandLine, stdin)
	if err != nil {
		return nil, fmt.Errorf("WinRM of %s: %w", c.address(), err)
	}
	return result, nil
}

func checkCommand(words []string) error {
	for _, word := range words {
		if word == "" || strings.ContainsFunc(word, func(r rune) bool {
			return !strings.ContainsRune(`ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._/\:=,+-`, r)
		}) {
			return fmt.Errorf(`the word %q of a command contains characters other than A-Z a-z 0-9 . _ / \ : = , + -`, word)
		}
	}
	if length := len(strings.Join(words, " ")); length == 0 || length > maxCommand {
		return fmt.Errorf("a command must have 1 to %d bytes, not %d", maxCommand, length)
	}
	return nil
}

func (c *Client) run(ctx context.Context, commandLine []string, stdin []byte) (*Result, error) {
	s := &shell{client: c}
	if err := s.create(ctx); err != nil {
		return nil, err
	}
	defer s.delete(ctx)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	result, err := s.run(ctx, commandLine, stdin)
	if err != nil {
		if _, ok := errors.AsType[*Fault](err); ok && s.command == "" {
			return nil, err // refused, so it has not started
		}
		return nil, &LostError{err}
	}
	return result, nil
}

// shell is a shell on the host, with at most one command.
type shell struct {
	client  *Client
	id      string
	command string // id of the command; "" before it has started
}

// create creates the shell. Nothing has happened before it exists, so failures are retried.
func (s *shell) create(ctx context.Context) error {
	begun, pause := time.Now(), firstPause
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := s.tryCreate(ctx)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("create a shell: %w", err)
		if !isBusy(err) || time.Since(begun)+pause > patience {
			return err
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, maxPause)
		case <-ctx.Done():
			return fmt.Errorf("%w; %w", err, context.Cause(ctx))
		}
	}
}

// tryCreate is one attempt to create the shell (3.1.4.5.2).
func (s *shell) tryCreate(ctx context.Context) error {
	ctx, cancel := withGrace(ctx)
	defer cancel()
	kept := s.client.conn != nil
	answer, err := s.client.call(ctx, createRequest(), nil)
	if kept && isBroken(err) {
		// The host has closed the connection since the last command. If it has created a shell
		// anyway, that shell times out.
		answer, err = s.client.call(ctx, createRequest(), nil)
	}
	if err != nil {
		return err
	}
	if s.id = answer.shellID(); s.id == "" {
		return errors.New("the host's answer has no shell id")
	}
	return nil
}

// withGrace returns a context that ends cleanUpTimeout after ctx.
func withGrace(ctx context.Context) (context.Context, func()) {
	later, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(cleanUpTimeout):
			cancel(context.Cause(ctx))
		case <-later.Done():
		}
	})
	return later, func() { stop(); cancel(nil) }
}

// run starts a command, sends its input and receives its output (3.1.4.11, 3.1.4.13, 3.1.4.14).
func (s *shell) run(ctx context.Context, commandLine []string, stdin []byte) (*Result, error) {
	answer, err := s.client.call(ctx, commandRequest(commandLine), s)
	if err != nil {
		return nil, fmt.Errorf("start the command: %w", err)
	}
	if s.command = answer.Body.Command.ID; s.command == "" {
		return nil, errors.New("start the command: the host's answer has no command id")
	}
	for end := false; !end; {
		part := stdin[:min(len(stdin), maxInput)]
		stdin = stdin[len(part):]
		end = len(stdin) == 0
		// A host under load accepts the input but reports a timeout.
		if _, err := s.client.call(ctx, sendRequest(s.command, part, end), s); err != nil && !isTimeout(err) {
			return nil, fmt.Errorf("send the command its input: %w", err)
		}
	}
	var out output
	for {
		answer, err := s.client.call(ctx, receiveRequest(s.command), s)
		if isTimeout(err) {
			continue // no output yet
		}
		if err == nil {
			err = out.add(answer, s.command)
		}
		if err != nil {
			return nil, fmt.Errorf("receive the command's output: %w", err)
		}
		if out.done {
			return out.result()
		}
	}
}

// delete terminates the command (3.1.4.12) and deletes the shell (3.1.4.4.1). If that fails, the
// shell times out.
func (s *shell) delete(ctx context.Context) {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), cleanUpTimeout, fmt.Errorf("no answer within %v", cleanUpTimeout))
	defer cancel()
	if s.command != "" {
		s.client.call(ctx, signalRequest(s.command), s)
	}
	s.client.call(ctx, deleteRequest(), s)
}

// output is the output of a command so far.
type output struct {
	stdout, stderr []byte
	exitCode       int
	done           bool
}

func (o *output) add(answer *envelope, command string) error {
	for _, stream := range answer.Body.Receive.Streams {
		if !strings.EqualFold(stream.Command, command) {
			continue
		}
		data, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(stream.Data), ""))
		if err != nil {
			return fmt.Errorf("a stream is not base64: %w", err)
		}
		if len(o.stdout)+len(o.stderr)+len(data) > maxOutput {
			return fmt.Errorf("it is longer than %d bytes", maxOutput)
		}
		switch stream.Name {
		case "stdout":
			o.stdout = append(o.stdout, data...)
		case "stderr":
			o.stderr = append(o.stderr, data...)
		}
	}
	state := answer.Body.Receive.State
	if state == nil || !strings.EqualFold(state.Command, command) || state.State != shellNamespace+"/CommandState/Done" {
		return nil
	}
	o.done = true
	if state.ExitCode == nil {
		return errors.New("the command ended without an exit code: the host has terminated it")
	}
	o.exitCode = int(*state.ExitCode)
	return nil
}

func (o *output) result() (*Result, error) {
	stdout, err := toUTF8(o.stdout)
	if err != nil {
		return nil, fmt.Errorf("standard output: %w", err)
	}
	stderr, err := toUTF8(o.stderr)
	if err != nil {
		return nil, fmt.Errorf("standard error: %w", err)
	}
	return &Result{stdout, stderr, o.exitCode}, nil
}

// Close closes the connection.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.disconnect()
	return nil
}
