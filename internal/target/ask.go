package target

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// ServerPair is a certificate and its key as a server's own configuration
// names them.
type ServerPair struct {
	Cert, Key string // absolute, unless the server takes the key from elsewhere
	Where     string // file and line
}

// Uses reports whether the server reads the key of m once m is installed with
// its key at keyPath, or only in the key store.
func (p ServerPair) Uses(keyPath Path, m *Material) bool {
	return keyPath != "" && resolved(p.Key) == resolved(string(keyPath)) || m.InKeyStore(Path(p.Key))
}

// KeyFor finds the key that belongs to cert. Only one answer is an answer.
func KeyFor(cert Path, pairs []ServerPair) (ServerPair, error) {
	var found []ServerPair
	want := resolved(string(cert))
	for _, pair := range pairs {
		if pair.Cert != string(cert) && resolved(pair.Cert) != want {
			continue
		}
		if !slices.ContainsFunc(found, func(f ServerPair) bool { return f.Key == pair.Key }) {
			found = append(found, pair)
		}
	}
	switch len(found) {
	case 0:
		return ServerPair{}, fmt.Errorf("the server's own configuration names no key for %s", cert)
	case 1:
	default:
		var keys []string
		for _, pair := range found {
			keys = append(keys, clip(pair.Key))
		}
		return ServerPair{}, fmt.Errorf("the server's own configuration names several keys for %s: %s", cert, strings.Join(keys, ", "))
	}
	key, err := ParsePath(found[0].Key)
	switch {
	case err != nil:
	case key == "" || key == cert:
		err = errors.New("it is no file of its own")
	case strings.Contains(string(key), "$"):
		err = fmt.Errorf("%s holds a variable", clip(string(key)))
	}
	if err != nil {
		return ServerPair{}, fmt.Errorf("the key that the server's own configuration names for %s (%s) cannot be used: %w", cert, found[0].Where, err)
	}
	found[0].Key = string(key)
	return found[0], nil
}

// Program is the index in argv of the program that a command starts, if its
// base name begins with one of names; else -1. sudo and doas are looked
// through.
func Program(argv []string, names ...string) int {
	last := 0
	if first := filepath.Base(argv[0]); first == "sudo" || first == "doas" {
		last = len(argv) - 1
	}
	return slices.IndexFunc(argv[:last+1], func(word string) bool {
		base := filepath.Base(word)
		return slices.ContainsFunc(names, func(name string) bool { return strings.HasPrefix(base, name) })
	})
}

// maxServerFile bounds one file of a server's configuration.
const maxServerFile = 4 << 20

// ReadServerFile reads a file of a server's own configuration.
func ReadServerFile(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() || info.Size() > maxServerFile {
		return "", fmt.Errorf("%s is no regular file of at most %d MiB", path, maxServerFile>>20)
	}
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxServerFile))
	return string(data), err
}
