package ber

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestElement(t *testing.T) {
	for _, test := range []struct {
		what, in   string
		body, rest string
		err        error
	}{
		{"short length", "\x04\x02ab" + "c", "ab", "c", nil},
		{"long length", "\x04\x81\x02ab", "ab", "", nil},
		{"zeros before the length", "\x04\x85\x00\x00\x00\x00\x02ab", "ab", "", nil},
		{"indefinite length", "\x24\x80\x04\x01a\x00\x00b", "\x04\x01a", "b", nil},
		{"indefinite lengths inside", "\x24\x80\x24\x80\x00\x00\x00\x00", "\x24\x80\x00\x00", "", nil},
		{"indefinite length of a primitive type", "\x04\x80\x00\x00", "", "", ErrInvalid},
		{"no end of contents", "\x24\x80\x04\x01a", "", "", ErrTruncated},
		{"too deep", strings.Repeat("\x24\x80", maxDepth+2) + strings.Repeat("\x00\x00", maxDepth+2), "", "", ErrInvalid},
		{"high tag number", "\x1f\x81\x01\x00", "", "", ErrInvalid},
		{"truncated", "\x04\x03ab", "", "", ErrTruncated},
		{"truncated length", "\x04\x82\x01", "", "", ErrTruncated},
		{"a length over all integers", "\x04\x89" + strings.Repeat("\xff", 9), "", "", ErrTruncated},
		{"nothing", "", "", "", ErrTruncated},
	} {
		v, rest, err := Element([]byte(test.in))
		if !errors.Is(err, test.err) || string(v.Body) != test.body || string(rest) != test.rest {
			t.Errorf("%s: body %q, rest %q, %v; want %q, %q, %v", test.what, v.Body, rest, err, test.body, test.rest, test.err)
		}
	}
}

func TestOctetsInPieces(t *testing.T) {
	f := Fields{Rest: []byte("\x24\x80\x04\x01a\x24\x03\x04\x01b\x00\x00" + "\x02\x01\x07")}
	if got := f.Octets(TagOctetString); string(got) != "ab" || f.Integer() != 7 || f.Err != nil {
		t.Errorf("got %q, %v; want ab and the rest", got, f.Err)
	}
	f = Fields{Rest: []byte("\x24\x03\x02\x01b")}
	if got := f.Octets(TagOctetString); got != nil || !errors.Is(f.Err, ErrInvalid) {
		t.Errorf("got %q, %v; want an error", got, f.Err)
	}
}

// TestEncode checks that elements survive encoding and have the shortest form.
func TestEncode(t *testing.T) {
	for size, header := range map[int]int{0: 2, 1: 2, 0x7f: 2, 0x80: 3, 0xff: 3, 0x100: 4, 0xffff: 4, 0x10000: 5, 0xffffff: 5, 0x1000000: 6} {
		body := bytes.Repeat([]byte{7}, size)
		encoded := Encode(TagOctetString, body[:size/2], body[size/2:])
		v, rest, err := Element(encoded)
		if err != nil || v.Tag != TagOctetString || !bytes.Equal(v.Body, body) || len(rest) > 0 || len(encoded) != size+header {
			t.Errorf("%d bytes: %d were read of %d, %v; want %d before them", size, len(v.Body), len(encoded), err, header)
		}
	}
	for n, want := range map[int]string{0: "\x02\x01\x00", 127: "\x02\x01\x7f", 128: "\x02\x02\x00\x80", 10_000: "\x02\x02\x27\x10", 1 << 30: "\x02\x04\x40\x00\x00\x00"} {
		f := Fields{Rest: EncodeInteger(n)}
		if string(f.Rest) != want || f.Integer() != n || f.Err != nil {
			t.Errorf("%d: %x, %v", n, EncodeInteger(n), f.Err)
		}
	}
}

func FuzzElement(f *testing.F) {
	f.Add([]byte("\x30\x80\x24\x80\x04\x01a\x00\x00\x0c\x01b\x00\x00"))
	f.Add([]byte("\x30\x06\x04\x01a\x02\x01\x07"))
	f.Fuzz(func(t *testing.T, data []byte) {
		v, rest, err := Element(data)
		if err != nil {
			return
		}
		if !bytes.Equal(append(bytes.Clone(v.Full), rest...), data) || !bytes.Contains(v.Full, v.Body) {
			t.Errorf("%x and %x are not the parts of %x", v.Full, rest, data)
		}
		for child, err := range v.Children() {
			if err != nil {
				break
			}
			_, _ = child.Octets()
			if text, ok := child.Text(16); ok && len(text) > 4*16 {
				t.Errorf("%d bytes of text", len(text))
			}
		}
	})
}
