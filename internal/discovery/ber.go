package discovery

import (
	"errors"
	"iter"
)

// Identifier octets of X.690 that matter here.
const (
	tagBoolean         = 0x01
	tagInteger         = 0x02
	tagBitString       = 0x03
	tagOctetString     = 0x04
	tagOID             = 0x06
	tagUTF8String      = 0x0c
	tagNumericString   = 0x12
	tagPrintableString = 0x13
	tagT61String       = 0x14
	tagIA5String       = 0x16
	tagUTCTime         = 0x17
	tagGeneralizedTime = 0x18
	tagVisibleString   = 0x1a
	tagGeneralString   = 0x1b
	tagUniversalString = 0x1c
	tagBMPString       = 0x1e
	tagSequence        = 0x30
	tagContext0        = 0x80 // [0] IMPLICIT on a primitive type
	tagExplicit0       = 0xa0 // [0] EXPLICIT, or IMPLICIT on a constructed type
	tagExplicit3       = 0xa3

	constructed = 0x20

	// maxBERDepth bounds how deep indefinite lengths nest. PKCS#7 and PKCS#12
	// need about ten levels.
	maxBERDepth = 32
)

var (
	errTruncated = errors.New("the encoding ends before it is complete")
	errBER       = errors.New("the encoding is not valid BER")
)

// value is one element of X.690. Tools that stream write PKCS#7 and PKCS#12
// with indefinite lengths and strings in pieces, which encoding/asn1 refuses.
type value struct {
	tag  byte   // identifier octet
	full []byte // the whole element
	body []byte // without header and end-of-contents
}

// element reads the first element of b.
func element(b []byte) (v value, rest []byte, err error) { return elementAt(b, 0) }

func elementAt(b []byte, depth int) (v value, rest []byte, err error) {
	if len(b) < 2 {
		return v, nil, errTruncated
	}
	if b[0]&0x1f == 0x1f || depth > maxBERDepth {
		return v, nil, errBER // high tag numbers occur in none of the formats
	}
	v.tag = b[0]
	length, header := int(b[1]), 2
	switch {
	case length == 0x80:
		return indefinite(b, depth)
	case length > 0x80:
		header += length - 0x80
		if len(b) < header {
			return v, nil, errTruncated
		}
		length = 0
		for _, octet := range b[2:header] { // BER allows zeros in front (X.690, 8.1.3.5)
			if length = length<<8 | int(octet); length > len(b) {
				return v, nil, errTruncated
			}
		}
	}
	if length > len(b)-header {
		return v, nil, errTruncated
	}
	end := header + length
	v.full, v.body = b[:end:end], b[header:end:end]
	return v, b[end:], nil
}

// headerLength is the length of tag and length at the start of b; 0: they are incomplete.
func headerLength(b []byte) int {
	if len(b) < 2 {
		return 0
	}
	n := 2
	if b[1] > 0x80 {
		n += int(b[1] - 0x80)
	}
	if n > len(b) {
		return 0
	}
	return n
}

// indefinite reads an element whose end is marked by two zero octets
// (X.690, 8.1.3.6).
func indefinite(b []byte, depth int) (v value, rest []byte, err error) {
	if b[0]&constructed == 0 {
		return v, nil, errBER
	}
	inner := b[2:]
	for {
		if len(inner) >= 2 && inner[0] == 0 && inner[1] == 0 {
			end := len(b) - len(inner)
			return value{tag: b[0], full: b[: end+2 : end+2], body: b[2:end:end]}, inner[2:], nil
		}
		if _, inner, err = elementAt(inner, depth+1); err != nil {
			return v, nil, err
		}
	}
}

// children are the elements inside v. Damage is the last pair.
func (v value) children() iter.Seq2[value, error] {
	return func(yield func(value, error) bool) {
		for rest := v.body; len(rest) > 0; {
			child, after, err := element(rest)
			if !yield(child, err) || err != nil {
				return
			}
			rest = after
		}
	}
}

// octets is the value of an OCTET STRING, put together where it came in pieces
// (X.690, 8.7.3). Its tag may be implicit.
func (v value) octets() ([]byte, error) { return v.octetsAt(0) }

func (v value) octetsAt(depth int) ([]byte, error) {
	if v.tag&constructed == 0 {
		return v.body, nil
	}
	if depth > maxBERDepth {
		return nil, errBER
	}
	var all []byte
	for piece, err := range v.children() {
		if err != nil {
			return nil, err
		}
		if piece.tag&^constructed != tagOctetString {
			return nil, errBER
		}
		part, err := piece.octetsAt(depth + 1)
		if err != nil {
			return nil, err
		}
		all = append(all, part...)
	}
	return all, nil
}

// fields reads the elements of b in order, so that a parser of a SEQUENCE need
// not check after each step. The first error stays.
type fields struct {
	rest []byte
	err  error
}

// sequence opens b, which is one SEQUENCE; what follows it is ignored.
func sequence(b []byte) *fields {
	outer := &fields{rest: b}
	return outer.inside(tagSequence)
}

// next reads an element of the given tag.
func (f *fields) next(tag byte) value {
	if f.err != nil {
		return value{}
	}
	v, rest, err := element(f.rest)
	switch {
	case err != nil:
		f.err = err
	case v.tag != tag:
		f.err = errBER
	default:
		f.rest = rest
		return v
	}
	return value{}
}

// inside reads an element of the given tag and returns what is in it.
func (f *fields) inside(tag byte) *fields {
	v := f.next(tag)
	return &fields{rest: v.body, err: f.err}
}

// at reports whether the next element has the given tag.
func (f *fields) at(tag byte) bool { return f.err == nil && len(f.rest) > 0 && f.rest[0] == tag }

// oid reads an object identifier: its content octets.
func (f *fields) oid() string { return string(f.next(tagOID).body) }

// octets reads an OCTET STRING under the given tag, in pieces or not.
func (f *fields) octets(tag byte) []byte {
	if f.at(tag | constructed) {
		tag |= constructed
	}
	v := f.next(tag)
	if f.err != nil {
		return nil
	}
	var all []byte
	all, f.err = v.octets()
	return all
}

// integer reads a small non-negative INTEGER.
func (f *fields) integer() int {
	v := f.next(tagInteger)
	if f.err != nil {
		return 0
	}
	if len(v.body) == 0 || len(v.body) > 4 || v.body[0] >= 0x80 {
		f.err = errBER
		return 0
	}
	n := 0
	for _, octet := range v.body {
		n = n<<8 | int(octet)
	}
	return n
}
