package controlplane_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/netfault"
)

func TestTLSRefusals(t *testing.T) {
	plane := devplane.Start(t, devplane.Options{})
	other := devplane.Start(t, devplane.Options{})
	u := plane.ServerURL()
	agent := plane.RegisterAgent("web1")
	for _, test := range []struct {
		name   string
		change func(*controlplane.Options)
		want   string
	}{
		{"another CA", func(o *controlplane.Options) { o.Roots = other.Roots() }, "check that CERTCTL_SERVER_CA_BUNDLE_PATH (-ca-bundle)"},
		{"system roots", func(o *controlplane.Options) { o.Roots = nil }, "check that CERTCTL_SERVER_CA_BUNDLE_PATH (-ca-bundle)"},
		{"another host", func(o *controlplane.Options) {
			o.Server = &url.URL{Scheme: "https", Host: "127.0.0.2:" + u.Port()}
			o.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, u.Host)
			}
		}, "check CERTCTL_SERVER_URL (-server)"},
	} {
		opts := options(plane, agent)
		test.change(&opts)
		before := plane.Count("")
		err := newClient(t, opts).Heartbeat(t.Context(), api.Heartbeat{})
		if err == nil || !strings.Contains(err.Error(), test.want) || !api.Temporary(err) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok {
			t.Errorf("%s: the cause is lost in %T", test.name, err)
		}
		if plane.Count("") != before {
			t.Errorf("%s: a request was sent", test.name)
		}
		opts.InsecureSkipVerify = true
		if _, err := newClient(t, opts).Work(t.Context()); err != nil {
			t.Errorf("%s, not verified: %v", test.name, err)
		}
	}
}

func TestExpiredCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := devplane.New(devplane.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		time.Sleep(20 * 365 * 24 * time.Hour)
		c := controlplane.New(options(p, "agent"))
		defer c.Close()
		_, err = c.Work(t.Context())
		if err == nil || !strings.Contains(err.Error(), "the clock of this host") {
			t.Fatalf("got %v, want a hint at the clock", err)
		}
		if want := "the control plane's certificate CN=plane.test is valid from 1999-12-31 to 2010-01-01: "; !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	})
}

func TestOldTLSIsRefused(t *testing.T) {
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.TLS = &tls.Config{MaxVersion: tls.VersionTLS12}
	server.Config.ErrorLog = discardLog
	server.StartTLS()
	defer server.Close()
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	_, err = newClient(t, controlplane.Options{Server: u, AgentID: "a", Key: fixed("key"), InsecureSkipVerify: true}).Work(t.Context())
	if err == nil || !strings.Contains(err.Error(), "must offer TLS 1.3") {
		t.Errorf("got %v, want a refusal that names TLS 1.3", err)
	}
}

func TestPlainHTTPServer(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	u, err := url.Parse(strings.Replace(server.URL, "http://", "https://", 1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newClient(t, controlplane.Options{Server: u, AgentID: "a", Key: fixed("key")}).Work(t.Context()); err == nil || api.Kind(err) != "network" {
		t.Errorf("got %v, want a network error", err)
	}
}

// TestSilentServer connects to a server that never sends anything.
func TestSilentServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := devplane.New(devplane.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		opts := options(p, "agent")
		opts.Dial = func(ctx context.Context, _, address string) (net.Conn, error) { return p.Dial(ctx, "udp", address) }
		start := time.Now()
		_, err = newClient(t, opts).Work(t.Context())
		if got := time.Since(start); got != 10*time.Second || api.Kind(err) != "timeout" || !strings.Contains(err.Error(), "TLS handshake") {
			t.Errorf("after %v: %v, want the end of the handshake after 10s", got, err)
		}

		// Behind a proxy.
		opts.Proxy = func(*url.URL) *url.URL { return &url.URL{Scheme: "http", Host: "proxy.test"} }
		opts.Dial = func(context.Context, string, string) (net.Conn, error) {
			conn, proxy := net.Pipe()
			go func() {
				if _, err := http.ReadRequest(bufio.NewReader(proxy)); err == nil {
					io.WriteString(proxy, "HTTP/1.1 200 OK\r\n\r\n")
					io.Copy(io.Discard, proxy)
				}
			}()
			return conn, nil
		}
		start = time.Now()
		_, err = newClient(t, opts).Work(t.Context())
		if got := time.Since(start); got != 10*time.Second || err == nil || !strings.Contains(err.Error(), "TLS handshake") {
			t.Errorf("behind a proxy, after %v: %v, want the end of the handshake after 10s", got, err)
		}
	})
}

// TestPathPrefix uses a control plane below a path prefix.
func TestPathPrefix(t *testing.T) {
	p := devplane.Start(t, devplane.Options{})
	agent := p.AddAgent("a/b", "web1")
	server := httptest.NewTLSServer(http.StripPrefix("/certctl/tenant", p.Handler()))
	defer server.Close()
	for _, prefix := range []string{"/certctl/tenant", "/certctl/tenant/"} {
		opts := options(p, agent)
		var err error
		if opts.Server, err = url.Parse(server.URL + prefix); err != nil {
			t.Fatal(err)
		}
		opts.Roots = server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
		if _, err := newClient(t, opts).Work(t.Context()); err != nil {
			t.Errorf("prefix %s: %v", prefix, err)
		}
	}
}

// proxy is an HTTP proxy that requires credentials and records its requests.
type proxy struct {
	mu       sync.Mutex
	connects []string // host:port of accepted requests
	refused  int
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	user, password, ok := (&http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}).BasicAuth()
	allowed := r.Method == http.MethodConnect && ok && user == "agent" && password == "pr0xy-secret"
	if allowed {
		p.connects = append(p.connects, r.Host)
	} else {
		p.refused++
	}
	p.mu.Unlock()
	if !allowed {
		http.Error(w, "who are you", http.StatusProxyAuthRequired)
		return
	}
	netfault.Tunnel(func(address string) string { return address }).ServeHTTP(w, r)
}

func TestProxy(t *testing.T) {
	for _, test := range []struct {
		scheme string
		http1  bool // the control plane has no HTTP/2
		want   string
	}{
		{"http", false, "HTTP/2.0"},
		{"http", true, "HTTP/1.1"},
		{"https", false, "HTTP/2.0"},
		{"https", true, "HTTP/1.1"},
	} {
		t.Run(test.scheme+" "+test.want, func(t *testing.T) {
			p := devplane.Start(t, devplane.Options{HTTP1: test.http1})
			agent := p.RegisterAgent("web1")
			way := new(proxy)
			server := httptest.NewUnstartedServer(way)
			server.Config.ErrorLog = discardLog
			if test.scheme == "http" {
				server.Start()
			} else {
				// The proxy offers HTTP/2, over which it does not support CONNECT.
				certificate, err := p.CA().TLSCertificate("127.0.0.1")
				if err != nil {
					t.Fatal(err)
				}
				server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
				server.EnableHTTP2 = true
				server.StartTLS()
			}
			defer server.Close()
			proxyURL, err := url.Parse(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			proxyURL.User = url.UserPassword("agent", "pr0xy-secret")
			opts := options(p, agent)
			opts.Proxy = func(*url.URL) *url.URL { return proxyURL }
			c := newClient(t, opts)
			for range 3 {
				if _, err := c.Work(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			way.mu.Lock()
			if way.refused != 0 || len(way.connects) != 1 || way.connects[0] != p.ServerURL().Host {
				t.Errorf("proxy saw %v and refused %d, want one connection to %s", way.connects, way.refused, p.ServerURL().Host)
			}
			way.mu.Unlock()
			if got := p.Requests()[0].Proto; got != test.want {
				t.Errorf("through the proxy by %s, want %s", got, test.want)
			}
			if got := c.LocalAddr(t.Context()); got != "127.0.0.1" {
				t.Errorf("LocalAddr = %q", got)
			}
			c.Close() // or the tunnel would keep the proxy open

			wrong := *proxyURL
			wrong.User = url.UserPassword("agent", "wr0ng-secret")
			opts.Proxy = func(*url.URL) *url.URL { return &wrong }
			_, err = newClient(t, opts).Work(t.Context())
			if err == nil || !strings.Contains(err.Error(), "the proxy "+proxyURL.Host+" answered 407") || strings.Contains(err.Error(), "secret") {
				t.Errorf("wrong password: %v, want a 407 from the proxy", err)
			}
		})
	}
}

func TestLocalAddr(t *testing.T) {
	for server, want := range map[string]string{
		"https://127.0.0.1:8443":     "127.0.0.1",
		"https://127.0.0.1":          "127.0.0.1",
		"https://localhost.invalid.": "",
	} {
		u, err := url.Parse(server)
		if err != nil {
			t.Fatal(err)
		}
		opts := controlplane.Options{Server: u}
		if want == "" {
			opts.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no such host") }
		}
		if got := newClient(t, opts).LocalAddr(t.Context()); got != want {
			t.Errorf("LocalAddr for %s = %q, want %q", server, got, want)
		}
	}
}
