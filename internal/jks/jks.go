// Package jks reads Java's own formats of key stores, JKS and JCEKS, and writes JKS. They are
// specified by the source of sun.security.provider.JavaKeyStore and
// com.sun.crypto.provider.JceKeyStore. Certificates are in clear, private keys under a password of
// their own. Integers are big-endian.
package jks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

const (
	magicJKS   = 0xfeedfeed
	magicJCEKS = 0xcececece

	headerSize = 12 // magic, version, number of entries

	tagKey     = 1
	tagTrusted = 2
	tagSecret  = 3 // JCEKS only

	// maxChain bounds the certificates of an entry, which take more memory than bytes of the store
	// when they are empty. A file of a megabyte has no room for that many real ones.
	maxChain = 10_000
)

// X509 is the type of a certificate whose encoding is DER.
const X509 = "X.509"

var (
	errFormat    = errors.New("it is not a Java key store")
	errTruncated = errors.New("the Java key store ends before it is complete")
	errSecret    = errors.New("the Java key store holds a secret key, whose end cannot be found without its password: the entries after it are not seen")
	errChain     = fmt.Errorf("the Java key store holds a chain of more than %d certificates", maxChain)
)

// Is reports whether data begins as a store does. A head of twelve bytes is enough.
func Is(data []byte) bool {
	if len(data) < headerSize {
		return false
	}
	magic, version := binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[4:])
	return (magic == magicJKS || magic == magicJCEKS) && (version == 1 || version == 2)
}

// Entry is a private key with its chain, or a trusted certificate. Its slices are part of the
// store's bytes.
type Entry struct {
	Alias   string // in Java's modified UTF-8
	Created time.Time
	Key     []byte        // EncryptedPrivateKeyInfo of PKCS#8, as it is in the store; nil: the entry is a trusted certificate
	Chain   []Certificate // of a key, its own certificate first
}

// Certificate is one in a store.
type Certificate struct {
	Type    string // of java.security.cert.Certificate; X509 in every store that keytool makes
	Encoded []byte
}

// Read hands out the entries of a store, in their order. Of a damaged one those before the damage
// are handed out, the last with what can be read of its chain. The digest at the end is not
// checked: that takes the password.
func Read(data []byte, entry func(Entry)) error {
	if !Is(data) {
		return errFormat
	}
	r := &reader{rest: data[headerSize:], typed: data[7] == 2}
	for range binary.BigEndian.Uint32(data[8:]) {
		e, err := r.entry()
		if len(e.Chain) > 0 || err == nil {
			entry(e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) entry() (e Entry, err error) {
	tag := r.uint32()
	e.Alias = string(r.bytes(r.uint16()))
	e.Created = time.UnixMilli(int64(r.number(8)))
	certificates := 1
	switch tag {
	case tagKey:
		e.Key = r.bytes(r.uint32())
		certificates = r.uint32()
	case tagTrusted:
	case tagSecret:
		r.fail(errSecret)
	default:
		r.fail(fmt.Errorf("the Java key store holds an entry of unknown kind %d", tag))
	}
	for i := range certificates {
		if i == maxChain {
			r.fail(errChain)
		}
		cert := r.certificate()
		if r.err != nil {
			break
		}
		e.Chain = append(e.Chain, cert)
	}
	return e, r.err
}

func (r *reader) certificate() Certificate {
	kind := X509
	if r.typed {
		if named := r.bytes(r.uint16()); string(named) != kind {
			kind = string(named)
		}
	}
	return Certificate{Type: kind, Encoded: r.bytes(r.uint32())}
}

// reader reads until the first error, which stays; then it returns zeros.
type reader struct {
	rest  []byte
	typed bool // each certificate has its type before it
	err   error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) bytes(n int) []byte {
	if r.err == nil && n > len(r.rest) {
		r.err = errTruncated
	}
	if r.err != nil {
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) number(size int) (n uint64) {
	for _, octet := range r.bytes(size) {
		n = n<<8 | uint64(octet)
	}
	return n
}

func (r *reader) uint16() int { return int(r.number(2)) }

// uint32 is clipped so that it is not a negative int on any platform; no length that large fits in
// a file that is read.
func (r *reader) uint32() int { return int(min(r.number(4), 1<<31-1)) }
