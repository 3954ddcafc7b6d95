package certfile

import (
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"

	"certctl-agent/internal/api"
	"certctl-agent/internal/ber"
)

// What a report says of one certificate is bounded: a file may hold a hundred thousand names, and
// a fleet's hosts scan what anybody puts there. Whatever fits a report at all stays below.
const (
	maxNames     = 10_000    // alternative names
	maxNameBytes = 256 << 10 // of all of them together
	maxText      = 16 << 10  // bytes of any other field
)

// errCut comes beside a certificate that is reported in part.
var errCut = fmt.Errorf("a certificate has more than %d names or %d KiB of them, or a field of more than %d KiB: it is reported without the rest",
	maxNames, maxNameBytes>>10, maxText>>10)

const (
	oidSubjectAltName   = "\x55\x1d\x11"
	oidBasicConstraints = "\x55\x1d\x13"
)

// describe fills in everything that a report says about a certificate except its fingerprint, its
// PEM and where it was found. der is exactly one certificate. The certificate is valid with a nil
// error and with errCut.
//
// crypto/x509 reads what may be trusted; this reads what is there, as `openssl x509 -text` does,
// and agrees with crypto/x509 wherever that reads a certificate at all. Only the order of the
// fields and a validity are asked for. Whatever else cannot be read is left out, or shown as it is
// encoded, and does not cost the rest.
func describe(der []byte) (api.DiscoveredCertificate, error) {
	tbs := ber.Sequence(der).Inside(ber.TagSequence)
	if tbs.At(ber.TagExplicit0) {
		tbs.Next(ber.TagExplicit0) // version
	}
	serial := tbs.Next(ber.TagInteger)
	tbs.Next(ber.TagSequence) // signature
	issuer := tbs.Next(ber.TagSequence)
	validity := tbs.Inside(ber.TagSequence)
	subject := tbs.Next(ber.TagSequence)
	key := tbs.Next(ber.TagSequence)
	if tbs.Err != nil {
		return api.DiscoveredCertificate{}, fmt.Errorf("x509: damaged certificate: %w", tbs.Err)
	}
	notBefore, err := readTime(validity)
	if err != nil {
		return api.DiscoveredCertificate{}, fmt.Errorf("x509: the start of the certificate's validity: %w", err)
	}
	notAfter, err := readTime(validity)
	if err != nil {
		return api.DiscoveredCertificate{}, fmt.Errorf("x509: the end of the certificate's validity: %w", err)
	}
	var cut bool // anything is left out
	bounded := func(s string) string {
		s, isCut := bound(api.Text(s))
		cut = cut || isCut
		return s
	}
	issuerName, subjectName := readName(issuer), readName(subject)
	cut = issuerName.cut || subjectName.cut
	extensions := readExtensions(tbs.Rest)
	cut = cut || extensions.cut
	algorithm, bits := publicKey(key)
	c := api.DiscoveredCertificate{
		CommonName:   bounded(subjectName.commonName),
		SANs:         make([]string, 0, extensions.count), // never nil
		SerialNumber: bounded(serialNumber(serial.Body)),
		IssuerDN:     bounded(issuerName.String()),
		SubjectDN:    bounded(subjectName.String()),
		NotBefore:    notBefore.Format(time.RFC3339),
		NotAfter:     notAfter.Format(time.RFC3339),
		KeyAlgorithm: algorithm,
		KeySize:      bits,
		IsCA:         extensions.isCA,
	}
	for _, names := range extensions.names {
		c.SANs = append(c.SANs, names...)
	}
	if cut {
		return c, errCut
	}
	return c, nil
}

// bound shortens s, which is valid UTF-8, to maxText bytes and an ellipsis.
func bound(s string) (string, bool) {
	if len(s) <= maxText {
		return s, false
	}
	end := maxText
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…", true
}

// serialNumber is the hex form of an INTEGER, of any length and minimal or not.
func serialNumber(octets []byte) string {
	if len(octets) > maxText {
		return fmt.Sprintf("%x", octets[:maxText]) // which is cut once more
	}
	n := new(big.Int).SetBytes(octets)
	if len(octets) > 0 && octets[0] >= 0x80 {
		n.Sub(n, new(big.Int).Lsh(big.NewInt(1), uint(8*len(octets)))) // two's complement
	}
	return n.Text(16)
}

var errTime = errors.New("it is not a point in time")

// readTime reads UTCTime or GeneralizedTime in any form of X.680 and some more: without seconds,
// with a fraction of one, with an offset, or under each other's tag.
func readTime(f *ber.Fields) (time.Time, error) {
	tag := byte(ber.TagUTCTime)
	if f.At(ber.TagGeneralizedTime) {
		tag = ber.TagGeneralizedTime
	}
	octets := f.Next(tag).Body
	if f.Err != nil {
		return time.Time{}, f.Err
	}
	digits := 0
	for digits < len(octets) && octets[digits] >= '0' && octets[digits] <= '9' {
		digits++
	}
	rest := octets[digits:]
	two := func() int {
		if len(octets) < 2 || digits < 2 {
			return 0
		}
		n := int(octets[0]-'0')*10 + int(octets[1]-'0')
		octets, digits = octets[2:], digits-2
		return n
	}
	var year int
	switch {
	case digits == 14, tag == ber.TagGeneralizedTime && (digits == 10 || digits == 12):
		year = 100*two() + two()
	case digits == 10 || digits == 12:
		if year = 1900 + two(); year < 1950 { // RFC 5280, 4.1.2.5.1
			year += 100
		}
	default:
		return time.Time{}, errTime
	}
	month, day, hour, minute, second := two(), two(), two(), two(), two()
	if month < 1 || month > 12 || day < 1 || day > 31 || hour > 24 || minute > 59 || second > 60 {
		return time.Time{}, errTime
	}
	t := time.Date(year, time.Month(month), day, hour, minute, second, 0, time.UTC)
	for len(rest) > 0 && (rest[0] == '.' || rest[0] == ',' || rest[0] >= '0' && rest[0] <= '9') {
		rest = rest[1:]
	}
	if zone, err := time.Parse("-0700", string(rest[:min(len(rest), 5)])); err == nil {
		_, offset := zone.Zone()
		if moved := t.Add(-time.Duration(offset) * time.Second); moved.Year() >= 0 && moved.Year() <= 9999 { // as RFC 3339 needs it
			t = moved
		}
	}
	return t, nil
}

// extensions is what a report has of a certificate's extensions.
type extensions struct {
	isCA         bool
	names        [len(nameTags)][]string
	count, bytes int // of all names
	cut          bool
}

// nameTags are the names that a report has, in the order of the protocol: dNSName, rfc822Name,
// iPAddress and uniformResourceIdentifier of RFC 5280, 4.2.1.6.
const nameTags = "\x82\x81\x87\x86"

// readExtensions reads what follows the public key (RFC 5280, 4.1): identifiers, which nobody uses,
// and the extensions.
func readExtensions(b []byte) (x extensions) {
	for part, err := range (ber.Value{Body: b}).Children() {
		if err != nil || part.Tag != ber.TagExplicit3 {
			continue
		}
		for extension, err := range sequenceIn(part.Body).Children() {
			if err != nil {
				break
			}
			f := ber.Fields{Rest: extension.Body}
			id := f.OID()
			if f.At(ber.TagBoolean) {
				f.Next(ber.TagBoolean) // critical
			}
			content := sequenceIn(f.Octets(ber.TagOctetString))
			switch {
			case f.Err != nil:
			case id == oidSubjectAltName:
				x.readNames(content)
			case id == oidBasicConstraints:
				ca := ber.Fields{Rest: content.Body}
				if ca.At(ber.TagBoolean) {
					// BER has any octet but zero for TRUE (X.690, 8.2.2).
					x.isCA = x.isCA || strings.Trim(string(ca.Next(ber.TagBoolean).Body), "\x00") != ""
				}
			}
		}
	}
	return x
}

// sequenceIn is the SEQUENCE at the start of b, or an empty one.
func sequenceIn(b []byte) ber.Value {
	v, _, err := ber.Element(b)
	if err != nil || v.Tag != ber.TagSequence {
		return ber.Value{}
	}
	return v
}

// readNames reads the names that a report has.
func (x *extensions) readNames(names ber.Value) {
	for name, err := range names.Children() {
		if err != nil {
			return
		}
		kind := strings.IndexByte(nameTags, name.Tag)
		if kind < 0 {
			continue
		}
		x.count++
		x.bytes += len(name.Body)
		if x.count > maxNames || x.bytes > maxNameBytes {
			x.cut = true
			return
		}
		shown := string(name.Body)
		switch name.Tag {
		case 0x87:
			shown = net.IP(name.Body).String()
		case 0x86:
			if uri, err := url.Parse(shown); err == nil {
				shown = uri.String()
			}
		}
		x.names[kind] = append(x.names[kind], api.Text(shown))
	}
}

// errNoCertificate: well-formed, but something else.
var errNoCertificate = errors.New("not a certificate")

// firstCertificate is the certificate at the start of b, judged by its outer shape (RFC 5280, 4.1):
// its own bytes, and what follows it, which OpenSSL ignores too.
func firstCertificate(b []byte) (der, rest []byte, err error) {
	outer, rest, err := ber.Element(b)
	if err != nil {
		if len(b) > 0 && b[0] == ber.TagSequence {
			return nil, nil, fmt.Errorf("damaged certificate: %w", err)
		}
		return nil, nil, errNoCertificate
	}
	if outer.Tag != ber.TagSequence {
		return nil, rest, errNoCertificate
	}
	parts := ber.Fields{Rest: outer.Body}
	parts.Next(ber.TagSequence)
	parts.Next(ber.TagSequence)
	parts.Next(ber.TagBitString)
	if errors.Is(parts.Err, ber.ErrTruncated) {
		return nil, rest, fmt.Errorf("damaged certificate: %w", parts.Err)
	}
	if parts.Err != nil {
		return nil, rest, errNoCertificate
	}
	return outer.Full, rest, nil
}

// looksLikeCertificate reports whether b, the beginning of a file, is that of a certificate: up to
// the validity, which neither a request nor a revocation list has in that place.
func looksLikeCertificate(b []byte) bool {
	tbs := ber.Fields{Rest: ber.Open(ber.Open(b))}
	if tbs.At(ber.TagExplicit0) {
		tbs.Next(ber.TagExplicit0)
	}
	tbs.Next(ber.TagInteger)
	algorithm := tbs.Inside(ber.TagSequence)
	tbs.Next(ber.TagSequence) // issuer
	validity := tbs.Inside(ber.TagSequence)
	return algorithm.At(ber.TagOID) && (validity.At(ber.TagUTCTime) || validity.At(ber.TagGeneralizedTime))
}
