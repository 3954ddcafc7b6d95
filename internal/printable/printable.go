// Package printable makes untrusted text, such as an error body, the output of a command or a
// server's greeting, safe to print in a log, an error or a terminal.
package printable

import (
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const ellipsis = "…"

// Line returns text on one line, in at most limit bytes of UTF-8. It turns each run of white space,
// including line breaks, into one space. It replaces all other unprintable characters by U+FFFD:
// control characters, because terminals act on escape sequences; invalid UTF-8; and format
// characters, because a bidirectional override can make a line look like another. It ends text that
// it cuts with an ellipsis.
func Line[T ~string | ~[]byte](text T, limit int) string {
	var out strings.Builder
	fits := 0 // bytes of out that leave room for the ellipsis
	space := false
	for _, r := range string(text) { // an invalid byte yields utf8.RuneError
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

// Quote returns untrusted text quoted for an error: on one line, and of bounded length.
func Quote(text string) string {
	const most = 120
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "..."
	}
	return strconv.QuoteToASCII(text)
}

// IsControl reports whether r is an ASCII control character.
func IsControl(r rune) bool { return r < ' ' || r == 0x7f }

// Text is like Line for text of several lines, such as the output of the agent's own commands. It
// keeps line ends, tabs and blanks, and cuts nothing.
func Text(text string) string {
	return strings.Map(func(r rune) rune { // an invalid byte is utf8.RuneError here
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return utf8.RuneError
	}, text)
}

// Writer applies Text to each write and passes the result to Out. A write must not split a
// character; those of package fmt do not. The program's own escape sequences must be written to Out
// directly.
type Writer struct{ Out io.Writer }

func (w Writer) Write(data []byte) (int, error) {
	if _, err := io.WriteString(w.Out, Text(string(data))); err != nil {
		return 0, err
	}
	return len(data), nil
}
