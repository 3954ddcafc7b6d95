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

// Mode is the permission bits of a file. 0 means "not configured". In JSON it is a number with the
// bits in decimal (416 is 0640) or an octal string ("0640", "640").
type Mode fs.FileMode

// maxKeyMode is the most permissive mode for the file of a private key.
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
	return fmt.Errorf("a number is the bits in decimal, and %d is %#o, which is not a plausible file mode%s", bits, bits, hint)
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
	return fmt.Errorf("a string is the mode in octal, such as \"0640\", and %s is not plausible%s", printable.Quote(text), hint)
}

// plausible reports whether the bits make sense for a file: the owner can read it, no class may do
// what the previous one may not, and write or execute permission implies read permission.
// Set-user-id and similar bits are never plausible. 0 is plausible because it means "not
// configured".
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

// Duration is a time span. In JSON it is a number of nanoseconds or a Go duration string ("10s"). 0
// means "not configured".
type Duration time.Duration

// maxDuration bounds how long a setting can make a deployment wait, because the deployment occupies
// a job slot meanwhile.
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
			return fmt.Errorf("a number counts nanoseconds, and %d of them is next to nothing: \"%ds\" was probably meant", span, span)
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

// Seconds is a time span. In JSON it is a whole number of seconds, which may be a string, or a Go
// duration string ("2m"). 0 means "not configured".
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

// ParseStrings parses a JSON object of strings, or a string that contains one. An empty string
// means "not configured".
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

// Path is a clean absolute path without "..".
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

// ParsePath parses a path from an untrusted source. "" stays "". It rejects "..", whose meaning
// depends on which elements are symlinks.
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

// Join returns the path of the file called name in the directory p.
func (p Path) Join(name FileName) Path {
	return Path(filepath.Join(string(p), string(name)))
}

// FileName is the plain name of a file, without a directory and a leading dot.
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

// Account is the name or number of a user or group.
type Account string

func (a *Account) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, &text) != nil {
		if _, err := strconv.ParseUint(string(raw), 10, 31); err != nil {
			return errors.New("expected the name or number of an account, got " + kindOf(raw))
		}
		text = string(raw)
	}
	if strings.ContainsFunc(text, printable.IsControl) || strings.ContainsAny(text, ":/ ") || len(text) > 256 {
		return fmt.Errorf("expected the name or number of an account, got %s", printable.Quote(text))
	}
	*a = Account(text)
	return nil
}

// FileOptions is the configured mode and owner of a file.
type FileOptions struct {
	Mode  Mode    `json:"mode"`
	Owner Account `json:"owner"`
	Group Account `json:"group"`
}

// parseBool accepts true, false and the strings that operators enter for them in forms. "" is
// false.
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

// parseInt accepts a whole number, also as a string. "" is 0.
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

// shown returns a JSON value for an error: scalars as they are, others by type.
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
