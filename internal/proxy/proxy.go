// Package proxy decides which proxy a request goes through. It follows the rules of
// net/http.ProxyFromEnvironment for HTTPS_PROXY and NO_PROXY, but takes their values from the
// caller, since they may come from a configuration file.
package proxy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// Rules choose a proxy. The zero value chooses none.
type Rules struct {
	proxy      *url.URL
	everything bool // NO_PROXY holds "*"
	exceptions []exception
}

// exception is one entry of NO_PROXY: either a network, or a host and its subdomains.
type exception struct {
	network netip.Prefix
	host    string // lower case, without a leading dot; "" for a network
	below   bool   // only the subdomains of host: the entry has a leading dot
	port    string // "" means any
}

// Parse parses the values of HTTPS_PROXY and NO_PROXY; either may be empty. The error does not
// quote the proxy's URL, which may contain a password.
func Parse(httpsProxy, noProxy string) (*Rules, error) {
	r := &Rules{}
	if httpsProxy != "" {
		proxy, err := parseURL(httpsProxy)
		if err != nil {
			return nil, err
		}
		r.proxy = proxy
	}
	// White space separates too, as in curl: no entry contains any.
	for entry := range strings.FieldsFuncSeq(strings.ToLower(noProxy), isSeparator) {
		if entry == "*" {
			r.everything = true
			continue
		}
		r.exceptions = append(r.exceptions, parseException(entry))
	}
	return r, nil
}

func isSeparator(r rune) bool { return r == ',' || unicode.IsSpace(r) }

func parseURL(value string) (*url.URL, error) {
	// "proxy.example:3128" is the usual way to write it.
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	u, err := url.Parse(value)
	if err != nil || u.Hostname() == "" {
		return nil, errors.New("is not the URL of a proxy: expected one such as http://proxy.example:3128")
	}
	schemes := []string{"http", "https", "socks5", "socks5h"} // all that net/http supports
	if !slices.Contains(schemes, u.Scheme) {
		return nil, fmt.Errorf("has scheme %q: expected one of %s", u.Scheme, strings.Join(schemes, ", "))
	}
	// Most likely the rest of a password. What comes before it would pass for the host: it would be
	// shown, and looked up in DNS.
	if u.Path != "" && u.Path != "/" || strings.ContainsAny(value, "?#") {
		return nil, errors.New("has a path, a query or a fragment, which a proxy cannot have: write / ? # in a user name or password as %2F %3F %23")
	}
	if n, err := strconv.Atoi(u.Port()); u.Port() != "" && (err != nil || n < 1 || n > 65535) {
		return nil, errors.New("has a port out of range: expected 1 to 65535")
	}
	return u, nil
}

// Redacted returns a proxy's URL without secrets: without a password, and without a user name that
// comes alone, since that is often a token.
func Redacted(u *url.URL) string {
	if _, ok := u.User.Password(); u.User != nil && !ok {
		shown := *u
		shown.User = url.User("xxxxx")
		return shown.String()
	}
	return u.Redacted()
}

func parseException(entry string) exception {
	if network, err := netip.ParsePrefix(entry); err == nil {
		return exception{network: network.Masked()}
	}
	host, port := splitPort(entry)
	if address, err := netip.ParseAddr(host); err == nil {
		address = address.Unmap()
		return exception{network: netip.PrefixFrom(address, address.BitLen()), port: port}
	}
	host = strings.TrimPrefix(host, "*") // "*.example.org" is ".example.org"
	name, below := strings.CutPrefix(host, ".")
	return exception{host: name, below: below, port: port}
}

// splitPort splits "host:port". An IPv6 address without brackets is a host without a port.
func splitPort(entry string) (host, port string) {
	if inside, ok := strings.CutPrefix(entry, "["); ok {
		host, rest, _ := strings.Cut(inside, "]")
		return host, strings.TrimPrefix(rest, ":")
	}
	if host, port, ok := strings.Cut(entry, ":"); ok && !strings.Contains(port, ":") {
		return host, port
	}
	return entry, ""
}

// URL returns the proxy, or nil if there is none. To display it, use Redacted.
func (r *Rules) URL() *url.URL { return r.proxy }

// For returns the proxy for an https URL, or nil for a direct connection. Loopback addresses are
// never proxied.
func (r *Rules) For(u *url.URL) *url.URL {
	if r.proxy == nil || r.everything {
		return nil
	}
	host := strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	port := cmp.Or(u.Port(), "443")
	address, err := netip.ParseAddr(host)
	address = address.Unmap()
	if host == "localhost" || err == nil && address.IsLoopback() {
		return nil
	}
	for _, e := range r.exceptions {
		if e.port != "" && e.port != port {
			continue
		}
		if err == nil && e.network.Contains(address) || e.host != "" && e.matches(host) {
			return nil
		}
	}
	return r.proxy
}

func (e exception) matches(host string) bool {
	return host == e.host && !e.below || strings.HasSuffix(host, "."+e.host)
}
