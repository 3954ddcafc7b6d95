package controlplane_test

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/testing/devplane"
)

// TestRedirectToNowhere: the error says where a redirect points only if it has a location.
func TestRedirectToNowhere(t *testing.T) {
	for _, location := range []string{"", "?q=secret", "http://[::1", "#here"} {
		c := hostile(t, func(w http.ResponseWriter, r *http.Request) {
			if location != "" {
				w.Header().Set("Location", location)
			}
			w.WriteHeader(http.StatusFound)
		})
		_, err := c.Work(t.Context())
		if !errors.Is(err, api.ErrRedirected) || strings.Contains(err.Error(), "points to") || strings.Contains(err.Error(), "secret") {
			t.Errorf("Location %q: %v, want api.ErrRedirected and no place", location, err)
		}
	}
}

// TestBadAgentIDIsNeverSent: a bad id must not change the path of any call.
func TestBadAgentIDIsNeverSent(t *testing.T) {
	p := devplane.Start(t, devplane.Options{})
	before := p.Count("")
	c := newClient(t, options(p, ".."))
	_, workErr := c.Work(t.Context())
	for call, err := range map[string]error{
		"work":      workErr,
		"csr":       c.SubmitCSR(t.Context(), "c", nil),
		"heartbeat": c.Heartbeat(t.Context(), api.Heartbeat{}),
		"discovery": c.ReportDiscovery(t.Context(), api.DiscoveryReport{}),
	} {
		if !errors.Is(err, api.ErrBadID) {
			t.Errorf("%s: %v, want api.ErrBadID", call, err)
		}
	}
	for call, err := range map[string]error{
		"status":       newClient(t, options(p, "a")).ReportStatus(t.Context(), "..", api.JobStatus{}),
		"verification": newClient(t, options(p, "a")).ReportVerification(t.Context(), "..", api.Verification{}),
	} {
		if !errors.Is(err, api.ErrBadID) {
			t.Errorf("%s: %v, want api.ErrBadID", call, err)
		}
	}
	if got := p.Count(""); got != before {
		t.Errorf("%d requests were sent", got-before)
	}
}

// TestAnswerWithoutDate: without a Date, a time in Retry-After is compared with this host's clock.
func TestAnswerWithoutDate(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Date"] = nil
		w.Header().Set("Retry-After", time.Now().Add(10*time.Minute).UTC().Format(http.TimeFormat))
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	defer server.Close()
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	var observed []api.Observation
	c := newClient(t, controlplane.Options{Server: u, AgentID: "agent-1", Key: fixed("key"), InsecureSkipVerify: true,
		Observe: func(o api.Observation) { observed = append(observed, o) }})
	_, err = c.Work(t.Context())
	if got := api.RetryAfter(err); got < 9*time.Minute || got > 10*time.Minute {
		t.Errorf("Retry-After is %v (%v), want ten minutes", got, err)
	}
	if len(observed) != 1 || !observed[0].Date.IsZero() || observed[0].Received.IsZero() {
		t.Errorf("observed %+v, want no date", observed)
	}
}

// closedConn notes that it is closed.
type closedConn struct {
	net.Conn
	closed *atomic.Bool
}

func (c closedConn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

// TestRefusedServerIsLeft: an agent with the wrong CA retries for days and must not leak connections.
func TestRefusedServerIsLeft(t *testing.T) {
	p := devplane.Start(t, devplane.Options{})
	opts := options(p, p.RegisterAgent("web1"))
	opts.Roots = x509.NewCertPool()
	var closed atomic.Bool
	opts.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		return closedConn{conn, &closed}, err
	}
	if err := newClient(t, opts).Heartbeat(t.Context(), api.Heartbeat{}); err == nil {
		t.Fatal("a server of another CA was accepted")
	}
	if !closed.Load() {
		t.Error("the connection was left open")
	}
}

// TestLocalAddrOfTheProxy: a host behind a proxy may have no route to the control
// plane.
func TestLocalAddrOfTheProxy(t *testing.T) {
	asked := ""
	c := newClient(t, controlplane.Options{
		Server: &url.URL{Scheme: "https", Host: "plane.example"},
		Proxy:  func(*url.URL) *url.URL { return &url.URL{Scheme: "http", Host: "proxy.example:3128"} },
		Dial: func(_ context.Context, network, address string) (net.Conn, error) {
			asked = network + " " + address
			return nil, errors.New("no route")
		},
	})
	if got := c.LocalAddr(t.Context()); got != "" || asked != "udp proxy.example:3128" {
		t.Errorf("got %q by way of %q, want the proxy's", got, asked)
	}
}
