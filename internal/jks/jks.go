// Package jks reads Java's own key store formats, JKS and JCEKS, and writes JKS. Their only
// specification is the source of sun.security.provider.JavaKeyStore and
// com.sun.crypto.provider.JceKeyStore. Certificates are in clear text; each private key has its own
// password. Integers are big-endian.
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

	// maxChain bounds the certificates of an entry, because empty ones take more memory than bytes
	// in the store. A file of a megabyte has no room for that many real ones.
	maxChain = 10_000
)

// X509 is the type of certificates encoded in DER.
const X509 = "X.509"

var (
	errFormat    = errors.New("not a Java key store")
	errTruncated = errors.New("the Java key store is truncated")
	errSecret    = errors.New("the Java key store holds a secret key: the entries after it cannot be read without its password")
	errChain     = fmt.Errorf("the Java key store has a chain of more than %d certificates", maxChain)
)

// Is reports whether data begins like a store. A head of twelve bytes is enough.
func Is(data []byte) bool {
	if len(data) < headerSize {
		return false
	}
	magic, version := binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[4:])
	return (magic == magicJKS || magic == magicJCEKS) && (version == 1 || version == 2)
}

// Entry is a private key with its chain, or a trusted certificate. Its slices alias the store's
// bytes.
type Entry struct {
	Alias   string // in Java's modified UTF-8
	Created time.Time
	Key     []byte        // EncryptedPrivateKeyInfo of PKCS#8; nil for a trusted certificate
	Chain   []Certificate // a key's own certificate comes first
}

// Certificate is a certificate in a store.
type Certificate struct {
	Type    string // type of java.security.cert.Certificate; X509 in every store that keytool creates
	Encoded []byte
}

// Read calls entry for each entry of a store, in order. In a damaged store these are the entries
// before the damage and the readable part of the last chain. Read does not check the digest at the
// end, which needs the password.
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
		r.fail(fmt.Errorf("the Java key store has an entry of unknown kind %d", tag))
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

// reader reads until the first error. From then on its methods return zero values.
type reader struct {
	rest  []byte
	typed bool // each certificate is preceded by its type
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

// uint32 limits the number so that it is not negative on any platform. No valid length is that
// large.
func (r *reader) uint32() int { return int(min(r.number(4), 1<<31-1)) }
