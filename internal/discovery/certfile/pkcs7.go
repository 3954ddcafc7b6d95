package certfile

import (
	"bytes"
	"fmt"

	"certctl-agent/internal/ber"
)

// oidSignedData is the encoded object identifier of PKCS#7 signedData.
const oidSignedData = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02"

// isSignedData reports whether b begins like a PKCS#7 ContentInfo with signedData, in DER or BER.
func isSignedData(b []byte) bool {
	return bytes.HasPrefix(ber.Open(b), []byte("\x06\x09"+oidSignedData))
}

// pkcs7 adds the certificates of signedData (RFC 5652, section 5.1), which certificate bundles use.
// It does not verify signatures.
func (c *content) pkcs7(b []byte) error {
	info := ber.Sequence(b)
	info.OID()
	signed := info.Inside(ber.TagExplicit0).Inside(ber.TagSequence)
	signed.Integer()             // version
	signed.Next(0x31)            // digestAlgorithms
	signed.Next(ber.TagSequence) // encapContentInfo
	if signed.At(ber.TagExplicit0) {
		for choice, err := range signed.Next(ber.TagExplicit0).Children() {
			if err != nil {
				signed.Err = err
			} else if choice.Tag == ber.TagSequence { // the other choices are attribute certificates
				c.add(choice.Full, formatPKCS7)
			}
		}
	}
	if signed.Err != nil {
		return fmt.Errorf("damaged PKCS#7: %w", signed.Err)
	}
	return nil
}
