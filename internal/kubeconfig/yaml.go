package kubeconfig

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"certctl-agent/internal/printable"
)

// A node is one value of a document. The parser supports the part of YAML that kubectl writes:
// block mappings and sequences, {} and [], and plain, quoted and literal scalars, wrapped over
// several lines in kubectl's way. It also supports what people add by hand: comments, indented
// lists and a leading "---". It rejects everything else rather than guessing.
type node struct {
	line   int
	kind   kind
	text   string // of a scalar
	quoted bool   // a string, even if the text is null
	fields []field
	items  []*node
}

type kind int

const (
	scalar kind = iota
	mapping
	sequence
)

func (k kind) String() string {
	return [...]string{"a single value", "a mapping", "a list"}[k]
}

// field is one key of a mapping.
type field struct {
	key   string
	line  int
	value *node
}

// get returns the value of a key, or nil.
func (n *node) get(key string) *node {
	if i := slices.IndexFunc(n.fields, func(f field) bool { return f.key == key }); i >= 0 {
		return n.fields[i].value
	}
	return nil
}

// isNull reports whether a node is missing or null.
func (n *node) isNull() bool {
	return n == nil || n.kind == scalar && !n.quoted && slices.Contains([]string{"", "~", "null", "Null", "NULL"}, n.text)
}

// maxDepth bounds the nesting of values. kubectl's files have 7 levels; extensions of other tools
// may have more.
const maxDepth = 50

// maxQuoted bounds a quoted string, in lines. Some tools break the base64 of a certificate into
// dozens of lines.
const maxQuoted = 1000

// SyntaxError is an error in a line of a document.
type SyntaxError struct {
	Line    int // from 1
	Problem string
}

func (e *SyntaxError) Error() string { return fmt.Sprintf("line %d: %s", e.Line, e.Problem) }

// line is a line of the document.
type line struct {
	number int
	indent int    // in spaces
	text   string // without indentation and trailing white space
	raw    string // without indentation
}

// isBlank reports whether a line is empty or a comment.
func (l line) isBlank() bool { return l.text == "" || l.text[0] == '#' }

// isItem reports whether an item of a sequence begins here.
func (l line) isItem() bool { return l.text == "-" || strings.HasPrefix(l.text, "- ") }

type parser struct {
	lines []line
	at    int // index of the next line
	depth int
}

// parse parses a document. It returns only errors of type *SyntaxError.
func parse(data []byte) (root *node, err error) {
	defer func() {
		if r := recover(); r != nil {
			syntax, ok := r.(*SyntaxError)
			if !ok {
				panic(r)
			}
			root, err = nil, syntax
		}
	}()
	p := new(parser)
	p.split(string(data))
	first := p.peek()
	if first == nil {
		return &node{line: 1}, nil
	}
	root = p.block(first.indent)
	if rest := p.peek(); rest != nil {
		p.fail(rest.number, "has an indentation that matches no block before it")
	}
	return root, nil
}

// fail ends parse.
func (p *parser) fail(number int, format string, args ...any) {
	panic(&SyntaxError{Line: number, Problem: fmt.Sprintf(format, args...)})
}

// split cuts a document into lines.
func (p *parser) split(data string) {
	data = strings.TrimPrefix(data, "\ufeff")
	begun := false
	number := 0
	for text := range strings.SplitSeq(data, "\n") {
		number++
		text = strings.TrimSuffix(text, "\r")
		if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r != '\t' && printable.IsControl(r) }) {
			p.fail(number, "contains bytes that are not text")
		}
		content := strings.TrimLeft(text, " ")
		l := line{number: number, indent: len(text) - len(content), text: strings.TrimRight(content, " \t"), raw: content}
		switch {
		case l.indent == 0 && l.text == "---" && !begun:
			l.text = "" // the start of the document
		case l.indent == 0 && (l.text == "---" || strings.HasPrefix(l.text, "--- ") || l.text == "..."):
			p.fail(number, "begins or ends a document: a kubeconfig is a single document")
		case l.indent == 0 && strings.HasPrefix(l.text, "%"):
			p.fail(number, "is a directive, which no kubeconfig needs")
		}
		begun = begun || !l.isBlank()
		p.lines = append(p.lines, l)
	}
}

// peek returns the next line that is not blank, or nil.
func (p *parser) peek() *line {
	for ; p.at < len(p.lines); p.at++ {
		l := &p.lines[p.at]
		if l.isBlank() {
			continue
		}
		if l.text[0] == '\t' {
			p.fail(l.number, "is indented with a tab: YAML allows only spaces")
		}
		return l
	}
	return nil
}

// block reads the value that starts on the next line, which has the given indentation.
func (p *parser) block(indent int) *node {
	l := p.peek()
	if p.depth++; p.depth > maxDepth {
		p.fail(l.number, "is nested more than %d levels deep", maxDepth)
	}
	defer func() { p.depth-- }()
	if l.isItem() {
		return p.sequence(indent)
	}
	if _, _, ok := p.splitKey(*l); ok {
		return p.mapping(indent)
	}
	if p.at++; indent == 0 {
		p.fail(l.number, "is neither a key followed by a colon nor an item of a list")
	}
	return p.inline(l.number, l.text, indent-1)
}

// mapping reads a mapping whose keys have the given indentation.
func (p *parser) mapping(indent int) *node {
	n := &node{kind: mapping, line: p.peek().number}
	seen := make(map[string]bool)
	for l := p.peek(); l != nil && l.indent == indent && !l.isItem(); l = p.peek() {
		key, rest, ok := p.splitKey(*l)
		if !ok {
			p.fail(l.number, "is neither a key followed by a colon nor an item of a list")
		}
		if seen[key] {
			p.fail(l.number, "repeats the key %s", printable.Quote(key))
		}
		seen[key] = true
		number := l.number
		p.at++
		n.fields = append(n.fields, field{key, number, p.value(number, rest, indent, true)})
	}
	p.noDeeper(indent)
	return n
}

// sequence reads a sequence whose items have the given indentation.
func (p *parser) sequence(indent int) *node {
	n := &node{kind: sequence, line: p.peek().number}
	for l := p.peek(); l != nil && l.indent == indent && l.isItem(); l = p.peek() {
		rest := strings.TrimLeft(l.text[1:], " ")
		number := l.number
		nested := line{number: number, indent: indent + len(l.text) - len(rest), text: rest}
		_, _, isKey := p.splitKey(nested)
		if !nested.isBlank() && (isKey || nested.isItem()) {
			*l = nested // the rest of the line begins a nested block
			n.items = append(n.items, p.block(nested.indent))
			continue
		}
		p.at++
		n.items = append(n.items, p.value(number, rest, indent, false))
	}
	p.noDeeper(indent)
	return n
}

// noDeeper rejects a next line that is indented more than the block before it.
func (p *parser) noDeeper(indent int) {
	if l := p.peek(); l != nil && l.indent > indent {
		p.fail(l.number, "has an indentation that matches no block before it")
	}
}

// value reads the value after a key or a dash, which may be on the same line or below. A list may
// have the same indentation as its key.
func (p *parser) value(number int, rest string, indent int, ofKey bool) *node {
	if rest != "" && rest[0] != '#' {
		return p.inline(number, rest, indent)
	}
	l := p.peek()
	if l != nil && (l.indent > indent || ofKey && l.indent == indent && l.isItem()) {
		return p.block(l.indent)
	}
	return &node{line: number}
}

// splitKey splits a line at the colon after its key.
func (p *parser) splitKey(l line) (key, rest string, ok bool) {
	text := l.text
	if text == "" {
		return "", "", false
	}
	switch text[0] {
	case '"', '\'':
		end, closed := closing(text, 1)
		if !closed {
			return "", "", false
		}
		key, valid := unquote(text[1:end], text[0])
		rest, ok = strings.CutPrefix(text[end+1:]+" ", ": ")
		return key, strings.Trim(rest, " "), ok && valid
	case '{', '[', '|', '>', '#':
		return "", "", false
	}
	end := strings.Index(text+" ", ": ")
	if end < 0 {
		return "", "", false
	}
	if comment := strings.Index(text, " #"); comment >= 0 && comment < end {
		return "", "", false
	}
	key = strings.TrimRight(text[:end], " ")
	if strings.ContainsAny(text[:1], "?&*!%@`,]}") || key == "<<" || key == "" {
		p.fail(l.number, "begins with %s: complex keys, anchors, aliases, tags and merges are not supported", printable.Quote(text[:1]))
	}
	return key, strings.TrimLeft(text[min(end+1, len(text)):], " "), true
}

// inline reads a value that begins with text, on the line of its key or dash, whose indentation is
// indent. It may continue on the following lines.
func (p *parser) inline(number int, text string, indent int) *node {
	n := &node{line: number}
	switch text[0] {
	case '"', '\'':
		n.text, n.quoted = p.quoted(number, text), true
		return n
	case '|':
		n.text, n.quoted = p.literal(number, text, indent), true
		return n
	case '{', '[':
		switch uncommented(text) {
		case "{}":
			n.kind = mapping
		case "[]":
			n.kind = sequence
		default:
			p.fail(number, "has a value in braces or brackets: write it on separate lines, or the whole file as JSON")
		}
		return n
	case '>', '&', '*', '!', '%', '@', '`', '?', ',', ']', '}':
		p.fail(number, "has a value that begins with %s: folded text, anchors, aliases and tags are not supported", printable.Quote(text[:1]))
	}
	if strings.HasPrefix(text, "- ") {
		p.fail(number, "has a list item after a key: put it on a separate line")
	}
	first := uncommented(text)
	p.noKey(number, first)
	whole := []byte(first)
	hasComment := first != text
	for breaks := 0; !hasComment && p.at < len(p.lines); p.at++ {
		l := p.lines[p.at]
		if l.text == "" {
			breaks++ // they count if text follows
			continue
		}
		if l.indent <= indent || l.isBlank() {
			break
		}
		more := uncommented(l.text)
		p.noKey(l.number, more)
		if breaks > 0 {
			whole = append(whole, strings.Repeat("\n", breaks)...)
		} else {
			whole = append(whole, ' ')
		}
		whole = append(whole, more...)
		hasComment, breaks = more != l.text, 0
	}
	n.text = string(whole)
	return n
}

// noKey rejects a plain value that looks like another key with its value.
func (p *parser) noKey(number int, text string) {
	if strings.Contains(text+" ", ": ") {
		p.fail(number, "has a colon in its value: quote the value")
	}
}

// uncommented returns text without a comment at the end.
func uncommented(text string) string {
	if i := strings.Index(text, " #"); i >= 0 {
		text = text[:i]
	}
	return strings.TrimRight(text, " \t")
}

// literal reads the literal text below a |.
func (p *parser) literal(number int, header string, parent int) string {
	strip, indent := "", 0
	for _, r := range uncommented(header[1:]) {
		switch {
		case (r == '-' || r == '+') && strip == "":
			strip = string(r)
		case r >= '1' && r <= '9' && indent == 0:
			indent = max(parent, 0) + int(r-'0')
		default:
			p.fail(number, "has %s, which is not a valid header of literal text", printable.Quote(header))
		}
	}
	var text strings.Builder
	blank := 0 // lines that count if text follows
	for ; p.at < len(p.lines); p.at++ {
		l := p.lines[p.at]
		if l.text == "" {
			blank++
			continue
		}
		if indent == 0 && l.indent > parent {
			indent = l.indent
		}
		if indent == 0 || l.indent < indent {
			break
		}
		text.WriteString(strings.Repeat("\n", blank))
		blank = 0
		text.WriteString(strings.Repeat(" ", l.indent-indent) + l.raw + "\n")
	}
	switch strip {
	case "-":
		return strings.TrimSuffix(text.String(), "\n")
	case "+":
		return text.String() + strings.Repeat("\n", blank)
	}
	return text.String()
}

// quoted reads a quoted string, which may span several lines.
func (p *parser) quoted(number int, text string) string {
	end, closed := closing(text, 1)
	for lines := 1; !closed; lines++ {
		if p.at == len(p.lines) || lines == maxQuoted {
			p.fail(number, "has an unterminated quoted string")
		}
		text += "\n" + p.lines[p.at].raw
		p.at++
		end, closed = closing(text, end)
	}
	if rest := text[end+1:]; uncommented(rest) != "" {
		p.fail(number, "has text after the closing quote")
	}
	value, ok := unquote(text[1:end], text[0])
	if !ok {
		p.fail(number, "has an invalid escape sequence")
	}
	return value
}

// closing finds the quote that closes the one at the start of text, searching from index at. If
// there is none, end is the index at which to continue in a longer text.
func closing(text string, at int) (end int, closed bool) {
	quote := text[0]
	for end = at; end < len(text); end++ {
		switch {
		case text[end] == '\\' && quote == '"':
			end++
		case text[end] != quote:
		case quote == '\'' && strings.HasPrefix(text[end+1:], "'"):
			end++
		default:
			return end, true
		}
	}
	return end, false
}

// unquote decodes the text between quotes. It reports whether all escapes are valid. Line breaks
// fold (YAML 1.2, section 7.3): a single one becomes a space, n become n-1.
func unquote(text string, quote byte) (value string, ok bool) {
	var out []byte
	kept := 0 // bytes of out that must not be trimmed before a line break
	for text != "" {
		switch c := text[0]; {
		case c == quote: // doubled
			out, text = append(out, c), text[2:]
		case c == '\\' && quote == '"':
			decoded, size := unescape(text[1:])
			if size == 0 {
				return "", false
			}
			out, text = append(out, decoded...), text[1+size:]
			kept = len(out)
		case c == '\n':
			rest := strings.TrimLeft(text, "\n \t")
			fold := " "
			if breaks := strings.Count(text[:len(text)-len(rest)], "\n"); breaks > 1 {
				fold = strings.Repeat("\n", breaks-1)
			}
			out = append(out[:kept], bytes.TrimRight(out[kept:], " \t")...)
			out, text = append(out, fold...), rest
			kept = len(out)
		default:
			out, text = append(out, c), text[1:]
		}
	}
	return string(out), true
}

// unescape decodes the escape after a backslash and returns its size in bytes, or 0 if it is
// invalid.
func unescape(text string) (decoded string, size int) {
	simple := map[byte]string{'0': "\x00", 'a': "\a", 'b': "\b", 't': "\t", '\t': "\t", 'n': "\n", 'v': "\v", 'f': "\f", 'r': "\r", 'e': "\x1b",
		' ': " ", '"': `"`, '/': "/", '\\': `\`, 'N': "\u0085", '_': "\u00a0", 'L': "\u2028", 'P': "\u2029"}
	if s, ok := simple[text[0]]; ok {
		return s, 1
	}
	if text[0] == '\n' { // an escaped break and the indentation after it are dropped
		return "", len(text) - len(strings.TrimLeft(text[1:], " \t"))
	}
	digits := map[byte]int{'x': 2, 'u': 4, 'U': 8}[text[0]]
	if digits == 0 || len(text) < 1+digits {
		return "", 0
	}
	r, err := strconv.ParseUint(text[1:1+digits], 16, 32)
	if err != nil || !utf8.ValidRune(rune(r)) {
		return "", 0
	}
	return string(rune(r)), 1 + digits
}
