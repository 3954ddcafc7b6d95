package config

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/command"
	"certctl-agent/internal/secret"
)

const (
	// maxEnvFile and maxSecretFile are far above what such files hold.
	maxEnvFile    = 1 << 20
	maxSecretFile = 64 << 10

	// maxBundle is ten times the size of a system's own bundle.
	maxBundle = 8 << 20
)

// parseServer checks the control plane's address. Its errors never quote a
// value that may hold a password.
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
		return nil, fmt.Errorf("is no URL: %w", withoutURL(err))
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
		return nil, errors.New("holds credentials: remove what is before the @; the API key is a setting of its own")
	case u.RawQuery != "" || u.ForceQuery:
		return nil, errors.New("holds a query: remove the ? and what follows it")
	case strings.Contains(value, "#"):
		return nil, errors.New("holds a fragment: remove the # and what follows it")
	case u.Hostname() == "":
		return nil, errors.New("names no host")
	}
	port := u.Port()
	if n, err := strconv.Atoi(port); port != "" && (err != nil || n < 1 || n > 65535) {
		return nil, fmt.Errorf("has port %s: ports are 1 to 65535", port)
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

// withoutURL takes the URL out of an error of package url, which quotes it.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		// The cause may quote a part of it too, such as an escape or a port.
		if _, ok := errors.AsType[url.EscapeError](e.Err); ok {
			return errors.New("it holds a bad % escape")
		}
		if _, ok := errors.AsType[url.InvalidHostError](e.Err); ok {
			return errors.New("its host holds a character that none may hold")
		}
	}
	return errors.New("it cannot be parsed")
}

// parseBundle reads the certificates that the control plane's must chain to.
// The warning is about those that it holds and that cannot be used: bundles of
// whole systems have a few that Go refuses, but in one of two that is the one
// that matters. Anybody may read the file.
func parseBundle(path string) (pool *x509.CertPool, warning string, err error) {
	data, _, _, err := readTrusted(path, maxBundle)
	if err != nil {
		return nil, "", err
	}
	data = bytes.ReplaceAll(data, byteOrderMark, nil) // within, too: bundles are joined from files
	begun, used := bytes.Count(data, []byte("-----BEGIN ")), 0
	reason := errors.New("it is not valid PEM")
	pool = x509.NewCertPool()
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		switch {
		case block.Type != "CERTIFICATE":
			reason = fmt.Errorf("%.40q is not CERTIFICATE", block.Type)
		case err != nil:
			reason = err
		default:
			pool.AddCert(certificate)
			used++
		}
	}
	switch {
	case used == 0:
		return nil, "", fmt.Errorf("%s holds no PEM certificate that can be parsed", path)
	case used < begun:
		warning = fmt.Sprintf("%s (CERTCTL_SERVER_CA_BUNDLE_PATH): %d of its %d PEM blocks are not used; of the last of them: %v", path, begun-used, begun, reason)
	}
	return pool, warning, nil
}

// checkKey refuses an API key that cannot stand in a header (RFC 6750, 2.1,
// allows even less). It does not quote it.
func checkKey(key string) error {
	for _, c := range []byte(key) {
		if c <= ' ' || c > '~' {
			return errors.New("holds a blank, a line end or another character that no API key holds")
		}
	}
	return nil
}

func checkAgentID(id string) error {
	const longest = 1024
	if id == "." || id == ".." || len(id) > longest {
		return fmt.Errorf("%.64q cannot be an agent id", id)
	}
	for _, c := range id {
		if c <= ' ' || c == 0x7f || c == '\uFFFD' {
			return fmt.Errorf("%.64q cannot be an agent id: it holds a blank or a control character", id)
		}
	}
	return nil
}

func parseBool(value string) (bool, error) {
	switch strings.ToLower(value) {
	case "1", "t", "true", "yes", "on":
		return true, nil
	case "0", "f", "false", "no", "off":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither true nor false", value)
}

func parseLevel(value string) (slog.Level, error) {
	switch strings.ToLower(value) {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("%q is none of debug, info, warn, error", value)
}

func parseDuration(value string, lowest, highest time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(value)
	if _, noUnit := strconv.ParseFloat(value, 64); noUnit == nil && value != "0" {
		return 0, fmt.Errorf("%q has no unit: write %ss for seconds", value, value)
	}
	if err != nil {
		return 0, fmt.Errorf("%q is no duration such as 90s, 5m or 6h", value)
	}
	if d < lowest || d > highest {
		return 0, fmt.Errorf("%q is out of range: from %v to %v", value, lowest, highest)
	}
	return d, nil
}

func parseInt(value string, lowest, highest int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil {
		return 0, fmt.Errorf("%q is no whole number", value)
	}
	if n < lowest || n > highest {
		return 0, fmt.Errorf("%d is out of range: from %d to %d", n, lowest, highest)
	}
	return n, nil
}

func parseWord(value string, words ...string) (string, error) {
	if word := strings.ToLower(value); slices.Contains(words, word) {
		return word, nil
	}
	return "", fmt.Errorf("%q is none of %s", value, strings.Join(words, ", "))
}

// parsePath makes a path absolute, so that it means the same wherever it is
// used; "" stays.
func parsePath(value string) (string, error) {
	switch {
	case value == "":
		return "", nil
	case strings.ContainsRune(value, 0):
		return "", errors.New("holds a NUL")
	case value[0] == '~' || value[0] == '$':
		return "", fmt.Errorf("%q begins with %q, which only a shell expands: write the path out (or ./%[1]s, if that is its name)", value, value[0])
	}
	return filepath.Abs(value)
}

// parseList splits at commas, trims blanks and drops what is empty.
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

// parseAllowedPaths is parseDirs for a list where a slip must not widen what
// is allowed: a relative path is an error, and a list without any entry too.
func parseAllowedPaths(value string) ([]string, error) {
	for _, entry := range parseList(value, ",") {
		if !filepath.IsAbs(entry) {
			return nil, fmt.Errorf("%q is no absolute path", entry)
		}
	}
	dirs, err := parseDirs(value)
	if err == nil && len(dirs) == 0 && value != "" {
		err = fmt.Errorf("%q names no directory: unset it to allow any", value)
	}
	return dirs, err
}

// parseAllowedCommands splits command lines into words. One that could never
// run, since it breaks the rules for commands, is an error.
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

func parseGlobs(value string) ([]string, error) {
	globs := parseList(value, ",")
	for _, glob := range globs {
		if _, err := filepath.Match(glob, ""); err != nil {
			return nil, fmt.Errorf("%q is no pattern: %w", glob, err)
		}
	}
	return globs, nil
}

// parsePasswords reads one password per line; what is on a line is the
// password, blanks included.
func parsePasswords(path string) (passwords []secret.String, warning string, err error) {
	if path, err = parsePath(path); err != nil {
		return nil, "", err
	}
	data, _, warning, err := readTrusted(path, maxSecretFile)
	if err != nil {
		return nil, "", err
	}
	for line := range strings.Lines(string(withoutMark(data))) {
		if line = strings.TrimRight(line, "\r\n"); line != "" {
			passwords = append(passwords, secret.New(line))
		}
	}
	return passwords, warning, nil
}

// parseRequiredPath is parsePath for what cannot be left out.
func parseRequiredPath(value string) (string, error) {
	if value == "" {
		return "", errors.New("is empty")
	}
	return parsePath(value)
}
