// Package keyentry is what key stores hold under an alias for a server: a private key with its chain,
// whichever the format of the store.
package keyentry

import (
	"bytes"
	"crypto/x509"
	"time"
)

// PrivateKey is an entry that is a private key.
type PrivateKey struct {
	Alias   string
	PKCS8   []byte              // PrivateKeyInfo, in clear, as crypto/x509 writes it
	Chain   []*x509.Certificate // the key's own certificate first
	Created time.Time

	Password string // of the key, in clear
}

// maxPKCS8 bounds a private key that is parsed, in bytes: RSA of 16384 bits takes 9 KiB.
const maxPKCS8 = 16 << 10

// SameKey reports whether was, which any program may have written, is key, which crypto/x509 wrote.
// Both are PKCS#8.
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
