// Package vendorapi calls the HTTP APIs of appliances and clouds. It bounds each
// call in time and bytes, repeats it where that is safe, and makes what the other
// side says fit to be shown.
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
	// defaultTimeout is for one try of a call.
	defaultTimeout = 30 * time.Second

	// defaultPatience is how long a call is tried again, in all.
	defaultPatience = time.Minute

	// firstPause is before the second try, and doubles from there to maxPause,
	// unless the API says how long it wants to be left alone. Up to a half more is
	// drawn, so that agents that were refused together do not come back together.
	firstPause = 500 * time.Millisecond
	maxPause   = 10 * time.Second

	// defaultMaxAnswer bounds an answer, in bytes: lists of objects come in pages
	// that are shorter.
	defaultMaxAnswer = 4 << 20

	// maxHeader bounds the header of an answer, in bytes.
	maxHeader = 64 << 10

	// maxMessage bounds what is shown of an answer that is not success, in bytes.
	maxMessage = 1 << 10
)

// Options are of one API.
type Options struct {
	// Dial connects to the API or, if there is one, to the proxy, at host:port. It
	// asks the policy. Nil: to any, because no private key is sent, or because the
	// policy has allowed what the proxy is to connect to.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	Proxy *url.URL // nil: none

	// TLS is asked for each try, after Sign, since what it reads may have rotated.
	// Nil: the authorities of the system are trusted.
	TLS func() (*tls.Config, error)

	// Sign authenticates a request, for each try. Nil: requests stay as they are.
	Sign func(ctx context.Context, request *http.Request, body []byte) error

	// Busy is asked about each answer that is not success: does it say that nothing
	// has been done, and may the call be made again? 429 and 503 count as yes. Nil:
	// nothing else does.
	Busy func(*StatusError) bool

	// Message is the vendor's own message in the body of an answer that is not
	// success. Nil or "": the whole body.
	Message func(body []byte) string

	Timeout  time.Duration // of one try; 0: 30 s
	Patience time.Duration // how long a call is tried again, in all; 0: one minute; negative: it is not
}

// Client calls one API.
type Client struct {
	options Options
	draw    func(n int64) int64 // uniform in [0, n); a test injects its own
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

// Request is one call.
type Request struct {
	Method string
	URL    string
	Header http.Header
	Body   []byte

	// Reads says that the call changes nothing, whatever its method, so that it
	// may be made again although it is not known whether it arrived. A GET does.
	Reads bool

	MaxAnswer int64 // in bytes; 0: 4 MiB
}

func (r *Request) reads() bool { return r.Reads || r.Method == http.MethodGet }

// Answer is a successful one, 2xx.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// StatusError is an answer that is not 2xx. Redirects are not followed.
type StatusError struct {
	Status  int
	Header  http.Header
	Body    []byte        // as it came
	Message string        // bounded, fit to print
	After   time.Duration // how long the API wants to be left alone; 0: it does not say
}

func (e *StatusError) Error() string {
	return strings.TrimSuffix(fmt.Sprintf("%d %s: %s", e.Status, http.StatusText(e.Status), e.Message), ": ")
}

// LostError says that a call may or may not have changed something: there was a
// connection for it, and no whole answer came.
type LostError struct{ err error }

func (e *LostError) Error() string { return e.err.Error() + " (it may have been carried out)" }

// Unwrap returns what happened to the connection.
func (e *LostError) Unwrap() error { return e.err }

// StatusOf is the status code of a StatusError, else 0.
func StatusOf(err error) int {
	if e, ok := errors.AsType[*StatusError](err); ok {
		return e.Status
	}
	return 0
}

// Do makes a call, and makes it again while the API is restarting or busy. A call
// that changes something and has begun is not cancelled with ctx: an undo has to
// know whether it happened.
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
			wait, asked = status.After, fmt.Sprintf(", since it wants to be left alone for %v", status.After)
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

// transport serves one request. A connection that is kept could be closed by the
// other side just when a change is sent by it, which nobody could tell from one
// that was carried out.
func (c *Client) transport() (*http.Transport, error) {
	config := &tls.Config{}
	if c.options.TLS != nil {
		var err error
		if config, err = c.options.TLS(); err != nil {
			return nil, err
		}
	}
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	proxy, dial := c.options.Proxy, c.options.Dial
	if dial == nil {
		dial = func(ctx context.Context, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		}
	}
	return &http.Transport{
		Proxy: http.ProxyURL(proxy),
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
			if answer.StatusCode != http.StatusOK { // net/http would show all of the reason, whatever that is
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

// plainError is an error of net/http without the URL, which may hold a secret
// and which the caller names better, and with the reason for a context's end.
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
		e.Message = "it redirects to " + location + ", which is not followed"
	}
	// It may quote anything of the request, and be of any length: Redact is slow.
	e.Message = printable.Line(command.Redact(e.Message[:min(len(e.Message), 8*maxMessage)]), maxMessage)
	e.After = retryAfter(response.Header.Get("Retry-After"))
	return e
}

// retryAfter reads the field's value, seconds or a date (RFC 9110, section 10.2.3).
func retryAfter(value string) time.Duration {
	const most = time.Hour // no call waits for as long
	if seconds, err := strconv.Atoi(value); err == nil {
		return time.Duration(min(max(seconds, 0), int(most/time.Second))) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(time.Until(at), 0), most)
}
