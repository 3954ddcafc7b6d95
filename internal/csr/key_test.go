package csr_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"strings"
	"testing"

	"certctl-agent/internal/csr"
)

func TestGenerateKey(t *testing.T) {
	describe := func(key crypto.Signer) any {
		switch key := key.(type) {
		case *ecdsa.PrivateKey:
			return key.Curve.Params().Name
		case *rsa.PrivateKey:
			return key.N.BitLen()
		case ed25519.PrivateKey:
			return "Ed25519"
		}
		return nil
	}
	tests := map[string]any{
		"ecdsa-p256": "P-256", "ecdsa-p384": "P-384", "rsa-2048": 2048, "rsa-3072": 3072, "rsa-4096": 4096, "ed25519": "Ed25519",
	}
	if got := csr.Algorithms(); len(got) != len(tests) || got[0] != csr.DefaultAlgorithm {
		t.Errorf("Algorithms = %q, want %d with %s first", got, len(tests), csr.DefaultAlgorithm)
	}
	for _, algorithm := range csr.Algorithms() {
		if testing.Short() && algorithm == "rsa-4096" {
			continue
		}
		key, err := csr.GenerateKey(algorithm)
		if err != nil {
			t.Errorf("%s: %v", algorithm, err)
			continue
		}
		if got := describe(key); got != tests[algorithm] {
			t.Errorf("%s makes %v, want %v", algorithm, got, tests[algorithm])
		}
	}
	for _, bad := range []string{"", "rsa-1024", "ECDSA-P256"} {
		if _, err := csr.GenerateKey(bad); err == nil || !strings.Contains(err.Error(), "rsa-3072") {
			t.Errorf("GenerateKey(%q): %v, want an error that lists the algorithms", bad, err)
		}
	}
}

// keyOf is a signer with any public key.
type keyOf struct {
	crypto.Signer
	public crypto.PublicKey
}

func (k keyOf) Public() crypto.PublicKey { return k.public }

func TestWeakKeysAreRefused(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0") // to generate the key to reject
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		key  crypto.Signer
		want string
	}{
		{weak, "1024 bits, fewer than 2048"},
		{p224, "P-224 is not supported"},
		{keyOf{public: "a key"}, "of type string are not supported"},
	}
	for _, test := range tests {
		if _, err := csr.New(test.key, "a.example", nil); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("New: error = %v, want one with %q", err, test.want)
		}
	}
}
