package pemutil_test

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"

	"certctl-agent/internal/pemutil"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func block(typ string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
}

func TestParseKey(t *testing.T) {
	ecKey := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	rsaKey := must(rsa.GenerateKey(rand.Reader, 2048))
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sec1 := block("EC PRIVATE KEY", must(x509.MarshalECPrivateKey(ecKey)))
	// The object identifier of P-256, which openssl ecparam -genkey writes before the key.
	parameters := block("EC PARAMETERS", []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7})
	x25519 := must(ecdh.X25519().GenerateKey(rand.Reader))

	tests := []struct {
		name string
		data []byte
		want crypto.Signer
		err  string
	}{
		{"SEC 1", sec1, ecKey, ""},
		{"byte order mark", append([]byte("\ufeff"), sec1...), ecKey, ""},
		{"SEC 1 after its parameters", append(parameters, sec1...), ecKey, ""},
		{"SEC 1 with CRLF", bytes.ReplaceAll(sec1, []byte("\n"), []byte("\r\n")), ecKey, ""},
		{"PKCS#8 ECDSA", block("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(ecKey))), ecKey, ""},
		{"PKCS#8 RSA", block("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(rsaKey))), rsaKey, ""},
		{"PKCS#8 Ed25519", block("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(edKey))), edKey, ""},
		{"PKCS#1", block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)), rsaKey, ""},
		{"after a certificate", append(block("CERTIFICATE", []byte("x")), sec1...), ecKey, ""},
		{"empty", nil, nil, "no PRIVATE KEY"},
		{"a public key", block("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(ecKey.Public()))), nil, "no PRIVATE KEY"},
		{"encrypted PKCS#8", block("ENCRYPTED PRIVATE KEY", []byte("x")), nil, "encrypted"},
		{"encrypted SEC 1", bytes.Replace(sec1, []byte("-----\n"), []byte("-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\n"), 1), nil, "encrypted"},
		{"OpenSSH", block("OPENSSH PRIVATE KEY", []byte("x")), nil, "not supported"},
		{"X25519", block("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(x25519))), nil, "cannot sign"},
		{"damaged", block("EC PRIVATE KEY", []byte("secret bytes")), nil, "damaged"},
		{"longer than any key", block("RSA PRIVATE KEY", make([]byte, 1<<20)), nil, "more than any key"},
		{"wrong label", block("EC PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)), nil, "damaged"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			key, err := pemutil.ParseKey(test.data)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("error = %v, want one with %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !pemutil.SamePublicKey(key.Public(), test.want.Public()) {
				t.Error("got another key")
			}
		})
	}
	const noKey = "no PRIVATE KEY block found"
	if _, err := pemutil.ParseKey(nil); err == nil || err.Error() != noKey {
		t.Errorf("error = %v, want %s", err, noKey)
	}
	const encrypted = "the private key is encrypted: store it without a passphrase (openssl pkey -in FILE -out FILE)"
	if _, err := pemutil.ParseKey(block("ENCRYPTED PRIVATE KEY", []byte("x"))); err == nil || err.Error() != encrypted {
		t.Errorf("error = %v, want %q", err, encrypted)
	}
}

func TestEncodeKey(t *testing.T) {
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		key  crypto.Signer
		want string
	}{
		{must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), "EC PRIVATE KEY"},
		{must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)), "EC PRIVATE KEY"},
		{must(rsa.GenerateKey(rand.Reader, 2048)), "PRIVATE KEY"},
		{edKey, "PRIVATE KEY"},
	}
	for _, test := range tests {
		data, err := pemutil.EncodeKey(test.key)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(data, []byte("-----BEGIN "+test.want+"-----\n")) || !bytes.HasSuffix(data, []byte("-----\n")) {
			t.Errorf("%T is encoded as %.40q, want %s", test.key, data, test.want)
		}
		again, err := pemutil.ParseKey(data)
		if err != nil || !pemutil.SamePublicKey(again.Public(), test.key.Public()) {
			t.Errorf("%T does not survive encoding: %v", test.key, err)
		}
	}
	if _, err := pemutil.EncodeKey(opaque{tests[0].key}); err == nil {
		t.Error("no error for a key that cannot be encoded")
	}
}

// opaque is a signer that does not reveal its key, like a hardware key.
type opaque struct{ crypto.Signer }

func TestSamePublicKey(t *testing.T) {
	a := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public()
	b := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public()
	c := must(rsa.GenerateKey(rand.Reader, 2048)).Public()
	tests := []struct {
		name string
		a, b crypto.PublicKey
		want bool
	}{
		{"same", a, a, true}, {"other", a, b, false}, {"other kind", a, c, false},
		{"nil", a, nil, false}, {"nil first", nil, a, false}, {"two nils", nil, nil, false}, {"no key", "a", "a", false},
	}
	for _, test := range tests {
		if got := pemutil.SamePublicKey(test.a, test.b); got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add(block("EC PRIVATE KEY", must(x509.MarshalECPrivateKey(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))))
	f.Add(block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(must(rsa.GenerateKey(rand.Reader, 2048)))))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := pemutil.ParseKey(data)
		if err != nil {
			return
		}
		encoded, err := pemutil.EncodeKey(key)
		if err != nil {
			t.Fatalf("a parsed key cannot be encoded: %v", err)
		}
		again, err := pemutil.ParseKey(encoded)
		if err != nil || !pemutil.SamePublicKey(key.Public(), again.Public()) {
			t.Errorf("the key does not survive encoding: %v", err)
		}
	})
}
