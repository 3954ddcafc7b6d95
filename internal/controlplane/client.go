// Package controlplane speaks to the control plane: HTTPS with TLS 1.3, one
// method for each call of its API. What an answer means is internal/api's to
// say; when to try again is the caller's, except after a 429.
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

// timeout bounds one request from dialling to the last byte of the answer.
// Signing a CSR is the slowest call, and takes seconds.
const timeout = 30 * time.Second

// maxWait bounds how long a call waits for its turn. An agent of a large fleet
// that renews everything at once has two turns a minute, for some ten calls at
// a time.
const maxWait = 10 * time.Minute

// longest is the Retry-After up to which calls wait here, to be sent or to be sent
// again. Their callers have better things to do with what they hold than to wait
// for longer.
const longest = time.Minute

// Bounds of an answer. Longer ones are api.ErrTooLarge.
const (
	// maxWork holds api.MaxJobs jobs of the usual size.
	maxWork = 8 << 20
	// maxCertificate holds a chain of some hundred certificates.
	maxCertificate = 1 << 20
	// maxAnswer is for the calls whose answer is a word or two, and for errors.
	maxAnswer = 64 << 10
	// maxErrorText is how much of an answer gets into an error.
	maxErrorText = 1 << 10
	// maxID is how long an identifier in a path may be. Servers refuse paths
	// and HTTP/2 header lists of some KiB without an answer that says why.
	maxID = 1 << 10
)

// Options say where the control plane is and who asks.
type Options struct {
	Server  *url.URL // the base; a path prefix is kept; the scheme is https
	AgentID string   // names this agent in the paths; Register needs none

	// Key is asked for the API key before every request, so that a key file can
	// change under a running agent. Registration takes the bootstrap token in its
	// place.
	Key func() secret.String

	Roots              *x509.CertPool // of the control plane and an HTTPS proxy; nil means the system's
	InsecureSkipVerify bool           // accepts any certificate
	Proxy              func(server *url.URL) *url.URL
	UserAgent          string

	// Budget, when set, gives calls their turns: those of an agent at work wait
	// in place of being refused, and are sent again after a 429.
	Budget *budget.Budget

	// Observe, when set, records the outcome of each request before the caller
	// gets it, so that no caller has to pass on a 410. It must not block.
	Observe func(api.Observation)

	// Dial makes connections; nil means the network. Tests give an in-memory
	// one. The network is "tcp", or "udp" for LocalAddr.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client is an agent's connection to its control plane. Its methods may be
// used at the same time.
//
// Their errors are api.StatusError for an answer that is no success, else wrap
// what the network said. They hold no request body, no header and no key.
type Client struct {
	opts      Options
	base      string // the server URL without trailing slash
	address   string // host:port of the server
	transport atomic.Pointer[http.Transport]
}

// New returns a client; it does not connect.
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

// Reload replaces the trusted roots for requests that begin from here on; those
// under way end as they began.
func (c *Client) Reload(roots *x509.CertPool) {
	if !roots.Equal(c.transport.Load().TLSClientConfig.RootCAs) {
		c.transport.Swap(c.newTransport(roots)).CloseIdleConnections()
	}
}

// Close closes connections that are not in use. The client can still be used,
// and would connect again.
func (c *Client) Close() { c.transport.Load().CloseIdleConnections() }

// Heartbeat says that the agent is alive. Its 410 is api.ErrRetired.
func (c *Client) Heartbeat(ctx context.Context, beat api.Heartbeat) error {
	return c.acknowledged(ctx, call{name: "heartbeat", method: http.MethodPost, path: api.HeartbeatPath(c.opts.AgentID),
		ids: []string{c.opts.AgentID}, body: beat, final: true, once: true})
}

// Work polls. Deployment jobs in the answer are claimed by it and do not come
// again. Its 410 is api.ErrRetired.
func (c *Client) Work(ctx context.Context) (api.Work, error) {
	var work api.Work
	err := c.do(ctx, call{name: "poll", class: budget.Poll, method: http.MethodGet, path: api.WorkPath(c.opts.AgentID),
		ids: []string{c.opts.AgentID}, limit: maxWork, final: true}, &work)
	return work, err
}

// SubmitCSR has a CSR signed for a certificate. A nil error means that the
// certificate has a new version.
func (c *Client) SubmitCSR(ctx context.Context, certID api.ID, csrPEM []byte) error {
	return c.acknowledged(ctx, call{name: "CSR", class: budget.CSR, method: http.MethodPost, path: api.CSRPath(c.opts.AgentID),
		ids: []string{c.opts.AgentID}, body: api.CSR{PEM: string(csrPEM), CertificateID: string(certID)}})
}

// Certificate fetches the latest version of a certificate: leaf and chain, PEM.
func (c *Client) Certificate(ctx context.Context, certID api.ID) ([]byte, error) {
	var answer api.Certificate
	err := c.do(ctx, call{name: "certificate", class: budget.Certificate, method: http.MethodGet, path: api.CertificatePath(c.opts.AgentID, string(certID)),
		ids: []string{c.opts.AgentID, string(certID)}, limit: maxCertificate}, &answer)
	if err == nil && answer.PEM == "" {
		err = incomplete("certificate", "certificate_pem")
	}
	return []byte(answer.PEM), err
}

// ReportStatus reports a job's progress. That it runs is left out while the
// budget is tight: the control plane has set that itself when it handed the job
// out.
func (c *Client) ReportStatus(ctx context.Context, jobID api.ID, status api.JobStatus) error {
	running := status.Status == api.StatusRunning
	if running && c.opts.Budget != nil && c.opts.Budget.Throttled() {
		return nil
	}
	return c.acknowledged(ctx, call{name: "status report", class: budget.Report, once: running, method: http.MethodPost, path: api.JobStatusPath(c.opts.AgentID, string(jobID)),
		ids: []string{c.opts.AgentID, string(jobID)}, body: status})
}

// ReportVerification reports what a live endpoint serves.
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
	// The summary's fields are only for people: any will do, but an error.
	var answer map[string]json.RawMessage
	err := c.do(ctx, call{name: "discovery report", class: budget.Discovery, method: http.MethodPost, path: api.DiscoveriesPath(c.opts.AgentID),
		ids: []string{c.opts.AgentID}, body: report}, &answer)
	if _, failed := answer["error"]; err == nil && (answer == nil || failed) {
		err = incomplete("discovery report", "summary")
	}
	return err
}

// acknowledged sends a request whose success is an object with a status. Which
// word that is, a newer control plane may decide.
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

// Register makes a new agent record and returns it; the key is the bootstrap
// token here.
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
	ids    []string // what path was made from
	body   any      // nil: none
	limit  int64    // of the answer; 0 means maxAnswer
	final  bool     // a 410 is final
}

// do sends a request when its turn has come, again after a 429, and decodes a
// success into answer.
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
		if api.RetryAfter(err) > longest {
			c.opts.Budget.Refuse(longest, err)
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
	// RoundTrip in place of an http.Client: it follows no redirect, keeps no
	// cookie, and its errors quote no URL.
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
		// A server cleans "." and ".." out of a path, and an empty segment too.
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
	// Parsed from its escaped form, so that an escaped slash stays one.
	req, err := http.NewRequestWithContext(ctx, call.method, c.base+call.path, bytes.NewReader(body))
	if err != nil {
		return nil, errors.New("the server URL is no URL")
	}
	if !key.IsZero() {
		req.Header.Set("Authorization", "Bearer "+key.Reveal())
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("User-Agent", c.opts.UserAgent)
	return req, nil
}
