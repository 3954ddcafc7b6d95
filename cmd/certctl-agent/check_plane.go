package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/buildinfo"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/proxy"
)

// controlPlane checks the connection to the control plane step by step, so that it reports the
// first problem.
func (c *checker) controlPlane(ctx context.Context) {
	through := c.config.Proxy.For(c.config.Server)
	if through != nil {
		c.ok("proxy", "%s", proxy.Redacted(through))
	}
	if through == nil && !c.reach(ctx) {
		return
	}
	if !c.handshake(ctx, through) {
		return
	}
	if !c.config.APIKey.IsZero() && c.config.AgentID != "" {
		c.identity(ctx)
	}
}

func (c *checker) reach(ctx context.Context) bool {
	host, port := c.config.Server.Hostname(), cmp.Or(c.config.Server.Port(), "443")
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		c.fail("name", "check DNS, /etc/hosts and the server's URL", "%v", err)
		return false
	}
	if len(addresses) != 1 || addresses[0] != host {
		c.ok("name", "%s resolves to %s", host, strings.Join(addresses, ", "))
	}
	started := time.Now()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		c.fail("tcp", "check firewalls, the port, and whether the control plane runs", "%v", err)
		return false
	}
	defer conn.Close()
	c.ok("tcp", "connected to %s in %v", conn.RemoteAddr(), time.Since(started).Round(time.Millisecond))
	return true
}

// handshake requests /health with the daemon's TLS settings and checks the server's certificate and
// clock.
func (c *checker) handshake(ctx context.Context, proxy *url.URL) bool {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	client := &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyURL(proxy),
			TLSClientConfig: &tls.Config{
				MinVersion:         tls.VersionTLS13,
				RootCAs:            c.config.Roots,
				InsecureSkipVerify: c.config.InsecureSkipVerify,
			},
			DisableKeepAlives: true,
			ForceAttemptHTTP2: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.config.Server.String()+api.HealthPath, nil)
	if err != nil {
		c.fail("tls", "", "%v", err)
		return false
	}
	request.Header.Set("User-Agent", buildinfo.UserAgent())
	request.Header.Set("Content-Type", "application/json") // every request has it, docs/protocol.md
	response, err := client.Do(request)
	if err != nil {
		c.fail("tls", tlsRemedy(err), "%v", err)
		return false
	}
	defer response.Body.Close()
	c.certificate(response.TLS)
	c.clock(response.Header.Get("Date"))
	if response.StatusCode != http.StatusOK {
		c.warn("health", "is this the control plane, and is the path prefix right?", "GET /health answered %s", response.Status)
		return true
	}
	c.ok("health", "%s answered %s", response.Proto, response.Status)
	return true
}

func tlsRemedy(err error) string {
	if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown {
		return "put the CA that signed the control plane's certificate into CERTCTL_SERVER_CA_BUNDLE_PATH"
	}
	if _, name := errors.AsType[x509.HostnameError](err); name {
		return "use a name from the certificate in CERTCTL_SERVER_URL"
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return controlplane.Advice(err)
	}
	if strings.Contains(err.Error(), "protocol version") {
		return "TLS 1.3 is the minimum; see docs/upgrade-to-tls.md"
	}
	return "see docs/upgrade-to-tls.md"
}

func (c *checker) certificate(state *tls.ConnectionState) {
	if state == nil || len(state.PeerCertificates) == 0 {
		c.fail("tls", "", "the connection is not encrypted")
		return
	}
	leaf := state.PeerCertificates[0]
	left := time.Until(leaf.NotAfter)
	detail := fmt.Sprintf("%s, %v, %d certificates, %s until %s", tls.VersionName(state.Version), state.CurveID,
		len(state.PeerCertificates), leaf.Subject, leaf.NotAfter.Format(time.DateOnly))
	switch {
	case c.config.InsecureSkipVerify:
		c.warn("tls", "set CERTCTL_SERVER_CA_BUNDLE_PATH instead", "%s; not verified", detail)
	case left < 14*24*time.Hour:
		c.warn("tls", "renew the control plane's certificate soon, or no agent can reach it", "%s", detail)
	default:
		c.ok("tls", "%s", detail)
	}
}

func (c *checker) clock(date string) {
	server, err := http.ParseTime(date)
	if err != nil {
		return
	}
	skew := time.Until(server).Round(time.Second)
	if skew.Abs() > 5*time.Minute {
		c.warn("clock", "check time synchronisation: this clock decides whether certificates are valid", "the control plane is %v ahead of this host", skew)
		return
	}
	c.ok("clock", "%v off the control plane's", skew.Abs())
}

// identity checks the API key and the agent id with a heartbeat.
func (c *checker) identity(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	client := app.NewClient(c.config)
	defer client.Close()
	err := client.Heartbeat(ctx, app.NewHeartbeat(ctx, client))
	switch {
	case err == nil:
		c.ok("agent", "the control plane knows %s and accepts its key", c.config.AgentID)
	case errors.Is(err, api.ErrRetired):
		c.fail("agent", "register this host again: certctl-agent register", "%s has been retired", c.config.AgentID)
	case api.RateLimited(err):
		c.warn("agent", "try again in a minute", "%v", err)
	case api.Denied(err):
		c.fail("agent", "check the API key and the agent id", "%v", err)
	case api.Temporary(err):
		c.fail("agent", "the control plane may also answer like this if it does not know the agent id", "%v", err)
	default:
		c.fail("agent", "", "%v", err)
	}
}
