package command

import (
	"slices"
	"strings"
	"unicode"

	"certctl-agent/internal/lazyregexp"
)

// redaction replaces a part of a command's output that must not reach a log.
const redaction = "[redacted]"

const (
	// minRun is the length from which a run of base64 or hex counts as key
	// material: 32 hex digits are 16 bytes, the shortest key in use.
	minRun = 32

	// minMixed is how many pairs of neighbours must be such as words and paths
	// hardly have (see mixed), and one in mixedShare. In base64 of random bytes
	// three in ten are.
	minMixed   = 5
	mixedShare = 10

	// minDump is how many numbers in a row make a line of a dump, such as
	// hexdump, od and openssl print. A MAC address has six.
	minDump = 8
)

var (
	// The label is not looked at: of what a command prints in armour, no error
	// needs to show anything.
	pemBegin = lazyregexp.New(`-----BEGIN [^-\r\n]{1,80}-----`)
	pemEnd   = lazyregexp.New(`-----END [^-\r\n]{1,80}-----`)

	encodedRun = lazyregexp.New(`[A-Za-z0-9+/_-]{32,}={0,2}`)
	hexRun     = lazyregexp.New(`[0-9A-Fa-f]{32,}`)
	encoded    = lazyregexp.New(`^[A-Za-z0-9+/_-]+={0,2}$`)
	colonHex   = lazyregexp.New(`(?:[0-9A-Fa-f]{2}[:-]){7,}`)
	dumpWord   = lazyregexp.New(`^(?:[0-9A-Fa-f]{2,11}|[!-~]|\\[^ ])$`)
)

// Redact takes what looks like key material out of a text that goes into an
// error, as Run does with the output of a command.
func Redact(text string) string { return redact(text, true, true) }

// redact takes key material out of the output of a command: it goes into
// errors, which the control plane sees, and a command of the control plane's
// choice may print any file. What looks like it is left out as well: a
// certificate, a fingerprint.
//
// It knows armour, base64 and dumps in bytes. It is not a wall: a control
// plane that may run any command has other ways, which CERTCTL_ALLOWED_COMMANDS closes.
//
// The text is a part of the output. begins and ends tell whether it has the
// output's own beginning and end, or was cut there.
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

// cutShort returns a run at the cut of an output if it is too short to be
// judged: it may be the end of a long one.
func cutShort(run string) string {
	if len(run) < 2*minRun {
		return run
	}
	return ""
}

// redactArmour takes out PEM. A block without its beginning is left out from
// the beginning of the text, one without its end to the end of the text.
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

// redactLines takes out what only shows over a line, or over several: dumps,
// and base64 that is wrapped into short lines.
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

// wrapped returns how many lines from each one on are one encoded text. It looks
// once at each: of the lines behind one, all that counts has been added up.
func wrapped(lines []string) []int {
	wraps := make([]int, len(lines))
	n, length, pairs := 0, 0, 0 // pairs is of neighbours in one line
	singles, hex := true, true  // every line is one character, as grep -o prints them; or hex
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

// dumped returns how many lines from here on are a dump. The last one of a dump
// may be too short to be known, and counts too.
func dumped(lines []string) int {
	for n, line := range lines {
		if !isDump(line) {
			return min(n, 1) * (n + 1)
		}
	}
	return len(lines)
}

// isDump reports whether a line shows bytes one by one, in whatever base.
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

// redactRuns takes out long words of base64 or hex. Paths are long words too.
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

// mixed counts pairs of neighbours of which one is an upper-case letter and the
// other a digit, or a lower-case letter before it.
func mixed(run string) (pairs int) {
	for i := 1; i < len(run); i++ {
		a, b := rune(run[i-1]), rune(run[i])
		if unicode.IsUpper(b) && (unicode.IsLower(a) || unicode.IsDigit(a)) || unicode.IsUpper(a) && unicode.IsDigit(b) {
			pairs++
		}
	}
	return pairs
}
