package ber

import (
	"encoding/binary"
	"unicode/utf16"
)

// Encode returns an element in DER with the given tag and the concatenated parts as its contents.
func Encode(tag byte, parts ...[]byte) []byte {
	size := 0
	for _, part := range parts {
		size += len(part)
	}
	element := make([]byte, 0, 6+size)
	element = append(element, tag)
	switch {
	case size < 0x80:
		element = append(element, byte(size))
	case size <= 0xff:
		element = append(element, 0x81, byte(size))
	case size <= 0xffff:
		element = append(element, 0x82, byte(size>>8), byte(size))
	case size <= 0xffffff:
		element = append(element, 0x83, byte(size>>16), byte(size>>8), byte(size))
	default: // callers encode far less than 4 GiB
		element = append(element, 0x84, byte(size>>24), byte(size>>16), byte(size>>8), byte(size))
	}
	for _, part := range parts {
		element = append(element, part...)
	}
	return element
}

// EncodeInteger encodes a small nonnegative INTEGER.
func EncodeInteger(n int) []byte {
	body := []byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
	for len(body) > 1 && body[0] == 0 && body[1] < 0x80 {
		body = body[1:]
	}
	return Encode(TagInteger, body)
}

// EncodeOID encodes an object identifier, given its content octets.
func EncodeOID(octets string) []byte { return Encode(TagOID, []byte(octets)) }

// EncodeBMP returns the contents of a BMPString: UTF-16, big-endian.
func EncodeBMP(s string) (content []byte) {
	for _, unit := range utf16.Encode([]rune(s)) {
		content = binary.BigEndian.AppendUint16(content, unit)
	}
	return content
}
