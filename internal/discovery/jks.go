package discovery

import (
	"encoding/binary"
	"errors"
	"fmt"

	"certctl-agent/internal/ber"
)

// Java's own key store formats. Certificates are in clear; private keys are
// passed over, encrypted as they are. Integers are big-endian.
const (
	jksMagic   = 0xfeedfeed
	jceksMagic = 0xcececece

	jksKey     = 1
	jksTrusted = 2
	jksSecret  = 3 // JCEKS only
)

func isJKS(b []byte) bool {
	if len(b) < 12 {
		return false
	}
	magic := binary.BigEndian.Uint32(b)
	return (magic == jksMagic || magic == jceksMagic) && (b[7] == 1 || b[7] == 2)
}

var (
	errJKSTruncated = errors.New("the Java key store ends before it is complete")
	errJKSSecret    = errors.New("the Java key store holds a secret key, whose end cannot be found without its password: the entries after it are not seen")
)

var errBouncyCastle = errors.New("a key store of BouncyCastle (BKS, UBER or BCFKS), which is not supported: " +
	"keytool -importkeystore -deststoretype PKCS12 makes one that is read")

// isBouncyCastle reports whether b begins as BKS and UBER do, with a version and the length of
// their salt, or as BCFKS: in DER, with an encrypted store and the algorithm of its encryption.
func isBouncyCastle(b []byte) bool {
	if len(b) >= 8 && binary.BigEndian.Uint32(b) <= 2 && binary.BigEndian.Uint32(b[4:]) == 20 {
		return true
	}
	for range 3 {
		header := ber.HeaderLength(b)
		if header == 0 || b[0] != ber.TagSequence {
			return false
		}
		b = b[header:]
	}
	return len(b) > 0 && b[0] == ber.TagOID
}

func (c *content) jks(data []byte) {
	// Version 2 names the type of each certificate.
	r := &jksReader{rest: data[12:], typed: data[7] == 2}
	for range binary.BigEndian.Uint32(data[8:]) {
		tag := r.uint32()
		r.skip(r.uint16()) // alias, modified UTF-8
		r.skip(8)          // creation time
		switch tag {
		case jksKey:
			r.skip(r.uint32())
			for range r.uint32() {
				c.jksCertificate(r)
				if r.err != nil {
					break
				}
			}
		case jksTrusted:
			c.jksCertificate(r)
		case jksSecret:
			r.fail(errJKSSecret)
		default:
			r.fail(fmt.Errorf("the Java key store holds an entry of unknown kind %d", tag))
		}
		if r.err != nil {
			c.fail(r.err)
			return
		}
	}
}

func (c *content) jksCertificate(r *jksReader) {
	x509Type := true
	if r.typed {
		x509Type = string(r.bytes(r.uint16())) == "X.509"
	}
	encoded := r.bytes(r.uint32())
	if r.err != nil || !x509Type {
		return
	}
	der, _, err := firstCertificate(encoded)
	if err != nil {
		c.fail(err)
		return
	}
	c.add(der, formatJKS)
}

// jksReader reads until the first error, which stays; then it returns zeros.
type jksReader struct {
	rest  []byte
	typed bool
	err   error
}

func (r *jksReader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *jksReader) bytes(n int) []byte {
	if r.err == nil && n > len(r.rest) {
		r.err = errJKSTruncated
	}
	if r.err != nil {
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

func (r *jksReader) skip(n int) { r.bytes(n) }

func (r *jksReader) uint16() int {
	if b := r.bytes(2); b != nil {
		return int(binary.BigEndian.Uint16(b))
	}
	return 0
}

// uint32 is clipped so that it is no negative int on any platform; no length
// that large fits in a file that is read.
func (r *jksReader) uint32() int {
	if b := r.bytes(4); b != nil {
		return int(min(binary.BigEndian.Uint32(b), 1<<31-1))
	}
	return 0
}
