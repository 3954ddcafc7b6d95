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
	"certctl-agent/internal/proxy"
)

// controlPlane looks at the way to the control plane, step by step, so that
// the first thing that is wrong is the one that is named.
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
		c.fail("name", "look at DNS, /etc/hosts and the server's URL", "%v", err)
		return false
	}
	if len(addresses) != 1 || addresses[0] != host {
		c.ok("name", "%s is %s", host, strings.Join(addresses, ", "))
	}
	begun := time.Now()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		c.fail("tcp", "look at firewalls, the port, and whether the control plane runs", "%v", err)
		return false
	}
	defer conn.Close()
	c.ok("tcp", "connected to %s in %v", conn.RemoteAddr(), time.Since(begun).Round(time.Millisecond))
	return true
}

// handshake asks /health with the daemon's TLS settings and looks at what the
// server showed.
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
		return "use a name in CERTCTL_SERVER_URL that the certificate has"
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
		c.warn("tls", "the control plane's certificate must be renewed soon, or no agent reaches it", "%s", detail)
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
		c.warn("clock", "look at time synchronisation: certificates are judged by this clock", "the control plane is %v ahead of this host", skew)
		return
	}
	c.ok("clock", "%v from the control plane's", skew.Abs())
}

// identity asks by a heartbeat whether key and agent id are good.
func (c *checker) identity(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	client := app.NewClient(c.config)
	defer client.Close()
	err := client.Heartbeat(ctx, app.NewHeartbeat(ctx, client))
	switch {
	case err == nil:
		c.ok("agent", "the control plane knows %s and takes its key", c.config.AgentID)
	case errors.Is(err, api.ErrRetired):
		c.fail("agent", "register this host anew: certctl-agent register", "%s has been retired", c.config.AgentID)
	case api.RateLimited(err):
		c.warn("agent", "try again in a minute", "%v", err)
	case api.Denied(err):
		c.fail("agent", "look at the API key and the agent id", "%v", err)
	case api.Temporary(err):
		c.fail("agent", "an agent id that the control plane does not know is answered like this too", "%v", err)
	default:
		c.fail("agent", "", "%v", err)
	}
}
