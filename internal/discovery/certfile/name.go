package certfile

import (
	"cmp"
	"encoding/hex"
	"slices"
	"strings"

	"certctl-agent/internal/ber"
)

// commonAttributes are the attributes that crypto/x509/pkix knows, in the order in which it writes
// them. Control planes store names in that order.
var commonAttributes = []string{oidSerialNumber, oidCommonName, "2.5.4.11", "2.5.4.10", "2.5.4.17", "2.5.4.9", "2.5.4.7", "2.5.4.8", "2.5.4.6"}

const (
	oidSerialNumber = "2.5.4.5"
	oidCommonName   = "2.5.4.3"
	idCommonName    = "\x55\x04\x03" // the same, encoded
)

// attributeNames are the names in crypto/x509/pkix and RFC 4514, section 3, and OpenSSL's names for
// other attributes of public certificates.
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

// distinguishedName is a Name (RFC 5280, section 4.1.2.4).
type distinguishedName struct {
	attributes []attribute
	commonName string // the last one, as in crypto/x509
	cut        bool   // attributes were omitted
}

type attribute struct {
	oid    string // dotted; empty if raw is not a valid attribute
	raw    []byte // encoding of the value
	text   string // the value, if isText
	isText bool
	joined bool // in the same RDN as the previous attribute
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

// String returns the name in the format of crypto/x509/pkix if all attributes are common ones,
// because control planes compare it with the reports of other programs. Otherwise it returns the
// format of RFC 4514 with the attributes in the order of the certificate: pkix would write the
// other attributes as numbers and hex.
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

// common returns the attributes of a type that pkix.Name keeps: only the last CN and SERIALNUMBER,
// unless that is empty.
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

// write writes an attribute (RFC 4514, sections 2.3 and 2.4) as text if it has a known name and a
// text value, and in hex otherwise.
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
