// Package ber reads DER and BER (X.690) and writes DER. Streaming tools write PKCS#7 and PKCS#12
// with indefinite lengths and segmented strings, which encoding/asn1 rejects.
package ber

import (
	"crypto/x509"
	"errors"
	"iter"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Identifier octets (X.690).
const (
	TagBoolean         = 0x01
	TagInteger         = 0x02
	TagBitString       = 0x03
	TagOctetString     = 0x04
	TagNull            = 0x05
	TagOID             = 0x06
	TagUTF8String      = 0x0c
	TagNumericString   = 0x12
	TagPrintableString = 0x13
	TagT61String       = 0x14
	TagIA5String       = 0x16
	TagUTCTime         = 0x17
	TagGeneralizedTime = 0x18
	TagVisibleString   = 0x1a
	TagGeneralString   = 0x1b
	TagUniversalString = 0x1c
	TagBMPString       = 0x1e
	TagSequence        = 0x30
	TagSet             = 0x31
	TagContext0        = 0x80 // [0] IMPLICIT on a primitive type
	TagExplicit0       = 0xa0 // [0] EXPLICIT, or IMPLICIT on a constructed type
	TagExplicit3       = 0xa3

	constructed = 0x20

	// maxDepth bounds the nesting of indefinite lengths. PKCS#7 and PKCS#12 need about ten levels.
	maxDepth = 32
)

var (
	ErrTruncated = errors.New("the encoding is truncated")
	ErrInvalid   = errors.New("the encoding is not valid BER")
)

// Value is one encoded element.
type Value struct {
	Tag  byte   // identifier octet
	Full []byte // the whole element
	Body []byte // contents without header and end-of-contents
}

// Element reads the first element of b.
func Element(b []byte) (v Value, rest []byte, err error) { return elementAt(b, 0) }

func elementAt(b []byte, depth int) (v Value, rest []byte, err error) {
	if len(b) < 2 {
		return v, nil, ErrTruncated
	}
	if b[0]&0x1f == 0x1f || depth > maxDepth {
		return v, nil, ErrInvalid // none of the supported formats has high tag numbers
	}
	v.Tag = b[0]
	length, header := int(b[1]), 2
	switch {
	case length == 0x80:
		return indefinite(b, depth)
	case length > 0x80:
		header += length - 0x80
		if len(b) < header {
			return v, nil, ErrTruncated
		}
		length = 0
		for _, octet := range b[2:header] { // BER allows leading zeros (X.690, 8.1.3.5)
			if length = length<<8 | int(octet); length > len(b) {
				return v, nil, ErrTruncated
			}
		}
	}
	if length > len(b)-header {
		return v, nil, ErrTruncated
	}
	end := header + length
	v.Full, v.Body = b[:end:end], b[header:end:end]
	return v, b[end:], nil
}

// Open returns the bytes after the header of the SEQUENCE at the start of b, or nil if b does not
// start with one. b may be only the head of a file.
func Open(b []byte) []byte {
	if len(b) < 2 || b[0] != TagSequence {
		return nil
	}
	header := 2
	if b[1] > 0x80 {
		header += int(b[1] - 0x80)
	}
	if header > len(b) {
		return nil
	}
	return b[header:]
}

// indefinite reads an element whose end is marked by two zero octets (X.690, 8.1.3.6).
func indefinite(b []byte, depth int) (v Value, rest []byte, err error) {
	if b[0]&constructed == 0 {
		return v, nil, ErrInvalid
	}
	inner := b[2:]
	for {
		if len(inner) >= 2 && inner[0] == 0 && inner[1] == 0 {
			end := len(b) - len(inner)
			return Value{Tag: b[0], Full: b[: end+2 : end+2], Body: b[2:end:end]}, inner[2:], nil
		}
		if _, inner, err = elementAt(inner, depth+1); err != nil {
			return v, nil, err
		}
	}
}

// Children yields the elements inside v. If v is damaged, the last pair has the error.
func (v Value) Children() iter.Seq2[Value, error] {
	return func(yield func(Value, error) bool) {
		for rest := v.Body; len(rest) > 0; {
			child, after, err := Element(rest)
			if !yield(child, err) || err != nil {
				return
			}
			rest = after
		}
	}
}

// Octets returns the value of an OCTET STRING and joins its segments, if any (X.690, 8.7.3). Its
// tag may be implicit.
func (v Value) Octets() ([]byte, error) { return v.octetsAt(0) }

func (v Value) octetsAt(depth int) ([]byte, error) {
	if v.Tag&constructed == 0 {
		return v.Body, nil
	}
	if depth > maxDepth {
		return nil, ErrInvalid
	}
	var all []byte
	for piece, err := range v.Children() {
		if err != nil {
			return nil, err
		}
		if piece.Tag&^constructed != TagOctetString {
			return nil, ErrInvalid
		}
		part, err := piece.octetsAt(depth + 1)
		if err != nil {
			return nil, err
		}
		all = append(all, part...)
	}
	return all, nil
}

// Fields reads the elements of a SEQUENCE in order. After the first error, which Err keeps, all
// reads return zero values, so a parser needs to check Err only once.
type Fields struct {
	Rest []byte
	Err  error
}

// Sequence returns the fields of the SEQUENCE at the start of b.
func Sequence(b []byte) *Fields {
	outer := &Fields{Rest: b}
	return outer.Inside(TagSequence)
}

// Next reads an element with the given tag.
func (f *Fields) Next(tag byte) Value {
	if f.Err != nil {
		return Value{}
	}
	v, rest, err := Element(f.Rest)
	switch {
	case err != nil:
		f.Err = err
	case v.Tag != tag:
		f.Err = ErrInvalid
	default:
		f.Rest = rest
		return v
	}
	return Value{}
}

// Inside reads an element with the given tag and returns its fields.
func (f *Fields) Inside(tag byte) *Fields {
	v := f.Next(tag)
	return &Fields{Rest: v.Body, Err: f.Err}
}

// At reports whether the next element has the given tag.
func (f *Fields) At(tag byte) bool { return f.Err == nil && len(f.Rest) > 0 && f.Rest[0] == tag }

// OID reads an object identifier and returns its content octets.
func (f *Fields) OID() string { return string(f.Next(TagOID).Body) }

// Octets reads an OCTET STRING with the given tag, segmented or not.
func (f *Fields) Octets(tag byte) []byte {
	if f.At(tag | constructed) {
		tag |= constructed
	}
	v := f.Next(tag)
	if f.Err != nil {
		return nil
	}
	var all []byte
	all, f.Err = v.Octets()
	return all
}

// Integer reads a small nonnegative INTEGER.
func (f *Fields) Integer() int {
	v := f.Next(TagInteger)
	if f.Err != nil {
		return 0
	}
	if len(v.Body) == 0 || len(v.Body) > 4 || v.Body[0] >= 0x80 {
		f.Err = ErrInvalid
		return 0
	}
	n := 0
	for _, octet := range v.Body {
		n = n<<8 | int(octet)
	}
	return n
}

// OIDText returns the dotted form of an object identifier.
func OIDText(octets []byte) string {
	const maxOID = 128 // three times the longest known one
	var oid x509.OID
	if len(octets) > maxOID || oid.UnmarshalBinary(octets) != nil {
		return "unreadable"
	}
	return oid.String()
}

// Text returns the value of a character string and whether v is one. Of a string longer than limit
// bytes it returns at least the first limit bytes. A string that is invalid for its type is read as
// UTF-8 or else as Latin-1: most such strings come from programs that ignored types and encodings.
func (v Value) Text(limit int) (string, bool) {
	body := v.Body[:min(len(v.Body), limit+utf8.UTFMax)]
	switch v.Tag {
	case TagBMPString:
		units := make([]uint16, 0, len(body)/2)
		for ; len(body) >= 2; body = body[2:] {
			units = append(units, uint16(body[0])<<8|uint16(body[1]))
		}
		if n := len(units); n > 0 && units[n-1] == 0 { // a terminator
			units = units[:n-1]
		}
		return string(utf16.Decode(units)), true
	case TagUniversalString:
		var b strings.Builder
		for ; len(body) >= 4; body = body[4:] {
			b.WriteRune(rune(uint32(body[0])<<24 | uint32(body[1])<<16 | uint32(body[2])<<8 | uint32(body[3])))
		}
		return b.String(), true
	case TagT61String:
		return latin1(body), true // like crypto/x509
	case TagUTF8String, TagNumericString, TagPrintableString, TagIA5String, TagVisibleString, TagGeneralString,
		TagUTCTime, TagGeneralizedTime:
		if utf8.Valid(body) || len(body) < len(v.Body) {
			return string(body), true
		}
		return latin1(body), true
	}
	return "", false
}

func latin1(octets []byte) string {
	wide := make([]byte, 0, 2*len(octets))
	for _, octet := range octets {
		wide = utf8.AppendRune(wide, rune(octet))
	}
	return string(wide)
}
