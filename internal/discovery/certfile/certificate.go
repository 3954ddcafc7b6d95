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

// The fields of one certificate in a report are bounded, because anyone may put a file with a
// hundred thousand names on a host. Certificates that fit into a report otherwise are far below
// these bounds.
const (
	maxNames     = 10_000    // alternative names
	maxNameBytes = 256 << 10 // bytes of all alternative names
	maxText      = 16 << 10  // bytes of any other field
)

// errCut accompanies a certificate of which some fields were cut.
var errCut = fmt.Errorf("a certificate has more than %d names or %d KiB of them, or a field of more than %d KiB: only part of it is reported",
	maxNames, maxNameBytes>>10, maxText>>10)

const (
	oidSubjectAltName   = "\x55\x1d\x11"
	oidBasicConstraints = "\x55\x1d\x13"
)

// describe returns what a report says about a certificate, except its fingerprint, PEM and path.
// der must be exactly one certificate. The result is valid if the error is nil or errCut.
//
// Unlike crypto/x509, which accepts only what may be trusted, describe reads what is there, like
// "openssl x509 -text". It agrees with crypto/x509 on every certificate that crypto/x509 can read.
// It requires only the order of the fields and a validity. Other fields that it cannot read are
// omitted or shown as encoded.
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
		return api.DiscoveredCertificate{}, fmt.Errorf("x509: invalid notBefore: %w", err)
	}
	notAfter, err := readTime(validity)
	if err != nil {
		return api.DiscoveredCertificate{}, fmt.Errorf("x509: invalid notAfter: %w", err)
	}
	var cut bool // some field is incomplete
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

// bound cuts s, which must be valid UTF-8, to maxText bytes and an ellipsis. It reports whether it
// did.
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

// serialNumber formats an INTEGER in hex. The INTEGER may have any length and need not be minimal.
func serialNumber(octets []byte) string {
	if len(octets) > maxText {
		return fmt.Sprintf("%x", octets[:maxText]) // twice as long, so bound cuts it
	}
	n := new(big.Int).SetBytes(octets)
	if len(octets) > 0 && octets[0] >= 0x80 {
		n.Sub(n, new(big.Int).Lsh(big.NewInt(1), uint(8*len(octets)))) // two's complement
	}
	return n.Text(16)
}

var errTime = errors.New("not a valid time")

// readTime reads UTCTime or GeneralizedTime in any form that X.680 allows, and more: without
// seconds, with fractions, with an offset, or with the tag of the other type.
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
		if moved := t.Add(-time.Duration(offset) * time.Second); moved.Year() >= 0 && moved.Year() <= 9999 { // RFC 3339 has four digits for the year
			t = moved
		}
	}
	return t, nil
}

// extensions holds the contents of a certificate's extensions that a report contains.
type extensions struct {
	isCA         bool
	names        [len(nameTags)][]string
	count, bytes int // of all names
	cut          bool
}

// nameTags are the types of alternative names in a report, in the protocol's order: dNSName,
// rfc822Name, iPAddress and uniformResourceIdentifier (RFC 5280, section 4.2.1.6).
const nameTags = "\x82\x81\x87\x86"

// readExtensions reads the fields after the public key (RFC 5280, section 4.1): the extensions, and
// unique identifiers, which it ignores.
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
					// In BER any nonzero octet is TRUE (X.690, 8.2.2).
					x.isCA = x.isCA || strings.Trim(string(ca.Next(ber.TagBoolean).Body), "\x00") != ""
				}
			}
		}
	}
	return x
}

// sequenceIn returns the SEQUENCE at the start of b, or an empty value.
func sequenceIn(b []byte) ber.Value {
	v, _, err := ber.Element(b)
	if err != nil || v.Tag != ber.TagSequence {
		return ber.Value{}
	}
	return v
}

// readNames collects the alternative names whose types are in nameTags.
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

// errNoCertificate means well-formed data of another kind.
var errNoCertificate = errors.New("not a certificate")

// firstCertificate returns the certificate at the start of b, recognized by its outer structure
// (RFC 5280, section 4.1), and the bytes after it.
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

// looksLikeCertificate reports whether b, the head of a file, begins like a certificate. It checks
// up to the validity, which certificate requests and revocation lists do not have in that place.
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
