// Package reliability_test checks the promises of docs/reliability.md: whatever happens to the
// network, the host and the process, a claimed job has one outcome, a server has a matching pair,
// and no key is lost or left in the wrong place.
package reliability_test

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
)

// site is the part of a host's disk that concerns the agent.
type site struct {
	dir     string
	servers []server

	mu      sync.Mutex           // guards secrets
	secrets map[string]secretKey // by DER
}

// secretKey is a private key, with the encodings to search for.
type secretKey struct {
	file  string
	forms [][]byte
}

// server is a target: a server that reads a certificate and a key.
type server struct {
	id, cert string
	chain    bool // in a separate file
	shared   bool // the key is read from the agent's key directory
	picky    bool // its validate command accepts nothing
}

func newSite(dir string, servers []server) (*site, error) {
	s := &site{dir: dir, servers: servers, secrets: make(map[string]secretKey)}
	for _, x := range servers {
		if err := os.MkdirAll(filepath.Join(dir, "www", x.id), 0o755); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *site) path(elements ...string) string {
	return filepath.Join(append([]string{s.dir}, elements...)...)
}

func (s *site) keyDir() string           { return s.path("keys") }
func (s *site) certPath(x server) string { return s.path("www", x.id, "cert.pem") }

func (s *site) keyPath(x server) string {
	if x.shared {
		return s.path("keys", x.cert+".key")
	}
	return s.path("www", x.id, "key.pem")
}

// config returns the target configuration of a server at the control plane.
func (s *site) config(x server, validate, reload string) map[string]any {
	config := map[string]any{"cert_path": s.certPath(x), "validate_command": validate, "reload_command": reload}
	if !x.shared {
		config["key_path"] = s.keyPath(x)
	}
	if x.chain {
		config["chain_path"] = s.path("www", x.id, "chain.pem")
	}
	return config
}

// pair returns the certificate that a server would load, or nil if none is installed yet. It
// returns an error if the server could not load it.
func (s *site) pair(x server) (*x509.Certificate, error) {
	return load(s.certPath(x), s.keyPath(x), x.shared)
}

// load loads a certificate and a key as a server does. Without a certificate, there may still be a
// key in the agent's key directory.
func load(certPath, keyPath string, shared bool) (*x509.Certificate, error) {
	certPEM, certErr := os.ReadFile(certPath)
	keyPEM, keyErr := os.ReadFile(keyPath)
	if errors.Is(certErr, fs.ErrNotExist) && (shared || errors.Is(keyErr, fs.ErrNotExist)) {
		return nil, nil
	}
	if err := errors.Join(certErr, keyErr); err != nil {
		return nil, err
	}
	return match(certPEM, keyPEM)
}

// match returns the leaf of a certificate file, or an error if its key is not in the key file.
func match(certPEM, keyPEM []byte) (*x509.Certificate, error) {
	certs, err := pemutil.ParseCertificates(certPEM)
	if err != nil {
		return nil, err
	}
	key, err := pemutil.ParseKey(keyPEM)
	switch now := time.Now(); {
	case err != nil:
		return nil, err
	case !pemutil.SamePublicKey(key.Public(), certs[0].PublicKey):
		return nil, errMismatch
	case now.Before(certs[0].NotBefore) || now.After(certs[0].NotAfter):
		return nil, errors.New("the certificate is not valid now")
	}
	return certs[0], nil
}

var errMismatch = errors.New("the key is not that of the certificate")

// checkPairs checks the pair of every target.
func (s *site) checkPairs() error {
	var errs []error
	for _, x := range s.servers {
		if _, err := s.pair(x); err != nil {
			errs = append(errs, fmt.Errorf("target %s: %w", x.id, err))
		}
	}
	return errors.Join(errs...)
}

// checkKeys finds the key of each given leaf in the agent's key directory.
func (s *site) checkKeys(keys *keystore.Store, cert string, leaves ...*x509.Certificate) error {
	for _, leaf := range leaves {
		key, err := keys.Find(api.ID(cert), leaf.PublicKey)
		if err != nil {
			return fmt.Errorf("certificate %s, serial %x: %w", cert, leaf.SerialNumber, err)
		}
		key.Clear()
	}
	return nil
}

// learn remembers the key material in the key directory, so that leaks can be found after a key has
// been removed.
func (s *site) learn() error {
	entries, err := os.ReadDir(s.keyDir())
	if err != nil {
		return nil // not created yet
	}
	for _, entry := range entries {
		if entry.IsDir() {
			continue
		}
		data, err := os.ReadFile(s.path("keys", entry.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // renamed in the meantime
		}
		if err != nil {
			return err
		}
		block, _ := pem.Decode(data)
		if block == nil {
			continue
		}
		s.mu.Lock()
		if _, known := s.secrets[string(block.Bytes)]; !known {
			s.secrets[string(block.Bytes)] = secretKey{entry.Name(), formsOf(block.Bytes)}
		}
		s.mu.Unlock()
	}
	return nil
}

// secretsIn returns the names of the keys whose material is in data, in any encoding.
func (s *site) secretsIn(data []byte) []string {
	var found []string
	if bytes.Contains(data, []byte("PRIVATE KEY")) {
		found = append(found, "a PRIVATE KEY block")
	}
	// Remove the line ends of PEM and JSON, so that base64 is in one piece.
	flat := data
	for _, end := range []string{"\n", "\r", `\n`} {
		flat = bytes.ReplaceAll(flat, []byte(end), nil)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range s.secrets {
		if slices.ContainsFunc(key.forms, func(form []byte) bool { return bytes.Contains(data, form) || bytes.Contains(flat, form) }) {
			found = append(found, key.file)
		}
	}
	return found
}

// formsOf returns the whole SEC 1 key and its secret part, raw, in hex and in base64. It leaves out
// the end of a base64 text, which depends on the bytes that follow.
func formsOf(der []byte) [][]byte {
	scalar := der[7:39] // after SEQUENCE, version and the head of the octet string
	return [][]byte{scalar, []byte(hex.EncodeToString(scalar)), []byte(base64.StdEncoding.EncodeToString(scalar)[:42]),
		[]byte(base64.StdEncoding.EncodeToString(der)[:56])}
}

// keyFiles are the files in which key material belongs.
var keyFiles = regexp.MustCompile(`^(keys/[^/]+|www/[^/]+/key\.pem|www/[^/]+/\.certctl-[a-z2-7]{20}|(keys/\.)?state/([0-9a-f]+/)?backups/[^/]+/[^/]+/[0-9]+-.*)$`)

// checkSecrets searches the whole site for key material. It must be only in keyFiles, which nobody
// else may read. checkSecrets tolerates files that vanish in the meantime.
func (s *site) checkSecrets() error {
	if err := s.learn(); err != nil {
		return err
	}
	var errs []error
	err := filepath.WalkDir(s.dir, func(name string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		data, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		found := s.secretsIn(data)
		rel, err := filepath.Rel(s.dir, name)
		switch {
		case err != nil:
			return err
		case len(found) == 0:
		case !keyFiles.MatchString(rel):
			errs = append(errs, fmt.Errorf("%s holds key material (%s)", rel, strings.Join(found, ", ")))
		case info.Mode().Perm() != 0o600:
			errs = append(errs, fmt.Errorf("%s holds a key and has mode %v", rel, info.Mode().Perm()))
		}
		return nil
	})
	return errors.Join(append(errs, err)...)
}

// The files that may be in the directories of an idle agent.
var (
	idleKeys  = regexp.MustCompile(`^(\.state|\.lock|[A-Za-z0-9_-]+\.(key|previous|[0-9a-f]{16}\.pending))$`)
	idleWWW   = regexp.MustCompile(`^(cert|key|chain)\.pem$`)
	idleState = regexp.MustCompile(`^(lock|machine|served\.json|discovery\.index|agent\.sock|jobs|journal|backups|backups/[^/]+|backups/[^/]+/[0-9]{8}-[0-9TZ]+|backups/[^/]+/[0-9]{8}-[0-9TZ]+/([0-9]+-.*|manifest\.json))$`)
)

// leftOver lists the files that an idle agent should not have on disk. state is its state
// directory.
func (s *site) leftOver(state string) []string {
	var left []string
	look := func(dir string, allowed *regexp.Regexp, deep bool) {
		_ = filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
			rel, relErr := filepath.Rel(dir, name)
			switch {
			case errors.Join(err, relErr) != nil:
				left = append(left, fmt.Sprint(name, ": ", errors.Join(err, relErr)))
			case rel == ".":
			case !allowed.MatchString(rel):
				left = append(left, name)
			case entry.IsDir() && !deep:
				return fs.SkipDir
			}
			return nil
		})
	}
	look(s.keyDir(), idleKeys, false)
	look(state, idleState, true)
	for _, x := range s.servers {
		look(s.path("www", x.id), idleWWW, false)
		if sets, _ := os.ReadDir(filepath.Join(state, "backups", x.id)); len(sets) > 3 {
			left = append(left, fmt.Sprintf("%d backup sets of %s", len(sets), x.id))
		}
	}
	slices.Sort(left)
	return left
}
