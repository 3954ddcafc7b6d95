package discovery

import (
	"bytes"
	"fmt"
)

// Object identifiers, as their content octets.
const (
	oidData          = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01"
	oidSignedData    = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02"
	oidEnvelopedData = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03"
	oidEncryptedData = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x06"
)

// isSignedData reports whether b begins as a PKCS#7 ContentInfo with
// signedData does, whatever the form of its length.
func isSignedData(b []byte) bool {
	return hasContentType(b, "\x06\x09"+oidSignedData)
}

// hasContentType reports whether b is a SEQUENCE that begins with want.
func hasContentType(b []byte, want string) bool {
	header := headerLength(b)
	return header > 0 && b[0] == tagSequence && bytes.HasPrefix(b[header:], []byte(want))
}

// pkcs7 adds the certificates of signedData (RFC 5652, 5.1), the form in which
// bundles are handed around; its signature is of no interest.
func (c *content) pkcs7(b []byte) error {
	info := sequence(b)
	info.oid()
	signed := info.inside(tagExplicit0).inside(tagSequence)
	signed.integer()         // version
	signed.next(0x31)        // digestAlgorithms
	signed.next(tagSequence) // encapContentInfo
	if signed.err != nil {
		return fmt.Errorf("damaged PKCS#7: %w", signed.err)
	}
	if !signed.at(tagExplicit0) {
		return nil
	}
	certificates := signed.next(tagExplicit0)
	for choice, err := range certificates.children() {
		if err != nil {
			return fmt.Errorf("damaged PKCS#7: %w", err)
		}
		if choice.tag == tagSequence { // the other choices are attribute certificates
			c.add(choice.full, formatPKCS7)
		}
	}
	if signed.err != nil {
		return fmt.Errorf("damaged PKCS#7: %w", signed.err)
	}
	return nil
}
