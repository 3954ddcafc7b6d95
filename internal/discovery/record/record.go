// Package record is the encoding of what is remembered between scans. Strings
// and lists have their length before them, as a varint.
package record

import "encoding/binary"

// AppendString appends a string with its length before it.
func AppendString[S ~string | ~[]byte](b []byte, s S) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// Decoder reads what was appended. Damage makes it return zeros.
type Decoder struct {
	Rest    []byte
	Damaged bool
	shared  string // the same bytes up to its end, or ""
}

// Share makes the strings that are read from here on parts of one: that saves
// an allocation for each.
func (d *Decoder) Share() { d.shared = string(d.Rest) }

func (d *Decoder) Uvarint() uint64 {
	n, size := binary.Uvarint(d.Rest)
	if size <= 0 {
		d.Damaged, d.Rest = true, nil
		return 0
	}
	d.Rest = d.Rest[size:]
	return n
}

// Length is the number of elements of a list, each of which takes a byte or
// more.
func (d *Decoder) Length() int {
	n := d.Uvarint()
	if n > uint64(len(d.Rest)) {
		d.Damaged, d.Rest = true, nil
		return 0
	}
	return int(n)
}

func (d *Decoder) Bytes() []byte {
	n := d.Length()
	b := d.Rest[:n:n]
	d.Rest = d.Rest[n:]
	return b
}

func (d *Decoder) String() string {
	b := d.Bytes()
	if d.shared == "" {
		return string(b)
	}
	end := len(d.shared) - len(d.Rest)
	return d.shared[end-len(b) : end]
}

func (d *Decoder) Byte() byte {
	if len(d.Rest) == 0 {
		d.Damaged = true
		return 0
	}
	b := d.Rest[0]
	d.Rest = d.Rest[1:]
	return b
}
