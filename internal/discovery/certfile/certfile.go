// Package certfile finds the X.509 certificates in the bytes of a file, whatever it is called and
// in whichever of the usual formats they are, and describes each as a report does. Only
// certificates leave it: private keys are neither decrypted nor copied.
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

// formats in the order of their numbers in an Outcome.
var formats = []string{formatPEM, formatDER, formatPKCS7, formatPKCS12, formatJKS}

// IsKey reports whether a file of that name is a private key's: it is not to be read.
func IsKey(name string) bool { return promiseOf(name) == promisesKey }

// Promises reports whether the name of a file says that there are certificates in it, or a key.
func Promises(name string) bool { return promiseOf(name) != promisesNothing }

// promise is what the name of a file says about its content.
type promise int

const (
	promisesNothing     promise = iota // PEM, if anything
	promisesCertificate                // .pem .crt .cer .cert: PEM, or DER
	promisesDER                        // .der
	promisesStore                      // a key store or a PKCS#7 bundle
	promisesKey                        // .key: never read
)

func promiseOf(name string) promise {
	switch strings.ToLower(path.Ext(name)) {
	case ".pem", ".crt", ".cer", ".cert":
		return promisesCertificate
	case ".der":
		return promisesDER
	case ".p7b", ".p7c", ".p12", ".pfx", ".jks", ".keystore", ".ks", ".bks", ".bcfks", ".uber", ".ubr":
		return promisesStore
	case ".key":
		return promisesKey
	}
	return promisesNothing
}

// HeadSize is how much of a file is looked at before the rest is read.
const HeadSize = 4096

// WorthReading reports whether a file that begins with head can hold a
// certificate. A name that promises one is believed, and so is the signature
// of a key store under any name. Beyond those only text can hold one, as PEM,
// anywhere in it; text has no NUL. (Text in UTF-16 has; no tool writes PEM so.)
func WorthReading(name string, head []byte) bool {
	return isOther(name, head) || bytes.IndexByte(head, 0) < 0
}

// WorthParsing reports whether Parse may find something in the bytes of a file. It costs one look
// at each byte, which is all that most files of a tree are worth.
func WorthParsing(name string, data []byte) bool {
	return isOther(name, data) || hasMarker(data)
}

// isOther reports whether a file may hold something else than PEM.
func isOther(name string, head []byte) bool {
	return promiseOf(name) != promisesNothing || jks.Is(head) || pkcs12.Is(head) || looksLikeDER(name, head)
}

// IsStore reports whether a file is a key store by its name or content: reading it may cost the time
// of trying passwords.
func IsStore(name string, data []byte) bool {
	return pkcs12.Is(data) || promiseOf(name) == promisesStore || bytes.Contains(data, []byte(pemBegin+labelPKCS12))
}

// looksLikeDER reports whether a file is read as DER though its name does not promise that: it has
// no extension, or a number as OpenSSL's hashes have, and begins as a certificate or a bundle does.
func looksLikeDER(name string, b []byte) bool {
	return strings.Trim(path.Ext(name), ".0123456789") == "" && (looksLikeCertificate(b) || isSignedData(b))
}

// found is one certificate in a file. der may alias the file's bytes.
type found struct {
	der    []byte
	format string
}

// content is what a file holds.
type content struct {
	certs  []found
	causes []string // of damage

	// locked: a password that is not configured would show more.
	locked bool

	passwords []string
	stores    *pkcs12.Reader // nil: there has been none
}

func (c *content) add(der []byte, format string) {
	c.certs = append(c.certs, found{der, format})
}

// fail notes the cause of damage, if err is one.
func (c *content) fail(err error) {
	// A file of damaged blocks must not fill the report alone.
	const maxCauses = 8
	switch {
	case err == nil:
	case len(c.causes) > 0 && c.causes[len(c.causes)-1] == err.Error():
	case len(c.causes) < maxCauses:
		c.causes = append(c.causes, err.Error())
	case len(c.causes) == maxCauses:
		c.causes = append(c.causes, "further damage in this file is not listed")
	}
}

// Parser looks into files. It may do so for several at a time.
type Parser struct {
	Passwords []string // tried on PKCS#12 stores after the empty one, in order

	recent record.Recent
}

// Parse finds the certificates in data, the bytes of a file of that name. It keeps none of them.
func (p *Parser) Parse(name string, data []byte) Outcome {
	return p.outcome(parse(name, data, p.Passwords))
}

// parse is Parse before the certificates are described.
func parse(name string, data []byte, passwords []string) content {
	c := content{passwords: passwords}
	promised := promiseOf(name)
	if looksLikeDER(name, data) {
		promised = promisesCertificate
	}
	switch {
	case len(data) == 0 || promised == promisesKey:
	case c.signed(data, promised):
	case c.pem(data):
	case promised != promisesNothing:
		c.binary(data, promised)
	}
	return c
}

// signed reads what its first bytes tell apart.
func (c *content) signed(data []byte, promised promise) bool {
	switch {
	case jks.Is(data):
		c.jks(data)
	case pkcs12.Is(data):
		c.pkcs12(data)
	case promised != promisesNothing && isSignedData(data):
		c.fail(c.pkcs7(data))
	case promised != promisesNothing && isBouncyCastle(data):
		c.fail(errBouncyCastle)
	default:
		return false
	}
	return true
}

// pem reads PEM blocks and reports whether there were any that can hold certificates.
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
		c.inside(text, func() {
			pemBlocks(text, func(block pemBlock) {
				block.embedded, block.store = true, false
				found(block)
			})
		})
	})
	return any
}

// inside parses what was decoded from a file. There may be a key in it, so only the certificates
// stay in memory.
func (c *content) inside(decoded []byte, parse func()) {
	before := len(c.certs)
	parse()
	for i := range c.certs[before:] {
		c.certs[before+i].der = bytes.Clone(c.certs[before+i].der)
	}
	clear(decoded[:cap(decoded)])
}

// block adds the certificates of one PEM block, whose label is not to be
// trusted: PKCS#7 is found in CERTIFICATE blocks too.
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

// binary reads what a name promised and PEM is not.
func (c *content) binary(data []byte, promised promise) {
	if isText(data[:min(len(data), HeadSize)]) {
		if c.bareBase64(data, promised) || promised != promisesDER {
			return
		}
	}
	err := c.der(data)
	switch {
	case err == nil:
	case !errors.Is(err, errNoCertificate):
		c.fail(err)
	case data[0] != ber.TagSequence || promised == promisesStore:
		c.fail(errUnknown)
	}
}

var errBase64Store = errors.New("PKCS#12 in base64 under a name that does not promise it: call it .p12 or .pfx")

// bareBase64 reads base64 without PEM's markers, as mail and secret stores hand out key stores.
func (c *content) bareBase64(data []byte, promised promise) (isDER bool) {
	if bytes.IndexByte(data, ':') >= 0 {
		return false
	}
	decoded, err := decodePEM(data)
	if err != nil {
		return false
	}
	c.inside(decoded, func() {
		// Under any other name it does not get to spend time on passwords.
		if pkcs12.Is(decoded) && promised != promisesStore {
			c.fail(errBase64Store)
			return
		}
		isDER = c.signed(decoded, promised) || c.der(decoded) == nil
	})
	return isDER
}

// errUnknown: the name promised something that is not there. DER of another kind, such as a key, is
// not an error.
var errUnknown = errors.New("neither PEM nor any other format that is known here")

// der adds the certificate at the start of b, and those that follow it directly. Anything else that
// follows is trailing garbage, as to OpenSSL.
func (c *content) der(b []byte) error {
	cert, rest, err := firstCertificate(b)
	for next := err; next == nil; cert, rest, next = firstCertificate(rest) {
		c.add(cert, formatDER)
	}
	return err
}

// isOtherSigned reports whether der is a signed object of another kind: a
// request and a revocation list have a certificate's outer shape.
func isOtherSigned(der []byte) bool {
	if _, err := x509.ParseCertificateRequest(der); err == nil {
		return true
	}
	_, err := x509.ParseRevocationList(der)
	return err == nil
}

// isText reports whether head looks like text in ASCII or UTF-8.
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
