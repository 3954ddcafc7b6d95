package devplane_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

// newHTTP returns an in-memory client.
func newHTTP(t *testing.T, p *devplane.Plane, http1 bool) *http.Client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(!http1)
	transport := &http.Transport{DialContext: p.Dial, Protocols: protocols, TLSClientConfig: &tls.Config{RootCAs: p.Roots()}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 10 * time.Second}
}

// send makes a request with the key and returns status and body.
func send(t *testing.T, client *http.Client, p *devplane.Plane, method, path, body string) (*http.Response, string, error) {
	t.Helper()
	r, err := http.NewRequest(method, p.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+p.APIKey)
	resp, err := client.Do(r)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return resp, string(data), err
}

// TestFaults uses TLS and both versions of HTTP, in a bubble.
func TestFaults(t *testing.T) {
	for name, http1 := range map[string]bool{"HTTP1": true, "HTTP2": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testFaults(t, http1) })
		})
	}
}

func testFaults(t *testing.T, http1 bool) {
	p := newPlane(t, devplane.Options{})
	agent := p.RegisterAgent("web1")
	cert := p.AddCertificate(devplane.Certificate{Targets: []string{p.AddTarget(devplane.Target{Agent: agent})}})
	client := newHTTP(t, p, http1)
	work := func() (*http.Response, string, error) { return send(t, client, p, "GET", api.WorkPath(agent), "") }
	works := func(when string) {
		t.Helper()
		if resp, body, err := work(); err != nil || resp.StatusCode != 200 {
			t.Errorf("%s: %v, %s, want 200", when, err, body)
		}
	}
	works("without a fault")

	// A status, for some of the requests.
	p.Inject(devplane.Fault{Call: devplane.CallWork, Skip: 1, Times: 2, Status: 503, RetryAfter: "7", Body: "busy",
		Header: http.Header{"X-Test": {"yes"}}})
	p.Inject(devplane.Fault{Agent: "another", Status: 500})
	p.Inject(devplane.Fault{Path: "/api/v1/agents/*/csr", Status: 500})
	p.Inject(devplane.Fault{Match: func(_ *http.Request, body []byte) bool { return strings.Contains(string(body), "never") }, Status: 500})
	works("skipped")
	for range 2 {
		resp, body, err := work()
		if err != nil || resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "7" || resp.Header.Get("X-Test") != "yes" || body != "busy" {
			t.Errorf("got %v, %q, %v", resp, body, err)
		}
	}
	works("used up")

	// A short delay, and one longer than the client's timeout.
	p.Inject(devplane.Fault{Delay: 3 * time.Second, Times: 1})
	start := time.Now()
	works("delayed")
	if got := time.Since(start); got != 3*time.Second {
		t.Errorf("delayed by %v, want 3s", got)
	}
	p.Inject(devplane.Fault{Delay: time.Hour, Times: 1})
	if _, _, err := work(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the client's timeout", err)
	}

	// A cut connection, before and after the request was handled. The second time the deployments
	// are claimed, but the agent does not know them.
	jobs := p.Redeploy(cert)
	remove := p.Inject(devplane.Fault{Drop: true})
	if resp, _, err := work(); err == nil {
		t.Errorf("dropped: %v", resp)
	}
	remove()
	if job, _ := p.Job(jobs[0]); job.Status != devplane.StatusPending {
		t.Errorf("dropped poll claimed %+v", job)
	}
	remove = p.Inject(devplane.Fault{LoseAnswer: true, Delay: time.Second})
	if resp, _, err := work(); err == nil {
		t.Errorf("lost: %v", resp)
	}
	remove()
	if job, _ := p.Job(jobs[0]); job.Status != api.StatusRunning {
		t.Errorf("lost poll left %+v, want it Running", job)
	}
	if _, body, err := work(); err != nil || !strings.Contains(body, `"jobs":[]`) {
		t.Errorf("poll after a lost one: %v, %s, want no jobs", err, body)
	}

	// A custom answer.
	p.Inject(devplane.Fault{Call: devplane.CallHealth, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = io.WriteString(w, "you said "+string(body))
	})})
	if _, body, err := send(t, client, p, "GET", api.HealthPath, "hello"); err != nil || body != "you said hello" {
		t.Errorf("got %q, %v", body, err)
	}
}

// TestStall: requests on a stalled connection time out, and a new connection works.
func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t, devplane.Options{HTTP1: true})
		client := newHTTP(t, p, true)
		for range 2 {
			if _, _, err := send(t, client, p, "GET", api.HealthPath, ""); err != nil {
				t.Fatal(err)
			}
		}
		if got := p.Connections(); got != 1 {
			t.Errorf("%d connections, want 1", got)
		}
		p.Stall()
		start := time.Now()
		if _, _, err := send(t, client, p, "GET", api.HealthPath, ""); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 10*time.Second {
			t.Errorf("stalled: %v after %v, want the client's timeout", err, time.Since(start))
		}
		if _, _, err := send(t, client, p, "GET", api.HealthPath, ""); err != nil {
			t.Errorf("on a new connection: %v", err)
		}
	})
}
