// Package printable makes text that came from elsewhere (an error body, the
// output of a command, a server's greeting) fit to stand in one line of a log,
// an error or a terminal.
package printable

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

const ellipsis = "…"

// Clip returns text on one line and in at most limit bytes of UTF-8. Every run
// of white space, line breaks too, becomes one space, and whatever else does not
// print becomes U+FFFD: control characters (so that no terminal escape acts),
// invalid UTF-8, and format characters (so that a bidirectional override cannot
// make a line read as another). What does not fit is cut, and an ellipsis says
// so.
func Clip[T ~string | ~[]byte](text T, limit int) string {
	var out strings.Builder
	fits := 0 // bytes of out that leave room for the ellipsis
	space := false
	for _, r := range string(text) { // an invalid byte reads as utf8.RuneError
		if unicode.IsSpace(r) {
			space = out.Len() > 0
			continue
		}
		if !unicode.IsPrint(r) {
			r = utf8.RuneError
		}
		if space {
			out.WriteByte(' ')
			space = false
		}
		out.WriteRune(r)
		switch {
		case out.Len() > limit && limit < len(ellipsis):
			return ""
		case out.Len() > limit:
			return strings.TrimRight(out.String()[:fits], " ") + ellipsis
		case out.Len() <= limit-len(ellipsis):
			fits = out.Len()
		}
	}
	return out.String()
}
