package config

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/trustedfile"
)

// readKey reads an API key file. Read is trustedfile.Read or trustedfile.ReadWithoutTimeout.
func readKey(read func(string, int64) ([]byte, fs.FileInfo, string, error), path string) (key secret.String, info fs.FileInfo, warning string, err error) {
	data, info, warning, err := read(path, maxSecretFile)
	if err != nil {
		return secret.String{}, nil, "", err
	}
	text := strings.TrimSpace(strings.TrimPrefix(string(data), hostfile.ByteOrderMark))
	if text == "" {
		return secret.String{}, nil, "", fmt.Errorf("%s is empty", path)
	}
	if err := checkKey(text); err != nil {
		return secret.String{}, nil, "", fmt.Errorf("%s %w", path, err)
	}
	return secret.New(text), info, warning, nil
}

// ReadKeyFile reads the bootstrap token of a registration, by the same rules as an API key file.
func ReadKeyFile(path string) (secret.String, error) {
	key, _, _, err := readKey(trustedfile.Read, path)
	return key, err
}

// keyTimeout is how long a call waits for the key file. A local file takes microseconds.
const keyTimeout = time.Second

const errLate = "it does not answer: check its file system"

// KeyFunc returns a function that returns the API key. The function is safe for concurrent use. If
// the key comes from a file, each call checks with one stat whether the file has changed. While the
// file cannot be read or trusted, or does not answer within a second, the function returns the last
// good key and logs that once.
func (c *Config) KeyFunc(log *slog.Logger) func() secret.String {
	if c.APIKeyFile == "" {
		return func() secret.String { return c.APIKey }
	}
	f := &keyFile{path: c.APIKeyFile, key: c.APIKey, log: log, stat: os.Stat}
	return f.get
}

// keyFile is an API key that is read again when its file changes.
type keyFile struct {
	path string
	log  *slog.Logger
	stat func(string) (fs.FileInfo, error)

	mu      sync.Mutex // guards the fields below, except seen; not held while the file is read
	check   *check     // under way, or nil
	key     secret.String
	failure string // last logged; "" if the key is up to date

	seen fs.FileInfo // of the file when key was read; nil: read again. The running check owns it
}

// check is one check of the file, for all calls that come meanwhile. On a network file system whose
// server does not answer, it lasts until the server answers, and no second one starts.
type check struct {
	done     chan struct{}
	deadline time.Time
}

func (f *keyFile) get() secret.String {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.check == nil {
		f.check = &check{done: make(chan struct{}), deadline: time.Now().Add(keyTimeout)}
		go f.refresh(f.check)
	}
	current := f.check
	f.mu.Unlock()
	late := false
	select {
	case <-current.done:
	case <-time.After(time.Until(current.deadline)):
		late = true
	}
	f.mu.Lock()
	if late && f.check == current {
		f.failed(errors.New(errLate))
	}
	return f.key
}

// refresh reads the file if it has changed, and ends the check.
func (f *keyFile) refresh(current *check) {
	key, changed, err := f.latest()
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err != nil:
		f.failed(err)
	case changed:
		if f.failure != "" || !key.Equal(f.key) {
			f.log.Info("API key read from its file again", "file", f.path, "changed", !key.Equal(f.key))
		}
		f.key, f.failure = key, ""
	case f.failure == errLate:
		f.failure = ""
	}
	f.check = nil
	close(current.done)
}

// latest reads the file if it has changed since it was last read.
func (f *keyFile) latest() (key secret.String, changed bool, err error) {
	info, err := f.stat(f.path)
	if err != nil {
		f.seen = nil
		return secret.String{}, false, err
	}
	if f.seen != nil && unchanged(info, f.seen) {
		return secret.String{}, false, nil
	}
	// Without a timeout: each one would leave another read stuck in the kernel. Callers do not wait
	// for this read.
	key, read, _, err := readKey(trustedfile.ReadWithoutTimeout, f.path)
	f.seen = nil
	if err == nil && unchanged(info, read) { // otherwise it is read again next time
		f.seen = info
	}
	return key, err == nil, err
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

// unchanged reports whether a file is the same. The mode counts too: it may be why the file was
// refused.
func unchanged(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && a.Mode() == b.Mode()
}
