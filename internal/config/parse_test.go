package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// writeBundle writes a CA bundle with one certificate and text around it.
func writeBundle(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return write(t, "ca.pem", "# our CA\n"+string(block)+"\n")
}

func TestBundleWithoutUsableCertificate(t *testing.T) {
	for name, content := range map[string]string{
		"a key":             "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		"a bad certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"too long":          strings.Repeat("\n", maxBundle+1),
	} {
		c := new(Config)
		if err := (bundle{c}).set(write(t, "ca.pem", content)); err == nil || c.Roots != nil {
			t.Errorf("%s: pool %v, error %v", name, c.Roots, err)
		}
	}
}

// TestBundleIsReadWhole: no certificate of a bundle is silently ignored.
func TestBundleIsReadWhole(t *testing.T) {
	first, err := os.ReadFile(writeBundle(t))
	must(t, err)
	second, err := os.ReadFile(writeBundle(t))
	must(t, err)
	block, _ := pem.Decode(second)
	trusted := string(pem.EncodeToMemory(&pem.Block{Type: "TRUSTED CERTIFICATE", Bytes: block.Bytes}))
	for _, test := range []struct {
		name, content string
		want          int
		warns         string
	}{
		{"two", string(first) + string(second), 2, ""},
		{"a mark before the first", "\ufeff" + strings.TrimPrefix(string(first), "# our CA\n") + string(second), 2, ""},
		{"a mark before each", "\ufeff" + strings.TrimPrefix(string(first), "# our CA\n") + "\ufeff" + strings.TrimPrefix(string(second), "# our CA\n"), 2, ""},
		{"the second is cut", string(first) + string(second[:len(second)/2]), 1, "1 of its 2 PEM blocks cannot be used; the last one: it is not valid PEM"},
		{"the second is damaged", string(first) + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", 1, "1 of its 2 PEM blocks cannot be used; the last one: x509: malformed certificate"},
		{"the second has another label", string(first) + trusted, 1, `"TRUSTED CERTIFICATE" is not CERTIFICATE`},
		{"indented", string(first) + " " + strings.TrimPrefix(string(second), "# our CA\n"), 1, "it is not valid PEM"},
	} {
		c, err := load(t, with("CERTCTL_SERVER_CA_BUNDLE_PATH", write(t, "ca.pem", test.content)))
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if warnings := strings.Join(c.Warnings, "\n"); !strings.Contains(warnings, test.warns) || test.warns == "" && strings.Contains(warnings, "PEM") {
			t.Errorf("%s: warnings %q, want %q", test.name, c.Warnings, test.warns)
		}
		want := x509.NewCertPool()
		for _, certificate := range [][]byte{first, second}[:test.want] {
			want.AppendCertsFromPEM(certificate)
		}
		if !c.Roots.Equal(want) {
			t.Errorf("%s: the pool does not contain the first %d certificates and no others", test.name, test.want)
		}
	}
}

// TestBundleMayBeRead: a world-readable bundle causes no warning.
func TestBundleMayBeRead(t *testing.T) {
	path := writeBundle(t)
	must(t, os.Chmod(path, 0o644))
	for _, warning := range mustLoad(t, with("CERTCTL_SERVER_CA_BUNDLE_PATH", path)).Warnings {
		if strings.Contains(warning, path) {
			t.Errorf("warning %q", warning)
		}
	}
}

func TestBoolean(t *testing.T) {
	for want, values := range map[bool][]string{
		true:  {"1", "t", "T", "true", "True", "TRUE", "yes", "on", "ON"},
		false: {"0", "f", "F", "false", "FALSE", "no", "No", "off"},
	} {
		for _, value := range values {
			got := !want
			if err := (boolean{&got}).set(value); err != nil || got != want {
				t.Errorf("boolean %q = %v, %v, want %v", value, got, err, want)
			}
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestEverySettingReadsTrusted: every setting reads its file with package trustedfile.
func TestEverySettingReadsTrusted(t *testing.T) {
	for _, flag := range []string{"config", "api-key-file", "ca-bundle", "discovery-passwords-file"} {
		open := write(t, flag, "x")
		must(t, os.Chmod(open, 0o666))
		pipe := filepath.Join(filepath.Dir(open), "pipe")
		must(t, syscall.Mkfifo(pipe, 0o600))
		for path, want := range map[string]string{open: "can be written by others (mode 0666): chmod go-w", pipe: "is not a regular file"} {
			_, err := load(t, required(), "-"+flag, path)
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "-"+flag+" (CERTCTL_") {
				t.Errorf("-%s %s: error %v, want one with %q", flag, path, err, want)
			}
		}
	}
}
