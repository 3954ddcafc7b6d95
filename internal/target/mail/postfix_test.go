package mail

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/target"
)

const mainCF = `config_directory = /etc/postfix
mua_key = /mua.key
smtp_tls_cert_file =
smtp_tls_chain_files =
smtp_tls_key_file = $smtp_tls_cert_file
smtpd_tls_cert_file = $config_directory/cert.pem
smtpd_tls_chain_files =
smtpd_tls_eccert_file = /ec.pem
smtpd_tls_eckey_file = ${smtpd_tls_ec_of_nobody}/ec.key
smtpd_tls_key_file = ${config_directory}/key.pem
tlsproxy_tls_cert_file = $smtpd_tls_cert_file
tlsproxy_tls_key_file = $smtpd_tls_key_file
`

func TestPostfixPairs(t *testing.T) {
	tests := []struct {
		name      string
		main      string
		overrides string
		cert      target.Path
		want      string // the key and where it is named, or a part of the error
	}{
		{"main.cf", mainCF, "", "/etc/postfix/cert.pem", "/etc/postfix/key.pem main.cf, smtpd_tls_key_file"},
		{"not named", mainCF, "", "/other.pem", "names no key"},
		{"unknown parameter", mainCF, "", "/ec.pem", "absolute path, got \"${smtpd_tls_ec_of_nobody}"},
		{"service with a certificate of its own", mainCF, "submission/inet/smtpd_tls_cert_file = /sub.pem\nsubmission/inet/smtpd_tls_key_file = $mua_key\n",
			"/sub.pem", "/mua.key master.cf, submission/inet, smtpd_tls_key_file"},
		{"service with another key", mainCF, "127.0.0.1:smtps/inet/smtpd_tls_key_file = /other.key\n", "/etc/postfix/cert.pem", "several keys"},
		{"service with something else", mainCF, "127.0.0.1:smtps/inet/smtpd_tls_wrappermode = yes\n",
			"/etc/postfix/cert.pem", "/etc/postfix/key.pem main.cf, smtpd_tls_key_file"},
		{"service with the general key", mainCF, "x/unix/smtpd_tls_cert_file = /x.pem\n", "/x.pem", "/etc/postfix/key.pem master.cf, x/unix, smtpd_tls_key_file"},
		{"one file of both", "smtpd_tls_cert_file = /both.pem\nsmtpd_tls_key_file = $smtpd_tls_cert_file\n", "", "/both.pem", "no file of its own"},
		{"condition", "smtpd_tls_cert_file = /c.pem\nsmtpd_tls_key_file = ${mua_key?/k.pem}\n", "", "/c.pem", "absolute path"},
		{"parentheses", "k = /k\nsmtpd_tls_cert_file = /c.pem\nsmtpd_tls_key_file = $(k).pem\n", "", "/c.pem", "absolute path"},
		{"endless", "smtpd_tls_cert_file = /c.pem\nsmtpd_tls_key_file = /$smtpd_tls_key_file\n", "", "/c.pem", "holds a variable"},
		{"nonsense", "=\n\n = \n", "/ =\nx = y\n", "/c.pem", "names no key"},
	}
	for _, test := range tests {
		check(t, test.name, test.cert, postfixPairs(test.main, test.overrides), test.want)
	}
}

func check(t *testing.T, name string, cert target.Path, pairs []target.ServerPair, want string) {
	t.Helper()
	found, err := target.KeyFor(cert, pairs)
	got := found.Key + " " + found.Where
	if err != nil {
		got = err.Error()
	}
	if got != want && (err == nil || !strings.Contains(got, want)) {
		t.Errorf("%s: got %q, want %q", name, got, want)
	}
}

// Of chain files only the one before the certificate can be its key, and only
// if it holds nothing but a key: an operator's combined file is not overwritten.
func TestChainFiles(t *testing.T) {
	dir := t.TempDir()
	const key, cert = "-----BEGIN PRIVATE KEY-----\n", "-----BEGIN CERTIFICATE-----\n"
	path := func(name string) string { return filepath.Join(dir, name) }
	for name, text := range map[string]string{"key": key, "cert": cert, "both": key + cert, "ca": cert} {
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		files string
		cert  string
		want  string
	}{
		{"key, cert, ca", "cert", path("key") + " main.cf, smtpd_tls_chain_files"},
		{"key cert both", "both", "no file of its own"},
		{"both, cert", "cert", "no file of its own"},
		{"cert", "cert", "no file of its own"},
		{"missing, cert", "cert", "no file of its own"},
		{"., cert", "cert", "no file of its own"},
		{"key, cert", "old", "names no key"},
	}
	for _, test := range tests {
		var main strings.Builder
		main.WriteString("smtpd_tls_cert_file = $dir/old\nsmtpd_tls_key_file = /k\ndir = " + dir + "\nsmtpd_tls_chain_files =")
		for name := range strings.FieldsSeq(test.files) {
			main.WriteString(" $dir/" + name)
		}
		check(t, test.files, target.Path(path(test.cert)), postfixPairs(main.String()+"\n", ""), test.want)
	}
}
