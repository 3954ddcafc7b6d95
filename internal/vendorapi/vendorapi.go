// Package vendorapi calls the HTTP APIs of appliances and clouds. It bounds the time and size of
// each call, retries calls if that is safe, and makes the server's error messages safe to print.
package vendorapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/command"
	"certctl-agent/internal/printable"
)

const (
	// defaultTimeout bounds one attempt of a call.
	defaultTimeout = 30 * time.Second

	// defaultPatience bounds all attempts of a call together.
	defaultPatience = time.Minute

	// firstPause is the pause before the first retry. Pauses double up to maxPause unless the API
	// asks for a longer one. Up to half of a pause is added at random, so agents that were rejected
	// together do not return together.
	firstPause = 500 * time.Millisecond
	maxPause   = 10 * time.Second

	// defaultMaxAnswer bounds an answer, in bytes. Lists of objects come in shorter pages.
	defaultMaxAnswer = 4 << 20

	// maxHeader bounds the header of an answer, in bytes.
	maxHeader = 64 << 10

	// maxMessage bounds the part of an error answer that is shown, in bytes.
	maxMessage = 1 << 10
)

// Options configure the client of an API.
type Options struct {
	// Dial connects to the API, or to the proxy if there is one, at host:port, after consulting the
	// policy. If it is nil, every connection is allowed: no private key is sent, or the policy has
	// already allowed the address behind the proxy.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	Proxy *url.URL // or nil

	// TLS returns the configuration for each attempt. It is called after Sign, because the files
	// that it reads may have been rotated. If it is nil, the system's CA certificates apply.
	TLS func() (*tls.Config, error)

	// Sign authenticates a request, for each attempt. It may be nil.
	Sign func(ctx context.Context, request *http.Request, body []byte) error

	// Busy reports whether an error answer means that nothing was done and that the call may be
	// retried. 429 and 503 always mean that. It may be nil.
	Busy func(*StatusError) bool

	// Message extracts the vendor's error message from the body of an answer. If Message is nil or
	// returns "", the whole body is shown.
	Message func(body []byte) string

	Timeout  time.Duration // of one attempt; 0 means 30 s
	Patience time.Duration // for all attempts; 0 means one minute, negative means no retries
}

// Client calls an API.
type Client struct {
	options Options
	draw    func(n int64) int64 // uniform in [0, n); injected by tests
}

// New returns a client.
func New(o Options) *Client {
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.Patience == 0 {
		o.Patience = defaultPatience
	}
	return &Client{o, rand.Int64N}
}

// Request is a call.
type Request struct {
	Method string
	URL    string
	Header http.Header
	Body   []byte

	// Reads means that the call changes nothing, whatever its method, so it may be retried even if
	// it may have arrived. It is implied by GET.
	Reads bool

	MaxAnswer int64 // in bytes; 0 means 4 MiB
}

func (r *Request) reads() bool { return r.Reads || r.Method == http.MethodGet }

// Answer is a successful answer (2xx).
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// StatusError is an answer other than 2xx. Redirects are not followed.
type StatusError struct {
	Status  int
	Header  http.Header
	Body    []byte        // as received
	Message string        // printable and bounded
	After   time.Duration // how long the API asks to wait, or 0
}

func (e *StatusError) Error() string {
	return strings.TrimSuffix(fmt.Sprintf("%d %s: %s", e.Status, http.StatusText(e.Status), e.Message), ": ")
}

// LostError means that a call may or may not have changed something: it was connected, but no
// complete answer arrived.
type LostError struct{ err error }

func (e *LostError) Error() string { return e.err.Error() + " (it may have been carried out)" }

// Unwrap returns the error of the connection.
func (e *LostError) Unwrap() error { return e.err }

// StatusOf returns the status code of a StatusError, or 0 for other errors.
func StatusOf(err error) int {
	if e, ok := errors.AsType[*StatusError](err); ok {
		return e.Status
	}
	return 0
}

// Do makes a call and retries it while the API restarts or is busy. Once a call that changes
// something has started, ctx does not cancel it: an undo must know whether the change happened.
func (c *Client) Do(ctx context.Context, r *Request) (*Answer, error) {
	begun, pause := time.Now(), firstPause
	for {
		answer, err := c.try(ctx, r)
		if err == nil {
			return answer, nil
		}
		if !c.mayRepeat(err) || c.options.Patience < 0 || ctx.Err() != nil {
			return nil, err
		}
		wait, asked := pause, ""
		if status, ok := errors.AsType[*StatusError](err); ok && status.After > wait {
			wait, asked = status.After, fmt.Sprintf(": it asks to wait %v", status.After)
		}
		wait += time.Duration(c.draw(int64(wait / 2)))
		if tried := time.Since(begun); tried+wait > c.options.Patience {
			return nil, fmt.Errorf("%w (given up after %v%s)", err, tried.Round(time.Second), asked)
		}
		select {
		case <-time.After(wait):
			pause = min(2*pause, maxPause)
		case <-ctx.Done():
			return nil, fmt.Errorf("%w; %w", err, context.Cause(ctx))
		}
	}
}

func (c *Client) mayRepeat(err error) bool {
	if status, ok := errors.AsType[*StatusError](err); ok {
		busy := c.options.Busy != nil && c.options.Busy(status)
		return busy || status.Status == http.StatusTooManyRequests || status.Status == http.StatusServiceUnavailable
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return true
	}
	broken := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)
	_, lost := errors.AsType[*LostError](err)
	return broken && !lost
}

func (c *Client) try(ctx context.Context, r *Request) (*Answer, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if !r.reads() {
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.options.Timeout, fmt.Errorf("no answer within %v", c.options.Timeout))
	defer cancel()
	connected := false
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected = true }})
	fail := func(err error) (*Answer, error) {
		if err = plainError(ctx, err); connected && !r.reads() {
			err = &LostError{err}
		}
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, r.Method, r.URL, bytes.NewReader(r.Body))
	if err != nil {
		return fail(err)
	}
	if r.Header != nil {
		request.Header = r.Header.Clone()
	}
	if c.options.Sign != nil {
		if err := c.options.Sign(ctx, request, r.Body); err != nil {
			return nil, err
		}
	}
	transport, err := c.transport()
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	response, err := client.Do(request)
	if err != nil {
		return fail(err)
	}
	defer response.Body.Close()
	limit := r.MaxAnswer
	if limit == 0 {
		limit = defaultMaxAnswer
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, limit+1))
	switch {
	case response.StatusCode/100 != 2:
		return nil, c.newStatusError(response, body)
	case err != nil:
		return fail(err)
	case int64(len(body)) > limit:
		return fail(fmt.Errorf("the answer is longer than %d KiB", limit>>10))
	}
	return &Answer{Status: response.StatusCode, Header: response.Header, Body: body}, nil
}

// transport returns a transport for one request. A kept connection could be closed by the server
// just when a change is sent over it, and it would be unknown whether the change was carried out.
func (c *Client) transport() (*http.Transport, error) {
	config := &tls.Config{}
	if c.options.TLS != nil {
		var err error
		if config, err = c.options.TLS(); err != nil {
			return nil, err
		}
	}
	proxy, dial := c.options.Proxy, c.options.Dial
	if dial == nil {
		dial = func(ctx context.Context, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		}
	}
	return &http.Transport{
		Proxy: http.ProxyURL(proxy),
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
			if answer.StatusCode != http.StatusOK { // net/http would show the whole reason, unbounded
				return fmt.Errorf("the proxy %s answers %s", proxy.Host, printable.Line(answer.Status, 200))
			}
			return nil
		},
		TLSClientConfig:        config,
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: maxHeader,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			return dial(ctx, address)
		},
	}, nil
}

// plainError returns an error of net/http without the URL, which may contain a secret and which the
// caller describes better. If the context ended, it returns the cause.
func plainError(ctx context.Context, err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
		return cause
	}
	return err
}

func (c *Client) newStatusError(response *http.Response, body []byte) *StatusError {
	e := &StatusError{Status: response.StatusCode, Header: response.Header, Body: body}
	if c.options.Message != nil {
		e.Message = c.options.Message(body)
	}
	if e.Message == "" {
		e.Message = string(body)
	}
	if location := response.Header.Get("Location"); response.StatusCode/100 == 3 {
		e.Message = "it redirects to " + location + "; redirects are not followed"
	}
	// The message may quote any part of the request, so redact it. Redact is slow: cut it first.
	e.Message = printable.Line(command.Redact(e.Message[:min(len(e.Message), 8*maxMessage)]), maxMessage)
	e.After = retryAfter(response.Header.Get("Retry-After"))
	return e
}

// retryAfter parses a Retry-After field in seconds or as a date (RFC 9110, section 10.2.3).
func retryAfter(value string) time.Duration {
	const most = time.Hour // longer than any call waits
	if seconds, err := strconv.Atoi(value); err == nil {
		return time.Duration(min(max(seconds, 0), int(most/time.Second))) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(time.Until(at), 0), most)
}
