package targetconf

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/printable"
)

// Mode is the permission bits of a file; 0 is "not configured". In JSON it is
// a number that holds the bits in decimal (416 is 0640), or an octal string
// ("0640", "640").
type Mode fs.FileMode

// maxKeyMode is the most that a private key's file may grant.
const maxKeyMode Mode = 0o770

func (m *Mode) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		return m.parseOctal(text)
	}
	bits, err := strconv.ParseUint(string(raw), 10, 32)
	if err != nil {
		return fmt.Errorf("expected a file mode: an octal string such as \"0640\", or its bits as a decimal number (416), got %s", shown(raw))
	}
	if Mode(bits).plausible() {
		*m = Mode(bits)
		return nil
	}
	hint := ""
	if meant, err := strconv.ParseUint(string(raw), 8, 32); err == nil && Mode(meant).plausible() {
		hint = fmt.Sprintf(", so \"%04o\" was probably meant (%d as a number)", meant, meant)
	}
	return fmt.Errorf("a number holds the bits in decimal, and %d is %#o, which is no plausible file mode%s", bits, bits, hint)
}

func (m *Mode) parseOctal(text string) error {
	if text == "" {
		*m = 0
		return nil
	}
	bits, err := strconv.ParseUint(strings.TrimPrefix(text, "0o"), 8, 32)
	if err == nil && Mode(bits).plausible() {
		*m = Mode(bits)
		return nil
	}
	hint := ""
	if meant, err := strconv.ParseUint(text, 10, 32); err == nil && Mode(meant).plausible() {
		hint = fmt.Sprintf(", so \"%04o\" (or the number %d) was probably meant", meant, meant)
	}
	return fmt.Errorf("a string holds the mode in octal, such as \"0640\", and %s is no plausible one%s", printable.Quote(text), hint)
}

// plausible reports whether some file could sensibly have these bits: the
// owner can read, no class may do what the one before it may not, and nothing
// is written or executed unread. Set-user-id and its kin are never plausible.
// 0 passes: it stands for "not configured".
func (m Mode) plausible() bool {
	if m == 0 {
		return true
	}
	owner, group, others := m>>6, m>>3&7, m&7
	for _, bits := range []Mode{owner, group, others} {
		if bits != 0 && bits&4 == 0 {
			return false
		}
	}
	return m <= 0o777 && owner&4 != 0 && group&^owner == 0 && others&^group == 0
}

// Duration is a time span: in JSON a number of nanoseconds or a Go duration
// string ("10s"). 0 is "not configured".
type Duration time.Duration

// maxDuration bounds what a configuration may make a deployment wait for; a
// job slot is held all the while.
const maxDuration = Duration(time.Hour)

func (d *Duration) UnmarshalJSON(raw []byte) error {
	text := string(raw)
	_ = json.Unmarshal(raw, &text)
	if text == "" || text == "0" {
		*d = 0
		return nil
	}
	span, err := time.ParseDuration(text)
	if nanoseconds, numErr := strconv.ParseInt(text, 10, 64); numErr == nil {
		span, err = time.Duration(nanoseconds), nil
		if span < time.Millisecond && span > 0 {
			return fmt.Errorf("a number is taken for nanoseconds, and %d of them is next to nothing: \"%ds\" was probably meant", span, span)
		}
	}
	switch {
	case err != nil:
		return fmt.Errorf("expected a duration such as \"10s\" or a number of nanoseconds, got %s", shown(raw))
	case span < 0 || Duration(span) > maxDuration:
		return fmt.Errorf("expected a duration of 0 to %v, got %v", time.Duration(maxDuration), span)
	}
	*d = Duration(span)
	return nil
}

// Seconds is a time span: in JSON a whole number of seconds, which may be a
// string, or a Go duration string ("2m"). 0 is "not configured".
type Seconds time.Duration

func (s *Seconds) UnmarshalJSON(raw []byte) error {
	text := string(raw)
	_ = json.Unmarshal(raw, &text)
	if _, err := strconv.ParseUint(text, 10, 64); err == nil {
		text += "s"
	}
	var span Duration
	if err := span.UnmarshalJSON(strconv.AppendQuote(nil, text)); err != nil {
		return fmt.Errorf("expected a whole number of seconds, or a duration such as \"30s\", of at most %v, got %s", time.Duration(maxDuration), shown(raw))
	}
	*s = Seconds(span)
	return nil
}

// ParseStrings reads a JSON object of strings, or a string that holds one. An
// empty string is "not configured".
func ParseStrings(raw []byte) (map[string]string, error) {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		if raw = []byte(text); strings.TrimSpace(text) == "" {
			return nil, nil
		}
	}
	var read map[string]string
	if json.Unmarshal(raw, &read) != nil {
		return nil, errors.New(`expected an object of strings such as {"team": "web"}, or a string that holds one`)
	}
	return read, nil
}

// Path is an absolute path without "..", cleaned.
type Path string

func (p *Path) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, &text) != nil {
		return errors.New("expected an absolute path, got " + kindOf(raw))
	}
	path, err := ParsePath(text)
	if err != nil {
		return err
	}
	*p = path
	return nil
}

// ParsePath checks a path that comes from outside. "" is none. A ".." is
// refused: what it means depends on which elements are symlinks.
func ParsePath(text string) (Path, error) {
	if text == "" {
		return "", nil
	}
	if !filepath.IsAbs(text) || strings.ContainsFunc(text, printable.IsControl) {
		return "", fmt.Errorf("expected an absolute path, got %s", printable.Quote(text))
	}
	for element := range strings.SplitSeq(filepath.ToSlash(text), "/") {
		if element == ".." {
			return "", fmt.Errorf("expected a path without \"..\", got %s", printable.Quote(text))
		}
	}
	return Path(filepath.Clean(text)), nil
}

// Join is the file called name in the directory p.
func (p Path) Join(name FileName) Path {
	return Path(filepath.Join(string(p), string(name)))
}

// FileName is the plain name of a file: no directory in it, no dot in front.
type FileName string

func (n *FileName) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, &text) != nil {
		return errors.New("expected a file name, got " + kindOf(raw))
	}
	if strings.HasPrefix(text, ".") || strings.ContainsAny(text, `/\`) || strings.ContainsFunc(text, printable.IsControl) || len(text) > 200 {
		return fmt.Errorf("expected a plain file name, without a directory and not starting with a dot, got %s", printable.Quote(text))
	}
	*n = FileName(text)
	return nil
}

// Account is a user or a group: its name, or its number.
type Account string

func (a *Account) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, &text) != nil {
		if _, err := strconv.ParseUint(string(raw), 10, 31); err != nil {
			return errors.New("expected a name or a number of an account, got " + kindOf(raw))
		}
		text = string(raw)
	}
	if strings.ContainsFunc(text, printable.IsControl) || strings.ContainsAny(text, ":/ ") || len(text) > 256 {
		return fmt.Errorf("expected a name or a number of an account, got %s", printable.Quote(text))
	}
	*a = Account(text)
	return nil
}

// FileOptions is what can be configured of a file's mode and owner.
type FileOptions struct {
	Mode  Mode    `json:"mode"`
	Owner Account `json:"owner"`
	Group Account `json:"group"`
}

// parseBool takes true, false, and what operators write for them in a form
// that sends strings. "" is false.
func parseBool(raw []byte) (bool, error) {
	text := string(raw)
	_ = json.Unmarshal(raw, &text)
	switch strings.ToLower(text) {
	case "1", "t", "true", "yes", "on":
		return true, nil
	case "", "0", "f", "false", "no", "off":
		return false, nil
	}
	return false, errors.New("expected true or false, got " + shown(raw))
}

// parseInt takes a whole number, also as a string. "" is 0.
func parseInt(raw []byte) (int64, error) {
	text := string(raw)
	_ = json.Unmarshal(raw, &text)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil {
		return 0, errors.New("expected a whole number, got " + shown(raw))
	}
	return n, nil
}

// shown is a JSON value for an error: scalars as they are, others by kind.
func shown(raw []byte) string {
	var text string
	switch {
	case json.Unmarshal(raw, &text) == nil:
		return printable.Quote(text)
	case raw[0] == '{' || raw[0] == '[':
		return kindOf(raw)
	}
	return strings.Trim(printable.Quote(string(raw)), `"`)
}
