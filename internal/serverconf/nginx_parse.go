package serverconf

import (
	"errors"
	"fmt"
	"strings"
)

// nginxDirective is a directive of a configuration with its block, if any.
type nginxDirective struct {
	name  string
	args  []string
	block []nginxDirective
	where string // file:line
}

// maxNesting bounds the nesting of blocks and includes. Real configurations have fewer than ten
// levels.
const maxNesting = 32

// parseNGINX parses a configuration file by the rules of nginx's own parser (ngx_conf_read_token):
// words are separated by white space and end at a ; or {. Quotes, and # for a comment, are special
// only at the start of a word.
func parseNGINX(file, text string) ([]nginxDirective, error) {
	p := &nginxParser{file: file, text: text, line: 1}
	block, err := p.block(0)
	if err != nil {
		return nil, fmt.Errorf("%s:%d: %w", file, p.line, err)
	}
	return block, nil
}

type nginxParser struct {
	file string
	text string // remaining text
	line int
}

var (
	errEnd   = errors.New("unexpected end of file")
	errQuote = errors.New("text follows a closing quote")
)

func (p *nginxParser) block(depth int) ([]nginxDirective, error) {
	if depth > maxNesting {
		return nil, errors.New("blocks are nested too deeply")
	}
	var list []nginxDirective
	for {
		word, mark, err := p.next()
		switch {
		case err != nil:
			return nil, err
		case mark == 0 && depth > 0:
			return nil, errEnd
		case mark == '}' && depth > 0, mark == 0:
			return list, nil
		case mark != 'w':
			return nil, fmt.Errorf("unexpected %q", mark)
		}
		d := nginxDirective{name: word, where: fmt.Sprintf("%s:%d", p.file, p.line)}
		if mark, err = p.rest(&d); err != nil {
			return nil, err
		}
		if mark == '{' {
			if strings.HasSuffix(d.name, "_by_lua_block") {
				err = p.skipLua()
			} else {
				d.block, err = p.block(depth + 1)
			}
			if err != nil {
				return nil, err
			}
		}
		list = append(list, d)
	}
}

// rest reads a directive's arguments and the mark that ends them.
func (p *nginxParser) rest(d *nginxDirective) (mark rune, err error) {
	for {
		word, mark, err := p.next()
		switch {
		case err != nil:
			return 0, err
		case mark == 'w':
			d.args = append(d.args, word)
		case mark == ';', mark == '{':
			return mark, nil
		case mark == 0:
			return 0, errEnd
		default:
			return 0, fmt.Errorf("unexpected %q", mark)
		}
	}
}

// next returns the next word with mark 'w', one of ; { } as the mark, or mark 0 at the end.
func (p *nginxParser) next() (word string, mark rune, err error) {
	for p.text != "" {
		switch c := p.text[0]; c {
		case ' ', '\t', '\r', '\n':
			p.skip(1)
		case '#':
			end := strings.IndexByte(p.text, '\n')
			if end < 0 {
				end = len(p.text)
			}
			p.skip(end)
		case ';', '{', '}':
			p.skip(1)
			return "", rune(c), nil
		case '"', '\'':
			word, err = p.quoted(c)
			return word, 'w', err
		default:
			word, err = p.bare()
			return word, 'w', err
		}
	}
	return "", 0, nil
}

func (p *nginxParser) skip(n int) {
	p.line += strings.Count(p.text[:n], "\n")
	p.text = p.text[n:]
}

func (p *nginxParser) quoted(quote byte) (string, error) {
	for i := 1; i < len(p.text); i++ {
		switch p.text[i] {
		case '\\':
			i++
		case quote:
			word := unescape(p.text[1:i])
			p.skip(i + 1)
			if p.text != "" && !strings.ContainsRune(" \t\r\n;{)", rune(p.text[0])) {
				return "", errQuote
			}
			return word, nil
		}
	}
	return "", errEnd
}

func (p *nginxParser) bare() (string, error) {
	for i := 0; i < len(p.text); i++ {
		switch p.text[i] {
		case '\\':
			i++
		case '$':
			if strings.HasPrefix(p.text[i+1:], "{") { // ${name} is part of the word
				i++
			}
		case ' ', '\t', '\r', '\n', ';', '{':
			word := unescape(p.text[:i])
			p.skip(i)
			return word, nil
		}
	}
	return "", errEnd
}

// unescape resolves nginx's escapes. Other backslashes stay.
func unescape(word string) string {
	if !strings.Contains(word, `\`) {
		return word
	}
	return strings.NewReplacer(`\"`, `"`, `\'`, `'`, `\\`, `\`, `\t`, "\t", `\r`, "\r", `\n`, "\n").Replace(word)
}

// skipLua skips a block of Lua. Its braces, quotes and comments follow Lua's rules.
func (p *nginxParser) skipLua() error {
	depth := 1
	for i := 0; i < len(p.text); i++ {
		switch rest := p.text[i:]; {
		case strings.HasPrefix(rest, "--[["), strings.HasPrefix(rest, "[["):
			end := strings.Index(rest, "]]")
			if end < 0 {
				return errEnd
			}
			i += end + 1
		case strings.HasPrefix(rest, "--"):
			end := strings.IndexByte(rest, '\n')
			if end < 0 {
				return errEnd
			}
			i += end
		case rest[0] == '"', rest[0] == '\'':
			quote := rest[0]
			for i++; i < len(p.text) && p.text[i] != quote; i++ {
				if p.text[i] == '\\' {
					i++
				}
			}
		case rest[0] == '{':
			depth++
		case rest[0] == '}':
			if depth--; depth == 0 {
				p.skip(i + 1)
				return nil
			}
		}
	}
	return errEnd
}
