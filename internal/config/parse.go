package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"certctl-agent/internal/command"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
)

const (
	// maxEnvFile and maxSecretFile are far more than such files need.
	maxEnvFile    = 1 << 20
	maxSecretFile = 64 << 10

	// maxBundle is ten times the size of a system's own bundle.
	maxBundle = 8 << 20
)

// parseServer parses the control plane's URL. Its errors do not quote parts that may contain a
// password.
func parseServer(value string) (*url.URL, error) {
	if value == "" {
		return nil, errors.New("is empty: give the control plane's address, such as https://certctl.example.com:8443")
	}
	scheme, _, ok := strings.Cut(value, "://")
	if !ok {
		return nil, errors.New("has no scheme: put https:// before it")
	}
	u, err := url.Parse(value)
	if err != nil {
		return nil, fmt.Errorf("is not a valid URL: %w", withoutURL(err))
	}
	switch scheme = strings.ToLower(scheme); scheme {
	case "https":
	case "http":
		return nil, errors.New("is plain http://, and the control plane is HTTPS-only: write https://; see docs/upgrade-to-tls.md")
	default:
		return nil, fmt.Errorf("has scheme %q, not https", scheme)
	}
	switch {
	case u.User != nil:
		return nil, errors.New("contains credentials: remove the part before the @; the API key is a separate setting")
	case u.RawQuery != "" || u.ForceQuery:
		return nil, errors.New("contains a query: remove the ? and everything after it")
	case strings.Contains(value, "#"):
		return nil, errors.New("contains a fragment: remove the # and everything after it")
	case u.Hostname() == "":
		return nil, errors.New("has no host")
	}
	port := u.Port()
	if n, err := strconv.Atoi(port); port != "" && (err != nil || n < 1 || n > 65535) {
		return nil, fmt.Errorf("has port %s: expected 1 to 65535", port)
	}
	// One spelling for each address: the state directory depends on it.
	host := strings.ToLower(u.Hostname())
	switch {
	case port != "" && port != "443":
		u.Host = net.JoinHostPort(host, port)
	case strings.Contains(host, ":"):
		u.Host = "[" + host + "]"
	default:
		u.Host = host
	}
	u.Path = strings.TrimRight(u.Path, "/")
	u.RawPath = strings.TrimRight(u.RawPath, "/")
	return u, nil
}

// withoutURL replaces an error of package url, which quotes the URL.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		// The cause may quote a part too, such as an escape or a port.
		if _, ok := errors.AsType[url.EscapeError](e.Err); ok {
			return errors.New("it contains a bad % escape")
		}
		if _, ok := errors.AsType[url.InvalidHostError](e.Err); ok {
			return errors.New("its host contains an invalid character")
		}
	}
	return errors.New("it cannot be parsed")
}

func parseText(value string) (string, error) { return value, nil }

// parseKey returns an invalid key too, so that it is not also reported as missing.
func parseKey(value string) (secret.String, error) { return secret.New(value), checkKey(value) }

// checkKey checks that an API key can be sent in a header. (RFC 6750, section 2.1, allows even
// fewer characters.) The error does not quote the key.
func checkKey(key string) error {
	if strings.ContainsFunc(key, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return errors.New("contains white space or another character that is not allowed in an API key")
	}
	return nil
}

// unprintable reports whether r is a control character or invalid UTF-8.
func unprintable(r rune) bool { return printable.IsControl(r) || r == utf8.RuneError }

// parseAgentID returns an invalid id too, as parseKey does.
func parseAgentID(id string) (string, error) {
	const longest = 1024
	if id == "." || id == ".." || len(id) > longest {
		return id, fmt.Errorf("%.64q cannot be an agent id", id)
	}
	if strings.Contains(id, " ") || strings.ContainsFunc(id, unprintable) {
		return id, fmt.Errorf("%.64q cannot be an agent id: it contains a space or a control character", id)
	}
	return id, nil
}

func parseLevel(value string) (slog.Level, error) {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, strings.ToLower(value)) {
		return 0, fmt.Errorf("%q is not one of debug, info, warn, error", value) // UnmarshalText also accepts info+2
	}
	var level slog.Level
	err := level.UnmarshalText([]byte(value))
	return level, err
}

// parsePath makes a path absolute. It keeps "".
func parsePath(value string) (string, error) {
	switch {
	case value == "":
		return "", nil
	case strings.ContainsRune(value, 0):
		return "", errors.New("contains a NUL")
	case value[0] == '~' || value[0] == '$':
		return "", fmt.Errorf("%q begins with %q, which only a shell expands: write the whole path (or ./%[1]s, if that is its name)", value, value[0])
	}
	return filepath.Abs(value)
}

// parseList splits a list, trims white space and drops empty entries.
func parseList(value, separator string) []string {
	var list []string
	for entry := range strings.SplitSeq(value, separator) {
		if entry = strings.TrimSpace(entry); entry != "" {
			list = append(list, entry)
		}
	}
	return list
}

func parseDirs(value string) ([]string, error) {
	var dirs []string
	for _, entry := range parseList(value, ",") {
		dir, err := parsePath(entry)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs, nil
}

// parseAllowedPaths is like parseDirs, but a mistake must not allow more: a relative path is an
// error, and so is a list without entries.
func parseAllowedPaths(value string) ([]string, error) {
	for _, entry := range parseList(value, ",") {
		if !filepath.IsAbs(entry) {
			return nil, fmt.Errorf("%q is not an absolute path", entry)
		}
	}
	dirs, err := parseDirs(value)
	if err == nil && len(dirs) == 0 && value != "" {
		err = fmt.Errorf("%q names no directory: unset it to allow any", value)
	}
	return dirs, err
}

// parseAllowedCommands splits command lines into words. A command that could never run is an error.
func parseAllowedCommands(value string) ([][]string, error) {
	var commands [][]string
	for _, line := range parseList(value, ";") {
		words, err := command.Split(line)
		if err != nil {
			return nil, fmt.Errorf("command %q: %w", line, err)
		}
		if words[0] == "*" {
			return nil, fmt.Errorf("command %q names no program: unset the list to allow any command", line)
		}
		commands = append(commands, words)
	}
	if len(commands) == 0 && value != "" {
		return nil, fmt.Errorf("%q names no command: unset it to allow any", value)
	}
	return commands, nil
}

// noHosts is the value for an empty list of hosts.
const noHosts = "none"

func parseAllowedHosts(value string) ([]policy.HostRule, error) {
	entries := parseList(value, ",")
	switch {
	case value == "":
		return nil, nil
	case strings.EqualFold(value, noHosts):
		return []policy.HostRule{}, nil
	case len(entries) == 0:
		return nil, fmt.Errorf("%q names no host: unset it to allow any, or write %s", value, noHosts)
	}
	var rules []policy.HostRule
	for _, entry := range entries {
		if strings.EqualFold(entry, noHosts) {
			return nil, fmt.Errorf("%q: %s must be the only entry", value, noHosts)
		}
		rule, err := policy.ParseHostRule(entry)
		if err != nil {
			return nil, err
		}
		rules = append(rules, rule)
	}
	return rules, nil
}

func parseGlobs(value string) ([]string, error) {
	globs := parseList(value, ",")
	for _, glob := range globs {
		if _, err := filepath.Match(glob, ""); err != nil {
			return nil, fmt.Errorf("%q is not a valid pattern: %w", glob, err)
		}
	}
	return globs, nil
}

// parseRequiredPath is like parsePath, but refuses "".
func parseRequiredPath(value string) (string, error) {
	if value == "" {
		return "", errors.New("is empty")
	}
	return parsePath(value)
}
