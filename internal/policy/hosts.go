package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"certctl-agent/internal/printable"
)

// HostRule is one entry of CERTCTL_ALLOWED_HOSTS: names or addresses, on one port or on any.
type HostRule struct {
	name   string // lower case; "*.example.org" means its subdomains; "": by address
	prefix netip.Prefix
	port   uint16 // 0: any
}

// ParseHostRule parses an entry: a host name, "*.example.org" for its subdomains, an address or a
// CIDR block, optionally followed by ":port". IPv6 needs brackets before a port:
// "[2001:db8::/32]:22".
func ParseHostRule(entry string) (HostRule, error) {
	host, port, err := cutPort(entry)
	if err != nil {
		return HostRule{}, err
	}
	rule := HostRule{port: port}
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" {
			return HostRule{}, fmt.Errorf("%s: an address with a zone is not supported", printable.Quote(entry))
		}
		rule.prefix = netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen())
		return rule, nil
	}
	if strings.Contains(host, "/") {
		prefix, err := netip.ParsePrefix(host)
		if err != nil || prefix.Masked() != prefix || prefix.Addr().Is4In6() {
			return HostRule{}, fmt.Errorf("%s is not a CIDR block such as 10.0.0.0/8", printable.Quote(entry))
		}
		rule.prefix = prefix
		return rule, nil
	}
	rule.name = canonical(host)
	if !isHostName(strings.TrimPrefix(rule.name, "*.")) {
		return HostRule{}, fmt.Errorf("%s is not a host name, *.example.org, an address or a CIDR block", printable.Quote(entry))
	}
	return rule, nil
}

// cutPort splits an entry into the host, without brackets, and the port, or 0.
func cutPort(entry string) (host string, port uint16, err error) {
	host = entry
	number, hasPort := "", false
	if inside, isBracket := strings.CutPrefix(entry, "["); isBracket {
		var after string
		host, after, _ = strings.Cut(inside, "]")
		if number, hasPort = strings.CutPrefix(after, ":"); !hasPort && after != "" {
			return "", 0, fmt.Errorf("%s: expected a colon and the port after the bracket", printable.Quote(entry))
		}
	} else if strings.Count(entry, ":") == 1 {
		host, number, hasPort = strings.Cut(entry, ":")
	}
	if !hasPort {
		return host, 0, nil
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return "", 0, fmt.Errorf("%s: expected a port from 1 to 65535", printable.Quote(entry))
	}
	return host, uint16(n), nil
}

// canonical returns the form in which names are compared: in lower case (RFC 4343), without the
// final dot of an absolute name.
func canonical(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// isHostName accepts names by RFC 1123, and underscores, which are in use.
func isHostName(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		odd := strings.ContainsFunc(label, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
		})
		if odd || label == "" || len(label) > 63 || label[0] == '-' {
			return false
		}
	}
	return len(name) <= 253
}

func (r HostRule) onPort(port uint16) bool { return r.port == 0 || r.port == port }

// named reports whether the rule allows a host by this name.
func (r HostRule) named(host string) bool {
	if below, isWildcard := strings.CutPrefix(r.name, "*"); isWildcard {
		return strings.HasSuffix(host, below) && len(host) > len(below)
	}
	return r.name != "" && r.name == host
}

// CheckHost checks whether a private key may be sent to host, a name or an address, before the name
// is looked up. If any CIDR block is allowed on this port, it accepts every name, and CheckAddress
// decides.
func (p *Policy) CheckHost(host string, port uint16) error {
	if addr, err := netip.ParseAddr(host); err == nil {
		return p.CheckAddress(host, netip.AddrPortFrom(addr, port))
	}
	name := canonical(host)
	if !isHostName(name) {
		return fmt.Errorf("%s is neither a host name nor an address", printable.Quote(host))
	}
	if p.Hosts == nil || isLoopbackName(name) {
		return nil
	}
	mayBe := func(r HostRule) bool { return r.onPort(port) && (r.prefix.IsValid() || r.named(name)) }
	if !slices.ContainsFunc(p.Hosts, mayBe) {
		return refused(fmt.Sprintf("%s, port %d,", name, port))
	}
	return nil
}

// CheckRelayed is like CheckHost, for a host that a proxy connects to. The proxy looks the name up,
// so there is no address to check: the name needs its own rule. A loopback address is the proxy's.
func (p *Policy) CheckRelayed(host string, port uint16) error {
	if err := p.CheckHost(host, port); err != nil || p.Hosts == nil {
		return err
	}
	addr, _ := netip.ParseAddr(host) // the zero Addr if host is a name: no block contains it
	addr, name := addr.Unmap().WithZone(""), canonical(host)
	allows := func(r HostRule) bool { return r.onPort(port) && (r.prefix.Contains(addr) || r.named(name)) }
	if !slices.ContainsFunc(p.Hosts, allows) {
		return refused(fmt.Sprintf("%s, port %d, which a proxy connects to,", name, port))
	}
	return nil
}

// isLoopbackName reports whether name means this host without DNS (RFC 6761, section 6.3).
func isLoopbackName(name string) bool {
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

// CheckAddress checks whether a private key may be sent to the address at, to which host resolved.
// Loopback is this host and always allowed. Unspecified and multicast addresses are never allowed,
// since they are not one host's.
func (p *Policy) CheckAddress(host string, at netip.AddrPort) error {
	addr, name := at.Addr().Unmap(), canonical(host)
	switch _, err := netip.ParseAddr(host); {
	case addr.IsLoopback():
		return nil
	case addr.IsUnspecified(), addr.IsMulticast():
		return fmt.Errorf("%s is not the address of a host", addr)
	case p.Hosts == nil:
		return nil
	case err != nil && isLoopbackName(name):
		return fmt.Errorf("%s resolves to %s, which is not this host", name, addr)
	}
	allows := func(r HostRule) bool {
		if r.prefix.IsValid() {
			return r.onPort(at.Port()) && r.prefix.Contains(addr.WithZone(""))
		}
		// DNS chooses the address, and cloud metadata services have link-local ones.
		return r.onPort(at.Port()) && r.named(name) && !addr.IsLinkLocalUnicast()
	}
	if slices.ContainsFunc(p.Hosts, allows) {
		return nil
	}
	what := at.String()
	if name != addr.String() {
		what = fmt.Sprintf("%s (%s)", name, at)
	}
	return refused(what)
}

// ErrHost means that a host is not allowed by CERTCTL_ALLOWED_HOSTS.
var ErrHost = errors.New("is not among the hosts that CERTCTL_ALLOWED_HOSTS allows")

func refused(what string) error { return fmt.Errorf("%s %w", what, ErrHost) }
