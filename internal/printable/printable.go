// Package printable makes text that came from elsewhere (an error body, the
// output of a command, a server's greeting) fit to stand in one line of a log,
// an error or a terminal.
package printable

import (
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const ellipsis = "…"

// Line returns text on one line, in at most limit bytes of UTF-8. Every run
// of white space, line breaks too, becomes one space, and whatever else does not
// print becomes U+FFFD: control characters (so that no terminal escape acts),
// invalid UTF-8, and format characters (so that a bidirectional override cannot
// make a line read as another). What does not fit is cut, and an ellipsis says
// so.
func Line[T ~string | ~[]byte](text T, limit int) string {
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

// Quote quotes a text from outside for an error: one line, of bounded length.
func Quote(text string) string {
	const most = 120
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "..."
	}
	return strconv.QuoteToASCII(text)
}

// IsControl reports whether r is an ASCII control character.
func IsControl(r rune) bool { return r < ' ' || r == 0x7f }

// Text is Line for text of several lines, such as the output of a command of
// ours: line ends, tabs and blanks stay, and nothing is cut.
func Text(text string) string {
	return strings.Map(func(r rune) rune { // an invalid byte is utf8.RuneError here
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return utf8.RuneError
	}, text)
}

// Writer passes on what Text makes of each write. A write ends at the end of a
// character, as those of package fmt do. Escapes of our own go to Out itself.
type Writer struct{ Out io.Writer }

func (w Writer) Write(data []byte) (int, error) {
	if _, err := io.WriteString(w.Out, Text(string(data))); err != nil {
		return 0, err
	}
	return len(data), nil
}
