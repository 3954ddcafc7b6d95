package vendorapi

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/testing/testca"
)

// network answers the calls of a client in memory. It uses its handlers in turn and repeats the
// last one.
type network struct {
	handlers []http.HandlerFunc
	calls    atomic.Int64
}

func (n *network) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i := int(n.calls.Add(1)) - 1
	n.handlers[min(i, len(n.handlers)-1)](w, r)
}

func (n *network) dial(context.Context, string) (net.Conn, error) {
	client, server := net.Pipe()
	go http.Serve(&single{conn: server}, n)
	return client, nil
}

// single is a listener of one connection.
type single struct{ conn net.Conn }

func (s *single) Accept() (net.Conn, error) {
	if conn := s.conn; conn != nil {
		s.conn = nil
		return conn, nil
	}
	return nil, net.ErrClosed
}
func (s *single) Close() error   { return nil }
func (s *single) Addr() net.Addr { return &net.TCPAddr{} }

func status(code int, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		fmt.Fprintf(w, "body %d", code)
	}
}

func drop(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		conn.Close()
	}
}

func hang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// TestRetries checks which calls are retried and how long each takes.
func TestRetries(t *testing.T) {
	busy := func(e *StatusError) bool { return e.Status == 423 }
	for _, test := range []struct {
		name     string
		method   string
		reads    bool
		handlers []http.HandlerFunc
		calls    int64
		took     time.Duration
		says     string // part of the error; "" for success
		lost     bool
	}{
		{"success", "POST", false, []http.HandlerFunc{status(201)}, 1, 0, "", false},
		{"busy once", "POST", false, []http.HandlerFunc{status(503), status(200)}, 2, firstPause, "", false},
		{"throttled, with a time", "POST", false, []http.HandlerFunc{status(429, "Retry-After", "7"), status(200)}, 2, 7 * time.Second, "", false},
		{"throttled for too long", "GET", false, []http.HandlerFunc{status(429, "Retry-After", "61"), status(200)}, 1, 0, "429 Too Many Requests: body 429 (given up after 0s: it asks to wait 1m1s)", false},
		{"the vendor's own busy", "POST", false, []http.HandlerFunc{status(423), status(200)}, 2, firstPause, "", false},
		{"busy permanently", "POST", false, []http.HandlerFunc{status(503)}, 10, 55500 * time.Millisecond, "given up after 56s", false},
		{"failed", "GET", false, []http.HandlerFunc{status(500)}, 1, 0, "500 Internal Server Error: body 500", false},
		{"redirected", "GET", false, []http.HandlerFunc{status(307, "Location", "https://evil.example/")}, 1, 0, "it redirects to https://evil.example/; redirects are not followed", false},
		{"a read whose answer is lost", "GET", false, []http.HandlerFunc{drop, status(200)}, 2, firstPause, "", false},
		{"a POST that reads", "POST", true, []http.HandlerFunc{drop, status(200)}, 2, firstPause, "", false},
		{"a change whose answer is lost", "POST", false, []http.HandlerFunc{drop, status(200)}, 1, 0, "it may have been carried out", true},
		{"a read that hangs", "GET", false, []http.HandlerFunc{hang}, 1, defaultTimeout, "no answer within 30s", false},
		{"a change that hangs", "PUT", false, []http.HandlerFunc{hang}, 1, defaultTimeout, "no answer within 30s (it may have been carried out)", true},
		{"a long answer", "GET", false, []http.HandlerFunc{func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 1<<10+1)) }}, 1, 0, "longer than 1 KiB", false},
		{"a long header", "GET", false, []http.HandlerFunc{status(200, "X", strings.Repeat("x", 128<<10))}, 1, 0, "exceeded 65536 bytes", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &network{handlers: test.handlers}
				c := New(Options{Dial: n.dial, Busy: busy})
				c.draw = func(int64) int64 { return 0 }
				begun := time.Now()
				answer, err := c.Do(t.Context(), &Request{Method: test.method, URL: "http://api.example/", Reads: test.reads, MaxAnswer: 1 << 10})
				if took := time.Since(begun); took != test.took {
					t.Errorf("it took %v, want %v", took, test.took)
				}
				if n.calls.Load() != test.calls {
					t.Errorf("%d calls, want %d", n.calls.Load(), test.calls)
				}
				_, lost := errors.AsType[*LostError](err)
				switch {
				case test.says == "" && err != nil, test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)):
					t.Errorf("got %v, want %q", err, test.says)
				case lost != test.lost:
					t.Errorf("%v: lost %v, want %v", err, lost, test.lost)
				case err == nil && !strings.HasPrefix(string(answer.Body), "body 2"):
					t.Errorf("the answer is %q", answer.Body)
				}
			})
		})
	}
}

// If nothing was sent, even a change is retried.
func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, before := range []error{syscall.ECONNREFUSED, syscall.ECONNRESET, io.EOF} { // refused, and in the handshake
			n, tries := &network{handlers: []http.HandlerFunc{status(200)}}, 0
			c := New(Options{Dial: func(ctx context.Context, address string) (net.Conn, error) {
				if tries++; tries < 3 {
					return nil, before
				}
				return n.dial(ctx, address)
			}})
			if _, err := c.Do(t.Context(), &Request{Method: "POST", URL: "http://api.example/"}); err != nil || tries != 3 {
				t.Errorf("%v: after %d tries: %v", before, tries, err)
			}
		}
		denied := errors.New("not allowed")
		c := New(Options{Dial: func(context.Context, string) (net.Conn, error) { return nil, denied }})
		// The URL may hold a secret.
		_, err := c.Do(t.Context(), &Request{Method: "POST", URL: "http://api.example/?token=secret"})
		if _, lost := errors.AsType[*LostError](err); err != denied || lost {
			t.Errorf("got %v (lost %v), want %v", err, lost, denied)
		}
	})
}

// An answer that does not end is not read to its end.
func TestLongAnswer(t *testing.T) {
	const piece, pieces = 64 << 10, 1 << 10
	var sent atomic.Int64
	n := &network{handlers: []http.HandlerFunc{func(w http.ResponseWriter, _ *http.Request) {
		for range pieces {
			if _, err := w.Write(make([]byte, piece)); err != nil {
				return
			}
			sent.Add(piece)
		}
	}}}
	_, err := New(Options{Dial: n.dial}).Do(t.Context(), &Request{Method: "GET", URL: "http://api.example/", MaxAnswer: piece})
	if err == nil || sent.Load() > 4*piece {
		t.Errorf("after %d bytes of an answer that may have %d: %v", sent.Load(), piece, err)
	}
}

// Nobody is left alone for more than an hour.
func TestRetryAfter(t *testing.T) {
	for value, want := range map[string]time.Duration{
		"": 0, "soon": 0, "-1": 0, "7": 7 * time.Second, "3601": time.Hour, "9223372036854775807": time.Hour,
		"Mon, 01 Jan 2001 00:00:00 GMT": 0, "Fri, 01 Jan 2100 00:00:00 GMT": time.Hour,
	} {
		if got := retryAfter(value); got != want {
			t.Errorf("%q: got %v, want %v", value, got, want)
		}
	}
}

// Clients that were rejected together do not return together.
func TestJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, draw := range []int64{0, 1} {
			n := &network{handlers: []http.HandlerFunc{status(503, "Retry-After", "10"), status(200)}}
			c := New(Options{Dial: n.dial})
			c.draw = func(n int64) int64 { return draw * (n - 1) }
			begun, want := time.Now(), 10*time.Second+time.Duration(draw)*(5*time.Second-1)
			if _, err := c.Do(t.Context(), &Request{Method: "GET", URL: "http://api.example/"}); err != nil || time.Since(begun) != want {
				t.Errorf("%v after %v, want %v", err, time.Since(begun), want)
			}
		}
	})
}

func TestNoPatience(t *testing.T) {
	n := &network{handlers: []http.HandlerFunc{status(503)}}
	_, err := New(Options{Dial: n.dial, Patience: -1}).Do(t.Context(), &Request{Method: "GET", URL: "http://api.example/"})
	if StatusOf(err) != 503 || strings.Contains(err.Error(), "given up") || n.calls.Load() != 1 {
		t.Errorf("%d calls: %v", n.calls.Load(), err)
	}
}

// A read ends with its context, but a change that has started does not.
func TestCancel(t *testing.T) {
	for method, want := range map[string]time.Duration{"GET": time.Second, "POST": 3 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			slow := func(w http.ResponseWriter, r *http.Request) {
				time.AfterFunc(time.Second, func() { cancel(errors.New("the agent is stopping")) })
				select {
				case <-time.After(3 * time.Second):
				case <-r.Context().Done():
				}
			}
			n := &network{handlers: []http.HandlerFunc{slow}}
			c := New(Options{Dial: n.dial})
			begun := time.Now()
			_, err := c.Do(ctx, &Request{Method: method, URL: "http://api.example/"})
			if took := time.Since(begun); took != want || (err == nil) != (method == "POST") {
				t.Errorf("%s: %v after %v, want %v", method, err, took, want)
			}
			_, err = c.Do(ctx, &Request{Method: method, URL: "http://api.example/"})
			if err == nil || err.Error() != "the agent is stopping" || n.calls.Load() != 1 {
				t.Errorf("%s after the end: %v, %d calls", method, err, n.calls.Load())
			}
		})
	}
}

// Messages from the server are bounded, on one line, and without keys.
func TestMessage(t *testing.T) {
	key := "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg\n-----END PRIVATE KEY-----"
	body := "denied\x1b[2J\n" + key + strings.Repeat("x", 1<<20)
	n := &network{handlers: []http.HandlerFunc{func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		w.Write([]byte(body))
	}}}
	_, err := New(Options{Dial: n.dial}).Do(t.Context(), &Request{Method: "GET", URL: "http://api.example/"})
	if StatusOf(err) != 403 || len(err.Error()) > maxMessage+100 || strings.ContainsAny(err.Error(), "\x1b\n") || strings.Contains(err.Error(), "MIGHAgEA") {
		t.Errorf("got %q", err)
	}
	begun := time.Now()
	c := New(Options{Dial: n.dial, Message: func([]byte) string { return strings.Repeat("\n00 01 0a", 1<<22) }})
	if _, err = c.Do(t.Context(), &Request{Method: "GET", URL: "http://api.example/"}); StatusOf(err) != 403 || time.Since(begun) > 5*time.Second {
		t.Errorf("a long message took %v: %v", time.Since(begun), err)
	}
	c = New(Options{Dial: n.dial, Message: func([]byte) string { return "no such thing" }})
	if _, err = c.Do(t.Context(), &Request{Method: "GET", URL: "http://api.example/"}); err.Error() != "403 Forbidden: no such thing" {
		t.Errorf("got %q", err)
	}
}

// TestOldTLSIsRefused, whatever else is not looked at.
func TestOldTLSIsRefused(t *testing.T) {
	server := httptest.NewUnstartedServer(status(200))
	server.TLS = &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	_, err := New(Options{TLS: Trust{Insecure: true}.Config}).Do(t.Context(), &Request{Method: "GET", URL: server.URL})
	if err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("got %v, want that TLS 1.1 is refused", err)
	}
}

func TestTrust(t *testing.T) {
	ca := testca.Must(t)
	pair, err := ca.TLSCertificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(status(200))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, ca.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(pair.Certificate[0]))
	other := fmt.Sprintf("%x", sha256.Sum256(nil))
	for name, test := range map[string]struct {
		trust Trust
		says  string
	}{
		"the system's authorities": {Trust{}, "unknown authority"},
		"its own authority":        {Trust{CAFile: file}, ""},
		"no such file":             {Trust{CAFile: file + "2"}, "no such file"},
		"its fingerprint":          {Trust{Fingerprint: strings.ToUpper(sum[:2]) + ":" + sum[2:]}, ""},
		"another fingerprint":      {Trust{Fingerprint: other}, "has the SHA-256 fingerprint " + sum},
		"another, and insecure":    {Trust{Fingerprint: other, Insecure: true}, "has the SHA-256 fingerprint"},
		"not a fingerprint":        {Trust{Fingerprint: "ab"}, "64 hexadecimal digits"},
		"insecure":                 {Trust{Insecure: true}, ""},
	} {
		_, err := New(Options{TLS: test.trust.Config}).Do(t.Context(), &Request{Method: "POST", URL: server.URL})
		if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %q", name, err, test.says)
		}
		if _, lost := errors.AsType[*LostError](err); lost {
			t.Errorf("%s: nothing was sent, but the error says that it may have been: %v", name, err)
		}
	}
}

// The client connects to the proxy, and the proxy's message is bounded.
func TestProxy(t *testing.T) {
	var asked atomic.Value
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Method + " " + r.Host)
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			fmt.Fprintf(conn, "HTTP/1.1 407 \x1b[2J%s\r\n\r\n", strings.Repeat("x", 4<<10))
			conn.Close()
		}
	}))
	defer proxy.Close()
	at, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	c := New(Options{Proxy: at})
	_, err = c.Do(t.Context(), &Request{Method: "POST", URL: "https://api.example/"})
	if err == nil || !strings.Contains(err.Error(), "answers 407") || strings.Contains(err.Error(), "\x1b") || len(err.Error()) > 1<<10 ||
		asked.Load() != "CONNECT api.example:443" {
		t.Errorf("got %v; the proxy was asked %v", err, asked.Load())
	}
}

// Each attempt is authenticated.
func TestSign(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{handlers: []http.HandlerFunc{status(503), func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, r.Header.Get("Authorization"), r.Header.Get("X"))
		}}}
		tries := 0
		c := New(Options{Dial: n.dial, Sign: func(_ context.Context, r *http.Request, body []byte) error {
			tries++
			r.Header.Set("Authorization", fmt.Sprintf("%d of %s", tries, body))
			return nil
		}})
		header := http.Header{"X": {"y"}}
		answer, err := c.Do(t.Context(), &Request{Method: "POST", URL: "http://api.example/", Header: header, Body: []byte("b")})
		if err != nil || string(answer.Body) != "2 of by" || len(header) != 1 {
			t.Errorf("got %v, %v; header %v", answer, err, header)
		}
	})
}
