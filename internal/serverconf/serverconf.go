// Package serverconf finds out from servers which certificates and keys they use.
package serverconf

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
)

// Query runs a command that changes nothing and returns its output. A nil Query means that commands
// cannot be run.
type Query func(ctx context.Context, c policy.Command) (stdout []byte, err error)

// Pair is a certificate and its key according to a server's configuration.
type Pair struct {
	Cert  string // absolute
	Key   string // absolute, or not a path if the key is not in a file; "" if unclear
	Where string // file and line
}

// Reads reports whether the server reads its key from the file at path.
func (p Pair) Reads(path targetconf.Path) bool {
	return hostfile.Real(p.Key) == hostfile.Real(string(path))
}

// ErrUnnamed means that a server does not use a certificate at all.
var ErrUnnamed = errors.New("it does not use that file")

// UnclearError means that a server uses a certificate, but that its key cannot be determined.
type UnclearError struct{ error }

func (e *UnclearError) Unwrap() error { return e.error }

func unclear(format string, args ...any) error { return &UnclearError{fmt.Errorf(format, args...)} }

// ask finds the key of cert among the pairs in the server's answer.
func ask(server string, query Query, cert targetconf.Path, pairs func() ([]Pair, error)) (Pair, error) {
	if query == nil {
		return Pair{}, errors.New(server + " cannot be asked here")
	}
	found, err := pairs()
	if err != nil {
		return Pair{}, fmt.Errorf("ask %s for its configuration: %w", server, err)
	}
	return KeyFor(cert, found)
}

// KeyFor finds the key that belongs to cert. It returns an error unless there is exactly one. If
// the certificate's own file holds the key, the result has cert as its Key.
func KeyFor(cert targetconf.Path, pairs []Pair) (Pair, error) {
	var found []Pair
	want := hostfile.Real(string(cert))
	for _, pair := range pairs {
		if pair.Cert != string(cert) && hostfile.Real(pair.Cert) != want {
			continue
		}
		same := func(f Pair) bool { return f.Key == pair.Key || hostfile.Real(f.Key) == hostfile.Real(pair.Key) }
		if !slices.ContainsFunc(found, same) {
			found = append(found, pair)
		}
	}
	switch len(found) {
	case 0:
		return Pair{}, fmt.Errorf("the server's own configuration names no key for %s: %w", cert, ErrUnnamed)
	case 1:
	default:
		var keys []string
		for _, pair := range found[:min(len(found), 4)] {
			keys = append(keys, printable.Quote(pair.Key)+" ("+pair.Where+")")
		}
		return Pair{}, unclear("the server's own configuration names several keys for %s: %s: use a separate certificate file for each key",
			cert, strings.Join(keys, ", "))
	}
	if found[0].Key == "" {
		return Pair{}, unclear("the server's own configuration leaves open which key belongs to %s (%s): name its key file there, next to the certificate",
			cert, found[0].Where)
	}
	key, err := targetconf.ParsePath(found[0].Key)
	if err == nil && strings.Contains(string(key), "$") {
		err = fmt.Errorf("%s contains a variable: write the path in full there", printable.Quote(string(key)))
	}
	if err != nil {
		return Pair{}, unclear("the key that the server's own configuration names for %s (%s) cannot be used: %w", cert, found[0].Where, err)
	}
	if found[0].Key = string(key); hostfile.Real(string(key)) == want {
		found[0].Key = string(cert)
	}
	return found[0], nil
}

// findStart returns the first of commands that starts one of programs, and the index of the program
// in it, or -1 if none does.
func findStart(commands []policy.Command, programs ...string) (c policy.Command, at int) {
	for _, c := range commands {
		if at := program(c.Argv, programs...); at >= 0 {
			return c, at
		}
	}
	return policy.Command{}, -1
}

// configPrinter returns a call of the program name, which prints the configuration of a mail
// server. The program is next to the first of programs that the job's commands start and gets the
// -c flag of that command. The reload command comes first because it shows which server the job is
// about.
func configPrinter(name string, validate, reload policy.Command, programs ...string) (policy.Command, error) {
	c, at := findStart([]policy.Command{reload, validate}, programs...)
	if at < 0 {
		return c, fmt.Errorf("neither reload_command nor validate_command starts %s itself", strings.Join(programs, " or "))
	}
	call := append(slices.Clone(c.Argv[:at]), name)
	if strings.Contains(c.Argv[at], "/") {
		call[at] = filepath.Join(filepath.Dir(c.Argv[at]), name)
	}
	c.Argv = append(call, configFlag(c.Argv[at+1:])...)
	return c, nil
}

// configFlag returns the flag -c in words with its value. Like the programs themselves, it accepts
// a value in the same word.
func configFlag(words []string) []string {
	for i, word := range words {
		value, ok := strings.CutPrefix(word, "-c")
		if ok && value == "" && i+1 < len(words) {
			value = words[i+1]
		}
		if ok {
			return []string{"-c", value}
		}
	}
	return nil
}

// program returns the index in argv of the program that a command starts if it is one of names, and
// -1 otherwise. It skips sudo and doas. A name may have the suffix of a version or variant. Any
// other longer name is a different program, such as a script around a server, which must not be
// started with arguments that the policy does not allow.
func program(argv []string, names ...string) int {
	at := 0
	if first := filepath.Base(argv[0]); first == "sudo" || first == "doas" {
		at = afterFlags(argv)
	}
	if at == len(argv) {
		return -1
	}
	base := filepath.Base(argv[at])
	for _, name := range names {
		variant, ok := strings.CutPrefix(base, name)
		if ok && isVariant(variant) {
			return at
		}
	}
	return -1
}

// isVariant reports whether suffix is one that distributions append to the names of servers.
func isVariant(suffix string) bool {
	switch suffix {
	case "-debug", ".worker", ".event", ".prefork":
		return true
	}
	return strings.Trim(suffix, "0123456789.") == ""
}

// afterFlags returns the index of the command in a call of sudo or doas.
func afterFlags(argv []string) int {
	at := 1
	for ; at < len(argv) && strings.HasPrefix(argv[at], "-"); at++ {
		// The next word is the value of these flags.
		if flag := argv[at]; len(flag) == 2 && strings.Contains("aCcDghpRrTtUu", flag[1:]) {
			at++
		}
	}
	return min(at, len(argv))
}

// maxFile bounds a file of a server's configuration, in bytes.
const maxFile = 4 << 20

// readFile reads a file of a server's configuration. Its directory need not be trusted.
func readFile(path string) ([]byte, error) {
	data, _, err := hostfile.Read(path, maxFile)
	return data, err
}
