package config

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"

	"certctl-agent/internal/secret"
)

// readKey reads an API key file.
func readKey(path string) (key secret.String, info fs.FileInfo, warning string, err error) {
	data, info, warning, err := readTrusted(path, maxSecretFile)
	if err != nil {
		return secret.String{}, nil, "", err
	}
	text := strings.TrimSpace(string(data))
	if text == "" {
		return secret.String{}, nil, "", fmt.Errorf("%s is empty", path)
	}
	if err := checkKey(text); err != nil {
		return secret.String{}, nil, "", fmt.Errorf("%s %w", path, err)
	}
	return secret.New(text), info, warning, nil
}

// ReadKeyFile reads a secret that is sent as API keys are, from a file that is
// held to the same rules: the bootstrap token of a registration.
func ReadKeyFile(path string) (secret.String, error) {
	key, _, _, err := readKey(path)
	return key, err
}

// KeyFunc returns a function that returns the API key, for any number of
// goroutines. Where the key comes from a file, each call looks whether that
// has changed, which costs one stat. While the file cannot be read, or cannot
// be trusted, the last good key stays in use, and the log says so once.
func (c *Config) KeyFunc(log *slog.Logger) func() secret.String {
	if c.APIKeyFile == "" {
		return func() secret.String { return c.APIKey }
	}
	f := &keyFile{path: c.APIKeyFile, key: c.APIKey, log: log}
	return f.get
}

// keyFile is an API key that follows its file.
type keyFile struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex  // guards the rest; held for a read of a small local file
	seen    fs.FileInfo // of the file that was last read, good or not; nil for none
	key     secret.String
	failure string // the text that was logged last, "" when all is well
}

func (f *keyFile) get() secret.String {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.path)
	if err != nil {
		f.seen = nil
		f.failed(err)
		return f.key
	}
	if f.seen != nil && unchanged(info, f.seen) {
		return f.key
	}
	f.seen = info // a file that changes while it is read is read again next time
	key, read, _, err := readKey(f.path)
	if err != nil {
		f.failed(err)
		return f.key
	}
	if !unchanged(info, read) {
		f.seen = nil
	}
	if f.failure != "" || !key.Equal(f.key) {
		f.log.Info("API key read from its file again", "file", f.path, "changed", !key.Equal(f.key))
	}
	f.key, f.failure = key, ""
	return key
}

func (f *keyFile) failed(err error) {
	text := err.Error()
	if errors.Is(err, fs.ErrNotExist) {
		text = "no such file"
	}
	if text != f.failure {
		f.log.Warn("the API key file cannot be used: the last good key stays in use", "file", f.path, "error", text)
	}
	f.failure = text
}

// unchanged reports whether two looks saw the same contents. A mode that
// changed matters too: it may be why the file was refused.
func unchanged(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && a.Mode() == b.Mode()
}
