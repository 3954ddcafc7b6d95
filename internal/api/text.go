package api

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// Text makes s safe for the control plane, which stores only UTF-8 and drops entries that contain a
// NUL.
func Text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

// TextOfPath returns path as UTF-8. It writes invalid bytes as \xNN, so that different paths stay
// different.
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
