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

// readKey reads an API key file by trustedfile.Read or trustedfile.ReadWithoutTimeout.
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

// ReadKeyFile reads a secret that is sent as API keys are, from a file that is
// held to the same rules: the bootstrap token of a registration.
func ReadKeyFile(path string) (secret.String, error) {
	key, _, _, err := readKey(trustedfile.Read, path)
	return key, err
}

// keyTimeout is how long a call waits for a look at the key file. A local file
// takes microseconds.
const keyTimeout = time.Second

const errLate = "it does not answer: look at the file system that it is on"

// KeyFunc returns a function that returns the API key, for any number of
// goroutines. Where the key comes from a file, each call looks whether that
// has changed, which costs one stat. While the file cannot be read, or cannot
// be trusted, or does not answer within a second, the last good key stays in
// use, and the log says so once.
func (c *Config) KeyFunc(log *slog.Logger) func() secret.String {
	if c.APIKeyFile == "" {
		return func() secret.String { return c.APIKey }
	}
	f := &keyFile{path: c.APIKeyFile, key: c.APIKey, log: log, stat: os.Stat}
	return f.get
}

// keyFile is an API key that follows its file.
type keyFile struct {
	path string
	log  *slog.Logger
	stat func(string) (fs.FileInfo, error)

	mu      sync.Mutex // guards the rest; never held while the file is looked at
	look    *look      // under way; nil for none
	key     secret.String
	failure string // the text that was logged last, "" when all is well

	seen fs.FileInfo // of the file that the key is from; nil: to be read again. Belongs to the look
}

// look is one look at the file, for all calls that come while it lasts. The
// file may be on a network file system whose server does not answer: then it
// lasts until that does, and no second one is begun.
type look struct {
	done     chan struct{}
	deadline time.Time
}

func (f *keyFile) get() secret.String {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.look == nil {
		f.look = &look{done: make(chan struct{}), deadline: time.Now().Add(keyTimeout)}
		go f.refresh(f.look)
	}
	current := f.look
	f.mu.Unlock()
	late := false
	select {
	case <-current.done:
	case <-time.After(time.Until(current.deadline)):
		late = true
	}
	f.mu.Lock()
	if late && f.look == current {
		f.failed(errors.New(errLate))
	}
	return f.key
}

// refresh looks at the file and ends the look.
func (f *keyFile) refresh(current *look) {
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
	f.look = nil
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
	// Without a timeout of its own, which would leave one more read behind in the
	// kernel each time. Callers do not wait for it.
	key, read, _, err := readKey(trustedfile.ReadWithoutTimeout, f.path)
	f.seen = nil
	if err == nil && unchanged(info, read) { // else it is read again next time
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

// unchanged reports whether two looks saw the same contents. A mode that
// changed matters too: it may be why the file was refused.
func unchanged(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && a.Mode() == b.Mode()
}
