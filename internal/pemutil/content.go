package pemutil

import (
	"bytes"
	"strings"

	"certctl-agent/internal/ber"
	"certctl-agent/internal/jks"
	"certctl-agent/internal/pkcs12"
)

// Content is the apparent content of a file that is about to be replaced. It is judged by form, so
// damaged, encrypted and unknown certificates and keys count, too.
type Content struct {
	Certificates bool // or related data: parameters, requests, public keys
	Keys         bool // private keys, or key stores
}

// ContentOf finds certificates and keys in PEM, DER, PKCS#12 and Java key stores. It ignores
// programs, whatever is embedded in them, and SSH and PGP keys, which HoldsPrivateKey does find.
func ContentOf(data []byte) Content {
	if bytes.HasPrefix(data, []byte("#!")) || bytes.HasPrefix(data, []byte("\x7fELF")) {
		return Content{}
	}
	var c Content
	beside := false // a curve, a request or a public key
	for label, begins := range labels(data) {
		switch {
		case !begins: // quoted in a configuration file or source code
		case strings.Contains(label, "OPENSSH"), strings.Contains(label, "SSH2"), strings.Contains(label, "PGP"):
		case strings.Contains(label, privateKeySuffix):
			c.Keys = true
		case label == curveType, strings.HasSuffix(label, "PUBLIC KEY"), strings.HasSuffix(label, "CERTIFICATE REQUEST"):
			beside = true
		case strings.Contains(label, certificateType), strings.HasSuffix(label, "PARAMETERS"),
			strings.Contains(label, "PKCS"), label == "CMS", label == "X509 CRL":
			c.Certificates = true
		}
	}
	// Beside a key these belong to the key: servers ignore them.
	c.Certificates = c.Certificates || beside && !c.Keys
	if isStore(data) {
		return Content{Certificates: true, Keys: true}
	}
	if isKeyDER(data) {
		c.Keys = true
	} else if _, ok := sequence(data); ok {
		c.Certificates = true
	}
	return c
}

// HoldsPrivateKey reports whether replacing data might destroy a private key. When in doubt it
// reports true.
func HoldsPrivateKey(data []byte) bool {
	for label := range labels(data) {
		if strings.Contains(label, privateKeySuffix) {
			return true
		}
	}
	return isStore(data) || isKeyDER(data)
}

// maxLabel bounds the length of a label in bytes.
const maxLabel = 64

// labels yields the label of every PEM block in upper case, and whether the block starts at the
// beginning of a line, which servers require. Incomplete blocks count: two dashes, BEGIN, a label
// and two dashes are enough.
func labels(data []byte) func(yield func(label string, begins bool) bool) {
	return func(yield func(string, bool) bool) {
		const begin = "BEGIN "
		upper := bytes.ToUpper(data)
		for done := 0; ; {
			at := bytes.Index(upper[done:], []byte(begin))
			if at < 0 {
				return
			}
			before := bytes.TrimRight(upper[done:done+at], " \t")
			done += at + len(begin)
			label, _, closed := bytes.Cut(upper[done:min(done+maxLabel, len(upper))], []byte("--"))
			if !closed || !bytes.HasSuffix(before, []byte("--")) {
				continue
			}
			before = bytes.TrimSuffix(bytes.TrimRight(before, "-"), []byte(byteOrderMark))
			begins := len(before) == 0 || bytes.HasSuffix(before, []byte("\n")) || bytes.HasSuffix(before, []byte("\r"))
			if !yield(string(bytes.TrimSpace(label)), begins) {
				return
			}
		}
	}
}

// isStore reports whether data is a key store.
func isStore(data []byte) bool { return pkcs12.Is(data) || jks.Is(data) }

// sequence returns the contents of data if it is a single SEQUENCE.
func sequence(data []byte) ([]byte, bool) {
	outer, rest, err := ber.Element(data)
	// Some programs append a line feed to DER.
	return outer.Body, err == nil && outer.Tag == ber.TagSequence && len(bytes.Trim(rest, "\r\n")) == 0
}

// isKeyDER reports whether data has the structure of a private key: it starts with a small version
// number (PKCS#1, SEC 1, PKCS#8), or with an algorithm and an octet string (encrypted PKCS#8, RFC
// 5208, section 6).
func isKeyDER(data []byte) bool {
	body, ok := sequence(data)
	if !ok {
		return false
	}
	const universal = 0xc0 // tag bits that are zero for universal types
	first, rest, err := ber.Element(body)
	second, _, err2 := ber.Element(rest)
	if err != nil || err2 != nil || second.Tag&universal != 0 {
		return false
	}
	return first.Tag == ber.TagInteger && len(first.Body) == 1 || first.Tag == ber.TagSequence && second.Tag == ber.TagOctetString
}
