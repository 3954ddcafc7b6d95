package controlplane_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/testing/devplane"
)

// discardLog is for servers whose clients intentionally misbehave.
var discardLog = log.New(io.Discard, "", 0)

// timeout is the timeout of one request.
const timeout = 30 * time.Second

const testAgent = "certctl-agent/1.0.0 (linux/amd64)"

// options returns the options of a client for p. The client connects in memory if p has no socket.
func options(p *devplane.Plane, agent string) controlplane.Options {
	opts := controlplane.Options{Server: p.ServerURL(), AgentID: agent, Key: fixed(p.APIKey),
		Roots: p.Roots(), UserAgent: testAgent}
	if strings.HasSuffix(opts.Server.Host, ".test") {
		opts.Dial = p.Dial
	}
	return opts
}

// fixed returns a constant key.
func fixed(key string) func() secret.String {
	return func() secret.String { return secret.New(key) }
}

func newClient(t *testing.T, opts controlplane.Options) *controlplane.Client {
	t.Helper()
	c := controlplane.New(opts)
	t.Cleanup(c.Close)
	return c
}

func newCSR(t *testing.T, commonName string, sans ...string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{Subject: pkix.Name{CommonName: commonName}, DNSNames: sans}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// TestEveryCall goes through the life of a certificate and checks that the requests follow the
// protocol.
func TestEveryCall(t *testing.T) {
	for _, http1 := range []bool{false, true} {
		t.Run(map[bool]string{false: "HTTP2", true: "HTTP1"}[http1], func(t *testing.T) {
			ctx := t.Context()
			p := devplane.Start(t, devplane.Options{HTTP1: http1})
			agent, err := newClient(t, options(p, "")).Register(ctx, api.Registration{Name: "web1", Hostname: "web1.example"})
			if err != nil {
				t.Fatal(err)
			}
			target := p.AddTarget(devplane.Target{Agent: agent.ID, Type: "NGINX", Config: map[string]any{"port": 443}})
			cert := p.AddCertificate(devplane.Certificate{CommonName: "web.example", SANs: []string{"web.example"}, Targets: []string{target}})
			issuance := p.StartIssuance(cert)
			before := p.Connections()
			c := newClient(t, options(p, agent.ID))

			if err := c.Heartbeat(ctx, api.Heartbeat{Version: "1.0.0", Hostname: "web1", OS: "linux", Architecture: "amd64",
				IPAddress: c.LocalAddr(ctx)}); err != nil {
				t.Fatal(err)
			}
			work, err := c.Work(ctx)
			if err != nil || len(work.Jobs) != 1 || string(work.Jobs[0].ID) != issuance || !work.Jobs[0].AwaitsCSR() {
				t.Fatalf("poll is %+v, %v, want job %s", work, err, issuance)
			}
			if err := c.SubmitCSR(ctx, api.ID(cert), newCSR(t, "web.example", "web.example")); err != nil {
				t.Fatal(err)
			}
			work, err = c.Work(ctx)
			if err != nil || len(work.Jobs) != 1 || !work.Jobs[0].IsDeployment() || string(work.Jobs[0].TargetID) != target {
				t.Fatalf("poll is %+v, %v, want a deployment", work, err)
			}
			deployment := work.Jobs[0].ID
			if err := c.ReportStatus(ctx, deployment, api.JobStatus{Status: api.StatusRunning}); err != nil {
				t.Fatal(err)
			}
			chain, err := c.Certificate(ctx, api.ID(cert))
			if err != nil {
				t.Fatal(err)
			}
			block, _ := pem.Decode(chain)
			leaf, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(leaf.Raw)
			fingerprint := hex.EncodeToString(sum[:])
			if err := c.ReportVerification(ctx, deployment, api.Verification{TargetID: api.ID(target), ExpectedFingerprint: fingerprint,
				ActualFingerprint: fingerprint, Verified: true}); err != nil {
				t.Fatal(err)
			}
			if err := c.ReportStatus(ctx, deployment, api.JobStatus{Status: api.StatusCompleted}); err != nil {
				t.Fatal(err)
			}
			if err := c.ReportDiscovery(ctx, api.DiscoveryReport{AgentID: agent.ID, Directories: []string{"/etc/ssl"},
				Certificates: []api.DiscoveredCertificate{{FingerprintSHA256: fingerprint, CommonName: "web.example",
					SANs: []string{"web.example"}, SerialNumber: leaf.SerialNumber.Text(16), PEMData: string(pem.EncodeToMemory(block)),
					SourcePath: "/etc/ssl/web.pem", SourceFormat: "PEM"}}}); err != nil {
				t.Fatal(err)
			}

			if job, _ := p.Job(string(deployment)); job.Status != api.StatusCompleted {
				t.Errorf("deployment is %+v", job)
			}
			if len(p.Verifications()) != 1 || len(p.Discoveries()) != 1 || len(p.Heartbeats()) != 1 || len(p.Versions(cert)) != 1 {
				t.Errorf("%d verifications, %d discoveries, %d heartbeats, %d versions, want 1 each", len(p.Verifications()),
					len(p.Discoveries()), len(p.Heartbeats()), len(p.Versions(cert)))
			}
			if got := p.Heartbeats()[0].IPAddress; got != "127.0.0.1" {
				t.Errorf("ip_address is %q, want that of the route to the control plane", got)
			}
			for _, problem := range p.Problems() {
				t.Error(problem)
			}
			if got := p.Connections() - before; got != 1 {
				t.Errorf("%d connections, want 1", got)
			}
			want := map[bool]string{false: "HTTP/2.0", true: "HTTP/1.1"}[http1]
			for _, request := range p.Requests() {
				if request.Proto != want {
					t.Errorf("%s went by %s, want %s", request.Call, request.Proto, want)
				}
				if got := request.Header.Get("Accept-Encoding"); got != "identity" {
					t.Errorf("%s has Accept-Encoding %q, want identity", request.Call, got)
				}
			}
		})
	}
}

// TestOneConnection: parallel calls share one HTTP/2 connection.
func TestOneConnection(t *testing.T) {
	p := devplane.Start(t, devplane.Options{})
	c := newClient(t, options(p, p.RegisterAgent("web1")))
	if _, err := c.Work(t.Context()); err != nil {
		t.Fatal(err)
	}
	var calls sync.WaitGroup
	for range 50 {
		calls.Go(func() {
			if _, err := c.Work(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if got := p.Connections(); got != 1 {
		t.Errorf("%d connections, want 1", got)
	}
}

// countedConn tells that it was closed.
type countedConn struct {
	net.Conn
	open *atomic.Int64
	once sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.open.Add(-1) })
	return c.Conn.Close()
}

// TestConnectionsEnd: a connection that is not in use ends when the roots by which it
// was trusted do, and with the client.
func TestConnectionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := devplane.New(devplane.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		var open atomic.Int64
		opts := options(p, p.RegisterAgent("web1"))
		opts.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := p.Dial(ctx, network, address)
			if err == nil {
				open.Add(1)
				conn = &countedConn{Conn: conn, open: &open}
			}
			return conn, err
		}
		c := controlplane.New(opts)
		for what, end := range map[string]func(){"Reload": func() { c.Reload(x509.NewCertPool()); c.Reload(opts.Roots) }, "Close": c.Close} {
			if _, err := c.Work(t.Context()); err != nil || open.Load() != 1 {
				t.Errorf("before %s: %d connections, %v", what, open.Load(), err)
			}
			end()
			synctest.Wait()
			if open.Load() != 0 {
				t.Errorf("after %s %d connections are open", what, open.Load())
			}
		}
	})
}

// TestIdleConnections: one is kept, for five minutes.
func TestIdleConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := devplane.New(devplane.Options{HTTP1: true})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		p.Inject(devplane.Fault{Call: devplane.CallWork, Delay: time.Second})
		c := controlplane.New(options(p, p.RegisterAgent("web1")))
		defer c.Close()
		for _, step := range []struct {
			after time.Duration
			calls int
			want  int // connections in all
		}{{0, 2, 2}, {time.Minute, 2, 3}, {4 * time.Minute, 1, 3}, {6 * time.Minute, 1, 4}} {
			time.Sleep(step.after)
			var calls sync.WaitGroup
			for range step.calls {
				calls.Go(func() {
					if _, err := c.Work(t.Context()); err != nil {
						t.Error(err)
					}
				})
			}
			calls.Wait()
			if got := p.Connections(); got != step.want {
				t.Errorf("%d calls at once after %v: %d connections, want %d", step.calls, step.after, got, step.want)
			}
		}
	})
}

func TestIdentifiersStayOneSegment(t *testing.T) {
	p := devplane.Start(t, devplane.Options{})
	for _, id := range []string{"../../evil", "a/b", "a%2Fb", "a b?c#d", "ä", "nul\x00", ".hidden", "...", `back\slash`} {
		c := newClient(t, options(p, p.AddAgent(id, id)))
		p.AddCertificate(devplane.Certificate{ID: id})
		p.AddVersion(id, "pem of "+id)
		if got, err := c.Certificate(t.Context(), api.ID(id)); err != nil || string(got) != "pem of "+id {
			t.Errorf("certificate %q is %q, %v", id, got, err)
		}
		if _, err := c.Work(t.Context()); err != nil {
			t.Errorf("agent %q: %v", id, err)
		}
	}
	before := p.Count("")
	for _, id := range []string{"", ".", "..", strings.Repeat("x", 1025)} {
		c := newClient(t, options(p, "agent"))
		_, certErr := c.Certificate(t.Context(), api.ID(id))
		_, agentErr := newClient(t, options(p, id)).Work(t.Context())
		for _, err := range []error{certErr, agentErr, c.ReportStatus(t.Context(), api.ID(id), api.JobStatus{})} {
			if !errors.Is(err, api.ErrBadID) || api.Temporary(err) {
				t.Errorf("id %.10q: %v, want api.ErrBadID", id, err)
			}
		}
	}
	if got := p.Count(""); got != before {
		t.Errorf("%d requests were sent for ids that cannot be in a path", got-before)
	}
}

func TestRetirement(t *testing.T) {
	p := devplane.Start(t, devplane.Options{GonePolls: true})
	agent := p.RegisterAgent("web1")
	var observed []api.Observation
	opts := options(p, agent)
	opts.Observe = func(o api.Observation) { observed = append(observed, o) }
	c := newClient(t, opts)
	p.Retire(agent)
	err := c.Heartbeat(t.Context(), api.Heartbeat{})
	if !errors.Is(err, api.ErrRetired) || !strings.Contains(err.Error(), "Agent has been retired (request req-") {
		t.Errorf("heartbeat: %v, want api.ErrRetired", err)
	}
	if _, err := c.Work(t.Context()); !errors.Is(err, api.ErrRetired) {
		t.Errorf("poll: %v, want api.ErrRetired", err)
	}
	p.Inject(devplane.Fault{Status: http.StatusGone})
	_, err = c.Certificate(t.Context(), "c")
	for _, err := range []error{
		err,
		c.ReportStatus(t.Context(), "j", api.JobStatus{Status: api.StatusRunning}),
		c.SubmitCSR(t.Context(), "c", nil),
		c.ReportVerification(t.Context(), "j", api.Verification{}),
		c.ReportDiscovery(t.Context(), api.DiscoveryReport{}),
	} {
		if !errors.Is(err, api.ErrGone) || errors.Is(err, api.ErrRetired) {
			t.Errorf("%v, want api.ErrGone", err)
		}
	}
	// The 410 of every call is observed.
	want := []string{"heartbeat", "poll", "certificate", "status report", "CSR", "verification", "discovery report"}
	var calls []string
	for i, o := range observed {
		calls = append(calls, o.Call)
		if retired := errors.Is(o.Err, api.ErrRetired); retired != (i < 2) || errors.Is(o.Err, api.ErrGone) == retired {
			t.Errorf("observed %+v", o)
		}
		if o.Received.IsZero() || o.Date.IsZero() {
			t.Errorf("the observation of a %s has no time: %+v", o.Call, o)
		}
	}
	if !slices.Equal(calls, want) {
		t.Errorf("observed %q, want %q", calls, want)
	}
}

func TestReload(t *testing.T) {
	p := devplane.Start(t, devplane.Options{})
	agent := p.RegisterAgent("web1")
	opts := options(p, agent)
	key := p.APIKey
	opts.Key = func() secret.String { return secret.New(key) }
	c := newClient(t, opts)
	check := func(when string, wantDenied bool) {
		t.Helper()
		if _, err := c.Work(t.Context()); api.Denied(err) != wantDenied || (err == nil) == wantDenied {
			t.Errorf("%s: %v, want denied: %v", when, err, wantDenied)
		}
	}
	check("at first", false)
	p.SetAPIKey("another")
	check("key replaced on the server", true)
	key = "another"
	c.Reload(opts.Roots)
	check("reloaded", false)
	if got := p.Connections(); got != 1 {
		t.Errorf("%d connections, want 1 even with a new key", got)
	}

	c.Reload(x509.NewCertPool())
	if _, err := c.Work(t.Context()); err == nil || !strings.Contains(err.Error(), "CERTCTL_SERVER_CA_BUNDLE_PATH") {
		t.Errorf("with no roots: %v, want a refusal of the certificate", err)
	}
	c.Reload(opts.Roots)
	check("roots back", false)
}

func TestKeyChanges(t *testing.T) {
	p := devplane.Start(t, devplane.Options{})
	opts := options(p, p.RegisterAgent("web1"))
	var key atomic.Pointer[secret.String]
	key.Store(new(secret.String))
	opts.Key = func() secret.String { return *key.Load() }
	c := newClient(t, opts)
	for _, test := range []struct {
		fromFile, onServer string
		want               bool
	}{{p.APIKey, p.APIKey, true}, {"new", "new", true}, {"new", "newer", false}} {
		next := secret.New(test.fromFile)
		key.Store(&next)
		p.SetAPIKey(test.onServer)
		if _, err := c.Work(t.Context()); (err == nil) != test.want {
			t.Errorf("file has %q, server wants %q: %v", test.fromFile, test.onServer, err)
		}
	}
}

// TestDeadConnection: the peer silently disappears. Pings detect that, and the next call connects
// again.
func TestDeadConnection(t *testing.T) {
	for _, http1 := range []bool{false, true} {
		t.Run(map[bool]string{false: "HTTP2", true: "HTTP1"}[http1], func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, err := devplane.New(devplane.Options{HTTP1: http1})
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				c := controlplane.New(options(p, p.RegisterAgent("web1")))
				defer c.Close()
				if _, err := c.Work(t.Context()); err != nil {
					t.Fatal(err)
				}
				p.Stall()
				if !http1 {
					time.Sleep(26 * time.Second) // a ping and its timeout
				} else if _, err := c.Work(t.Context()); api.Kind(err) != "timeout" {
					t.Errorf("poll on the dead connection: %v, want a time-out", err)
				}
				if _, err := c.Work(t.Context()); err != nil {
					t.Errorf("poll after the connection died: %v", err)
				}
				if got := p.Connections(); got != 2 {
					t.Errorf("%d connections, want 2", got)
				}
			})
		})
	}
}

func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := devplane.New(devplane.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		c := controlplane.New(options(p, p.RegisterAgent("web1")))
		defer c.Close()
		p.Inject(devplane.Fault{Call: devplane.CallWork, Delay: time.Minute, Times: 1})
		start := time.Now()
		_, err = c.Work(t.Context())
		if got := time.Since(start); got != timeout || api.Kind(err) != "timeout" || !api.Temporary(err) {
			t.Errorf("after %v: %v, want a time-out after %v", got, err, timeout)
		}
		if !strings.Contains(err.Error(), "no answer within 30s") {
			t.Errorf("error is %q", err)
		}
		if _, err := c.Work(t.Context()); err != nil {
			t.Errorf("next poll: %v", err)
		}
		if got := p.Connections(); got != 1 {
			t.Errorf("%d connections, want the HTTP/2 connection to survive a timeout", got)
		}
	})
}

// TestSecretsStayOut checks that the texts of all kinds of failures contain neither the key nor the
// body.
func TestSecretsStayOut(t *testing.T) {
	const key, body = "hunter2-hunter2", "classified-body"
	p := devplane.Start(t, devplane.Options{APIKey: key})
	agent := p.RegisterAgent("web1")
	for name, fault := range map[string]devplane.Fault{
		"echoed":         {Status: 500, Body: "you sent Authorization: Bearer " + key},
		"echoed in JSON": {Status: 400, Body: `{"message":"bad header Bearer ` + key + `"}`},
		"redirected":     {Status: 302, Header: http.Header{"Location": {"https://user:" + key + "@elsewhere.example/a?k=" + key}}},
		"dropped":        {Drop: true},
		"no JSON":        {Status: 200, Body: "Bearer " + key},
	} {
		remove := p.Inject(fault)
		c := newClient(t, options(p, agent))
		_, workErr := c.Work(t.Context())
		for _, err := range []error{workErr, c.ReportStatus(t.Context(), "j", api.JobStatus{Status: body})} {
			if err == nil {
				t.Errorf("%s: no error", name)
				continue
			}
			if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), body) {
				t.Errorf("%s: %v", name, err)
			}
		}
		remove()
	}
	opts := options(p, agent)
	opts.Key = fixed("hunter2\nsecond line")
	if _, err := newClient(t, opts).Work(t.Context()); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a key that is not a valid header value: %v", err)
	}
}
