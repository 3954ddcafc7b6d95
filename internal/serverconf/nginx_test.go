package serverconf

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
)

const nginxMain = "# configuration file /etc/nginx/nginx.conf:\n"

func TestNGINXKeyInDump(t *testing.T) {
	tests := []struct {
		name string
		dump string
		want string // key, or part of the error
	}{
		{"same block", nginxMain + `http { server { ssl_certificate /c.pem; ssl_certificate_key /k.pem; } }`, "/k.pem"},
		{"inherited from http", nginxMain + `http { ssl_certificate /c.pem; ssl_certificate_key /k.pem; server { listen 443 ssl; } }`, "/k.pem"},
		{"key inherited, certificate not", nginxMain + `http { ssl_certificate_key /k.pem; server { ssl_certificate /c.pem; } }`, "/k.pem"},
		{"the server's own takes precedence over the inherited", nginxMain + `http { ssl_certificate /x; ssl_certificate_key /y; server { ssl_certificate /c.pem; ssl_certificate_key /k.pem; } }`, "/k.pem"},
		{"relative to the main file's directory", nginxMain + `http { server { ssl_certificate ../../c.pem; ssl_certificate_key tls/k.pem; } }`, "/etc/nginx/tls/k.pem"},
		{"quoted", nginxMain + `http { server { ssl_certificate "/c.pem"; ssl_certificate_key '/k k.pem'; } }`, "/k k.pem"},
		{"two pairs in one block, neither exists", nginxMain + `http { server { ssl_certificate /rsa; ssl_certificate /c.pem; ssl_certificate_key /rsa.key; ssl_certificate_key /k.pem; } }`, "which key belongs to /c.pem"},
		{"more keys than certificates", nginxMain + `http { server { ssl_certificate /c.pem; ssl_certificate_key /k.pem; ssl_certificate_key /x; } }`, "/k.pem"},
		{"the same pair twice", nginxMain + `http { server { ssl_certificate /c.pem; ssl_certificate_key /k.pem; } server { ssl_certificate /c.pem; ssl_certificate_key /k.pem; } }`, "/k.pem"},
		{"stream", nginxMain + `stream { server { ssl_certificate /c.pem; ssl_certificate_key /k.pem; } }`, "/k.pem"},
		{"include, relative with a wildcard", nginxMain + "http { include sites/*.conf; }\n# configuration file /etc/nginx/sites/a.conf:\nserver { include tls; }\n\n# configuration file /etc/nginx/tls:\nssl_certificate /c.pem; ssl_certificate_key /k.pem;\n", "/k.pem"},
		{"not included where it would count", nginxMain + "http { include sites/*.conf; }\n# configuration file /etc/nginx/other/a.conf:\nserver { ssl_certificate /c.pem; ssl_certificate_key /k.pem; }\n", "names no key"},
		{"none", nginxMain + `http { server { ssl_certificate /other; ssl_certificate_key /k.pem; } }`, "names no key for /c.pem"},
		{"no key", nginxMain + `http { server { ssl_certificate /c.pem; } }`, "which key belongs to /c.pem"},
		{"in a comment", nginxMain + "http { server { # ssl_certificate /c.pem; ssl_certificate_key /k.pem;\n } }", "names no key"},
		{"of a proxied connection", nginxMain + `http { server { proxy_ssl_certificate /c.pem; proxy_ssl_certificate_key /k.pem; } }`, "names no key"},
		{"several", nginxMain + `http { server { ssl_certificate /c.pem; ssl_certificate_key /k1; } server { ssl_certificate /c.pem; ssl_certificate_key /k2; } }`, `several keys for /c.pem: "/k1" (/etc/nginx/nginx.conf:1), "/k2" (`},
		{"an engine's", nginxMain + `http { server { ssl_certificate /c.pem; ssl_certificate_key engine:pkcs11:secret-pin; } }`, "cannot be used"},
		{"in the configuration itself", nginxMain + `http { server { ssl_certificate /c.pem; ssl_certificate_key "data:secret-pin"; } server { ssl_certificate /c.pem; ssl_certificate_key /k; } }`, `several keys for /c.pem: "data:" (/etc/nginx/nginx.conf:1), "/k" (`},
		{"a variable", nginxMain + `http { server { ssl_certificate /c.pem; ssl_certificate_key $ssl_server_name.key; } }`, "cannot be used"},
		{"in the same file", nginxMain + `http { server { ssl_certificate /c.pem; ssl_certificate_key /c.pem; } }`, "/c.pem"},
		{"a file twice", nginxMain + "a;\n" + nginxMain + "b;", "twice"},
		{"a circular include", nginxMain + "include nginx.conf;", "too deep"},
		{"nothing", "", "printed no configuration"},
		{"no configuration", nginxMain + "http {", "unexpected end"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var found Pair
			pairs, err := nginxDumpPairs(test.dump)
			if err == nil {
				found, err = KeyFor("/c.pem", pairs)
			}
			if strings.HasPrefix(test.want, "/") {
				if err != nil || found.Key != test.want {
					t.Errorf("got %q, %v, want %q", found.Key, err, test.want)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %q, %v, want an error with %q", found.Key, err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret-pin") {
				t.Errorf("the error shows a secret: %v", err)
			}
		})
	}
}

// nginx gives each of several certificates in a block the key of its type, whatever the order. The
// contents of the files decide, and a certificate that does not exist yet gets the remaining key.
func TestNGINXSeveralPairs(t *testing.T) {
	dir := t.TempDir()
	rsa, ec, ed := writePair(t, dir, "rsa", newRSA(t)), writePair(t, dir, "ec", nil), writePair(t, dir, "ed", newEd25519(t))
	again := filepath.Join(dir, "again")
	for _, suffix := range []string{".crt", ".key"} {
		data, err := os.ReadFile(rsa + suffix)
		must(t, err)
		must(t, os.WriteFile(again+suffix, data, 0o600))
	}
	const missing = "/missing/"
	tests := []struct {
		name        string
		certs, keys []string
		want        map[string]string
	}{
		{"in order", []string{rsa, ec}, []string{rsa, ec}, map[string]string{rsa: rsa, ec: ec}},
		{"keys swapped", []string{rsa, ec}, []string{ec, rsa}, map[string]string{rsa: rsa, ec: ec}},
		{"three", []string{rsa, ec, ed}, []string{ed, rsa, ec}, map[string]string{rsa: rsa, ec: ec, ed: ed}},
		{"copies of one pair", []string{rsa, again}, []string{rsa, again}, map[string]string{rsa: rsa, again: again}},
		{"one pair does not exist yet", []string{rsa, missing + "x"}, []string{missing + "y", rsa}, map[string]string{rsa: rsa, missing + "x": missing + "y"}},
		{"one certificate does not exist yet", []string{missing + "x", rsa}, []string{rsa, ec}, map[string]string{rsa: rsa, missing + "x": ec}},
		{"two do not exist yet", []string{rsa, missing + "x", missing + "y"}, []string{missing + "x", missing + "y", rsa},
			map[string]string{rsa: rsa, missing + "x": "", missing + "y": ""}},
		{"a key that nginx does not read", []string{rsa, ec}, []string{rsa, missing + "x", ec}, map[string]string{rsa: rsa, ec: missing + "x"}},
		{"too few keys", []string{rsa, ec}, []string{ec}, map[string]string{rsa: "", ec: ec}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var block strings.Builder
			for _, key := range test.keys {
				block.WriteString("ssl_certificate_key " + key + ".key;")
			}
			for _, cert := range test.certs {
				block.WriteString("ssl_certificate " + cert + ".crt;")
			}
			pairs, err := nginxDumpPairs(nginxMain + "http { server {" + block.String() + "} }")
			got := make(map[string]string)
			for _, pair := range pairs {
				got[strings.TrimSuffix(pair.Cert, ".crt")] = strings.TrimSuffix(pair.Key, ".key")
			}
			if err != nil || !maps.Equal(got, test.want) {
				t.Errorf("got %v, %v, want %v", got, err, test.want)
			}
		})
	}
}

func newRSA(t *testing.T) crypto.Signer {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	return key
}

func newEd25519(t *testing.T) crypto.Signer {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	return key
}

// writePair writes dir/name.crt and dir/name.key, and returns dir/name.
func writePair(t *testing.T, dir, name string, key crypto.Signer) string {
	t.Helper()
	issued, err := testca.Must(t).Issue(testca.Template{Key: key})
	must(t, err)
	path := filepath.Join(dir, name)
	must(t, os.WriteFile(path+".crt", issued.LeafPEM(), 0o600))
	must(t, os.WriteFile(path+".key", issued.KeyPEM(), 0o600))
	return path
}

// Includes that double at each level fail before they exhaust the memory.
func TestNGINXIncludeBomb(t *testing.T) {
	dump := nginxMain + "include a0; include a0;\n"
	for i := range 30 {
		dump += "# configuration file /etc/nginx/a" + string(rune('A'+i)) + ":\ninclude b*;\n"
	}
	dump = strings.ReplaceAll(dump, "include b*;", "include a[A-^]; include a[A-^];")
	dump = strings.ReplaceAll(dump, "include a0;", "include a[A-^];")
	if _, err := nginxDumpPairs(dump); err == nil || !strings.Contains(err.Error(), "too") {
		t.Errorf("got %v", err)
	}
}

func TestNGINXDiskPairs(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("nginx.conf", "http { include sites/*; }")
	write("sites/a", "server { ssl_certificate /c.pem; ssl_certificate_key k.pem; }")
	write("sites/.hidden", "server { ssl_certificate /c.pem; ssl_certificate_key other.pem; }")
	pairs, err := nginxDiskPairs(filepath.Join(dir, "nginx.conf"))
	want := []Pair{{Cert: "/c.pem", Key: filepath.Join(dir, "k.pem"), Where: filepath.Join(dir, "sites/a") + ":1"}}
	if err != nil || !slices.Equal(pairs, want) {
		t.Errorf("got %v, %v, want %v", pairs, err, want)
	}
	write("nginx.conf", "include missing;")
	if _, err := nginxDiskPairs(filepath.Join(dir, "nginx.conf")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an include that does not exist: %v", err)
	}
	write("nginx.conf", "include sites;")
	if _, err := nginxDiskPairs(filepath.Join(dir, "nginx.conf")); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("an include of a directory: %v", err)
	}
}

func TestNGINXCall(t *testing.T) {
	tests := []struct{ validate, reload, want string }{
		{"nginx -t", "systemctl reload nginx", "nginx"},
		{"/usr/sbin/nginx -t -q -c /etc/nginx/nginx.conf", "", "/usr/sbin/nginx -c /etc/nginx/nginx.conf"},
		{"nginx -tqc /x -p/y", "", "nginx -c /x -p /y"},
		{"/bin/true", "/opt/nginx/sbin/nginx -p /srv -s reload", "/opt/nginx/sbin/nginx -p /srv"},
		{"nginx -sreload -e stderr", "", "nginx -e stderr"},
		{"sudo -n /usr/sbin/nginx -t", "", "sudo -n /usr/sbin/nginx"},
		{"openresty -t", "", "openresty"},
		{"systemctl reload nginx", "service nginx reload", ""},
	}
	for _, test := range tests {
		got, err := nginxCall(words(test.validate), words(cmp.Or(test.reload, "true")))
		if strings.Join(got.Argv, " ") != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%q and %q: got %q, %v, want %q", test.validate, test.reload, got, err, test.want)
		}
	}
}

func TestNGINXFails(t *testing.T) {
	if _, err := NGINX(t.Context(), nil, "/c.pem", words("nginx -t"), words("true")); err == nil || !strings.Contains(err.Error(), "cannot be asked") {
		t.Errorf("no query: %v", err)
	}
	query := func(context.Context, policy.Command) ([]byte, error) { return nil, errors.New("exit status 1") }
	if _, err := NGINX(t.Context(), query, "/c.pem", words("nginx -t"), words("true")); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("nginx fails: %v", err)
	}
}
