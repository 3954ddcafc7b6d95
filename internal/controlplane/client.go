// Package controlplane is the client of the control plane: HTTPS with TLS 1.3, one method per call.
// Package api defines what answers mean. Callers decide when to retry, except after a 429.
package controlplane

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/budget"
	"certctl-agent/internal/secret"
)

// timeout bounds one request, from dialling to the last byte of the answer. The slowest call is
// signing a CSR, which takes seconds.
const timeout = 30 * time.Second

// maxWait bounds how long a call waits for its turn. If a large fleet renews everything at once, an
// agent has two turns a minute for about ten calls.
const maxWait = 10 * time.Minute

// longestRetryAfter is the longest Retry-After that calls wait for. After a longer one they fail,
// so that their callers release what they hold.
const longestRetryAfter = time.Minute

// Bounds of an answer. Longer ones are api.ErrTooLarge.
const (
	// maxWork allows for api.MaxJobs jobs of the usual size.
	maxWork = 8 << 20
	// maxCertificate allows for a chain of some hundred certificates.
	maxCertificate = 1 << 20
	// maxAnswer is for short answers and errors.
	maxAnswer = 64 << 10
	// maxErrorText is how much of an answer an error quotes.
	maxErrorText = 1 << 10
	// maxID is the longest identifier in a path. Servers reject longer paths and HTTP/2 headers
	// without saying why.
	maxID = 1 << 10
)

// Options configure a Client.
type Options struct {
	Server  *url.URL // an https URL, which may have a path prefix
	AgentID string   // for the paths; Register needs none

	// Key returns the API key. It is called before every request, so that the key file can change
	// while the agent runs. For Register it returns the bootstrap token.
	Key func() secret.String

	Roots              *x509.CertPool // for the control plane and an HTTPS proxy; nil: the system's
	InsecureSkipVerify bool           // accepts any certificate
	Proxy              func(server *url.URL) *url.URL
	UserAgent          string

	// Budget limits the rate of calls. With it, calls wait for their turn and are sent again after
	// a 429. May be nil.
	Budget *budget.Budget

	// Observe records the outcome of each request, before the caller gets it. So callers need not
	// handle a 410. It must not block. May be nil.
	Observe func(api.Observation)

	// Dial makes connections. Nil means a net.Dialer; tests use in-memory connections. The network
	// is "tcp", or "udp" for LocalAddr.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client is a client of the control plane. It is safe for concurrent use.
//
// Its errors are api.StatusError if the answer is not a success; otherwise they wrap the network's
// error. They contain no request body, no headers and no key.
type Client struct {
	opts      Options
	base      string // the server URL without trailing slash
	address   string // host:port of the server
	transport atomic.Pointer[http.Transport]
}

// New returns a client. It does not connect yet.
func New(opts Options) *Client {
	if opts.Dial == nil {
		opts.Dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	if opts.Proxy == nil {
		opts.Proxy = func(*url.URL) *url.URL { return nil }
	}
	base := url.URL{Scheme: opts.Server.Scheme, Host: opts.Server.Host, Path: opts.Server.Path, RawPath: opts.Server.RawPath}
	c := &Client{opts: opts, base: strings.TrimRight(base.String(), "/"), address: hostPort(&base)}
	c.transport.Store(c.newTransport(opts.Roots))
	return c
}

// Reload replaces the trusted roots for new requests.
func (c *Client) Reload(roots *x509.CertPool) {
	if !roots.Equal(c.transport.Load().TLSClientConfig.RootCAs) {
		c.transport.Swap(c.newTransport(roots)).CloseIdleConnections()
	}
}

// Close closes idle connections. Later calls connect again.
func (c *Client) Close() { c.transport.Load().CloseIdleConnections() }

// Heartbeat sends a heartbeat. A 410 is api.ErrRetired.
func (c *Client) Heartbeat(ctx context.Context, beat api.Heartbeat) error {
	return c.acknowledged(ctx, call{name: "heartbeat", method: http.MethodPost, path: api.HeartbeatPath(c.opts.AgentID),
		ids: []string{c.opts.AgentID}, body: beat, final: true, once: true})
}

// Work polls. It claims the deployment jobs in the answer, which no later poll returns. A 410 is
// api.ErrRetired.
func (c *Client) Work(ctx context.Context) (api.Work, error) {
	var work api.Work
	err := c.do(ctx, call{name: "poll", class: budget.Poll, method: http.MethodGet, path: api.WorkPath(c.opts.AgentID),
		ids: []string{c.opts.AgentID}, limit: maxWork, final: true}, &work)
	return work, err
}

// SubmitCSR submits a CSR for a certificate. A nil error means that the certificate has a new
// version.
func (c *Client) SubmitCSR(ctx context.Context, certID api.ID, csrPEM []byte) error {
	return c.acknowledged(ctx, call{name: "CSR", class: budget.CSR, method: http.MethodPost, path: api.CSRPath(c.opts.AgentID),
		ids: []string{c.opts.AgentID}, body: api.CSR{PEM: string(csrPEM), CertificateID: string(certID)}})
}

// Certificate fetches the latest version of a certificate: leaf and chain, as PEM.
func (c *Client) Certificate(ctx context.Context, certID api.ID) ([]byte, error) {
	var answer api.Certificate
	err := c.do(ctx, call{name: "certificate", class: budget.Certificate, method: http.MethodGet, path: api.CertificatePath(c.opts.AgentID, string(certID)),
		ids: []string{c.opts.AgentID, string(certID)}, limit: maxCertificate}, &answer)
	if err == nil && answer.PEM == "" {
		err = incomplete("certificate", "certificate_pem")
	}
	return []byte(answer.PEM), err
}

// ReportStatus reports a job's progress. It skips the status Running while calls are throttled: the
// control plane set that status itself when the job was claimed.
func (c *Client) ReportStatus(ctx context.Context, jobID api.ID, status api.JobStatus) error {
	running := status.Status == api.StatusRunning
	if running && c.opts.Budget != nil && c.opts.Budget.Throttled() {
		return nil
	}
	return c.acknowledged(ctx, call{name: "status report", class: budget.Report, once: running, method: http.MethodPost, path: api.JobStatusPath(c.opts.AgentID, string(jobID)),
		ids: []string{c.opts.AgentID, string(jobID)}, body: status})
}

// ReportVerification reports which certificate an endpoint serves.
func (c *Client) ReportVerification(ctx context.Context, jobID api.ID, verification api.Verification) error {
	var answer struct {
		Verified *bool `json:"verified"`
	}
	err := c.do(ctx, call{name: "verification", class: budget.Report, method: http.MethodPost, path: api.VerifyPath(string(jobID)),
		ids: []string{string(jobID)}, body: verification}, &answer)
	if err == nil && answer.Verified == nil {
		err = incomplete("verification", "verified")
	}
	return err
}

// ReportDiscovery reports certificates found on this host.
func (c *Client) ReportDiscovery(ctx context.Context, report api.DiscoveryReport) error {
	// The summary is for people: any object without an error is a success.
	var answer map[string]json.RawMessage
	err := c.do(ctx, call{name: "discovery report", class: budget.Discovery, method: http.MethodPost, path: api.DiscoveriesPath(c.opts.AgentID),
		ids: []string{c.opts.AgentID}, body: report}, &answer)
	if _, failed := answer["error"]; err == nil && (answer == nil || failed) {
		err = incomplete("discovery report", "summary")
	}
	return err
}

// acknowledged sends a request whose success is an object with a status. It accepts any status,
// since newer control planes may use another one.
func (c *Client) acknowledged(ctx context.Context, call call) error {
	var answer struct {
		Status string `json:"status"`
	}
	err := c.do(ctx, call, &answer)
	if err == nil && answer.Status == "" {
		err = incomplete(call.name, "status")
	}
	return err
}

// Register creates an agent record and returns it. The client's key must be the bootstrap token.
func (c *Client) Register(ctx context.Context, registration api.Registration) (api.Agent, error) {
	var agent api.Agent
	err := c.do(ctx, call{name: "registration", method: http.MethodPost, path: api.RegisterPath, body: registration}, &agent)
	if err == nil && agent.ID == "" {
		err = incomplete("registration", "id")
	}
	return agent, err
}

// call is one request.
type call struct {
	name   string // for messages
	class  budget.Class
	once   bool // not sent again after a 429
	method string
	path   string
	ids    []string // the identifiers in path
	body   any      // nil: none
	limit  int64    // of the answer, in bytes; 0 means maxAnswer
	final  bool     // a 410 means that the agent is retired
}

// do waits for the call's turn, sends the request, again after a 429, and decodes a success into
// answer.
func (c *Client) do(ctx context.Context, call call, answer any) error {
	if c.opts.Budget == nil {
		return c.try(ctx, call, answer)
	}
	waiting, cancel := context.WithTimeoutCause(ctx, maxWait, api.ErrNoTurn)
	defer cancel()
	for {
		turn, err := c.opts.Budget.Wait(waiting, call.class)
		if err != nil {
			return fmt.Errorf("%s: not sent: %w", call.name, err)
		}
		err = c.try(ctx, call, answer)
		switch {
		case err == nil:
			c.opts.Budget.Succeeded()
			return nil
		case !api.RateLimited(err):
			return err
		}
		again := c.opts.Budget.Limited(turn, api.RetryAfter(err)) && !call.once
		if api.RetryAfter(err) > longestRetryAfter {
			c.opts.Budget.Refuse(longestRetryAfter, err)
			again = false
		}
		if !again {
			return err
		}
	}
}

// try sends a request once.
func (c *Client) try(ctx context.Context, call call, answer any) error {
	seen := api.Observation{Call: call.name}
	seen.Err = c.send(ctx, call, answer, &seen)
	if c.opts.Observe != nil {
		c.opts.Observe(seen)
	}
	return seen.Err
}

func (c *Client) send(ctx context.Context, call call, answer any, seen *api.Observation) error {
	key := c.opts.Key()
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errTimeout)
	defer cancel()
	req, err := c.request(ctx, call, key)
	if err != nil {
		return fmt.Errorf("%s: %w", call.name, err)
	}
	// RoundTrip instead of an http.Client: it does not follow redirects or keep cookies, and its
	// errors do not quote the URL.
	resp, err := c.transport.Load().RoundTrip(req)
	if err != nil {
		return c.failure(ctx, call, key, err)
	}
	defer resp.Body.Close()
	seen.Received = time.Now()
	now := seen.Received
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		seen.Date, now = date, date
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return refusal(call, resp, key, now)
	}
	if err := decode(resp, call, answer); err != nil {
		return c.failure(ctx, call, key, err)
	}
	return nil
}

func (c *Client) request(ctx context.Context, call call, key secret.String) (*http.Request, error) {
	for _, id := range call.ids {
		// Servers remove ".", ".." and empty segments from a path.
		if id == "" || id == "." || id == ".." || len(id) > maxID {
			return nil, fmt.Errorf("%w: %.64q", api.ErrBadID, id)
		}
	}
	var body []byte
	if call.body != nil {
		var err error
		if body, err = json.Marshal(call.body); err != nil {
			return nil, errors.New("encode the request") // the cause may quote it
		}
	}
	// Parsed from its escaped form, so that an escaped slash stays escaped.
	req, err := http.NewRequestWithContext(ctx, call.method, c.base+call.path, bytes.NewReader(body))
	if err != nil {
		return nil, errors.New("the server URL is invalid")
	}
	if !key.IsZero() {
		req.Header.Set("Authorization", "Bearer "+key.Reveal())
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	// Set explicitly, so that net/http neither asks for gzip nor decompresses: the limits then hold
	// for the uncompressed answer.
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("User-Agent", c.opts.UserAgent)
	return req, nil
}
