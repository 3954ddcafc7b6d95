package config

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"certctl-agent/internal/hostfile"
)

// assignment is one KEY=VALUE of an environment file.
type assignment struct {
	key, value string
	start, end int // its bytes, including the line break
}

// envFile is a file in the syntax of systemd's EnvironmentFile=,
// systemd.exec(5).
type envFile struct {
	assignments []assignment
	warnings    []string // about lines that systemd silently ignores, or whose meaning depends on its version
}

// get returns the value of key: the last assignment counts.
func (f *envFile) get(key string) string {
	for _, a := range slices.Backward(f.assignments) {
		if a.key == key {
			return a.value
		}
	}
	return ""
}

// validKey reports whether key can name an environment variable.
func validKey(key string) bool {
	const digits, others = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_"
	return key != "" && !strings.Contains(digits, key[:1]) && strings.Trim(key, digits+others) == ""
}

// parseEnvFile reads an environment file as systemd does:
//
//   - It skips empty lines and lines that begin with # or ;.
//   - A value consists of any number of quoted parts, followed by an unquoted part up to the end of
//     the line. They are joined.
//   - In single quotes every character is literal, even a line break.
//   - In double quotes a backslash escapes " \ ` and $, and removes a line break; before any other
//     character it is literal.
//   - Without quotes a backslash makes the next character literal, and removes a line break. White
//     space at both ends is removed. A quote inside is literal.
//   - There is no expansion.
//
// It skips a byte order mark.
//
// Three things that systemd accepts are errors here, since no operator wants them: an unclosed
// quote (it swallows the rest of the file), a NUL, and a line that begins with export (systemd
// ignores it).
func parseEnvFile(data []byte) (*envFile, error) {
	number := 0
	for line := range bytes.Lines(data) {
		number++
		switch {
		case bytes.IndexByte(line, 0) >= 0:
			return nil, fmt.Errorf("line %d contains a NUL", number)
		case !utf8.Valid(line):
			return nil, fmt.Errorf("line %d is not UTF-8", number)
		}
	}
	s := envScanner{text: string(data)}
	if strings.HasPrefix(s.text, hostfile.ByteOrderMark) {
		s.pos = len(hostfile.ByteOrderMark)
	}
	f := &envFile{}
	for s.skipBlank(); s.pos < len(s.text); s.skipBlank() {
		start, line := s.pos, s.line()
		if s.text[s.pos] == '#' || s.text[s.pos] == ';' {
			if comment := s.untilLineEnd(""); strings.HasSuffix(comment, `\`) {
				f.warnings = append(f.warnings, fmt.Sprintf(
					"line %d is a comment that ends in a backslash: systemd before version 254 treats the next line as part of it", line))
			}
			continue
		}
		s.pos++ // a leading equals sign is part of the name
		s.untilLineEnd("=")
		key := s.text[start:s.pos]
		if s.pos == len(s.text) || s.text[s.pos] != '=' {
			f.warnings = append(f.warnings, fmt.Sprintf("line %d is ignored: it has no equals sign", line))
			continue
		}
		s.pos++
		key = strings.TrimRight(key, " \t")
		value, err := s.value()
		if err != nil {
			return nil, err
		}
		if rest, ok := strings.CutPrefix(key, "export"); ok && strings.TrimLeft(rest, " \t") != rest {
			return nil, fmt.Errorf("line %d begins with export, which only shells understand: remove that word", line)
		}
		if !validKey(key) {
			f.warnings = append(f.warnings, fmt.Sprintf("line %d is ignored: %.64q is not a valid variable name", line, key))
			continue
		}
		f.assignments = append(f.assignments, assignment{key: key, value: value, start: start, end: s.pos})
	}
	return f, nil
}

// envScanner is a position in an environment file.
type envScanner struct {
	text    string
	pos     int
	counted int // position up to which line breaks are counted
	lines   int // line breaks before counted
}

func isLineEnd(c byte) bool { return c == '\n' || c == '\r' }
func isBlank(c byte) bool   { return c == ' ' || c == '\t' }

func (s *envScanner) line() int {
	s.lines += strings.Count(s.text[s.counted:s.pos], "\n")
	s.counted = s.pos
	return s.lines + 1
}

func (s *envScanner) skipBlank() {
	s.pos = len(s.text) - len(strings.TrimLeft(s.text[s.pos:], " \t\r\n"))
}

// untilLineEnd reads up to the line break, or any character of stop.
func (s *envScanner) untilLineEnd(stop string) string {
	start := s.pos
	if i := strings.IndexAny(s.text[s.pos:], "\r\n"+stop); i >= 0 {
		s.pos += i
	} else {
		s.pos = len(s.text)
	}
	return s.text[start:s.pos]
}

func (s *envScanner) value() (string, error) {
	var value strings.Builder
	for s.pos < len(s.text) {
		c := s.text[s.pos]
		switch {
		case isLineEnd(c):
			s.pos++
			if c == '\r' && strings.HasPrefix(s.text[s.pos:], "\n") {
				s.pos++
			}
			return value.String(), nil
		case isBlank(c):
			s.pos++
		case c == '\'' || c == '"':
			if err := s.quoted(&value, c); err != nil {
				return "", err
			}
		default:
			s.unquoted(&value)
		}
	}
	return value.String(), nil
}

func (s *envScanner) quoted(value *strings.Builder, quote byte) error {
	line := s.line()
	for s.pos++; s.pos < len(s.text); s.pos++ {
		c := s.text[s.pos]
		if c == quote {
			s.pos++
			return nil
		}
		if c == '\\' && quote == '"' && s.pos+1 < len(s.text) {
			s.pos++
			c = s.text[s.pos]
			if c == '\n' {
				continue
			}
			if !strings.ContainsRune("\"\\`$", rune(c)) {
				value.WriteByte('\\')
			}
		}
		value.WriteByte(c)
	}
	return fmt.Errorf("line %d opens a quote that is never closed", line)
}

// unquoted reads up to the line break.
func (s *envScanner) unquoted(value *strings.Builder) {
	var part strings.Builder
	keep := 0 // the part after keep is white space, removed if it is the end
	for s.pos < len(s.text) && !isLineEnd(s.text[s.pos]) {
		c := s.text[s.pos]
		s.pos++
		escaped := c == '\\'
		if escaped {
			if s.pos == len(s.text) {
				keep = part.Len()
				break
			}
			c = s.text[s.pos]
			s.pos++
		}
		if !escaped || !isLineEnd(c) {
			part.WriteByte(c)
		}
		if escaped || !isBlank(c) {
			keep = part.Len()
		}
	}
	value.WriteString(part.String()[:keep])
}
