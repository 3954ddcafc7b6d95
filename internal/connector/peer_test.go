package connector

import (
	"errors"
	"net"
	"testing"

	"certctl-agent/internal/policy"
)

func TestPeer(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := listener.Addr().(*net.TCPAddr).Port
	h := Host{Policy: &policy.Policy{Hosts: []policy.HostRule{}}}
	for _, host := range []string{"127.0.0.1", "localhost"} {
		peer, err := h.Peer(host, port, false)
		if err != nil {
			t.Fatalf("%s: %v", host, err)
		}
		conn, err := peer.Dial(t.Context())
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		conn.Close()
		if all, err := peer.Resolve(t.Context()); err != nil || len(all) == 0 || !all[0].Addr().IsLoopback() || int(all[0].Port()) != port {
			t.Errorf("%s: resolved to %v, %v", host, all, err)
		}
	}
	if peer, err := h.Peer("203.0.113.1", port, false); !errors.Is(err, policy.ErrHost) {
		t.Errorf("an address elsewhere: got %v, %v", peer, err)
	}
	if peer, err := h.Peer("203.0.113.1", port, true); err != nil || peer.Address() != net.JoinHostPort("203.0.113.1", listenPort(listener)) {
		t.Errorf("one that an overlay names: got %v, %v", peer, err)
	}
	if peer, err := h.Peer("[2001:db8::1]", 22, true); err != nil || peer.Address() != "[2001:db8::1]:22" {
		t.Errorf("brackets: got %v, %v", peer, err)
	}
	for _, port := range []int{0, -1, 65536} {
		if _, err := h.Peer("localhost", port, true); err == nil {
			t.Errorf("port %d: got no error", port)
		}
	}
}

func listenPort(l net.Listener) string {
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// TestPeerAddress: the policy applies to the address of the connection, not to an earlier
// resolution of the name.
func TestPeerAddress(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	rule, err := policy.ParseHostRule("web1.example.org")
	if err != nil {
		t.Fatal(err)
	}
	peer, err := Host{Policy: &policy.Policy{Hosts: []policy.HostRule{rule}}}.Peer("web1.example.org", listener.Addr().(*net.TCPAddr).Port, false)
	if err != nil {
		t.Fatal(err)
	}
	peer.host = "0.0.0.0" // loopback to the kernel, but in no rule
	if conn, err := peer.Dial(t.Context()); err == nil {
		conn.Close()
		t.Error("connected to an address that is not allowed")
	}
	if all, err := peer.Resolve(t.Context()); err == nil {
		t.Errorf("resolved to %v", all)
	}
}

func TestIsHost(t *testing.T) {
	for text, want := range map[string]bool{
		"www.example.org": true, "www.example.org.": true, "a": true, "192.0.2.1": true, "2001:db8::1": true, "_x": true,
		"": false, "-oProxyCommand=x": false, "a b": false, "a/b": false, "user@host": false, "[::1]": false, "fe80::1%eth0": false, "wéb": false, "a:443": false, "a\n": false,
	} {
		if IsHost(text) != want {
			t.Errorf("%q: got %v", text, !want)
		}
	}
}
