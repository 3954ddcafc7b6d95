package api_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/api"
)

// TestVerdicts follows the table "Errors" of docs/protocol.md.
func TestVerdicts(t *testing.T) {
	call := func(status int) error { return &api.StatusError{Call: "status report", Status: status, Own: true} }
	gateway := func(status int) error { return &api.StatusError{Call: "status report", Status: status} }
	poll := func(status int) error { return &api.StatusError{Call: "poll", Status: status, Final: true} }
	for _, test := range []struct {
		err       error
		temporary bool
		doubtful  bool
		denied    bool
		kind      string
	}{
		{nil, false, false, false, ""},
		{call(400), false, false, false, "refused"},
		{gateway(400), true, true, false, "refused"},
		{gateway(401), true, false, true, "denied"},
		{gateway(403), true, false, true, "denied"},
		{gateway(404), true, true, false, "refused"},
		{gateway(405), true, true, false, "refused"},
		{call(405), false, false, false, "refused"},
		{gateway(408), true, false, false, "refused"},
		{gateway(409), true, true, false, "refused"},
		{gateway(410), true, false, false, "gone"},
		{gateway(413), true, true, false, "refused"},
		{gateway(422), true, true, false, "refused"},
		{gateway(429), true, false, false, "rate_limited"},
		{gateway(451), true, true, false, "refused"},
		{gateway(502), true, false, false, "server"},
		{call(401), true, false, true, "denied"},
		{call(403), true, false, true, "denied"},
		{call(404), false, false, false, "refused"},
		{poll(404), true, false, true, "denied"},
		{call(408), true, false, false, "refused"},
		{call(409), false, false, false, "refused"},
		{call(410), true, false, false, "gone"},
		{poll(410), true, false, false, "gone"},
		{call(413), false, false, false, "refused"},
		{call(422), false, false, false, "refused"},
		{call(425), true, false, false, "refused"},
		{call(429), true, false, false, "rate_limited"},
		{call(301), true, false, false, "refused"},
		{call(500), true, false, false, "server"},
		{call(503), true, false, false, "server"},
		{call(599), true, false, false, "server"},
		{api.ErrTooLarge, true, true, false, "answer"},
		{api.ErrUnreadable, true, false, false, "answer"},
		{api.ErrBadID, false, false, false, "refused"},
		{context.DeadlineExceeded, true, false, false, "timeout"},
		{context.Canceled, true, false, false, "cancelled"},
		{io.ErrUnexpectedEOF, true, false, false, "network"},
	} {
		err := test.err
		if err != nil {
			err = fmt.Errorf("report: %w", err)
		}
		if got := api.Temporary(err); got != test.temporary {
			t.Errorf("Temporary(%v) = %v, want %v", err, got, test.temporary)
		}
		if got := api.Doubtful(err); got != test.doubtful {
			t.Errorf("Doubtful(%v) = %v, want %v", err, got, test.doubtful)
		}
		if got := api.Denied(err); got != test.denied {
			t.Errorf("Denied(%v) = %v, want %v", err, got, test.denied)
		}
		if got := api.Kind(err); got != test.kind {
			t.Errorf("Kind(%v) = %q, want %q", err, got, test.kind)
		}
	}
}

func TestSentinels(t *testing.T) {
	for _, test := range []struct {
		err                       api.StatusError
		retired, gone, redirected bool
	}{
		{api.StatusError{Status: 410, Final: true}, true, false, false},
		{api.StatusError{Status: 410}, false, true, false},
		{api.StatusError{Status: 308}, false, false, true},
		{api.StatusError{Status: 404, Final: true}, false, false, false},
	} {
		err := fmt.Errorf("heartbeat: %w", &test.err)
		if errors.Is(err, api.ErrRetired) != test.retired || errors.Is(err, api.ErrGone) != test.gone ||
			errors.Is(err, api.ErrRedirected) != test.redirected {
			t.Errorf("%v (final: %v): retired %v, gone %v, redirected %v", err, test.err.Final,
				errors.Is(err, api.ErrRetired), errors.Is(err, api.ErrGone), errors.Is(err, api.ErrRedirected))
		}
	}
}

func TestStatusErrorText(t *testing.T) {
	for _, test := range []struct {
		err  api.StatusError
		want string
	}{
		{api.StatusError{Call: "poll", Status: 503, Body: "busy"}, "poll: the control plane answered 503 Service Unavailable: busy"},
		{api.StatusError{Call: "poll", Status: 599}, "poll: the control plane answered 599"},
		{api.StatusError{Call: "poll", Status: 401}, "the API key is wrong"},
		{api.StatusError{Call: "poll", Status: 403}, "lacks the permission"},
		{api.StatusError{Call: "poll", Status: 404, Final: true}, "does not know this agent id"},
		{api.StatusError{Call: "poll", Status: 302}, "never followed"},
		{api.StatusError{Call: "CSR", Status: 404, Body: "default backend"}, "(not in the control plane's own format: a proxy or gateway may have answered): default backend"},
		{api.StatusError{Call: "CSR", Status: 404, Body: "no agent", Own: true}, "404 Not Found: no agent"},
	} {
		if got := test.err.Error(); !strings.Contains(got, test.want) || strings.HasSuffix(got, " ") {
			t.Errorf("got %q, want %q in it", got, test.want)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	limited := fmt.Errorf("poll: %w", &api.StatusError{Status: 429, RetryAfter: 7 * time.Second})
	if got := api.RetryAfter(limited); got != 7*time.Second {
		t.Errorf("RetryAfter = %v, want 7s", got)
	}
	if !api.RateLimited(limited) || api.RateLimited(io.EOF) || api.RetryAfter(io.EOF) != 0 {
		t.Error("RateLimited or RetryAfter of other errors")
	}
}

// TestOwn: JSON errors of proxies and gateways do not count as the control plane's.
func TestOwn(t *testing.T) {
	plane := api.Refusal{Error: "Not Found", Message: "certificate not found", RequestID: "38c8"}
	for _, test := range []struct {
		name   string
		body   api.Refusal
		status int
		want   bool
	}{
		{"plane", plane, 404, true},
		{"plane", plane, 405, true},
		{"plane", plane, 400, true},
		{"plane without a request id", api.Refusal{Error: "Bad Request", Message: "no"}, 400, true},
		{"message alone", api.Refusal{Message: "no"}, 422, true},
		{"error alone", api.Refusal{Error: "no"}, 409, true},
		{"gateway", api.Refusal{Message: "no Route matched with those values", RequestID: "38c8"}, 404, false},
		{"gateway without a request id", api.Refusal{Error: "Not Found", Message: "Cannot POST /"}, 404, false},
		{"nothing", api.Refusal{}, 404, false},
		{"nothing", api.Refusal{}, 400, false},
		{"request id alone", api.Refusal{RequestID: "38c8"}, 413, false},
	} {
		if got := test.body.Own(test.status); got != test.want {
			t.Errorf("%s: Own(%d) = %v, want %v", test.name, test.status, got, test.want)
		}
	}
}
