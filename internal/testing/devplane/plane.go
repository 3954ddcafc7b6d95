// Package devplane implements the control plane of docs/protocol.md in memory, with its own CA and
// injectable faults. It is for tests and the demo; the agent never imports it.
package devplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"certctl-agent/internal/testing/testca"
)

// Defaults of deployed control planes.
const (
	DefaultBodyLimit = 1 << 20
	DefaultRate      = 50
	DefaultBurst     = 100
)

// Options select the behaviour of a Plane.
type Options struct {
	// Listen is a TCP address such as "127.0.0.1:0". Empty means no socket: clients connect with
	// Plane.Dial, which works in a testing/synctest bubble.
	Listen string

	// Dir is the directory for ca.pem (see CAFile); empty means that it is not written.
	Dir string

	// APIKey is required for every call but /health; empty means a fixed key. It is also the
	// bootstrap token.
	APIKey string

	// BodyLimit bounds a request body, in bytes; 0 means DefaultBodyLimit.
	BodyLimit int

	// RateLimit enables a limit that all agents share: Rate requests a second and Burst at once; 0
	// means the defaults.
	RateLimit bool
	Rate      float64
	Burst     int

	// Mask masks values of target_config that may be secret.
	Mask bool

	// GonePolls answers 410 also to polls of a retired agent, not only to its heartbeats.
	GonePolls bool

	// HTTP1 disables HTTP/2.
	HTTP1 bool

	// Skew is added to the Date of every answer.
	Skew time.Duration
}

// Plane is a control plane. It is safe for concurrent use.
type Plane struct {
	// URL is the base URL, APIKey the initial API key.
	URL    string
	APIKey string

	opts      Options
	ca        *testca.CA
	caFile    string
	handler   http.Handler
	server    *http.Server
	memory    *memoryListener
	serving   sync.WaitGroup
	done      chan struct{} // closed by Close
	closeOnce sync.Once

	mu       sync.Mutex // guards the fields below
	state    state
	key      string
	tokens   float64   // of the rate limit
	refilled time.Time // when tokens was computed
	accepted int       // number of connections
	changed  chan struct{}
}

// New starts a control plane. The caller must Close it.
func New(opts Options) (*Plane, error) {
	if opts.APIKey == "" {
		opts.APIKey = "devplane-api-key-0123456789abcdef"
	}
	if opts.BodyLimit == 0 {
		opts.BodyLimit = DefaultBodyLimit
	}
	if opts.Rate == 0 {
		opts.Rate = DefaultRate
	}
	if opts.Burst == 0 {
		opts.Burst = DefaultBurst
	}
	ca, err := testca.New()
	if err != nil {
		return nil, err
	}
	p := &Plane{
		URL:      "https://" + memoryHost,
		APIKey:   opts.APIKey,
		opts:     opts,
		ca:       ca,
		memory:   newMemoryListener(),
		done:     make(chan struct{}),
		state:    newState(),
		key:      opts.APIKey,
		tokens:   float64(opts.Burst),
		refilled: time.Now(),
		changed:  make(chan struct{}),
	}
	p.handler = p.routes()
	if opts.Dir != "" {
		p.caFile = filepath.Join(opts.Dir, "ca.pem")
		if err := os.WriteFile(p.caFile, p.CAPEM(), 0o644); err != nil {
			return nil, fmt.Errorf("write the CA certificate: %w", err)
		}
	}
	if err := p.serve(); err != nil {
		return nil, err
	}
	return p, nil
}

// TB is the part of testing.TB that Start needs.
type TB interface {
	Helper()
	Fatal(args ...any)
	Cleanup(func())
	TempDir() string
}

// Start starts a control plane for a test, by default on a loopback port and with a CA file. It
// stops at the end of the test.
func Start(t TB, opts Options) *Plane {
	t.Helper()
	if opts.Listen == "" {
		opts.Listen = "127.0.0.1:0"
	}
	if opts.Dir == "" {
		opts.Dir = t.TempDir()
	}
	p, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

type connKey struct{}

func (p *Plane) serve() error {
	// Valid as long as the CA, so that months can pass in virtual time.
	certificate, err := p.ca.Issue(testca.Template{Names: []string{memoryHost, "localhost", "127.0.0.1", "::1"},
		NotAfter: p.ca.Root.NotAfter})
	if err != nil {
		return err
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(!p.opts.HTTP1)
	p.server = &http.Server{
		Handler:   p,
		Protocols: protocols,
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{certificate.TLS()}},
		ErrorLog:  log.New(io.Discard, "", 0),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				p.update(func() { p.accepted++ })
			}
		},
		ReadHeaderTimeout: 10 * time.Second,
	}
	listeners := []net.Listener{p.memory}
	if p.opts.Listen != "" {
		listener, err := net.Listen("tcp", p.opts.Listen)
		if err != nil {
			return err
		}
		listeners = append(listeners, listener)
		p.URL = "https://" + listener.Addr().String()
	}
	for _, listener := range listeners {
		p.serving.Go(func() { _ = p.server.ServeTLS(listener, "", "") })
	}
	return nil
}

// Close stops the control plane and cuts its connections.
func (p *Plane) Close() {
	p.closeOnce.Do(func() {
		close(p.done)
		p.server.Close()
		p.memory.Close()
		p.serving.Wait()
	})
}

// Handler answers requests without a socket.
func (p *Plane) Handler() http.Handler { return p }

// ServerURL returns URL, parsed.
func (p *Plane) ServerURL() *url.URL {
	u, err := url.Parse(p.URL)
	if err != nil {
		panic(err) // made by New
	}
	return u
}

// Dial connects in memory and ignores the address. A "udp" connection only has a local address.
func (p *Plane) Dial(ctx context.Context, network, _ string) (net.Conn, error) {
	return p.memory.dial(ctx, network)
}

// Stall makes all connections of Dial permanently silent, as if the peer lost power: written data
// vanishes.
func (p *Plane) Stall() { p.memory.stall() }

// CA returns the CA that signs certificates, also the control plane's own.
func (p *Plane) CA() *testca.CA { return p.ca }

// CAPEM returns the CA's certificate.
func (p *Plane) CAPEM() []byte { return p.ca.PEM() }

// CAFile returns the path of a file with CAPEM, or "" without Options.Dir.
func (p *Plane) CAFile() string { return p.caFile }

// Roots returns a pool with the CA's certificate.
func (p *Plane) Roots() *x509.CertPool { return p.ca.Pool() }

// SetAPIKey replaces the API key.
func (p *Plane) SetAPIKey(key string) { p.update(func() { p.key = key }) }

// Connections returns how many connections were accepted.
func (p *Plane) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted
}

// update runs change with mu held and wakes Wait.
func (p *Plane) update(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	close(p.changed)
	p.changed = make(chan struct{})
}

// Wait waits until done returns true. It calls done again after every change; done may call any
// method of the Plane.
func (p *Plane) Wait(ctx context.Context, done func() bool) error {
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		if done() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.done:
			return errors.New("the control plane was closed")
		}
	}
}

// WaitJob waits until a job has one of the given statuses.
func (p *Plane) WaitJob(ctx context.Context, id string, statuses ...string) (Job, error) {
	var job Job
	err := p.Wait(ctx, func() bool {
		job, _ = p.Job(id)
		return slices.Contains(statuses, job.Status)
	})
	if err != nil {
		return job, fmt.Errorf("job %s has status %q, waited for %v: %w", id, job.Status, statuses, err)
	}
	return job, nil
}

// WaitRequests waits until at least n requests of a call were answered or cut.
func (p *Plane) WaitRequests(ctx context.Context, call string, n int) error {
	if err := p.Wait(ctx, func() bool { return p.Count(call) >= n }); err != nil {
		return fmt.Errorf("%d of %d %s requests: %w", p.Count(call), n, call, err)
	}
	return nil
}
