package main

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"certctl-agent/internal/testing/devplane"
)

// connectProxy is a proxy that accepts CONNECT for one host, which only it can reach.
type connectProxy struct {
	*httptest.Server
	tunnels atomic.Int32
}

func startProxy(t *testing.T, host, address string) *connectProxy {
	p := &connectProxy{}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Host != host {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		server, err := net.Dial("tcp", address)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer server.Close()
		client, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer client.Close()
		p.tunnels.Add(1)
		io.WriteString(client, "HTTP/1.1 200 OK\r\n\r\n")
		var both sync.WaitGroup
		both.Go(func() { io.Copy(server, buffered); server.Close() })
		both.Go(func() { io.Copy(client, server); client.Close() })
		both.Wait()
	}))
	t.Cleanup(p.Close)
	return p
}

// TestProxy reaches a control plane whose name only the proxy knows.
func TestProxy(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	address := strings.TrimPrefix(h.plane.URL, "https://")
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	// plane.test is in the certificate of the control plane.
	proxy := startProxy(t, "plane.test:"+port, address)
	h.env["CERTCTL_SERVER_URL"] = "https://plane.test:" + port
	withPassword := strings.Replace(proxy.URL, "http://", "http://user:password-not-to-be-seen@", 1)
	for _, test := range []struct {
		name, env, file string
	}{
		{"environment", withPassword, ""},
		{"file", "", "HTTPS_PROXY=" + withPassword + "\n"},
		{"file, lower case", "", "https_proxy=" + withPassword + "\nno_proxy=example.org\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h.write("agent.env", test.file, 0o600)
			before := proxy.tunnels.Load()
			agent := h.startWith(map[string]string{"HTTPS_PROXY": test.env})
			agent.waitLog("first heartbeat accepted")
			h.waitMore(devplane.CallWork, 2)
			agent.stop()
			if n := proxy.tunnels.Load() - before; n != 1 {
				t.Errorf("%d tunnels, want one that is kept", n)
			}
			code, output := h.runWith(map[string]string{"HTTPS_PROXY": test.env}, "check")
			if code != exitOK || !strings.Contains(output, "ok       proxy") {
				t.Errorf("check: exit code %d\n%s", code, output)
			}
			if strings.Contains(agent.output.String()+output, "password-not-to-be-seen") {
				t.Error("the proxy's password is shown")
			}
		})
	}
	h.write("agent.env", "HTTPS_PROXY="+proxy.URL+"\nNO_PROXY=plane.test\n", 0o600)
	before := proxy.tunnels.Load()
	agent := h.start()
	agent.waitLog("try failed", "heartbeat", "plane.test")
	agent.stop()
	if n := proxy.tunnels.Load() - before; n != 0 {
		t.Errorf("%d tunnels to a host that NO_PROXY names", n)
	}
}
