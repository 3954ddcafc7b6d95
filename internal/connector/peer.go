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
	policy *policy.Policy // an empty one if the owner of this host chose the peer
	host   string
	port   uint16
}

// hostName is what may become part of a URL, or a word of a command line.
var hostName = lazyregexp.New(`^[A-Za-z0-9_]([A-Za-z0-9._-]{0,252}[A-Za-z0-9_.])?$`)

// IsHost reports whether text is the name of a host, or an address without
// brackets and zone.
func IsHost(text string) bool {
	addr, err := netip.ParseAddr(text)
	return hostName().MatchString(text) || err == nil && addr.Zone() == ""
}

// Peer returns the peer at host, a name or an address (IPv6 with brackets or
// without), if CERTCTL_ALLOWED_HOSTS lets keys go there. Named says that the
// owner of this host chose it, in an overlay or a file that only root can write,
// which counts as permission.
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

// ProxyFor is the proxy that the owner of this host has named for u. It returns nil
// if there is none.
func (h Host) ProxyFor(u *url.URL) *url.URL {
	if h.Proxy == nil {
		return nil
	}
	return h.Proxy(u)
}

// Route asks the policy whether keys may go to the host of an https URL, as Peer
// does. It returns what connects to it, or else the proxy that does.
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
		return nil, proxy, peer.CheckRelayed() // it looks the name up
	}
	return func(ctx context.Context, _ string) (net.Conn, error) { return peer.Dial(ctx) }, nil, nil
}

// CheckRelayed reports whether keys may go there by way of a proxy, which looks
// the name up by itself.
func (p *Peer) CheckRelayed() error { return p.policy.CheckRelayed(p.host, p.port) }

// Address returns host:port as configured.
func (p *Peer) Address() string {
	return net.JoinHostPort(p.host, strconv.Itoa(int(p.port)))
}

// Dial connects to the peer over TCP. It asks the policy about each address that
// the name resolves to before it tries that.
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

// Resolve looks the name up for a program that connects by itself. It returns the
// addresses that the policy allows, or an error if there are none.
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
