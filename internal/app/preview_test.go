package app

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"
)

// The placeholder has everything that a target type may require.
func TestStandIn(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := placeholder(key)
	if err != nil {
		t.Fatal(err)
	}
	if len(leaf.DNSNames) == 0 || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("it has the names %q and the key %v", leaf.DNSNames, leaf.PublicKey)
	}
}
