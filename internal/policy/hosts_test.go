package policy

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func rules(t *testing.T, entries ...string) []HostRule {
	t.Helper()
	all := []HostRule{}
	for _, entry := range entries {
		rule, err := ParseHostRule(entry)
		must(t, err)
		all = append(all, rule)
	}
	return all
}

func TestParseHostRule(t *testing.T) {
	for entry, want := range map[string]string{
		"":                  "is not a host name",
		"*":                 "is not a host name",
		"a*.example.org":    "is not a host name",
		"*.*.example.org":   "is not a host name",
		"web 1":             "is not a host name",
		"bücher.example":    "is not a host name",
		"-o.example.org":    "is not a host name",
		"web1:0":            "expected a port",
		"web1:ssh":          "expected a port",
		"web1:65536":        "expected a port",
		"[::1]22":           "after the bracket",
		"10.0.0.1/8":        "is not a CIDR block",
		"10.0.0.0/33":       "is not a CIDR block",
		"::ffff:10.0.0.0/8": "is not a CIDR block",
		"fe80::1%eth0":      "an address with a zone",
		"https://web1":      "expected a port",
		"a/b":               "is not a CIDR block",
	} {
		if rule, err := ParseHostRule(entry); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %+v, %v, want an error with %q", entry, rule, err, want)
		}
	}
}

// TestHosts checks the host and then its address, as a connection does.
func TestHosts(t *testing.T) {
	list := []string{"web1.example.org:22", "Bigip.Example.ORG.", "*.k8s.example.org:6443", "10.1.0.0/16", "192.0.2.7:443", "[2001:db8::/32]:22", "2001:db8:1::5", "169.254.9.9"}
	tests := []struct {
		host, addr string
		hosts      []string
		want       string // "host" or "address", by what refuses it
	}{
		{"web1.example.org", "203.0.113.1:22", list, ""},
		{"WEB1.example.org.", "203.0.113.1:22", list, ""},
		{"web1.example.org", "203.0.113.1:2222", list, "address"}, // a CIDR block might have allowed it
		{"web1.example.org", "203.0.113.1:2222", []string{"web1.example.org:22"}, "host"},
		{"xweb1.example.org", "203.0.113.1:22", []string{"web1.example.org"}, "host"},
		{"bigip.example.org", "203.0.113.1:8443", list, ""},
		{"a.k8s.example.org", "203.0.113.1:6443", list, ""},
		{"a.b.k8s.example.org", "203.0.113.1:6443", list, ""},
		{"k8s.example.org", "203.0.113.1:6443", list, "address"},
		{"evilk8s.example.org", "203.0.113.1:6443", list, "address"},
		{"anything.example.com", "10.1.2.3:1", list, ""},
		{"anything.example.com", "10.2.2.3:1", list, "address"},
		{"10.1.2.3", "10.1.2.3:22", list, ""},
		{"::ffff:10.1.2.3", "[::ffff:10.1.2.3]:22", list, ""},
		{"10.2.0.1", "10.2.0.1:22", list, "host"},
		{"192.0.2.7", "192.0.2.7:443", list, ""},
		{"192.0.2.7", "192.0.2.7:22", list, "host"},
		{"2001:db8::1", "[2001:db8::1]:22", list, ""},
		{"2001:db8::1", "[2001:db8::1]:23", list, "host"},
		{"2001:db8:1::5", "[2001:db8:1::5]:23", list, ""},

		// A name in someone else's DNS zone.
		{"bigip.example.org", "169.254.169.254:80", list, "address"},
		{"bigip.example.org", "169.254.9.9:80", list, ""},
		{"bigip.example.org", "[fe80::1%eth0]:80", list, "address"},
		{"bigip.example.org", "0.0.0.0:80", list, "address"},
		{"bigip.example.org", "224.0.0.1:80", list, "address"},
		{"localhost", "203.0.113.1:22", list, "address"},

		// This host is always allowed.
		{"localhost", "127.0.0.1:22", []string{}, ""},
		{"127.9.9.9", "127.9.9.9:22", []string{}, ""},
		{"::1", "[::1]:22", []string{}, ""},
		{"::ffff:127.0.0.1", "[::ffff:127.0.0.1]:22", []string{}, ""},
		{"bigip.example.org", "127.0.0.1:22", list, ""},
		{"web1.example.org", "203.0.113.1:22", []string{}, "host"},
		{"0.0.0.0", "0.0.0.0:22", []string{}, "host"},

		// Without a list, any host.
		{"web1.example.org", "203.0.113.1:22", nil, ""},
		{"203.0.113.1", "203.0.113.1:22", nil, ""},
		{"0x7f.1", "127.0.0.1:22", nil, ""},
		{"-oProxyCommand=reboot", "203.0.113.1:22", nil, "host"},
		{"a b", "203.0.113.1:22", nil, "host"},
		{"", "203.0.113.1:22", nil, "host"},
		{"user@web1", "203.0.113.1:22", nil, "host"},
	}
	for _, test := range tests {
		p := new(Policy)
		if test.hosts != nil {
			p.Hosts = rules(t, test.hosts...)
		}
		at := netip.MustParseAddrPort(test.addr)
		got, err := "host", p.CheckHost(test.host, at.Port())
		if err == nil {
			if got, err = "address", p.CheckAddress(test.host, at); err == nil {
				got = ""
			}
		}
		if got != test.want {
			t.Errorf("%s at %s with %q: refused by %q (%v), want %q", test.host, test.addr, test.hosts, got, err, test.want)
		}
		if errors.Is(err, ErrHost) && !strings.Contains(err.Error(), "CERTCTL_ALLOWED_HOSTS") {
			t.Errorf("%s: %v does not name the setting", test.host, err)
		}
	}
}

func TestCheckRelayed(t *testing.T) {
	list := []string{"api.example.org:6443", "*.k8s.example.org", "10.1.0.0/16"}
	for host, want := range map[string]bool{"API.example.org.": true, "a.k8s.example.org": true, "10.1.2.3": true, "::ffff:10.1.2.3": true,
		"k8s.example.org": false, "evil.example.org": false, "10.2.0.1": false, "localhost": false, "127.0.0.1": false, "0.0.0.0": false} {
		p := &Policy{Hosts: rules(t, list...)}
		if err := p.CheckRelayed(host, 6443); (err == nil) != want {
			t.Errorf("%s: %v", host, err)
		}
	}
	p := new(Policy)
	if err := p.CheckRelayed("evil.example.org", 6443); err != nil {
		t.Errorf("without a list: %v", err)
	}
}
