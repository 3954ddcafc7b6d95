package pemutil_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

func TestContentOf(t *testing.T) {
	issued := issue(t, testca.Must(t), testca.Template{})
	certificate, key := issued.LeafPEM(), issued.KeyPEM()
	block, _ := pem.Decode(key)
	pkcs8 := must(x509.MarshalPKCS8PrivateKey(issued.Key))
	text := func(label string) []byte {
		return []byte("-----BEGIN " + label + "-----\nAAAA\n-----END " + label + "-----\n")
	}
	const certs, keys = 1, 2
	tests := []struct {
		name string
		data []byte
		want int
		lost bool // HoldsPrivateKey
	}{
		{"empty", nil, 0, false},
		{"text", []byte("root:x:0:0:\n"), 0, false},
		{"dashes", []byte("----\n-- BEGIN\n-----BEGIN\n----- BEGIN OF THE FILE\n"), 0, false},
		{"certificate", certificate, certs, false},
		{"comment first", append([]byte("# of www\n\n"), certificate...), certs, false},
		{"carriage returns", bytes.ReplaceAll(certificate, []byte("\n"), []byte("\r\n")), certs, false},
		{"byte order mark", append([]byte("\xef\xbb\xbf"), certificate...), certs, false},
		{"half a certificate", certificate[:60], certs, false},
		{"trusted certificate", text("TRUSTED CERTIFICATE"), certs, false},
		{"Diffie-Hellman parameters", text("DH PARAMETERS"), certs, false},
		{"a curve", text("EC PARAMETERS"), certs, false},
		{"certificate, DER", issued.Leaf.Raw, certs, false},
		{"key", key, keys, true},
		{"both", append(bytes.Clone(certificate), key...), certs | keys, true},
		{"key with its curve", append(text("EC PARAMETERS"), key...), keys, true},
		{"key with its request", append(text("CERTIFICATE REQUEST"), key...), keys, true},
		{"key with its public key", append(bytes.Clone(key), text("PUBLIC KEY")...), keys, true},
		{"request", text("NEW CERTIFICATE REQUEST"), certs, false},
		{"public key", text("PUBLIC KEY"), certs, false},
		{"key with its curve, and a certificate", append(append(text("EC PARAMETERS"), key...), certificate...), certs | keys, true},
		{"half a key", key[:40], keys, true},
		{"encrypted key", text("ENCRYPTED PRIVATE KEY"), keys, true},
		{"another kind of key", text("ANY PRIVATE KEY"), keys, true},
		{"key in YAML", []byte("a-b:\n  key: |\n    -----BEGIN PRIVATE KEY-----\n"), 0, true},
		{"key in JSON", []byte(`{"a--b": "BEGIN ", "key": "-----BEGIN PRIVATE KEY-----\nAA"}`), 0, true},
		{"certificate in YAML", []byte("  ca: -----BEGIN CERTIFICATE-----\n"), 0, false},
		{"lower case", []byte("-----begin private key-----\n"), keys, true},
		{"odd dashes", []byte("---- BEGIN RSA PRIVATE KEY ----\n"), keys, true},
		{"key of SSH", text("OPENSSH PRIVATE KEY"), 0, true},
		{"key of PGP", text("PGP PRIVATE KEY BLOCK"), 0, true},
		{"key, SEC 1, DER", block.Bytes, keys, true},
		{"key, PKCS#8, DER", pkcs8, keys, true},
		{"key, DER, line feed", append(bytes.Clone(pkcs8), '\n'), keys, true},
		{"Java key store", []byte("\xfe\xed\xfe\xed\x00\x00\x00\x02\x00\x00\x00\x00"), certs | keys, true},
		{"PKCS#12 of indefinite length", []byte("\x30\x80\x02\x01\x03\x30\x80"), certs | keys, true},
		{"script", append([]byte("#!/bin/sh\ncat <<E\n"), certificate...), 0, false},
		{"script with a key", append([]byte("#!/bin/sh\ncat <<E\n"), key...), 0, true},
		{"program", append([]byte("\x7fELF\n"), certificate...), 0, false},
		{"binary", bytes.Repeat([]byte{0, '-', 0xff}, 1<<16), 0, false},
	}
	for _, test := range tests {
		want := pemutil.Content{Certificates: test.want&certs != 0, Keys: test.want&keys != 0}
		if got := pemutil.ContentOf(test.data); got != want {
			t.Errorf("%s: %+v, want %+v", test.name, got, want)
		}
		if got := pemutil.HoldsPrivateKey(test.data); got != test.lost {
			t.Errorf("%s: a private key in it: %t, want %t", test.name, got, test.lost)
		}
	}
}

// TestContentOfOpenSSL covers files written by openssl.
func TestContentOfOpenSSL(t *testing.T) {
	openssl := needs.Need(t, "openssl")
	issued := issue(t, testca.Must(t), testca.Template{})
	file := filepath.Join(t.TempDir(), "both.pem")
	if err := os.WriteFile(file, append(issued.LeafPEM(), issued.KeyPEM()...), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args string
		key  bool
	}{
		{"pkcs12 -export -passout pass: -in", true},
		{"pkcs8 -topk8 -outform DER -passout pass:secret -in", true},
		{"pkcs8 -topk8 -passout pass:secret -in", true},
		{"pkcs8 -topk8 -outform DER -nocrypt -in", true},
		{"ec -outform DER -in", true},
		{"ec -aes128 -passout pass:secret -in", true},
		{"ec -pubout -outform DER -in", false},
		{"x509 -text -in", false},
		{"x509 -outform DER -in", false},
		{"crl2pkcs7 -nocrl -outform DER -certfile", false},
	} {
		data, err := exec.Command(openssl, strings.Fields(test.args+" "+file)...).Output()
		if err != nil {
			t.Errorf("openssl %s: %v", test.args, err)
			continue
		}
		if c := pemutil.ContentOf(data); c.Keys != test.key || !c.Certificates && !c.Keys || pemutil.HoldsPrivateKey(data) != test.key {
			t.Errorf("openssl %s: %+v", test.args, c)
		}
	}
}

func FuzzContentOf(f *testing.F) {
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n"))
	f.Add([]byte("\x30\x80\x02\x01\x03"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if pemutil.ContentOf(data).Keys && !pemutil.HoldsPrivateKey(data) {
			t.Error("ContentOf finds keys that HoldsPrivateKey does not")
		}
	})
}
