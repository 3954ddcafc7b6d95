package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf16"

	"certctl-agent/internal/config"
	"certctl-agent/internal/printable"
)

// maxShown bounds untrusted text in one line, in bytes.
const maxShown = 4 << 10

// printError prints why a command failed, one line per problem.
func printError(w io.Writer, err error) {
	lines := []error{err}
	if problems, ok := err.(config.Problems); ok {
		lines = problems
	}
	var text []string
	for _, line := range lines {
		text = append(text, printable.Line(line.Error(), maxShown))
	}
	fmt.Fprintln(w, "certctl-agent: "+strings.Join(text, "\n"))
}

// unwrapped returns the writer inside a printable.Writer.
func unwrapped(w io.Writer) io.Writer {
	if w, ok := w.(printable.Writer); ok {
		return w.Out
	}
	return w
}

// printJSON writes a document for programs. It escapes characters that are not printable, so that
// strings are unchanged for programs and harmless on a terminal.
func printJSON(w io.Writer, document any) error {
	var plain bytes.Buffer
	encoder := json.NewEncoder(&plain)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(document); err != nil {
		return err
	}
	var out strings.Builder
	for _, r := range plain.String() {
		switch {
		case r == '\n' || unicode.IsPrint(r):
			out.WriteRune(r)
		case r > 0xffff: // RFC 8259, section 7: as a surrogate pair
			first, second := utf16.EncodeRune(r)
			fmt.Fprintf(&out, `\u%04x\u%04x`, first, second)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
	}
	_, err := io.WriteString(w, out.String())
	return err
}
