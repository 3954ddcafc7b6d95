package connector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"

	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/policy"
)

// Peer is the host and port of a remote target, to which private keys are sent.
type Peer struct {
	policy *policy.Policy // allows every host if the owner of this host chose the peer
	host   string
	port   uint16
}

// hostName matches names that are safe in a URL and as a word of a command line.
var hostName = lazyregexp.New(`^[A-Za-z0-9_]([A-Za-z0-9._-]{0,252}[A-Za-z0-9_.])?$`)

// IsHost reports whether text is a host name, or an address without brackets and zone.
func IsHost(text string) bool {
	addr, err := netip.ParseAddr(text)
	return hostName().MatchString(text) || err == nil && addr.Zone() == ""
}

// Peer returns the peer at host, a name or an address (IPv6 with or without brackets), if
// CERTCTL_ALLOWED_HOSTS allows sending keys there. Named says that the owner of this host chose the
// peer, in an overlay or in a file that only root can write, which counts as permission.
func (h Host) Peer(host string, port int, named bool) (*Peer, error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("expected a port from 1 to 65535, got %d", port)
	}
	if inside, isBracket := strings.CutPrefix(host, "["); isBracket {
		host = strings.TrimSuffix(inside, "]")
	}
	peer := &Peer{policy: h.Policy, host: host, port: uint16(port)}
	if named {
		peer.policy = &policy.Policy{}
	}
	return peer, peer.policy.CheckHost(host, peer.port)
}

// ProxyFor returns the proxy for u, or nil to connect directly.
func (h Host) ProxyFor(u *url.URL) *url.URL {
	if h.Proxy == nil {
		return nil
	}
	return h.Proxy(u)
}

// Route returns how to connect to the host of an https URL, by dial or else by proxy, if the policy
// allows sending keys there as in Peer.
func (h Host) Route(u *url.URL, named bool) (dial func(ctx context.Context, address string) (net.Conn, error), proxy *url.URL, err error) {
	port := 443
	if text := u.Port(); text != "" {
		if port, err = strconv.Atoi(text); err != nil {
			return nil, nil, errors.New("expected a port from 1 to 65535")
		}
	}
	peer, err := h.Peer(u.Hostname(), port, named)
	if err != nil {
		return nil, nil, err
	}
	if proxy = h.ProxyFor(u); proxy != nil {
		return nil, proxy, peer.CheckRelayed()
	}
	return func(ctx context.Context, _ string) (net.Conn, error) { return peer.Dial(ctx) }, nil, nil
}

// CheckRelayed returns an error unless keys may be sent to the peer through a proxy, which resolves
// the name itself.
func (p *Peer) CheckRelayed() error { return p.policy.CheckRelayed(p.host, p.port) }

// Address returns the configured host and port.
func (p *Peer) Address() string {
	return net.JoinHostPort(p.host, strconv.Itoa(int(p.port)))
}

// Dial connects to the peer over TCP. It checks each address that the name resolves to with the
// policy before it connects.
func (p *Peer) Dial(ctx context.Context) (net.Conn, error) {
	dialer := net.Dialer{Control: func(_, address string, _ syscall.RawConn) error {
		at, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		return p.policy.CheckAddress(p.host, at)
	}}
	return dialer.DialContext(ctx, "tcp", p.Address())
}

// Resolve resolves the name for a program that makes its own connections. It returns the addresses
// that the policy allows, or an error if there are none.
func (p *Peer) Resolve(ctx context.Context) ([]netip.AddrPort, error) {
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", p.host)
	if err != nil {
		return nil, err
	}
	var allowed []netip.AddrPort
	for _, addr := range found {
		at := netip.AddrPortFrom(addr.Unmap(), p.port)
		if refused := p.policy.CheckAddress(p.host, at); refused != nil {
			err = refused
			continue
		}
		allowed = append(allowed, at)
	}
	if len(allowed) == 0 {
		return nil, err
	}
	return allowed, nil
}
