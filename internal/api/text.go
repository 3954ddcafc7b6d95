package api

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// Text makes s safe for the control plane, which drops an entry with a NUL in
// a name and stores nothing but UTF-8.
func Text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

// TextOfPath is path as text that every control plane stores: bytes that are not
// UTF-8 are written \xNN, so that two such names stay two.
func TextOfPath(path string) string {
	if utf8.ValidString(path) {
		return path
	}
	var b strings.Builder
	for i := 0; i < len(path); {
		r, size := utf8.DecodeRuneInString(path[i:])
		if r == utf8.RuneError && size == 1 {
			b.WriteString(`\x` + strconv.FormatUint(uint64(path[i])|0x100, 16)[1:])
		} else {
			b.WriteString(path[i : i+size])
		}
		i += size
	}
	return b.String()
}
