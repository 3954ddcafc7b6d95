package serverconf

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// HTTPD finds the key of cert in httpd's configuration. httpd's mod_info prints the configuration
// with includes, macros, Define, <IfModule> and the environment resolved (-D DUMP_CONFIG). -D
// DUMP_RUN_CFG prints the base of relative paths and keeps httpd from opening certificate files, so
// it answers even before the first deployment.
func HTTPD(ctx context.Context, query Query, cert targetconf.Path, validate, reload policy.Command) (Pair, error) {
	call, err := httpdCall(validate, reload)
	if err != nil {
		return Pair{}, err
	}
	return ask("httpd", query, cert, func() ([]Pair, error) {
		for _, load := range loadInfo() {
			stdout, err := query(ctx, policy.Command{
				Argv:    slices.Concat(call.Argv, load, []string{"-t", "-D", "DUMP_RUN_CFG", "-D", "DUMP_CONFIG"}),
				Timeout: call.Timeout,
			})
			if pairs, ok := httpdPairs(string(stdout), string(cert)); err == nil && ok {
				return pairs, nil
			}
			if err != nil && load == nil {
				return nil, err // loading a module would not help
			}
		}
		return nil, errors.New("it printed none: that requires mod_info")
	})
}

// infoModules are the paths of mod_info: on Debian, Alpine, SUSE and Gentoo, then relative to the
// directory that httpd was built for, in Apache's own layout with Red Hat, and on FreeBSD.
var infoModules = [...]string{
	"/usr/lib/apache2/modules/mod_info.so", "/usr/lib/apache2/mod_info.so", "/usr/lib64/apache2/mod_info.so", "/usr/lib64/apache2/modules/mod_info.so",
	"modules/mod_info.so", "libexec/apache24/mod_info.so",
}

// loadInfo returns the sets of flags to try for loading mod_info. The first is for an httpd that
// has already loaded it.
func loadInfo() [][]string {
	tries := [][]string{nil}
	for _, module := range infoModules {
		if _, err := os.Stat(module); err == nil || !filepath.IsAbs(module) {
			tries = append(tries, []string{"-C", "LoadModule info_module " + module})
		}
	}
	return tries
}

// httpdCall returns the call of httpd in the commands of a job, with the flags that select its
// configuration.
func httpdCall(validate, reload policy.Command) (policy.Command, error) {
	c, at := findStart([]policy.Command{validate, reload}, "apache2", "apache2ctl", "apachectl", "httpd")
	if at < 0 {
		return c, errors.New("neither validate_command nor reload_command starts httpd itself, so it cannot be asked")
	}
	words := c.Argv[at+1:]
	c.Argv = slices.Clone(c.Argv[:at+1])
	for i := 0; i < len(words); i++ {
		flag, isFlag := strings.CutPrefix(words[i], "-")
		if !isFlag || flag == "" || !strings.Contains("fdDCcE", flag[:1]) {
			if flag == "k" || flag == "e" {
				i++ // skip its value
			}
			continue
		}
		c.Argv = append(c.Argv, words[i])
		if len(flag) == 1 && i+1 < len(words) {
			i++
			c.Argv = append(c.Argv, words[i])
		}
	}
	return c, nil
}

type httpdSetting struct {
	value string
	where string // file:line
}

// httpdScope holds the settings of a virtual host, or of the server outside them.
type httpdScope struct {
	certs, keys []httpdSetting
}

// httpdPairs parses the output of -D DUMP_RUN_CFG and -D DUMP_CONFIG. That has each effective
// directive on a line, preceded by its line number, and the name of a file before its first
// directive. httpdPairs reports false if the output contains no configuration. The httpd that
// printed it may lack environment variables of the running server. If a path with unknown variables
// can match cert, it is assumed to be cert.
func httpdPairs(dump, cert string) (pairs []Pair, ok bool) {
	var server httpdScope
	var hosts []*httpdScope
	current := &server
	root, file, number := "", "", ""
	for line := range strings.Lines(dump) {
		line = strings.TrimSpace(line)
		if quoted, found := strings.CutPrefix(line, "ServerRoot: "); found {
			root = strings.Trim(quoted, `"`)
		}
		if comment, found := strings.CutPrefix(line, "#"); found {
			if name, found := strings.CutPrefix(comment, " In file: "); found {
				file, ok = name, true
			} else {
				number = strings.Trim(comment, " :")
			}
			continue
		}
		words := httpdWords(line)
		if len(words) == 0 {
			continue
		}
		add := func(list *[]httpdSetting) {
			if len(words) == 2 {
				*list = append(*list, httpdSetting{words[1], file + ":" + number})
			}
		}
		switch strings.ToLower(words[0]) {
		case "<virtualhost":
			current = new(httpdScope)
			hosts = append(hosts, current)
		case "</virtualhost>":
			current = &server
		case "sslcertificatefile":
			add(&current.certs)
		case "sslcertificatekeyfile":
			add(&current.keys)
		}
	}
	pairs = server.pairs(root)
	for _, host := range hosts {
		host.inherit(&server)
		pairs = append(pairs, host.pairs(root)...)
	}
	for i, pair := range pairs {
		if strings.Contains(pair.Cert, "${") && canExpandTo(pair.Cert, cert) {
			pairs[i].Cert = cert
		}
	}
	return pairs, ok
}

// canExpandTo reports whether path can result from template when its variables, such as ${name},
// are replaced.
func canExpandTo(template, path string) bool {
	var pattern strings.Builder
	for i, part := range strings.Split(template, "${") {
		if i > 0 {
			if _, rest, closed := strings.Cut(part, "}"); closed {
				pattern.WriteString(".*")
				part = rest
			} else {
				part = "${" + part
			}
		}
		pattern.WriteString(regexp.QuoteMeta(part))
	}
	ok, err := regexp.MatchString("^(?s:"+pattern.String()+")$", path)
	return ok && err == nil
}

// inherit adds the settings of the enclosing server. As in httpd, the first setting of a virtual
// host overrides the first of the server, and so on.
func (s *httpdScope) inherit(server *httpdScope) {
	s.certs = append(s.certs, server.certs[min(len(s.certs), len(server.certs)):]...)
	s.keys = append(s.keys, server.keys[min(len(s.keys), len(server.keys)):]...)
}

// pairs combines the first certificate with the first key, and so on. If there is no key, httpd
// reads it from the certificate's file.
func (s *httpdScope) pairs(root string) []Pair {
	var pairs []Pair
	for i, cert := range s.certs {
		key := cert
		if i < len(s.keys) {
			key = s.keys[i]
		}
		if cert.value == "" || key.value == "" {
			continue // httpd would not start
		}
		pairs = append(pairs, Pair{Cert: httpdPath(root, cert.value), Key: httpdPath(root, key.value), Where: key.where})
	}
	return pairs
}

// httpdPath makes a path absolute. For a key in a PKCS#11 token it returns only the scheme, which
// cannot be mistaken for an absolute path.
func httpdPath(root, value string) string {
	if scheme := "pkcs11:"; strings.HasPrefix(value, scheme) {
		return scheme
	}
	if filepath.IsAbs(value) {
		return filepath.Clean(value)
	}
	return filepath.Join(root, value)
}

// httpdWords splits a line into words like ap_getword_conf: a word may be quoted, and a backslash
// in it escapes a quote or a backslash. A comment has no words.
func httpdWords(line string) []string {
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
