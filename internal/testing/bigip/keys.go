package bigip

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"sync"
)

// rsaKey generates the key of the factory certificate. Generating one is slow, so all devices of a
// process share it.
var rsaKey = sync.OnceValues(func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) })
