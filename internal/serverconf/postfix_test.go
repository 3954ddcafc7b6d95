package serverconf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// Output of postconf 3.7: for -x, for -P, and for -x with the overrides of a service.
const mainCF = `config_directory = /etc/postfix
mua_key = /mua.key
smtp_tls_cert_file =
smtp_tls_chain_files =
smtp_tls_key_file =
smtpd_tls_cert_file = /etc/postfix/cert.pem
smtpd_tls_chain_files =
smtpd_tls_eccert_file = /ec.pem
smtpd_tls_eckey_file =
smtpd_tls_key_file = /etc/postfix/key.pem
tlsproxy_tls_cert_file = /etc/postfix/cert.pem
tlsproxy_tls_key_file = /etc/postfix/key.pem
`

// pairsOf returns the pairs of a Postfix with this output.
func pairsOf(t *testing.T, keyPath, main, overrides string, services map[string]string) ([]Pair, error) {
	t.Helper()
	query := func(_ context.Context, command policy.Command) ([]byte, error) {
		switch line := strings.Join(command.Argv, " "); line {
		case "postconf -x":
			return []byte(main), nil
		case "postconf -P":
			return []byte(overrides), nil
		default:
			service := strings.TrimPrefix(line, "postconf -x -o ")
			answer, ok := services[service]
			if !ok {
				return nil, errors.New("no answer, or none any more, to " + line)
			}
			delete(services, service) // each service must be asked for once only
			return []byte(answer), nil
		}
	}
	return postfixPairs(t.Context(), query, keyPath, words("postfix check"), words("postfix reload"))
}

func TestPostfixPairs(t *testing.T) {
	changed := func(old, new string) string { return strings.ReplaceAll(mainCF, old, new) }
	tests := []struct {
		name      string
		main      string
		overrides string
		services  map[string]string
		cert      targetconf.Path
		want      string // the key and where it is named, or a part of the error
	}{
		{"main.cf", mainCF, "", nil, "/etc/postfix/cert.pem", "/etc/postfix/key.pem main.cf, smtpd_tls_key_file"},
		{"not named", mainCF, "", nil, "/other.pem", "does not use that file"},
		{"no key", mainCF, "", nil, "/ec.pem", "which key belongs to /ec.pem"},
		{"service with its own certificate", mainCF, "submission/inet/smtpd_tls_cert_file = /sub.pem\nsubmission/inet/smtpd_tls_key_file = $mua_key\n",
			map[string]string{"smtpd_tls_cert_file=/sub.pem -o smtpd_tls_key_file=$mua_key": "smtpd_tls_cert_file = /sub.pem\nsmtpd_tls_key_file = /mua.key\n"},
			"/sub.pem", "/mua.key master.cf, submission/inet, smtpd_tls_key_file"},
		{"service with another key", mainCF, "127.0.0.1:smtps/inet/smtpd_tls_key_file = /other.key\n",
			map[string]string{"smtpd_tls_key_file=/other.key": changed("/etc/postfix/key.pem", "/other.key")}, "/etc/postfix/cert.pem", "several keys"},
		{"service with something else", mainCF, "127.0.0.1:smtps/inet/smtpd_tls_wrappermode = yes\n",
			map[string]string{"smtpd_tls_wrappermode=yes": mainCF}, "/etc/postfix/cert.pem", "/etc/postfix/key.pem main.cf, smtpd_tls_key_file"},
		{"services with the same overrides", mainCF, "a/inet/x = y\nb/inet/x = y\n", map[string]string{"x=y": mainCF}, "/etc/postfix/cert.pem", "/etc/postfix/key.pem main.cf, smtpd_tls_key_file"},
		{"one file of both", changed("/key.pem", "/cert.pem"), "", nil, "/etc/postfix/cert.pem", "/etc/postfix/cert.pem main.cf, smtpd_tls_key_file"},
		{"a service that cannot be asked for", mainCF, "a/inet/x = y\n", nil, "/etc/postfix/cert.pem", "no answer"},
		{"nonsense", "=\n\n = \n", "/ =\nx = y\n", map[string]string{"=": ""}, "/c.pem", "does not use that file"},
	}
	for _, test := range tests {
		pairs, err := pairsOf(t, "", test.main, test.overrides, test.services)
		check(t, test.name, test.cert, pairs, err, test.want)
	}
}

// postconf is run from the directory of the program that the job starts.
func TestPostfixCall(t *testing.T) {
	tests := []struct{ reload, validate, want string }{
		{"postfix reload", "postfix check", "postconf -P"},
		{"systemctl reload postfix", "/usr/sbin/postfix -c /etc/x check", "/usr/sbin/postconf -c /etc/x -P"},
		{"/opt/postfix -c/etc/y -v reload", "postfix -c /etc/x check", "/opt/postconf -c /etc/y -P"},
		{"sudo -n postfix reload", "true", "sudo -n postconf -P"},
		{"systemctl reload postfix", "true", ""},
	}
	for _, test := range tests {
		var got string
		query := func(_ context.Context, command policy.Command) ([]byte, error) {
			got = strings.Join(command.Argv, " ")
			return nil, nil
		}
		_, err := postfixPairs(t.Context(), query, "", words(test.validate), words(test.reload))
		if got != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%q and %q: got %q, %v, want %q", test.reload, test.validate, got, err, test.want)
		}
	}
}

func TestPostfixTooManyServices(t *testing.T) {
	var overrides strings.Builder
	for i := range maxServices + 1 {
		fmt.Fprintf(&overrides, "%d/inet/x = %d\n", i, i)
	}
	if _, err := pairsOf(t, "", mainCF, overrides.String(), nil); err == nil || !strings.Contains(err.Error(), "more than 64 services") {
		t.Errorf("got %v", err)
	}
}

func check(t *testing.T, name string, cert targetconf.Path, pairs []Pair, err error, want string) {
	t.Helper()
	var found Pair
	if err == nil {
		found, err = KeyFor(cert, pairs)
	}
	got := found.Key + " " + found.Where
	if err != nil {
		got = err.Error()
	}
	if got != want && (err == nil || !strings.Contains(got, want)) {
		t.Errorf("%s: got %q, want %q", name, got, want)
	}
}

// The key of a chain file is in the previous file if that holds only a key, and in the file itself
// otherwise. A file that does not exist yet will hold what the target puts there.
func TestPostfixChainFiles(t *testing.T) {
	dir := t.TempDir()
	const key, cert = "-----BEGIN PRIVATE KEY-----\n", "-----BEGIN CERTIFICATE-----\n"
	for name, text := range map[string]string{"key": key, "cert": cert, "both": key + cert, "ca": cert} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	tests := []struct {
		files   []string
		keyPath string
		cert    string
		want    string // the key, or a part of the error
	}{
		{[]string{"key", "cert", "ca"}, "", "cert", "key"},
		{[]string{"key", "cert", "both"}, "", "both", "both"},
		{[]string{"both"}, "", "both", "both"},
		{[]string{"both", "new"}, "", "new", "new"},
		{[]string{"new", "cert"}, "new", "cert", "new"},
		{[]string{"new", "cert"}, "cert", "cert", "cert"},
		{[]string{"new", "cert"}, "ca", "cert", "which key belongs to "},
		{[]string{"new", "cert"}, "", "cert", "which key belongs to "},
		{[]string{".", "cert"}, "", "cert", "cert"},
		{[]string{"key", "cert"}, "", "old", "does not use that file"},
	}
	for _, test := range tests {
		path := func(name string) string { return filepath.Join(dir, name) }
		list := slices.Clone(test.files)
		for i := range list {
			list[i] = path(list[i])
		}
		main := "smtpd_tls_cert_file = " + path("old") + "\nsmtpd_tls_key_file = /k\nsmtpd_tls_chain_files = " + strings.Join(list, ", ") + "\n"
		keyPath, want := "", test.want
		if test.keyPath != "" {
			keyPath = path(test.keyPath)
		}
		if !strings.Contains(want, " ") {
			want = path(want) + " main.cf, smtpd_tls_chain_files"
		}
		pairs, err := pairsOf(t, keyPath, main, "", nil)
		check(t, strings.Join(test.files, " ")+", key_path "+test.keyPath, targetconf.Path(path(test.cert)), pairs, err, want)
	}
}

func FuzzPostfix(f *testing.F) {
	f.Add("smtpd_tls_cert_file = /c\nsmtpd_tls_key_file = /k\n", "a/inet/x = y\n")
	f.Add("x_cert_file =\nx_chain_files = , ,\n =\n", "/ =\n//=\n")
	f.Fuzz(func(t *testing.T, main, overrides string) {
		for _, pair := range parametersOf(main).pairs("main.cf", "") {
			if pair.Cert == "" {
				t.Errorf("%q: a pair without a certificate", main)
			}
		}
		for _, service := range servicesOf(overrides) {
			if len(service.flags)%2 != 0 || len(service.flags) == 0 {
				t.Errorf("%q: flags %q", overrides, service.flags)
			}
		}
	})
}
