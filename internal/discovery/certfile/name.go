package certfile

import (
	"cmp"
	"encoding/hex"
	"slices"
	"strings"

	"certctl-agent/internal/ber"
)

// commonAttributes are the attributes that crypto/x509/pkix knows, in the order in which it writes
// them, which is the order that control planes have in their databases.
var commonAttributes = []string{oidSerialNumber, oidCommonName, "2.5.4.11", "2.5.4.10", "2.5.4.17", "2.5.4.9", "2.5.4.7", "2.5.4.8", "2.5.4.6"}

const (
	oidSerialNumber = "2.5.4.5"
	oidCommonName   = "2.5.4.3"
	idCommonName    = "\x55\x04\x03" // the same, encoded
)

// attributeNames are those of crypto/x509/pkix and of RFC 4514, section 3, and beyond them the ones
// that OpenSSL has for attributes of public certificates.
var attributeNames = map[string]string{
	oidSerialNumber:              "SERIALNUMBER",
	oidCommonName:                "CN",
	"2.5.4.6":                    "C",
	"2.5.4.7":                    "L",
	"2.5.4.8":                    "ST",
	"2.5.4.9":                    "STREET",
	"2.5.4.10":                   "O",
	"2.5.4.11":                   "OU",
	"2.5.4.17":                   "POSTALCODE",
	"0.9.2342.19200300.100.1.1":  "UID",
	"0.9.2342.19200300.100.1.25": "DC",
	"0.9.2342.19200300.100.1.3":  "mail",
	"1.2.840.113549.1.9.1":       "emailAddress",
	"1.2.840.113549.1.9.2":       "unstructuredName",
	"1.2.840.113549.1.9.8":       "unstructuredAddress",
	"1.3.6.1.4.1.311.60.2.1.1":   "jurisdictionL",
	"1.3.6.1.4.1.311.60.2.1.2":   "jurisdictionST",
	"1.3.6.1.4.1.311.60.2.1.3":   "jurisdictionC",
	"2.5.4.4":                    "SN",
	"2.5.4.12":                   "title",
	"2.5.4.13":                   "description",
	"2.5.4.15":                   "businessCategory",
	"2.5.4.20":                   "telephoneNumber",
	"2.5.4.41":                   "name",
	"2.5.4.42":                   "GN",
	"2.5.4.43":                   "initials",
	"2.5.4.44":                   "generationQualifier",
	"2.5.4.45":                   "x500UniqueIdentifier",
	"2.5.4.46":                   "dnQualifier",
	"2.5.4.65":                   "pseudonym",
	"2.5.4.97":                   "organizationIdentifier",
}

// distinguishedName is a Name of RFC 5280, 4.1.2.4.
type distinguishedName struct {
	attributes []attribute
	commonName string // the last one, as in crypto/x509
	cut        bool   // there are more attributes
}

type attribute struct {
	oid    string // dotted; empty: raw is not an attribute at all
	raw    []byte // encoding of the value
	text   string // the value, when isText
	isText bool
	joined bool // in the same RDN as the attribute before
}

func readName(name ber.Value) (n distinguishedName) {
	size := 0
	fits := func(encoded []byte) bool {
		size += len(encoded)
		n.cut = size > maxText
		return !n.cut
	}
	for rdn, err := range name.Children() {
		if err != nil {
			if fits(name.Body) {
				n.attributes = append(n.attributes, attribute{raw: name.Body})
			}
			return n
		}
		joined := false
		for pair, err := range rdn.Children() {
			f := ber.Fields{Rest: pair.Body}
			id := f.Next(ber.TagOID).Body
			v, _, valueErr := ber.Element(f.Rest)
			if err != nil || f.Err != nil || valueErr != nil {
				if fits(rdn.Full) {
					n.attributes = append(n.attributes, attribute{raw: rdn.Full, joined: joined})
				}
				break
			}
			isCommonName := string(id) == idCommonName
			if !fits(pair.Full) && !isCommonName {
				continue
			}
			a := attribute{oid: ber.OIDText(id), raw: v.Full, joined: joined}
			if a.text, a.isText = v.Text(maxText); a.isText && isCommonName {
				n.commonName = a.text
			}
			if !n.cut {
				n.attributes = append(n.attributes, a)
			}
			joined = true
		}
	}
	return n
}

// String is the name as crypto/x509/pkix writes it where all attributes are common ones: control
// planes compare it with what other programs reported. With any other attribute it is the form of
// RFC 4514, in the order of the certificate; pkix would write those attributes as a number and hex.
func (n distinguishedName) String() string {
	var b strings.Builder
	write := func(rdn []attribute) {
		for i, a := range rdn {
			switch {
			case i > 0:
				b.WriteByte('+')
			case b.Len() > 0:
				b.WriteByte(',')
			}
			a.write(&b)
		}
	}
	if n.isCommon() {
		for _, oid := range commonAttributes {
			write(n.common(oid))
		}
		return b.String()
	}
	for end := len(n.attributes); end > 0; {
		begin := end - 1
		for n.attributes[begin].joined {
			begin--
		}
		write(n.attributes[begin:end])
		end = begin
	}
	return b.String()
}

func (n distinguishedName) isCommon() bool {
	return !slices.ContainsFunc(n.attributes, func(a attribute) bool { return !slices.Contains(commonAttributes, a.oid) || !a.isText })
}

// common is what pkix.Name keeps of one type: of CN and SERIALNUMBER the last one alone, unless that
// is empty.
func (n distinguishedName) common(oid string) (list []attribute) {
	for _, a := range n.attributes {
		if a.oid == oid {
			list = append(list, a)
		}
	}
	if last := len(list) - 1; last >= 0 && (oid == oidCommonName || oid == oidSerialNumber) {
		if list = list[last:]; list[0].text == "" {
			return nil
		}
	}
	return list
}

// write writes an attribute (RFC 4514, 2.3 and 2.4): with its name and as text where it has both,
// else in hex.
func (a attribute) write(b *strings.Builder) {
	name := attributeNames[a.oid]
	b.WriteString(cmp.Or(name, a.oid))
	if a.oid != "" {
		b.WriteByte('=')
	}
	if name != "" && a.isText {
		escape(b, a.text)
		return
	}
	b.WriteByte('#')
	b.WriteString(hex.EncodeToString(a.raw))
}

func escape(b *strings.Builder, s string) {
	for i, c := range s {
		switch c {
		case ',', '+', '"', '\\', '<', '>', ';':
			b.WriteByte('\\')
		case ' ':
			if i == 0 || i == len(s)-1 {
				b.WriteByte('\\')
			}
		case '#':
			if i == 0 {
				b.WriteByte('\\')
			}
		}
		b.WriteRune(c)
	}
}
