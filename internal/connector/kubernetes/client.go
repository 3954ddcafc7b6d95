package kubernetes

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/command"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/trustedfile"
)

const (
	// maxAnswer bounds an answer of the API server, in bytes. A secret is 1 MiB at
	// most, in base64, and has metadata.
	maxAnswer = 4 << 20

	// maxMessage bounds what is kept of an error that the API server reports, in
	// bytes.
	maxMessage = 1 << 10

	// maxCredential bounds the files of tokens and certificates, in bytes.
	maxCredential = 256 << 10

	// retryFor is how long a call is tried again, in all.
	retryFor = time.Minute

	// firstPause is before the second try, and doubles from there to maxPause,
	// unless the API server says how long it wants to be left alone.
	firstPause = 500 * time.Millisecond
	maxPause   = 10 * time.Second
)

// client calls one API server.
type client struct {
	*access
	peers   map[string]*connector.Peer // by host:port: the API server or the proxy before it
	plugin  *policy.Command            // nil: the kubeconfig has none
	query   serverconf.Query
	timeout time.Duration // of one try

	patience time.Duration // for how long a call is tried again

	issued *credentials // what the plugin printed; nil: nothing yet
}

// newClient asks the policy whether the API server and its proxy may be reached.
func newClient(a *access, c *targetconf.Config, host connector.Host) (*client, error) {
	k := &client{access: a, peers: make(map[string]*connector.Peer), query: host.Query, timeout: time.Duration(c.Common.CommandTimeout)}
	for _, at := range []*url.URL{a.Cluster.Server, a.Cluster.Proxy} {
		if at == nil {
			continue
		}
		port, err := portOf(at)
		if err != nil {
			return nil, targetconf.Invalid("kubeconfig_path", "%s: %v", a.from, err)
		}
		peer, err := host.Peer(at.Hostname(), port, a.named)
		if err == nil && at == a.Cluster.Server && a.Cluster.Proxy != nil {
			err = peer.CheckRelayed()
		}
		if err != nil {
			return nil, fmt.Errorf("API server of %s: %w", a.from, err)
		}
		k.peers[net.JoinHostPort(at.Hostname(), strconv.Itoa(port))] = peer
	}
	var err error
	if a.User.Exec != nil {
		k.plugin, err = pluginCommand(a, c, host)
	}
	return k, err
}

func portOf(u *url.URL) (int, error) {
	switch {
	case u.Port() == "" && u.Scheme == "https":
		return 443, nil
	case u.Port() == "" && u.Scheme == "socks5":
		return 1080, nil
	case u.Port() == "":
		return 80, nil
	}
	n, err := strconv.Atoi(u.Port())
	if err != nil || n < 1 || n > 65535 {
		return 0, errors.New("a port is from 1 to 65535")
	}
	return n, nil
}

// credentials authenticate a request.
type credentials struct {
	token       string
	certificate *tls.Certificate
	expires     time.Time // zero: not known
}

// credentials reads the files again each time, since tokens and certificates
// rotate. Those of a plugin are kept until they expire.
func (c *client) credentials(ctx context.Context) (*credentials, error) {
	user := &c.User
	if c.plugin != nil {
		if c.issued == nil || !c.issued.expires.IsZero() && time.Until(c.issued.expires) < c.timeout {
			issued, err := c.askPlugin(ctx)
			if err != nil {
				return nil, fmt.Errorf("exec of %s: %w", c.from, err)
			}
			c.issued = issued
		}
		return c.issued, nil
	}
	shown := &credentials{token: user.Token.Reveal()}
	if user.TokenFile != "" {
		data, err := readFile(user.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("token of %s: %w", c.from, err)
		}
		shown.token = strings.TrimSpace(string(data))
		if shown.token == "" || strings.ContainsFunc(shown.token, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return nil, fmt.Errorf("token of %s: %s holds no token", c.from, user.TokenFile)
		}
	}
	certificate, err := orFile(user.Certificate, user.CertificateFile)
	if err == nil && certificate != nil {
		var key []byte
		if key, err = orFile([]byte(user.Key.Reveal()), user.KeyFile); err == nil {
			shown.certificate, err = keyPair(certificate, key)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("client certificate of %s: %w", c.from, err)
	}
	return shown, nil
}

func keyPair(certificate, key []byte) (*tls.Certificate, error) {
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, err
	}
	return &pair, nil
}

// readFile reads a file that decides where a key goes, or under whose name.
func readFile(path string) ([]byte, error) {
	data, _, _, err := trustedfile.Read(path, maxCredential)
	return data, err
}

// orFile is data, or else what is in the file at path; nil without both.
func orFile(data []byte, path string) ([]byte, error) {
	if len(data) > 0 || path == "" {
		return data, nil
	}
	return readFile(path)
}

// transport serves one request: by the next, certificate and authority may have rotated.
func (c *client) transport(shown *credentials) (*http.Transport, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.Cluster.ServerName, InsecureSkipVerify: c.Cluster.Insecure}
	ca, err := orFile(c.Cluster.CA, c.Cluster.CAFile)
	if err != nil {
		return nil, fmt.Errorf("certificate authority of %s: %w", c.from, err)
	}
	if ca != nil {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("certificate authority of %s: there is no certificate in it", c.from)
		}
	}
	if shown.certificate != nil {
		config.Certificates = []tls.Certificate{*shown.certificate}
	}
	return &http.Transport{
		Proxy: http.ProxyURL(c.Cluster.Proxy),
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
			if answer.StatusCode != http.StatusOK { // net/http would show all of the reason, whatever that is
				return fmt.Errorf("the proxy of %s answers %s", c.from, printable.Line(answer.Status, 200))
			}
			return nil
		},
		TLSClientConfig:   config,
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			peer := c.peers[address]
			if peer == nil {
				return nil, fmt.Errorf("%s is neither the API server nor its proxy", address)
			}
			return peer.Dial(ctx)
		},
	}, nil
}

// statusError is an answer that is not success.
type statusError struct {
	code    int
	status  status
	after   time.Duration // how long the API server wants to be left alone; 0: it does not say
	message string
}

// status is a Status of the API, see
// https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/.
type status struct {
	Kind    string `json:"kind"`
	Message string `json:"message"`
	Reason  string `json:"reason"`
	Details struct {
		Kind string `json:"kind"` // of the object
	} `json:"details"`
}

func (e *statusError) Error() string {
	return strings.TrimSuffix(fmt.Sprintf("%d %s: %s", e.code, http.StatusText(e.code), e.message), ": ")
}

// codeOf is the status code of a statusError that the API server itself sent,
// else 0.
func codeOf(err error) int {
	if e, ok := errors.AsType[*statusError](err); ok && e.status.Kind == "Status" {
		return e.code
	}
	return 0
}

// call makes a request, and retries it while the API server is restarting or
// busy. Cancellation does not end a change under way: an undo has to know whether
// it happened.
func (c *client) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	begun, pause, refreshed, away := time.Now(), firstPause, false, false
	for {
		answer, err := c.send(ctx, method, path, body)
		if err == nil {
			return answer, nil
		}
		wait := pause
		status, _ := errors.AsType[*statusError](err)
		switch {
		case status != nil && status.code == http.StatusUnauthorized && !refreshed && (c.plugin != nil || c.User.TokenFile != ""):
			c.issued, refreshed = nil, true // it may have rotated just now
			continue
		case status != nil && (status.code == http.StatusTooManyRequests || status.code == http.StatusServiceUnavailable):
			wait, away = max(wait, status.after), true
		case errors.Is(err, syscall.ECONNREFUSED):
			away = true
		case status != nil && away && (status.code == http.StatusUnauthorized || status.code == http.StatusForbidden):
			// An API server that has just started knows neither service accounts nor
			// roles until it has read them.
		default:
			return nil, err
		}
		if tried := time.Since(begun); tried+wait > c.patience {
			return nil, fmt.Errorf("%w (given up after %v)", err, tried.Round(time.Second))
		}
		select {
		case <-time.After(wait):
			pause = min(2*pause, maxPause)
		case <-ctx.Done():
			return nil, fmt.Errorf("%w; %w", err, context.Cause(ctx))
		}
	}
}

func (c *client) send(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if method != http.MethodGet {
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, fmt.Errorf("no answer within %v", c.timeout))
	defer cancel()
	shown, err := c.credentials(ctx)
	if err != nil {
		return nil, err
	}
	transport, err := c.transport(shown)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, method, c.Cluster.Server.String()+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", manager)
	if shown.token != "" {
		request.Header.Set("Authorization", "Bearer "+shown.token)
	}
	if len(body) > 0 {
		request.Header.Set("Content-Type", "application/json")
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	response, err := client.Do(request)
	if err != nil {
		return nil, plainError(ctx, err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	switch {
	case response.StatusCode/100 != 2:
		return nil, newStatusError(response, answer)
	case err != nil:
		return nil, plainError(ctx, err)
	case len(answer) > maxAnswer:
		return nil, fmt.Errorf("the answer is longer than %d MiB", maxAnswer>>20)
	}
	return answer, nil
}

// plainError is an error of net/http without the URL, which the caller names,
// and with the reason for a context's end.
func plainError(ctx context.Context, err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
		return cause
	}
	return err
}

func newStatusError(response *http.Response, answer []byte) *statusError {
	e := &statusError{code: response.StatusCode}
	e.message = string(answer[:min(len(answer), 8*maxMessage)])
	if json.Unmarshal(answer, &e.status) == nil && e.status.Kind == "Status" {
		e.message = e.status.Message
	}
	if location := response.Header.Get("Location"); response.StatusCode/100 == 3 {
		e.message = "it redirects to " + location + ", which is not followed"
	}
	// An admission webhook may quote anything of the request.
	e.message = printable.Line(command.Redact(e.message), maxMessage)
	if seconds, err := strconv.Atoi(response.Header.Get("Retry-After")); err == nil && seconds > 0 {
		e.after = time.Duration(min(seconds, 3600)) * time.Second
	}
	return e
}
