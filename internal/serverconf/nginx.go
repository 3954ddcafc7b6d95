package serverconf

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// NGINX finds the key of cert in nginx's configuration. It runs the nginx in the job's commands
// with -T, which prints the configuration. That fails before a first deployment, while files are
// missing. Then nginx names its main configuration file, and NGINX reads the configuration from
// disk.
func NGINX(ctx context.Context, query Query, cert targetconf.Path, validate, reload policy.Command) (Pair, error) {
	call, err := nginxCall(validate, reload)
	if err != nil {
		return Pair{}, err
	}
	return ask("nginx", query, cert, func() ([]Pair, error) {
		call.Argv = append(call.Argv, "-T", "-q")
		dump, err := query(ctx, call)
		if err == nil {
			return nginxDumpPairs(string(dump))
		}
		if file := testedFile(err.Error()); file != "" {
			return nginxDiskPairs(file)
		}
		return nil, err
	})
}

// testedFile returns the configuration file that nginx names when its test fails, or "".
func testedFile(output string) string {
	const named = "configuration file "
	before, _, failed := strings.Cut(output, " test failed")
	at := strings.LastIndex(before, named)
	if !failed || at < 0 {
		return ""
	}
	file := before[at+len(named):]
	if !strings.HasPrefix(file, "/") || strings.ContainsAny(file, " \t") {
		return ""
	}
	return file
}

// nginxCall returns the call of nginx in the commands of a job, with the flags that select its
// configuration.
func nginxCall(validate, reload policy.Command) (policy.Command, error) {
	c, at := findStart([]policy.Command{validate, reload}, "nginx", "openresty", "angie", "freenginx", "tengine")
	if at < 0 {
		return c, errors.New("neither validate_command nor reload_command starts nginx itself, so it cannot be asked")
	}
	c.Argv = append(slices.Clone(c.Argv[:at+1]), nginxFlags(c.Argv[at+1:])...)
	return c, nil
}

// nginxFlags returns the flags that select nginx's configuration. As in nginx, one word may hold
// several flags, and a value may follow its flag in the same word.
func nginxFlags(words []string) []string {
	var kept []string
	for i := 0; i < len(words); i++ {
		flags, _ := strings.CutPrefix(words[i], "-")
		at := strings.IndexAny(flags, "cpges")
		if at < 0 || flags == words[i] {
			continue
		}
		flag, value := flags[at], flags[at+1:]
		if value == "" && i+1 < len(words) {
			i++
			value = words[i]
		}
		if flag != 's' { // the signal to send
			kept = append(kept, "-"+string(flag), value)
		}
	}
	return kept
}

type nginxFile struct {
	path string
	text string
}

// dumpHeader comes before each file in the output of nginx -T.
const dumpHeader = "# configuration file "

func nginxDumpPairs(dump string) ([]Pair, error) {
	var sections []nginxFile
	start, at := 0, 0 // offsets of the file's text and of the line
	end := func() {
		if len(sections) > 0 {
			sections[len(sections)-1].text = dump[start:at]
		}
	}
	for line := range strings.Lines(dump) {
		path, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), dumpHeader)
		if path, isHeader := strings.CutSuffix(path, ":"); ok && isHeader {
			end()
			sections = append(sections, nginxFile{path: filepath.Clean(path)})
			start = at + len(line)
		}
		at += len(line)
	}
	if end(); len(sections) == 0 {
		return nil, errors.New("nginx -T printed no configuration")
	}
	// nginx prints each file once. A second header is a comment that looks like one, so the text
	// cannot be assigned to files reliably.
	seen := make(map[string]bool)
	for _, s := range sections {
		if seen[s.path] {
			return nil, fmt.Errorf("nginx -T seems to print %s twice", s.path)
		}
		seen[s.path] = true
	}
	return nginxPairs(sections[0].path, func(pattern string) ([]nginxFile, error) {
		var found []nginxFile
		for _, s := range sections {
			if included(pattern, s.path) {
				found = append(found, s)
			}
		}
		return found, nil
	})
}

// included reports whether an include of pattern matches path. As in glob(3), a wildcard does not
// match a leading dot.
func included(pattern, path string) bool {
	if pattern == path {
		return true
	}
	if hidden := strings.HasPrefix(filepath.Base(path), "."); hidden && !strings.HasPrefix(filepath.Base(pattern), ".") {
		return false
	}
	ok, err := filepath.Match(pattern, path)
	return ok && err == nil
}

// maxIncluded bounds the files of one configuration. Files that are included twice count twice.
const maxIncluded = 4096

func nginxDiskPairs(main string) ([]Pair, error) {
	return nginxPairs(filepath.Clean(main), func(pattern string) ([]nginxFile, error) {
		paths := []string{pattern}
		if strings.ContainsAny(pattern, "*?[") {
			var err error
			if paths, err = filepath.Glob(pattern); err != nil {
				return nil, err
			}
		}
		var found []nginxFile
		for _, path := range paths {
			if !included(pattern, path) {
				continue
			}
			text, err := readFile(path)
			if err != nil {
				return nil, err
			}
			found = append(found, nginxFile{path, string(text)})
		}
		return found, nil
	})
}

// nginxPairs returns the certificates and keys of all server blocks.
func nginxPairs(main string, open func(pattern string) ([]nginxFile, error)) ([]Pair, error) {
	w := &nginxWalker{dir: filepath.Dir(main), open: open}
	list, err := w.include(main, 0)
	if err != nil {
		return nil, err
	}
	w.walk("", list, nginxScope{})
	return w.pairs, nil
}

type nginxWalker struct {
	dir   string // directory of the main file, to which relative paths refer
	open  func(pattern string) ([]nginxFile, error)
	files int
	pairs []Pair
}

func (w *nginxWalker) full(path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(w.dir, path)
}

func (w *nginxWalker) include(path string, depth int) ([]nginxDirective, error) {
	if depth > maxNesting {
		return nil, errors.New("includes are nested too deeply")
	}
	sections, err := w.open(w.full(path))
	if err != nil {
		return nil, err
	}
	if w.files += len(sections); w.files > maxIncluded {
		return nil, errors.New("too many includes")
	}
	var all []nginxDirective
	for _, s := range sections {
		list, err := parseNGINX(s.path, s.text)
		if err != nil {
			return nil, err
		}
		if list, err = w.expand(list, depth); err != nil {
			return nil, err
		}
		all = append(all, list...)
	}
	return all, nil
}

// expand replaces include directives by the contents of the files.
func (w *nginxWalker) expand(list []nginxDirective, depth int) ([]nginxDirective, error) {
	var all []nginxDirective
	for _, d := range list {
		content := []nginxDirective{d}
		var err error
		if d.name == "include" && len(d.args) == 1 && d.block == nil {
			content, err = w.include(d.args[0], depth+1)
		} else {
			content[0].block, err = w.expand(d.block, depth)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, content...)
	}
	return all, nil
}

// nginxScope holds the certificates and keys of a block. A block without directives of one kind
// inherits those of the enclosing block.
type nginxScope struct {
	certs, keys []nginxDirective
}

func (w *nginxWalker) walk(name string, list []nginxDirective, outer nginxScope) {
	var own nginxScope
	for _, d := range list {
		switch {
		case len(d.args) != 1:
		case d.name == "ssl_certificate":
			own.certs = append(own.certs, d)
		case d.name == "ssl_certificate_key":
			own.keys = append(own.keys, d)
		}
	}
	if own.certs == nil {
		own.certs = outer.certs
	}
	if own.keys == nil {
		own.keys = outer.keys
	}
	if name == "server" {
		w.pair(own)
	}
	for _, d := range list {
		w.walk(d.name, d.block, own)
	}
}

// pair adds the pairs of a server block. nginx keeps one certificate and one key for each type of
// key. It loads the first certificate and the first key, then the second ones, and finally each
// certificate has the key of its type, whatever the order. So if there are several, the contents of
// the files decide, and a single certificate that does not exist yet gets the remaining key.
func (w *nginxWalker) pair(s nginxScope) {
	keys := make([]string, min(len(s.keys), len(s.certs))) // nginx ignores further keys
	for i := range keys {
		keys[i] = w.keyFile(s.keys[i].args[0])
	}
	key := make([]int, len(s.certs)) // index of the key of each certificate, or -1
	taken := make([]bool, len(keys))
	for i, cert := range s.certs {
		key[i] = -1
		if len(s.certs) > 1 {
			key[i] = keyOf(w.full(cert.args[0]), keys, i)
		}
		if key[i] >= 0 {
			taken[key[i]] = true
		}
	}
	if lone, spare := uniqueIndex(key, -1), uniqueIndex(taken, false); lone >= 0 && spare >= 0 {
		key[lone] = spare
	}
	for i, cert := range s.certs {
		pair := Pair{Cert: w.full(cert.args[0]), Where: cert.where}
		if at := key[i]; at >= 0 {
			pair.Key, pair.Where = keys[at], s.keys[at].where
		}
		w.pairs = append(w.pairs, pair)
	}
}

// keyOf returns the index of the key of a certificate, or -1. If several match, as with placeholder
// copies of one pair, it prefers the key at index place.
func keyOf(cert string, keys []string, place int) int {
	if place < len(keys) && isPair(cert, keys[place]) {
		return place
	}
	return slices.IndexFunc(keys, func(key string) bool { return isPair(cert, key) })
}

// uniqueIndex returns the index of v in list, or -1 unless v occurs exactly once.
func uniqueIndex[T comparable](list []T, v T) int {
	at := slices.Index(list, v)
	if at >= 0 && slices.Contains(list[at+1:], v) {
		return -1
	}
	return at
}

// isPair reports whether the file key holds the private key of the certificate in the file cert.
func isPair(cert, key string) bool {
	if !filepath.IsAbs(key) || strings.Contains(key, "$") {
		return false
	}
	certPEM, err := readFile(cert)
	if err != nil {
		return false
	}
	keyPEM, err := readFile(key)
	if err != nil {
		return false
	}
	_, err = tls.X509KeyPair(certPEM, keyPEM)
	return err == nil
}

// keyFile returns the file in an ssl_certificate_key. If the value itself, an engine or a provider
// holds the key, it returns only the scheme. It leaves variables as they are. Neither can be
// mistaken for an absolute path.
func (w *nginxWalker) keyFile(value string) string {
	for _, scheme := range []string{"data:", "engine:", "store:"} {
		if strings.HasPrefix(value, scheme) {
			return scheme
		}
	}
	if strings.Contains(value, "$") {
		return value
	}
	return w.full(value)
}
