package keyentry

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"testing"
)

// privateKeyInfo is PrivateKeyInfo of RFC 5958, section 2.
type privateKeyInfo struct {
	Version    int
	Algorithm  pkix.AlgorithmIdentifier
	PrivateKey []byte
}

// withoutPublic returns key as Java encodes it: an ECPrivateKey (RFC 5915, section 3) without the
// optional parameters and public key.
func withoutPublic(t *testing.T, key []byte) []byte {
	t.Helper()
	var info privateKeyInfo
	_, err := asn1.Unmarshal(key, &info)
	var inner struct {
		Version    int
		PrivateKey []byte
		Public     asn1.BitString `asn1:"explicit,tag:1"`
	}
	if err == nil {
		_, err = asn1.Unmarshal(info.PrivateKey, &inner)
	}
	if err == nil {
		info.PrivateKey, err = asn1.Marshal(struct {
			Version    int
			PrivateKey []byte
		}{inner.Version, inner.PrivateKey})
	}
	short, marshalErr := asn1.Marshal(info)
	if err != nil || marshalErr != nil {
		t.Fatal(err, marshalErr)
	}
	return short
}

func newKey(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestSameKey(t *testing.T) {
	key, other := newKey(t), newKey(t)
	for _, test := range []struct {
		name string
		was  []byte
		same bool
	}{
		{"itself", bytes.Clone(key), true},
		{"as Java writes it", withoutPublic(t, key), true},
		{"another", other, false},
		{"another, as Java writes it", withoutPublic(t, other), false},
		{"nothing", nil, false},
		{"damaged", key[:len(key)-1], false},
		{"huge", append(bytes.Clone(key), make([]byte, maxPKCS8)...), false},
	} {
		if got := SameKey(test.was, key); got != test.same {
			t.Errorf("%s: got %v, want %v", test.name, got, test.same)
		}
	}
}
