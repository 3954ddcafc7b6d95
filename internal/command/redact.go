package command

import (
	"slices"
	"strings"
	"unicode"

	"certctl-agent/internal/lazyregexp"
)

// redaction replaces key material in a command's output.
const redaction = "[redacted]"

const (
	// minRun is the shortest run of base64 or hex that counts as key material: 32 hex digits are 16
	// bytes, the shortest key in use.
	minRun = 32

	// minMixed and mixedShare: base64 differs from words and paths in its mixed pairs of characters
	// (see mixed). It has at least minMixed of them, and one in mixedShare. In base64 of random
	// bytes, three pairs in ten are mixed.
	minMixed   = 5
	mixedShare = 10

	// minDump is how many numbers in a row make a line a dump, as hexdump, od and openssl print
	// them. A MAC address has six.
	minDump = 8
)

var (
	// Any label counts: no error needs to show a PEM block.
	pemBegin = lazyregexp.New(`-----BEGIN [^-\r\n]{1,80}-----`)
	pemEnd   = lazyregexp.New(`-----END [^-\r\n]{1,80}-----`)

	encodedRun = lazyregexp.New(`[A-Za-z0-9+/_-]{32,}={0,2}`)
	hexRun     = lazyregexp.New(`[0-9A-Fa-f]{32,}`)
	encoded    = lazyregexp.New(`^[A-Za-z0-9+/_-]+={0,2}$`)
	colonHex   = lazyregexp.New(`(?:[0-9A-Fa-f]{2}[:-]){7,}`)
	dumpWord   = lazyregexp.New(`^(?:[0-9A-Fa-f]{2,11}|[!-~]|\\[^ ])$`)
)

// Redact replaces what looks like key material in a text that goes into an error, as Run does.
func Redact(text string) string { return redact(text, true, true) }

// redact replaces key material in the output of a command. The output goes into errors, which the
// control plane sees, and a command that the control plane chose may print any file. Certificates
// and fingerprints look like key material and are replaced too.
//
// It recognises PEM, base64 and hex dumps. It is not a security boundary: a control plane that may
// run any command can send secrets in other ways, which CERTCTL_ALLOWED_COMMANDS prevents.
//
// The text is a part of the output. begins and ends say whether it includes the output's beginning
// and end, or was cut there.
func redact(text string, begins, ends bool) string {
	if !begins {
		text = strings.TrimPrefix(text, cutShort(text[:len(text)-len(strings.TrimLeftFunc(text, isEncoded))]))
	}
	if !ends {
		text = strings.TrimSuffix(text, cutShort(text[len(strings.TrimRightFunc(text, isEncoded)):]))
	}
	return redactRuns(redactLines(redactArmour(text), begins))
}

func isEncoded(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("+/=_-", r)
}

// cutShort returns a run of base64 at a cut if it is too short to judge: it may be the end of a
// long one.
func cutShort(run string) string {
	if len(run) < 2*minRun {
		return run
	}
	return ""
}

// redactArmour replaces PEM blocks. If the BEGIN line of a block is missing, it replaces everything
// from the beginning of the text; if the END line is missing, everything to its end.
func redactArmour(text string) string {
	var out strings.Builder
	for {
		begin, end := pemBegin().FindStringIndex(text), pemEnd().FindStringIndex(text)
		switch {
		case begin == nil && end == nil:
			out.WriteString(text)
			return out.String()
		case begin == nil || end != nil && end[0] < begin[0]:
			out.Reset()
			out.WriteString(redaction)
			text = text[end[1]:]
			continue
		}
		out.WriteString(text[:begin[0]])
		out.WriteString(redaction)
		text = text[begin[1]:]
		if end = pemEnd().FindStringIndex(text); end == nil {
			return out.String()
		}
		text = text[end[1]:]
	}
}

// redactLines replaces key material that takes whole lines: dumps, and base64 wrapped into short
// lines.
func redactLines(text string, begins bool) string {
	lines := strings.Split(text, "\n")
	if !begins && len(lines) > 1 && isDump(lines[1]) {
		lines[0] = redaction
	}
	wraps := wrapped(lines)
	for i := 0; i < len(lines); {
		n := wraps[i]
		if n == 0 {
			n = dumped(lines[i:])
		}
		if n == 0 {
			i++
			continue
		}
		for j := range n {
			lines[i+j] = ""
		}
		lines[i] = redaction
		i += n
	}
	return strings.Join(lines, "\n")
}

// wrapped returns, for each line, how many lines from there on are one encoded text. It goes
// backward, so that it looks at each line once.
func wrapped(lines []string) []int {
	wraps := make([]int, len(lines))
	n, length, pairs := 0, 0, 0 // mixed pairs, within lines
	singles, hex := true, true  // every line is a single character, as from grep -o; is hex
	for i, line := range slices.Backward(lines) {
		line = strings.TrimSpace(line)
		if !encoded().MatchString(line) {
			n, length, pairs, singles, hex = 0, 0, 0, true, true
			continue
		}
		n++
		length += len(line)
		pairs += mixed(line)
		singles = singles && len(line) == 1
		hex = hex && strings.Trim(line, "0123456789abcdefABCDEF") == ""
		if length >= minRun && (isMixed(pairs, length-n) || singles || hex) {
			wraps[i] = n
		}
	}
	return wraps
}

// dumped returns how many lines are a dump. It includes the line after them, since the last line of
// a dump may be too short to recognise.
func dumped(lines []string) int {
	for n, line := range lines {
		if !isDump(line) {
			return min(n, 1) * (n + 1)
		}
	}
	return len(lines)
}

// isDump reports whether a line shows single bytes, in any base.
func isDump(line string) bool {
	if colonHex().MatchString(line) {
		return true
	}
	row, whole := 0, true
	for word := range strings.FieldsSeq(line) {
		if !dumpWord().MatchString(word) {
			row, whole = 0, false
			continue
		}
		if row++; row == minDump {
			return true
		}
	}
	return whole && row >= minDump/2
}

// redactRuns replaces long words of base64 or hex, but not paths.
func redactRuns(text string) string {
	text = encodedRun().ReplaceAllStringFunc(text, func(run string) string {
		if isMixed(mixed(run), len(run)) {
			return redaction
		}
		return run
	})
	return hexRun().ReplaceAllString(text, redaction)
}

func isMixed(pairs, of int) bool { return pairs >= minMixed && pairs*mixedShare >= of }

// mixed counts the pairs of adjacent characters that words and paths hardly have: an upper-case
// letter and a digit, or an upper-case letter after a lower-case one.
func mixed(run string) (pairs int) {
	for i := 1; i < len(run); i++ {
		a, b := rune(run[i-1]), rune(run[i])
		if unicode.IsUpper(b) && (unicode.IsLower(a) || unicode.IsDigit(a)) || unicode.IsUpper(a) && unicode.IsDigit(b) {
			pairs++
		}
	}
	return pairs
}
