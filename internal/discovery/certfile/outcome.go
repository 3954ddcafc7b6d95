package certfile

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"slices"
	"strings"

	"certctl-agent/internal/api"
	"certctl-agent/internal/discovery/record"
)

// Outcome is the encoded result of parsing a file. Workers pass it to the goroutine that reports
// it, and the index stores it, so unchanged files are reported without being parsed.
//
//	flags, causes (list of strings), certificates (list of format, certificate)
type Outcome []byte

const flagLocked = 1

// ErrDamaged means that bytes are not a valid Outcome.
var ErrDamaged = errors.New("a file's record in the index is damaged")

func (p *Parser) outcome(c content) Outcome {
	// Encoding a certificate may add causes, which come first in the outcome.
	var certs []byte
	n := 0
	for _, cert := range c.certs {
		encoded, err := p.encode(cert.der)
		if err != nil && (cert.format != formatDER || !isOtherSigned(cert.der)) {
			c.fail(err)
		}
		if encoded == nil {
			continue
		}
		certs = append(certs, byte(slices.Index(formats, cert.format)))
		certs = record.AppendString(certs, encoded)
		n++
	}
	flags := byte(0)
	if c.locked {
		flags = flagLocked
	}
	b := binary.AppendUvarint([]byte{flags}, uint64(len(c.causes)))
	for _, cause := range c.causes {
		b = record.AppendString(b, cause)
	}
	b = binary.AppendUvarint(b, uint64(n))
	return append(b, certs...)
}

// Locked reports whether an unknown password hides certificates.
func (o Outcome) Locked() bool { return len(o) > 0 && o[0]&flagLocked != 0 }

// Empty reports whether there is nothing to report.
func (o Outcome) Empty() bool { return len(o) == 3 && o[1]|o[2] == 0 }

// Report calls cert for each certificate of a file and cause for each error. source is the path to
// report.
func (o Outcome) Report(source string, cert func(api.DiscoveredCertificate) error, cause func(string)) error {
	d := record.Decoder{Rest: o}
	d.Byte()
	for range d.Length() {
		if text := d.String(); !d.Damaged {
			cause(text)
		}
	}
	for range d.Length() {
		format := int(d.Byte())
		found := decodeCertificate(d.Bytes())
		if d.Damaged || format >= len(formats) {
			return ErrDamaged
		}
		found.SourcePath, found.SourceFormat = source, formats[format]
		if err := cert(found); err != nil {
			return err
		}
	}
	if d.Damaged {
		return ErrDamaged
	}
	return nil
}

func appendCertificate(b []byte, c api.DiscoveredCertificate, der []byte) []byte {
	b = record.AppendString(b, der)
	for _, s := range []string{c.FingerprintSHA256, c.CommonName, c.SerialNumber, c.IssuerDN, c.SubjectDN, c.NotBefore, c.NotAfter, c.KeyAlgorithm} {
		b = record.AppendString(b, s)
	}
	b = binary.AppendUvarint(b, uint64(c.KeySize))
	b = append(b, 0)
	if c.IsCA {
		b[len(b)-1] = 1
	}
	b = binary.AppendUvarint(b, uint64(len(c.SANs)))
	for _, san := range c.SANs {
		b = record.AppendString(b, san)
	}
	return b
}

func decodeCertificate(b []byte) api.DiscoveredCertificate {
	d := record.Decoder{Rest: b}
	der := d.Bytes()
	d.Share()
	c := api.DiscoveredCertificate{
		FingerprintSHA256: d.String(),
		CommonName:        d.String(),
		SerialNumber:      d.String(),
		IssuerDN:          d.String(),
		SubjectDN:         d.String(),
		NotBefore:         d.String(),
		NotAfter:          d.String(),
		KeyAlgorithm:      d.String(),
		KeySize:           int(d.Uvarint()),
		IsCA:              d.Byte() == 1,
	}
	c.SANs = make([]string, d.Length())
	for i := range c.SANs {
		c.SANs[i] = d.String()
	}
	c.PEMData = encodePEM(der)
	return c
}

// encodePEM does what pem.EncodeToMemory does at a third of the cost, because it dominates the cost
// of an unchanged certificate.
func encodePEM(der []byte) string {
	const (
		begin = "-----BEGIN CERTIFICATE-----\n"
		end   = "-----END CERTIFICATE-----\n"
		line  = 48 // bytes that make 64 characters (RFC 7468, 2)
	)
	var b strings.Builder
	b.Grow(len(begin) + base64.StdEncoding.EncodedLen(len(der)) + len(der)/line + 1 + len(end))
	b.WriteString(begin)
	var text [65]byte
	for part := range slices.Chunk(der, line) {
		b.Write(append(base64.StdEncoding.AppendEncode(text[:0], part), '\n'))
	}
	b.WriteString(end)
	return b.String()
}

// encode returns the encoded form of a certificate, and errCut with it if some of its fields were
// cut. It caches the result: hosts have many copies of the same CA certificates and chains.
func (p *Parser) encode(der []byte) ([]byte, error) {
	digest := sha256.Sum256(der)
	if encoded := p.recent.Get(digest); encoded != nil {
		return encoded, nil
	}
	described, err := describe(der)
	if err != nil && err != errCut {
		return nil, err
	}
	described.FingerprintSHA256 = hex.EncodeToString(digest[:])
	encoded := appendCertificate(nil, described, der)
	if err == nil { // not if cut: every file with such a certificate must report errCut
		p.recent.Put(digest, encoded)
	}
	return encoded, err
}
