package controlplane_test

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"certctl-agent/internal/api"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/testing/devplane"
)

// hostile returns a client of a server that uses handler for every request.
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
	return newClient(t, controlplane.Options{Server: u, AgentID: "agent-1", Key: fixed("key"), UserAgent: testAgent,
		Roots: server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs})
}

func TestBounds(t *testing.T) {
	var size, header int
	c := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X", strings.Repeat("a", header))
		field := "status"
		switch path.Base(path.Dir(r.URL.Path)) + path.Base(r.URL.Path) {
		case "agent-1work":
			field = `jobs":[],"x`
		case "certificatesc":
			field = "certificate_pem"
		}
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
			if err := call.call(); !errors.Is(err, api.ErrTooLarge) || !api.Doubtful(err) {
				t.Errorf("%s of %d bytes: %v, want api.ErrTooLarge", name, size, err)
			}
		}
	}
	size, header = 100, 128<<10
	if err := c.Heartbeat(t.Context(), api.Heartbeat{}); err == nil {
		t.Errorf("a header of %d bytes was read", header)
	}
}

// TestSuccess: a proxy's page, or a body that was changed on the way, is not a success, whatever
// its status.
func TestSuccess(t *testing.T) {
	var status int
	var body string
	var header http.Header
	c := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		maps.Copy(w.Header(), header)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
	calls := map[string]struct {
		good []string // bodies
		call func() error
	}{
		"heartbeat": {[]string{`{"status":"heartbeat_recorded"}`, `{"status":"seen","next":{"in":60}}`},
			func() error { return c.Heartbeat(t.Context(), api.Heartbeat{}) }},
		"work": {[]string{`{"jobs":[],"count":0}`, `{"jobs":null,"more":false}`},
			func() error { _, err := c.Work(t.Context()); return err }},
		"CSR": {[]string{`{"status":"csr_signed"}`}, func() error { return c.SubmitCSR(t.Context(), "c", nil) }},
		"certificate": {[]string{`{"certificate_pem":"x"}`},
			func() error { _, err := c.Certificate(t.Context(), "c"); return err }},
		"status": {[]string{`{"status":"updated"}`},
			func() error { return c.ReportStatus(t.Context(), "j", api.JobStatus{}) }},
		"verification": {[]string{`{"job_id":"j","verified":false,"verified_at":"2026-11-23T19:40:21Z"}`},
			func() error { return c.ReportVerification(t.Context(), "j", api.Verification{}) }},
		"discovery": {[]string{`{"id":"dscan-1","certificates_found":5}`, `{"scan":{}}`},
			func() error { return c.ReportDiscovery(t.Context(), api.DiscoveryReport{}) }},
		"registration": {[]string{`{"id":"agent-1"}`},
			func() error { _, err := c.Register(t.Context(), api.Registration{}); return err }},
	}
	for name, call := range calls {
		for _, body = range call.good {
			for _, status = range []int{200, 202} {
				for _, header = range []http.Header{{"Content-Type": {"application/json"}},
					{"Content-Type": {""}, "Content-Encoding": {"Identity"}}} {
					if err := call.call(); err != nil {
						t.Errorf("%s answered %s: %v", name, body, err)
					}
				}
			}
		}
	}
	for _, test := range []struct {
		name   string
		status int
		header http.Header
		body   string // "": a valid one
		want   string // in the error
	}{
		{"no content", 204, nil, "", "cannot be read"},
		{"empty", 200, nil, " ", "cannot be read"},
		{"garbage", 200, nil, "\x1b[2J garbage", "cannot be read"},
		{"plain text", 200, http.Header{"Content-Type": {"text/plain"}}, "ok", "cannot be read"},
		{"null", 200, nil, "null", "cannot be read"},
		{"list", 200, nil, "[]", "cannot be read"},
		{"string", 200, nil, `"ok"`, "cannot be read"},
		{"error", 200, nil, `{"error":"no healthy upstream"}`, "cannot be read"},
		{"error with a status", 200, nil, `{"error":"Service Unavailable","status":503}`, "cannot be read"},
		{"cut short", 200, nil, `{"jobs":[`, "cannot be read"},
		{"something after", 200, nil, `{"jobs":[],"status":"ok"}{}`, "cannot be read"},
		{"web page", 200, http.Header{"Content-Type": {"text/html; charset=utf-8"}}, "<html>", "check the server URL"},
		{"web page with good JSON", 200, http.Header{"Content-Type": {"text/html"}}, "", "check the server URL"},
		{"gzip", 200, http.Header{"Content-Encoding": {"gzip"}}, "\x1f\x8b\x08\x00", "it is encoded (gzip)"},
		{"brotli", 200, http.Header{"Content-Encoding": {"br"}}, "", "it is encoded (br)"},
		{"gzip in secret", 200, nil, "\x1f\x8b\x08\x00", "cannot be read"},
	} {
		for name, call := range calls {
			status, header, body = test.status, test.header, cmp.Or(test.body, call.good[0])
			err := call.call()
			if err == nil || !strings.Contains(err.Error(), test.want) || !errors.Is(err, api.ErrUnreadable) ||
				!api.Temporary(err) || api.Doubtful(err) || api.Kind(err) != "answer" {
				t.Errorf("%s to %s: got %v, want a temporary error with %q", test.name, name, err, test.want)
			}
			if err != nil && strings.ContainsFunc(err.Error(), unicode.IsControl) {
				t.Errorf("%s to %s: control characters in %q", test.name, name, err)
			}
		}
	}
	status, header, body = 200, nil, `{}`
	for name, call := range calls {
		if err := call.call(); name != "discovery" && !errors.Is(err, api.ErrUnreadable) {
			t.Errorf("an empty object to %s: %v", name, err)
		}
	}
}

// TestOwnWords: only a refusal in the control plane's own format is permanent.
func TestOwnWords(t *testing.T) {
	var status int
	var body string
	var header http.Header
	c := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		maps.Copy(w.Header(), header)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
	calls := map[string]func() error{
		"CSR":          func() error { return c.SubmitCSR(t.Context(), "c", nil) },
		"certificate":  func() error { _, err := c.Certificate(t.Context(), "c"); return err },
		"status":       func() error { return c.ReportStatus(t.Context(), "j", api.JobStatus{}) },
		"verification": func() error { return c.ReportVerification(t.Context(), "j", api.Verification{}) },
		"discovery":    func() error { return c.ReportDiscovery(t.Context(), api.DiscoveryReport{}) },
	}
	own := `{"error":"Bad Request","message":"no","request_id":"38c8"}`
	for _, test := range []struct {
		name, body string
		header     http.Header
		want       bool
	}{
		{"own", own, nil, true},
		{"empty", "", nil, false},
		{"plain text", "default backend - 404", nil, false},
		{"web page", "<html><h1>404 Not Found</h1></html>", http.Header{"Content-Type": {"text/html"}}, false},
		{"string", `"no"`, nil, false},
		{"list", `[` + own + `]`, nil, false},
		{"other object", `{"fault":{"faultstring":"no route"}}`, nil, false},
		{"fields of other types", `{"error":{"code":404},"message":["no"],"request_id":1}`, nil, false},
		{"cut short", own[:len(own)-1], nil, false},
		{"more than is read", `{"error":"no","request_id":"38c8","x":"` + strings.Repeat("x", 64<<10) + `"}`, nil, false},
		{"encoded", "\x1f\x8b\x08\x00", http.Header{"Content-Encoding": {"gzip"}}, false},
	} {
		for _, status = range []int{400, 404, 405, 409, 413, 415, 422, 431} {
			for name, call := range calls {
				body, header = test.body, test.header
				err := call()
				if api.Temporary(err) == test.want || api.Doubtful(err) == test.want {
					t.Errorf("%d %s to %s: temporary %v, doubtful %v: %v", status, test.name, name, api.Temporary(err), api.Doubtful(err), err)
				}
				if test.name == "encoded" && !strings.Contains(err.Error(), "encoded (gzip)") {
					t.Errorf("the error does not say that the body is encoded: %v", err)
				}
			}
		}
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
		if !ok || status.Body != test.want || status.Status != 400 || status.Call != "heartbeat" || !status.Final {
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
				t.Errorf("%d: %v, want api.ErrRedirected and the location", status, err)
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
		opts.Observe = func(o api.Observation) { serverTime = o.Date }
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
			t.Errorf("Observe got %v, want %v", serverTime, server)
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
		if got := time.Since(start); got != timeout {
			t.Errorf("gave up after %v, want %v", got, timeout)
		}
		if err := c.ReportStatus(t.Context(), "j", api.JobStatus{Status: api.StatusRunning}); api.Kind(err) != "timeout" {
			t.Errorf("report: %v, want a time-out", err)
		}
	})
}
