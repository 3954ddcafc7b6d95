package bigip

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"sync"
)

// rsaKey is the key of the factory's certificate: making one is slow, so all
// devices of a process have the same, as real ones have theirs by serial number.
var rsaKey = sync.OnceValues(func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) })
