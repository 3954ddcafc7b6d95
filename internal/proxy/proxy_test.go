package proxy_test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"certctl-agent/internal/proxy"
)

const through = "http://proxy.example:3128"

// hosts are looked up under every NO_PROXY below.
var hosts = []string{
	"example.org", "www.example.org", "a.www.example.org", "badexample.org", "EXAMPLE.org", "example.org:8443", "www.example.org:8443",
	"10.1.2.3", "10.1.2.3:8443", "192.0.2.1", "[2001:db8::1]", "[2001:db8::1]:8443", "[2001:db9::1]",
	"localhost", "localhost:8443", "127.0.0.1", "127.8.9.10:8443", "[::1]:8443", "notlocalhost", "host", "example.com",
}

var noProxies = []string{
	"", "*", "example.org", ".example.org", "*.example.org", "EXAMPLE.ORG", "www.example.org", "example.org:8443", ".example.org:8443",
	"example.org:443", "10.1.2.3", "10.1.2.3:8443", "10.0.0.0/8", "10.0.0.0/8,192.0.2.1", "0.0.0.0/0", "2001:db8::1",
	"[2001:db8::1]:8443", "2001:db8::/32", " example.org , host ,,", "org", "ample.org", "x,*", "10.1.2", "10.1.2.3/99",
}

// TestLikeNetHTTP compares the rules with the standard library's. The latter reads the environment
// once per process, so each value has its own process.
func TestLikeNetHTTP(t *testing.T) {
	if noProxy, child := os.LookupEnv("TEST_NO_PROXY"); child {
		os.Setenv("HTTPS_PROXY", through)
		os.Setenv("NO_PROXY", noProxy)
		var answers []string
		for _, host := range hosts {
			u, err := http.ProxyFromEnvironment(&http.Request{URL: &url.URL{Scheme: "https", Host: host}})
			if err != nil {
				t.Fatal(err)
			}
			answers = append(answers, text(u))
		}
		if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, noProxy := range noProxies {
		t.Run(noProxy, func(t *testing.T) {
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestLikeNetHTTP$")
			child.Env = []string{"TEST_NO_PROXY=" + noProxy, "GORACE=atexit_sleep_ms=0"}
			out, err := child.Output()
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			if err := json.NewDecoder(strings.NewReader(string(out))).Decode(&want); err != nil {
				t.Fatal(err)
			}
			rules, err := proxy.Parse(through, noProxy)
			if err != nil {
				t.Fatal(err)
			}
			for i, host := range hosts {
				if got := rules.For(&url.URL{Scheme: "https", Host: host}); text(got) != want[i] {
					t.Errorf("NO_PROXY=%q: proxy for %s is %q; net/http says %q", noProxy, host, text(got), want[i])
				}
			}
		})
	}
}

func text(u *url.URL) string {
	if u == nil {
		return ""
	}
	return u.String()
}

func TestParse(t *testing.T) {
	for _, test := range []struct{ value, want string }{
		{"", ""},
		{"proxy.example:3128", "http://proxy.example:3128"},
		{"proxy.example", "http://proxy.example"},
		{"https://proxy.example", "https://proxy.example"},
		{"socks5h://user:pw@proxy.example:1080", "socks5h://user:pw@proxy.example:1080"},
	} {
		rules, err := proxy.Parse(test.value, "")
		if err != nil || text(rules.URL()) != test.want {
			t.Errorf("Parse(%q) = %v, %v, want %s", test.value, rules.URL(), err, test.want)
		}
	}
	for _, value := range []string{"ftp://proxy.example", "http://", "http://user:hunter2@[::1", "://hunter2", "http://u:hunter2%@proxy",
		"http://u:12#hunter2@proxy:3128", "http://u:12/hunter2@proxy:3128", "http://u:12?hunter2@proxy:3128", "u:12#hunter2@proxy:3128",
		"http://u:#hunter2@proxy", "http://proxy/hunter2", "http://proxy?hunter2", "http://proxy#", "http://u:hunter2#@proxy", "http://proxy:99999", "http://proxy:0"} {
		rules, err := proxy.Parse(value, "")
		if err == nil {
			t.Errorf("Parse(%q) = %v, want an error", value, rules.URL())
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error quotes the URL: %v", err)
		}
	}
}

func TestRedacted(t *testing.T) {
	for value, want := range map[string]string{
		"http://proxy:3128":              "http://proxy:3128",
		"http://user:hunter2@proxy:3128": "http://user:xxxxx@proxy:3128",
		"http://hunter2@proxy:3128":      "http://xxxxx@proxy:3128",
		"http://:hunter2@proxy":          "http://:xxxxx@proxy",
	} {
		rules, err := proxy.Parse(value, "")
		if err != nil {
			t.Errorf("%s: %v", value, err)
		} else if got := proxy.Redacted(rules.URL()); got != want {
			t.Errorf("Redacted(%s) = %s, want %s", value, got, want)
		}
	}
}

// TestBlanksInNoProxy: curl takes white space for separators, net/http for part of a name.
func TestBlanksInNoProxy(t *testing.T) {
	rules, err := proxy.Parse(through, "a.example b.example,\t10.0.0.0/8\n .c.example")
	if err != nil {
		t.Fatal(err)
	}
	for host, direct := range map[string]bool{"a.example": true, "b.example": true, "10.1.2.3": true, "x.c.example": true, "d.example": false} {
		if got := rules.For(&url.URL{Scheme: "https", Host: host}); (got == nil) != direct {
			t.Errorf("proxy for %s: %v", host, got)
		}
	}
}

// TestBrackets: net/http takes an IPv6 address in brackets only with a port.
func TestBrackets(t *testing.T) {
	rules, err := proxy.Parse(through, "[2001:db8::1]")
	if err != nil {
		t.Fatal(err)
	}
	if got := rules.For(&url.URL{Scheme: "https", Host: "[2001:db8::1]:8443"}); got != nil {
		t.Errorf("proxy %v, want none", got)
	}
}

func TestZeroValueIsDirect(t *testing.T) {
	if got := new(proxy.Rules).For(&url.URL{Scheme: "https", Host: "example.org"}); got != nil {
		t.Errorf("proxy %v, want none", got)
	}
}

func FuzzParse(f *testing.F) {
	for _, noProxy := range noProxies {
		f.Add(through, noProxy, "www.example.org:8443")
	}
	f.Fuzz(func(t *testing.T, httpsProxy, noProxy, host string) {
		rules, err := proxy.Parse(httpsProxy, noProxy)
		if err != nil {
			return
		}
		if got := rules.For(&url.URL{Scheme: "https", Host: host}); got != nil && got != rules.URL() {
			t.Errorf("proxy %v, want that of %q", got, httpsProxy)
		}
	})
}
