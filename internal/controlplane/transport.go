package controlplane

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"
)

const (
	// dialTimeout and handshakeTimeout leave time for a second address within one request.
	dialTimeout      = 10 * time.Second
	handshakeTimeout = 10 * time.Second

	// pingAfter is how long an HTTP/2 connection may be silent before the client sends a ping, and
	// pingTimeout how long the server may take to answer. Together they are less than a request's
	// timeout, so that a dead connection costs at most one request.
	pingAfter   = 15 * time.Second
	pingTimeout = 10 * time.Second

	// idleTimeout is longer than the usual pause between two calls, so that the connection stays
	// open. It also closes the old connections after a Reload.
	idleTimeout = 5 * time.Minute

	// maxHeader bounds the header of an answer, in bytes; real ones are under 1 KiB.
	maxHeader = 64 << 10

	// localAddrTimeout bounds the DNS lookup of the server's name.
	localAddrTimeout = 5 * time.Second
)

// newTransport returns a transport that keeps one connection.
func (c *Client) newTransport(roots *x509.CertPool) *http.Transport {
	config := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		RootCAs:            roots,
		InsecureSkipVerify: c.opts.InsecureSkipVerify,
		NextProtos:         []string{"h2", "http/1.1"},
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	return &http.Transport{
		Proxy:                  func(req *http.Request) (*url.URL, error) { return c.opts.Proxy(req.URL), nil },
		DialContext:            c.opts.Dial,
		DialTLSContext:         c.dialTLS(config),
		TLSClientConfig:        config.Clone(),
		TLSHandshakeTimeout:    handshakeTimeout,
		Protocols:              protocols,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
		MaxIdleConnsPerHost:    1,
		IdleConnTimeout:        idleTimeout,
		MaxResponseHeaderBytes: maxHeader,
		OnProxyConnectResponse: proxyAnswer,
	}
}

// dialTLS dials the control plane or an HTTPS proxy. The transport itself would also offer HTTP/2
// to the proxy, and then send an HTTP/1.1 CONNECT.
func (c *Client) dialTLS(config *tls.Config) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		config := config.Clone()
		config.ServerName = host
		if address != c.address {
			config.NextProtos = nil
		}
		conn, err := c.opts.Dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
		defer cancel()
		secured := tls.Client(conn, config)
		if err := secured.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		return secured, nil
	}
}

// proxyAnswer names the proxy if it refused to connect. Without it the error is only the text of
// the status line.
func proxyAnswer(_ context.Context, proxy *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return fmt.Errorf("the proxy %s answered %s", proxy.Host, resp.Status) // clip makes it fit to print
}

// LocalAddr returns the local IP address of the route to the control plane, or to its proxy. It
// returns "" if there is no route. It asks a connected UDP socket and sends nothing.
func (c *Client) LocalAddr(ctx context.Context) string {
	address := c.address
	if proxy := c.opts.Proxy(c.opts.Server); proxy != nil {
		address = hostPort(proxy)
	}
	ctx, cancel := context.WithTimeout(ctx, localAddrTimeout)
	defer cancel()
	conn, err := c.opts.Dial(ctx, "udp", address)
	if err != nil {
		return ""
	}
	defer conn.Close()
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return ""
	}
	return local.Addr().Unmap().WithZone("").String()
}

// hostPort returns the address to connect to for a URL.
func hostPort(u *url.URL) string {
	standard := map[string]string{"http": "80", "socks5": "1080", "socks5h": "1080"}
	return net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), standard[u.Scheme], "443"))
}
