package kubernetes

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/trustedfile"
	"certctl-agent/internal/vendorapi"
)

const (
	// maxAnswer bounds an answer of the API server, in bytes. A secret is at most 1 MiB, and comes
	// in base64 with metadata.
	maxAnswer = 4 << 20

	// maxCredential bounds files with tokens and certificates, in bytes.
	maxCredential = 256 << 10

	// retryFor bounds all tries of a call.
	retryFor = time.Minute
)

// client calls one API server.
type client struct {
	*access
	peers   map[string]*connector.Peer // by host:port: the API server and its proxy
	plugin  *policy.Command            // nil: the kubeconfig has none
	query   serverconf.Query
	timeout time.Duration // of one try

	patience time.Duration // how long a call is retried

	issued *credentials // by the plugin; nil: none yet
}

// newClient returns a client if the policy allows the API server and its proxy.
func newClient(a *access, c *targetconf.Config, host connector.Host) (*client, error) {
	k := &client{access: a, peers: make(map[string]*connector.Peer), query: host.Query, timeout: time.Duration(c.Common.CommandTimeout)}
	for _, at := range []*url.URL{a.Cluster.Server, a.Cluster.Proxy} {
		if at == nil {
			continue
		}
		peer, err := host.Peer(at.Hostname(), portOf(at), a.named)
		if err == nil && at == a.Cluster.Server && a.Cluster.Proxy != nil {
			err = peer.CheckRelayed()
		}
		if err != nil {
			return nil, fmt.Errorf("API server of %s: %w", a.from, err)
		}
		k.peers[peer.Address()] = peer
	}
	var err error
	if a.User.Exec != nil {
		k.plugin, err = pluginCommand(a, c, host)
	}
	return k, err
}

// portOf returns the port of a URL, or the default of its scheme. It returns 0, which Peer refuses,
// if the port is invalid.
func portOf(u *url.URL) int {
	standard := map[string]string{"https": "443", "http": "80", "socks5": "1080"}
	n, _ := strconv.Atoi(cmp.Or(u.Port(), standard[u.Scheme]))
	return n
}

// credentials authenticate a request.
type credentials struct {
	token       string
	certificate *tls.Certificate
	expires     time.Time // zero: unknown
}

// credentials returns the current credentials. It reads files each time, since tokens and
// certificates rotate. It keeps those of a plugin until they expire.
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
		if !isToken(shown.token) {
			return nil, fmt.Errorf("token of %s: %s does not contain a token", c.from, user.TokenFile)
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

// isToken reports whether text is a valid token for a header field.
func isToken(text string) bool {
	return text != "" && !strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' })
}

func keyPair(certificate, key []byte) (*tls.Certificate, error) {
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, err
	}
	return &pair, nil
}

// readFile reads a file that affects who gets the key, so it must be trusted.
func readFile(path string) ([]byte, error) {
	data, _, _, err := trustedfile.Read(path, maxCredential)
	return data, err
}

// orFile returns data, or the content of the file at path if data is empty. It returns nil if both
// are empty.
func orFile(data []byte, path string) ([]byte, error) {
	if len(data) > 0 || path == "" {
		return data, nil
	}
	return readFile(path)
}

// tls returns the TLS configuration of one request. Certificate and authority may rotate between
// requests.
func (c *client) tls(shown *credentials) (*tls.Config, error) {
	config := &tls.Config{ServerName: c.Cluster.ServerName, InsecureSkipVerify: c.Cluster.Insecure}
	ca, err := orFile(c.Cluster.CA, c.Cluster.CAFile)
	if err != nil {
		return nil, fmt.Errorf("certificate authority of %s: %w", c.from, err)
	}
	if ca != nil {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("certificate authority of %s: it contains no certificate", c.from)
		}
	}
	if shown.certificate != nil {
		config.Certificates = []tls.Certificate{*shown.certificate}
	}
	return config, nil
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

// parseStatus returns the Status in an answer, or an empty one if the answer is not from an API
// server.
func parseStatus(body []byte) (s status) {
	if json.Unmarshal(body, &s) != nil || s.Kind != "Status" {
		return status{}
	}
	return s
}

// codeOf returns the status code of an error answered by the API server itself, or 0.
func codeOf(err error) int {
	if e, ok := errors.AsType[*vendorapi.StatusError](err); ok && parseStatus(e.Body).Kind != "" {
		return e.Status
	}
	return 0
}

// call makes a request with the current credentials.
func (c *client) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	var shown *credentials
	refreshed, away := false, false
	api := vendorapi.New(vendorapi.Options{
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			peer := c.peers[address]
			if peer == nil {
				return nil, fmt.Errorf("%s is neither the API server nor its proxy", address)
			}
			conn, err := peer.Dial(ctx)
			away = away || errors.Is(err, syscall.ECONNREFUSED)
			return conn, err
		},
		Proxy: c.Cluster.Proxy,
		Sign: func(ctx context.Context, request *http.Request, _ []byte) (err error) {
			shown, err = c.credentials(ctx)
			if err == nil && shown.token != "" {
				request.Header.Set("Authorization", "Bearer "+shown.token)
			}
			return err
		},
		TLS: func() (*tls.Config, error) { return c.tls(shown) },
		Busy: func(e *vendorapi.StatusError) bool {
			switch {
			case e.Status == http.StatusTooManyRequests || e.Status == http.StatusServiceUnavailable:
				away = true
			case e.Status == http.StatusUnauthorized && !refreshed && (c.plugin != nil || c.User.TokenFile != ""):
				c.issued, refreshed = nil, true // the token may have just rotated
				return true
			}
			// An API server that is starting refuses requests until it has loaded service accounts
			// and roles.
			return away && (e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden)
		},
		Message:  func(body []byte) string { return parseStatus(body).Message },
		Timeout:  c.timeout,
		Patience: c.patience,
	})
	header := http.Header{"Accept": {"application/json"}, "User-Agent": {manager}}
	if len(body) > 0 {
		header.Set("Content-Type", "application/json")
	}
	answer, err := api.Do(ctx, &vendorapi.Request{Method: method, URL: c.Cluster.Server.String() + path, Header: header, Body: body, MaxAnswer: maxAnswer})
	if err != nil {
		return nil, err
	}
	return answer.Body, nil
}
