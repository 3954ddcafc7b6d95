package pemutil

import (
	"bytes"
	"strings"

	"certctl-agent/internal/ber"
	"certctl-agent/internal/jks"
	"certctl-agent/internal/pkcs12"
)

// Content is what a file that is about to be replaced seems to hold. It is
// found by shape, so that damaged, encrypted and unknown ones count too.
type Content struct {
	Certificates bool // or what comes with them: parameters, requests, public keys
	Keys         bool // private keys, or stores that can hold them
}

// ContentOf looks for certificates and keys: PEM, DER, PKCS#12 and Java key
// stores. A program counts as neither, whatever it carries, and so does a key
// of SSH or PGP, though HoldsPrivateKey sees it.
func ContentOf(data []byte) Content {
	if bytes.HasPrefix(data, []byte("#!")) || bytes.HasPrefix(data, []byte("\x7fELF")) {
		return Content{}
	}
	var c Content
	beside := false // a curve, a request or a public key
	for label, begins := range labels(data) {
		switch {
		case !begins: // quoted in a configuration or in code
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
	// Beside a key these are a part of it: no server reads them.
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

// HoldsPrivateKey reports whether a private key would be lost with data. It
// errs on the side of finding one.
func HoldsPrivateKey(data []byte) bool {
	for label := range labels(data) {
		if strings.Contains(label, privateKeySuffix) {
			return true
		}
	}
	return isStore(data) || isKeyDER(data)
}

// maxLabel bounds what is taken for the label of a PEM block.
const maxLabel = 64

// labels yields the label of every PEM block in upper case, and whether the
// block begins a line, as those do that a server reads. A block need not be
// whole: two dashes, BEGIN, and dashes again are enough.
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

// sequence returns the content of the one SEQUENCE that data is.
func sequence(data []byte) ([]byte, bool) {
	outer, rest, err := ber.Element(data)
	// Some programs end a DER file with a line feed.
	return outer.Body, err == nil && outer.Tag == ber.TagSequence && len(bytes.Trim(rest, "\r\n")) == 0
}

// isKeyDER reports whether data has the outer shape of a private key: a small
// version number first (PKCS#1, SEC 1, PKCS#8), or an algorithm before an octet
// string (encrypted PKCS#8, RFC 5208, section 6).
func isKeyDER(data []byte) bool {
	body, ok := sequence(data)
	if !ok {
		return false
	}
	const universal = 0xc0 // the bits of the tag that are zero
	first, rest, err := ber.Element(body)
	second, _, err2 := ber.Element(rest)
	if err != nil || err2 != nil || second.Tag&universal != 0 {
		return false
	}
	return first.Tag == ber.TagInteger && len(first.Body) == 1 || first.Tag == ber.TagSequence && second.Tag == ber.TagOctetString
}
