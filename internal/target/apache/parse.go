package apache

import (
	"fmt"
	"path/filepath"
	"strings"

	"certctl-agent/internal/target"
)

// setting is one SSLCertificateFile or SSLCertificateKeyFile.
type setting struct {
	value string
	where string // file:line
}

// scope is what one virtual host, one macro, or the rest of one file sets.
type scope struct {
	name        string // of the section, in lower case; "" for the file
	certs, keys []setting
}

// reader collects certificates and keys from configuration files.
type reader struct {
	root    string            // ServerRoot
	defines map[string]string // -D and Define, with their values
	pairs   []target.ServerPair
}

// read takes one file. Sections that choose by <IfDefine> are decided as httpd
// decides them; what <IfModule> and its like hold always counts. So more may
// be found than is in force, never less, and target.KeyFor wants one answer.
func (r *reader) read(file, text string) {
	scopes := []*scope{{}}
	skipping := 0 // open sections, from the one that is not in force
	number := 0
	for line, lines := range logicalLines(text) {
		number += lines
		words := split(line)
		if len(words) == 0 {
			continue
		}
		name := strings.ToLower(words[0])
		section, opens := strings.CutPrefix(name, "<")
		closed, closes := strings.CutPrefix(section, "/")
		closed = strings.TrimSuffix(closed, ">")
		switch {
		case skipping > 0 && closes:
			skipping--
		case skipping > 0 && opens:
			skipping++
		case skipping > 0:
		case closes:
			if current := scopes[len(scopes)-1]; current.name == closed {
				r.finish(current)
				scopes = scopes[:len(scopes)-1]
			}
		case opens && (section == "virtualhost" || section == "macro"):
			scopes = append(scopes, &scope{name: section})
		case opens && section == "ifdefine" && len(words) > 1 && !r.defined(words[1]):
			skipping++
		case name == "sslcertificatefile" && len(words) == 2:
			current := scopes[len(scopes)-1]
			current.certs = append(current.certs, setting{r.full(words[1]), fmt.Sprintf("%s:%d", file, number)})
		case name == "sslcertificatekeyfile" && len(words) == 2:
			current := scopes[len(scopes)-1]
			current.keys = append(current.keys, setting{r.full(words[1]), fmt.Sprintf("%s:%d", file, number)})
		}
	}
	for _, open := range scopes {
		r.finish(open)
	}
}

// finish pairs the first certificate of a scope with its first key, and so on.
// Where the numbers differ, any of the keys may be the one.
func (r *reader) finish(s *scope) {
	for i, cert := range s.certs {
		keys := s.keys
		if len(s.certs) == len(s.keys) {
			keys = s.keys[i : i+1]
		}
		for _, key := range keys {
			r.pairs = append(r.pairs, target.ServerPair{Cert: cert.value, Key: key.value, Where: key.where})
		}
	}
}

func (r *reader) defined(condition string) bool {
	name, negated := strings.CutPrefix(strings.TrimSuffix(condition, ">"), "!")
	_, ok := r.defines[name]
	return ok != negated
}

// full resolves ${name} and makes a path absolute. Of a key that a token holds
// only the scheme is kept, which nobody takes for a path.
func (r *reader) full(value string) string {
	for name, defined := range r.defines {
		value = strings.ReplaceAll(value, "${"+name+"}", defined)
	}
	if scheme := "pkcs11:"; strings.HasPrefix(value, scheme) {
		return scheme
	}
	if filepath.IsAbs(value) {
		return filepath.Clean(value)
	}
	return filepath.Join(r.root, value)
}

// logicalLines yields the lines of a file with continued ones joined, and how
// many lines of the file each one is.
func logicalLines(text string) func(yield func(string, int) bool) {
	return func(yield func(string, int) bool) {
		var joined strings.Builder
		count := 0
		for line := range strings.Lines(text) {
			count++
			line = strings.TrimRight(line, "\r\n")
			if head, continued := strings.CutSuffix(line, `\`); continued {
				joined.WriteString(head)
				continue
			}
			joined.WriteString(line)
			if !yield(joined.String(), count) {
				return
			}
			joined.Reset()
			count = 0
		}
		if joined.Len() > 0 {
			yield(joined.String(), count)
		}
	}
}

// split parts a line into words as ap_getword_conf does: a word may be quoted,
// and a backslash in it escapes a quote or a backslash. A comment has none.
func split(line string) []string {
	var words []string
	for line = strings.TrimSpace(line); line != "" && (len(words) > 0 || line[0] != '#'); line = strings.TrimSpace(line) {
		if quote := line[0]; quote == '"' || quote == '\'' {
			var word strings.Builder
			i := 1
			for ; i < len(line) && line[i] != quote; i++ {
				if line[i] == '\\' && i+1 < len(line) && (line[i+1] == quote || line[i+1] == '\\') {
					i++
				}
				word.WriteByte(line[i])
			}
			words = append(words, word.String())
			line = line[min(i+1, len(line)):]
			continue
		}
		end := strings.IndexAny(line, " \t")
		if end < 0 {
			end = len(line)
		}
		words = append(words, line[:end])
		line = line[end:]
	}
	return words
}
