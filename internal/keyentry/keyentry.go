// Package keyentry holds the entry that a server's key store has under an alias, whatever its
// format: a private key with its certificate chain.
package keyentry

import (
	"bytes"
	"crypto/x509"
	"time"
)

// PrivateKey is a private key entry of a key store.
type PrivateKey struct {
	Alias   string
	PKCS8   []byte              // PrivateKeyInfo, unencrypted, as crypto/x509 encodes it
	Chain   []*x509.Certificate // the key's own certificate first
	Created time.Time

	Password string // of the key, in plain text
}

// maxPKCS8 bounds the private keys that are parsed, in bytes. An RSA-16384 key takes 9 KiB.
const maxPKCS8 = 16 << 10

// SameKey reports whether two PKCS #8 keys are the same. Any program may have encoded was;
// crypto/x509 must have encoded key.
func SameKey(was, key []byte) bool {
	if bytes.Equal(was, key) {
		return true
	}
	if len(was) > maxPKCS8 {
		return false
	}
	parsed, err := x509.ParsePKCS8PrivateKey(was)
	if err != nil {
		return false
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(parsed)
	return err == nil && bytes.Equal(encoded, key)
}
