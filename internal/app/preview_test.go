package app

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"
)

// The certificate that stands in for one has what any type may ask of it.
func TestStandIn(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := standIn(key)
	if err != nil {
		t.Fatal(err)
	}
	if len(leaf.DNSNames) == 0 || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("it has the names %q and the key %v", leaf.DNSNames, leaf.PublicKey)
	}
}
