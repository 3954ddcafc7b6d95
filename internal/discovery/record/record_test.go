package record

import (
	"encoding/binary"
	"testing"
)

func TestDecoder(t *testing.T) {
	b := AppendString(AppendString([]byte{7}, "one"), []byte("two"))
	b = AppendString(AppendString(binary.AppendUvarint(b, 2), "a"), "b")
	for _, shared := range []bool{false, true} {
		d := Decoder{Rest: b}
		if shared {
			d.Share()
		}
		if got := d.Byte(); got != 7 {
			t.Errorf("byte %d, want 7", got)
		}
		if one, two := d.String(), string(d.Bytes()); one != "one" || two != "two" {
			t.Errorf("strings %q, %q", one, two)
		}
		if n := d.Length(); n != 2 || d.String()+d.String() != "ab" || len(d.Rest) != 0 || d.Damaged {
			t.Errorf("a list of %d, %x left, damaged: %v", n, d.Rest, d.Damaged)
		}
	}
	for end := range len(b) {
		d := Decoder{Rest: b[:end]}
		_, _, _ = d.Byte(), d.String(), d.String()
		for range d.Length() {
			_ = d.String()
		}
		if !d.Damaged {
			t.Errorf("the first %d bytes: no damage", end)
		}
	}
}
