package controlplane_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"certctl-agent/internal/api"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/devplane"
	"certctl-agent/internal/secret"
)

// hostile is a client of a server that answers everything by handler.
func hostile(t *testing.T, handler http.HandlerFunc) *controlplane.Client {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	return newClient(t, controlplane.Options{Server: u, AgentID: "agent-1", APIKey: secret.New("key"), UserAgent: testAgent,
		Roots: server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs})
}

func TestBounds(t *testing.T) {
	var size int
	c := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		field := map[bool]string{true: "jobs\":[],\"x", false: "certificate_pem"}[strings.HasSuffix(r.URL.Path, "/work")]
		frame := len(`{"":""}`) + len(field)
		fmt.Fprintf(w, `{"%s":"%s"}`, field, strings.Repeat("a", size-frame))
	})
	calls := map[string]struct {
		limit int
		call  func() error
	}{
		"work":        {8 << 20, func() error { _, err := c.Work(t.Context()); return err }},
		"certificate": {1 << 20, func() error { _, err := c.Certificate(t.Context(), "c"); return err }},
		"heartbeat":   {64 << 10, func() error { return c.Heartbeat(t.Context(), api.Heartbeat{}) }},
		"csr":         {64 << 10, func() error { return c.SubmitCSR(t.Context(), "c", nil) }},
	}
	for name, call := range calls {
		size = call.limit
		if err := call.call(); err != nil {
			t.Errorf("%s at the limit: %v", name, err)
		}
		for _, size = range []int{call.limit + 1, 10 << 20} {
			if err := call.call(); !errors.Is(err, api.ErrTooLarge) || api.Temporary(err) {
				t.Errorf("%s of %d bytes: %v, want api.ErrTooLarge", name, size, err)
			}
		}
	}
}

func TestSuccess(t *testing.T) {
	var status int
	var body, kind string
	c := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", kind)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
	for _, test := range []struct {
		name              string
		status            int
		kind, body        string
		reported, decoded string // "" is success, else in the error
	}{
		{"as documented", 200, "application/json", `{"jobs":[],"count":0}`, "", ""},
		{"another 2xx", 202, "application/json", `{"jobs":null}`, "", ""},
		{"no content", 204, "application/json", "", "", "cannot be read"},
		{"no type", 200, "", `{"jobs":[]}`, "", ""},
		{"garbage", 200, "application/json", "\x1b[2J garbage", "", "cannot be read"},
		{"cut short", 200, "application/json", `{"jobs":[`, "", "cannot be read"},
		{"something after", 200, "application/json", `{"jobs":[]}{}`, "", "cannot be read"},
		{"web page", 200, "text/html; charset=utf-8", "<html>", "check the server URL", "check the server URL"},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, kind, body = test.status, test.kind, test.body
			_, decoded := c.Work(t.Context())
			for err, want := range map[error]string{decoded: test.decoded, c.Heartbeat(t.Context(), api.Heartbeat{}): test.reported} {
				if want == "" && err == nil {
					continue
				}
				if err == nil || want == "" || !strings.Contains(err.Error(), want) || !errors.Is(err, api.ErrUnreadable) || !api.Temporary(err) {
					t.Errorf("got %v, want %q", err, want)
				}
				if err != nil && strings.ContainsFunc(err.Error(), unicode.IsControl) {
					t.Errorf("control characters in %q", err)
				}
			}
		})
	}
}

func TestMissingAnswer(t *testing.T) {
	c := hostile(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, `{}`) })
	if _, err := c.Certificate(t.Context(), "c"); !errors.Is(err, api.ErrUnreadable) {
		t.Errorf("certificate without PEM: %v", err)
	}
	if _, err := c.Register(t.Context(), api.Registration{}); !errors.Is(err, api.ErrUnreadable) {
		t.Errorf("agent without id: %v", err)
	}
}

func TestErrorBodies(t *testing.T) {
	var body string
	c := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, body)
	})
	for _, test := range []struct{ name, body, want string }{
		{"both fields", `{"error":"Gone","message":"Agent has been retired","request_id":"38c8"}`, "Agent has been retired (request 38c8)"},
		{"error alone", `{"error":"no such job"}`, "no such job"},
		{"fields of other types", `{"message":7,"error":"no such job","request_id":9}`, "no such job"},
		{"plain text", "  rate limit exceeded\n", "rate limit exceeded"},
		{"other JSON", `["x"]`, `["x"]`},
		{"neither field", `{"detail":"x"}`, `{"detail":"x"}`},
		{"empty", "", ""},
	} {
		body = test.body
		err := c.Heartbeat(t.Context(), api.Heartbeat{})
		status, ok := errors.AsType[*api.StatusError](err)
		if !ok || status.Body != test.want || status.Status != 400 || status.Call != "heartbeat" || !status.Decides {
			t.Errorf("%s: %#v, want body %q", test.name, err, test.want)
		}
	}
	for name, hostile := range map[string]string{
		"terminal escapes": "\x1b]0;owned\x07\x1b[2J\r\nfake log line\u202e\x00\xff",
		"in JSON":          `{"message":"\u001b[31mred\u0007\nline"}`,
		"endless":          strings.Repeat("\x1b[31m", 10<<20/5),
	} {
		body = hostile
		err := c.Heartbeat(t.Context(), api.Heartbeat{})
		status, ok := errors.AsType[*api.StatusError](err)
		if !ok || len(status.Body) > 1<<10 {
			t.Fatalf("%s: %d bytes of %T", name, len(status.Body), err)
		}
		if strings.ContainsFunc(err.Error(), func(r rune) bool { return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) }) {
			t.Errorf("%s: not printable: %q", name, err)
		}
	}
}

func TestRedirectIsRefused(t *testing.T) {
	followed := false
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed = true }))
	defer elsewhere.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		c := hostile(t, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+"/there?q=1", status)
		})
		_, workErr := c.Work(t.Context())
		for _, err := range []error{workErr, c.Heartbeat(t.Context(), api.Heartbeat{})} {
			if !errors.Is(err, api.ErrRedirected) || !strings.HasSuffix(err.Error(), "it points to "+elsewhere.URL+"/there") {
				t.Errorf("%d: %v, want api.ErrRedirected and where to", status, err)
			}
		}
	}
	if followed {
		t.Error("a redirect was followed")
	}
}

func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const skew = time.Hour
		p, err := devplane.New(devplane.Options{Skew: skew})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		var serverTime time.Time
		opts := options(p, p.RegisterAgent("web1"))
		opts.OnDate = func(date time.Time) { serverTime = date }
		c := controlplane.New(opts)
		defer c.Close()
		server := time.Now().Add(skew)
		for value, want := range map[string]time.Duration{
			"": 0, "0": 0, "1": time.Second, " 30 ": 30 * time.Second, "900": 15 * time.Minute, "901": 15 * time.Minute,
			"99999999999999999999": 15 * time.Minute, "9223372036854775807": 15 * time.Minute,
			"-5": 0, "1.5": 0, "soon": 0, "1e3": 0, "0x10": 0,
			server.Add(90 * time.Second).UTC().Format(http.TimeFormat): 90 * time.Second,
			server.Add(24 * time.Hour).UTC().Format(http.TimeFormat):   15 * time.Minute,
			server.Add(-time.Hour).UTC().Format(http.TimeFormat):       0,
		} {
			p.Inject(devplane.Fault{Status: 429, RetryAfter: value, Times: 1})
			_, err := c.Work(t.Context())
			if got := api.RetryAfter(err); got != want || !api.RateLimited(err) {
				t.Errorf("Retry-After %q: %v (%v), want %v", value, got, err, want)
			}
		}
		if !serverTime.Equal(server.Truncate(time.Second)) {
			t.Errorf("OnDate got %v, want %v", serverTime, server)
		}
	})
}

func TestSlowBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := devplane.New(devplane.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		p.Inject(devplane.Fault{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for range 1000 {
				if _, err := io.WriteString(w, " "); err != nil {
					return
				}
				_ = http.NewResponseController(w).Flush()
				select {
				case <-time.After(time.Second):
				case <-r.Context().Done():
					return
				}
			}
		})})
		c := controlplane.New(options(p, "agent"))
		defer c.Close()
		start := time.Now()
		if _, err := c.Work(t.Context()); api.Kind(err) != "timeout" {
			t.Errorf("poll: %v, want a time-out", err)
		}
		if got := time.Since(start); got != controlplane.DefaultTimeout {
			t.Errorf("gave up after %v, want %v", got, controlplane.DefaultTimeout)
		}
		// The status line has said that a report arrived.
		if err := c.ReportStatus(t.Context(), "j", api.JobStatus{Status: api.StatusRunning}); err != nil {
			t.Errorf("report: %v", err)
		}
	})
}
