// Package certfile finds the X.509 certificates in the bytes of a file, in any of the usual formats
// and under any name, and describes them for a report. Only certificates leave the package: private
// keys are neither decrypted nor copied.
package certfile

import (
	"bytes"
	"crypto/x509"
	"errors"
	"path"
	"strings"
	"unicode/utf8"

	"certctl-agent/internal/ber"
	"certctl-agent/internal/discovery/record"
	"certctl-agent/internal/jks"
	"certctl-agent/internal/pkcs12"
)

// Source formats of a report.
const (
	formatPEM    = "PEM"
	formatDER    = "DER"
	formatPKCS7  = "PKCS7"
	formatPKCS12 = "PKCS12"
	formatJKS    = "JKS"
)

// formats lists the formats in the order of their numbers in an Outcome.
var formats = []string{formatPEM, formatDER, formatPKCS7, formatPKCS12, formatJKS}

// IsKey reports whether a file has the name of a private key. Such files must not be read.
func IsKey(name string) bool { return hintOf(name) == hintKey }

// HasKnownExtension reports whether a file has an extension that is usual for certificates, key
// stores or keys.
func HasKnownExtension(name string) bool { return hintOf(name) != hintNone }

// nameHint is the content that the name of a file suggests.
type nameHint int

const (
	hintNone        nameHint = iota // PEM, if anything
	hintCertificate                 // .pem .crt .cer .cert: PEM, or DER
	hintDER                         // .der
	hintStore                       // a key store or a PKCS#7 bundle
	hintKey                         // .key: never read
)

func hintOf(name string) nameHint {
	switch strings.ToLower(path.Ext(name)) {
	case ".pem", ".crt", ".cer", ".cert":
		return hintCertificate
	case ".der":
		return hintDER
	case ".p7b", ".p7c", ".p12", ".pfx", ".jks", ".keystore", ".ks", ".bks", ".bcfks", ".uber", ".ubr":
		return hintStore
	case ".key":
		return hintKey
	}
	return hintNone
}

// HeadSize is how many bytes of a file are read before the decision to read the rest.
const HeadSize = 4096

// WorthReading reports whether a file that begins with head can hold a certificate: its name
// suggests it, it begins like a key store, or it may be text, which can hold PEM anywhere. Text has
// no NUL, except in UTF-16, in which no tool writes PEM.
func WorthReading(name string, head []byte) bool {
	return maybeBinary(name, head) || bytes.IndexByte(head, 0) < 0
}

// WorthParsing reports whether Parse may find something in a file. It only searches for markers,
// which is far cheaper than parsing.
func WorthParsing(name string, data []byte) bool {
	return maybeBinary(name, data) || hasMarker(data)
}

// maybeBinary reports whether a file may hold a format other than PEM.
func maybeBinary(name string, head []byte) bool {
	return hintOf(name) != hintNone || jks.Is(head) || pkcs12.Is(head) || looksLikeDER(name, head)
}

// IsStore reports whether a file is a key store by its name or content. Parsing it may be slow,
// because it tries passwords.
func IsStore(name string, data []byte) bool {
	return pkcs12.Is(data) || hintOf(name) == hintStore || bytes.Contains(data, []byte(pemBegin+labelPKCS12))
}

// looksLikeDER reports whether a file is read as DER although its name does not suggest it: it has
// no extension, or a number as in OpenSSL's hash links, and it begins like a certificate or a
// PKCS#7 bundle.
func looksLikeDER(name string, b []byte) bool {
	return strings.Trim(path.Ext(name), ".0123456789") == "" && (looksLikeCertificate(b) || isSignedData(b))
}

// found is one certificate in a file. der may alias the file's bytes.
type found struct {
	der    []byte
	format string
}

// content is the result of parsing a file.
type content struct {
	certs  []found
	causes []string // errors to report

	// locked means that an unknown password hides certificates.
	locked bool

	passwords []string
	stores    *pkcs12.Reader // created for the first store; bounds the work of all
}

func (c *content) add(der []byte, format string) {
	c.certs = append(c.certs, found{der, format})
}

// fail records err, if not nil, as an error to report.
func (c *content) fail(err error) {
	// One file full of damaged blocks must not fill the report.
	const maxCauses = 8
	switch {
	case err == nil:
	case len(c.causes) > 0 && c.causes[len(c.causes)-1] == err.Error():
	case len(c.causes) < maxCauses:
		c.causes = append(c.causes, err.Error())
	case len(c.causes) == maxCauses:
		c.causes = append(c.causes, "further errors in this file are not listed")
	}
}

// Parser parses files. It may be used concurrently.
type Parser struct {
	Passwords []string // tried on PKCS#12 stores after the empty one, in order

	recent record.Recent
}

// Parse finds the certificates in data, the content of a file with that name. It does not retain
// data.
func (p *Parser) Parse(name string, data []byte) Outcome {
	return p.outcome(parse(name, data, p.Passwords))
}

// parse finds the certificates but does not decode them.
func parse(name string, data []byte, passwords []string) content {
	c := content{passwords: passwords}
	hint := hintOf(name)
	if looksLikeDER(name, data) {
		hint = hintCertificate
	}
	switch {
	case len(data) == 0 || hint == hintKey:
	case c.byMagic(data, hint):
	case c.pem(data):
	case hint != hintNone:
		c.binary(data, hint)
	}
	return c
}

// byMagic reads formats that begin with a known sequence of bytes. It reports whether data has such
// a format.
func (c *content) byMagic(data []byte, hint nameHint) bool {
	switch {
	case jks.Is(data):
		c.jks(data)
	case pkcs12.Is(data):
		c.pkcs12(data)
	case hint != hintNone && isSignedData(data):
		c.fail(c.pkcs7(data))
	case hint != hintNone && isBouncyCastle(data):
		c.fail(errBouncyCastle)
	default:
		return false
	}
	return true
}

// pem reads PEM blocks and reports whether any of them can hold certificates.
func (c *content) pem(data []byte) bool {
	any := false
	found := func(block pemBlock) {
		if block.err == nil {
			block.err = c.block(block)
		}
		if block.err == nil || !block.embedded {
			any = true
			c.fail(block.err)
		}
	}
	pemBlocks(data, found)
	wrappedPEM(data, func(text []byte) {
		c.parseDecoded(text, func() {
			pemBlocks(text, func(block pemBlock) {
				block.embedded, block.store = true, false
				found(block)
			})
		})
	})
	return any
}

// parseDecoded runs parse on bytes that were decoded from a file and then clears them, because they
// may hold a key. Certificates found by parse are copied.
func (c *content) parseDecoded(decoded []byte, parse func()) {
	before := len(c.certs)
	parse()
	for i := range c.certs[before:] {
		c.certs[before+i].der = bytes.Clone(c.certs[before+i].der)
	}
	clear(decoded[:cap(decoded)])
}

// block adds the certificates of a PEM block. Labels are unreliable: some CERTIFICATE blocks hold
// PKCS#7.
func (c *content) block(block pemBlock) error {
	if isSignedData(block.der) {
		return c.pkcs7(block.der)
	}
	if block.store && pkcs12.Is(block.der) {
		c.pkcs12(block.der)
		return nil
	}
	cert, _, err := firstCertificate(block.der)
	if err != nil {
		return err
	}
	c.add(cert, formatPEM)
	return nil
}

// binary reads a file that holds no PEM although its name suggests certificates.
func (c *content) binary(data []byte, hint nameHint) {
	if isText(data[:min(len(data), HeadSize)]) {
		if c.bareBase64(data, hint) || hint != hintDER {
			return
		}
	}
	err := c.der(data)
	switch {
	case err == nil:
	case !errors.Is(err, errNoCertificate):
		c.fail(err)
	case data[0] != ber.TagSequence || hint == hintStore:
		c.fail(errUnknown)
	}
}

var errBase64Store = errors.New("PKCS#12 in base64: rename the file to .p12 or .pfx to have it read")

// bareBase64 reads base64 without PEM markers, as mail and secret stores use for key stores.
func (c *content) bareBase64(data []byte, hint nameHint) (isDER bool) {
	if bytes.IndexByte(data, ':') >= 0 {
		return false
	}
	decoded, err := decodePEM(data)
	if err != nil {
		return false
	}
	c.parseDecoded(decoded, func() {
		// Passwords are tried only if the name suggests a key store.
		if pkcs12.Is(decoded) && hint != hintStore {
			c.fail(errBase64Store)
			return
		}
		isDER = c.byMagic(decoded, hint) || c.der(decoded) == nil
	})
	return isDER
}

// errUnknown is reported if a file lacks the certificates that its name suggests. Other DER, such
// as a key, is not an error.
var errUnknown = errors.New("neither PEM nor another supported format")

// der adds the certificate at the start of b and those that follow it directly. Like OpenSSL, it
// ignores trailing garbage.
func (c *content) der(b []byte) error {
	cert, rest, err := firstCertificate(b)
	for next := err; next == nil; cert, rest, next = firstCertificate(rest) {
		c.add(cert, formatDER)
	}
	return err
}

// isOtherSigned reports whether der is a certificate request or a revocation list, which have the
// same outer structure as a certificate.
func isOtherSigned(der []byte) bool {
	if _, err := x509.ParseCertificateRequest(der); err == nil {
		return true
	}
	_, err := x509.ParseRevocationList(der)
	return err == nil
}

// isText reports whether head looks like ASCII or UTF-8 text.
func isText(head []byte) bool {
	for len(head) > 0 {
		r, size := utf8.DecodeRune(head)
		if r == utf8.RuneError && size == 1 && len(head) >= utf8.UTFMax || r < ' ' && !strings.ContainsRune("\t\n\v\f\r\x1b", r) {
			return false
		}
		head = head[size:]
	}
	return true
}
