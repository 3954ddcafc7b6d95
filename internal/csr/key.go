package csr

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"slices"
	"strings"
)

// DefaultAlgorithm is the algorithm of new keys if none is configured.
const DefaultAlgorithm = "ecdsa-p256"

// Algorithms returns the algorithms that GenerateKey supports, the default first.
func Algorithms() []string {
	return []string{DefaultAlgorithm, "ecdsa-p384", "rsa-2048", "rsa-3072", "rsa-4096", "ed25519"}
}

// GenerateKey generates a private key.
func GenerateKey(algorithm string) (crypto.Signer, error) {
	switch algorithm {
	case "ecdsa-p256":
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ecdsa-p384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "rsa-2048":
		return rsa.GenerateKey(rand.Reader, 2048)
	case "rsa-3072":
		return rsa.GenerateKey(rand.Reader, 3072)
	case "rsa-4096":
		return rsa.GenerateKey(rand.Reader, 4096)
	case "ed25519":
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	}
	return nil, fmt.Errorf("key algorithm %q is not supported: expected one of %s", algorithm, strings.Join(Algorithms(), ", "))
}

// minRSABits is the minimum that public CAs sign (CA/Browser Forum, Baseline Requirements, section
// 6.1.5). Some control planes would sign shorter keys.
const minRSABits = 2048

// checkKey rejects keys that are too weak or not supported.
func checkKey(public crypto.PublicKey) error {
	switch public := public.(type) {
	case *rsa.PublicKey:
		if bits := public.N.BitLen(); bits < minRSABits {
			return fmt.Errorf("the RSA key has %d bits, fewer than %d", bits, minRSABits)
		}
		return nil
	case *ecdsa.PublicKey:
		if !slices.Contains([]elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()}, public.Curve) {
			return fmt.Errorf("the curve %s is not supported: expected P-256, P-384 or P-521", public.Curve.Params().Name)
		}
		return nil
	case ed25519.PublicKey:
		return nil
	}
	return fmt.Errorf("keys of type %T are not supported", public)
}
