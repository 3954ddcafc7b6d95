package pemutil

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

const (
	pkcs8Type        = "PRIVATE KEY"
	pkcs1Type        = "RSA PRIVATE KEY"
	sec1Type         = "EC PRIVATE KEY"
	encryptedType    = "ENCRYPTED PRIVATE KEY"
	privateKeySuffix = "PRIVATE KEY"

	// maxKey bounds the DER of a key. An RSA key of 16384 bits takes 9 KiB. The work of reading a
	// key is quadratic in its length, and a key of a megabyte would take minutes.
	maxKey = 16 << 10
)

var (
	errNoKey = errors.New("no PRIVATE KEY block found")

	// errEncrypted means that the private key has a passphrase, which nobody could enter when a
	// server restarts at night.
	errEncrypted = errors.New("the private key is encrypted: store it without a passphrase (openssl pkey -in FILE -out FILE)")
)

// ParseKey returns the first private key in data: PKCS#8, PKCS#1 (RSA PRIVATE KEY) or SEC 1 (EC
// PRIVATE KEY). It skips blocks of other types, such as the EC PARAMETERS that openssl writes
// before a key. Its errors do not reveal anything about the key itself.
func ParseKey(data []byte) (crypto.Signer, error) {
	data = bytes.TrimPrefix(data, []byte(byteOrderMark)) // without a copy of the key
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			return nil, errNoKey
		}
		if !strings.HasSuffix(block.Type, privateKeySuffix) {
			continue
		}
		defer clear(block.Bytes)
		// RFC 1421, section 4.6.1.1: the header that marks encrypted PKCS#1 and SEC 1 keys.
		if block.Type == encryptedType || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
			return nil, errEncrypted
		}
		return parseKeyBlock(block)
	}
}

func parseKeyBlock(block *pem.Block) (crypto.Signer, error) {
	if len(block.Bytes) > maxKey {
		return nil, fmt.Errorf("the %s block holds %d bytes, more than any key in use", block.Type, len(block.Bytes))
	}
	var key any
	var err error
	switch block.Type {
	case pkcs8Type:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case pkcs1Type:
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case sec1Type:
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("%s blocks are not supported: expected %s, %s or %s", block.Type, pkcs8Type, sec1Type, pkcs1Type)
	}
	if err != nil {
		return nil, fmt.Errorf("the %s block is damaged: %w", block.Type, err)
	}
	switch key := key.(type) {
	case *ecdsa.PrivateKey, *rsa.PrivateKey, ed25519.PrivateKey:
		return key.(crypto.Signer), nil
	}
	return nil, fmt.Errorf("keys of type %T cannot sign: expected ECDSA, RSA or Ed25519", key)
}

// EncodeKey returns a private key in PEM: ECDSA as SEC 1, the format that existing fleets have on
// disk, RSA and Ed25519 as PKCS#8. The caller must clear the result after use.
func EncodeKey(key crypto.Signer) ([]byte, error) {
	block := pem.Block{Type: pkcs8Type}
	var err error
	if ec, ok := key.(*ecdsa.PrivateKey); ok {
		block.Type = sec1Type
		block.Bytes, err = x509.MarshalECPrivateKey(ec)
	} else {
		block.Bytes, err = x509.MarshalPKCS8PrivateKey(key)
	}
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	defer clear(block.Bytes)
	return pem.EncodeToMemory(&block), nil
}

// SamePublicKey reports whether a and b are the same key.
func SamePublicKey(a, b crypto.PublicKey) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && b != nil && key.Equal(b)
}

// SamePrivateKey reports whether a and b are the same private key. Comparing public keys is not
// enough: crypto/x509 does not check all primes of a multi-prime RSA key, so anyone can make such a
// key for someone else's certificate.
func SamePrivateKey(a, b crypto.Signer) bool {
	key, ok := a.(interface{ Equal(crypto.PrivateKey) bool })
	return ok && b != nil && key.Equal(b)
}
