// Package keystore keeps the private keys of certificates on disk.
package keystore

import (
	"crypto"
	"errors"
	"log/slog"
)

// ErrNoKey means that no key of the certificate is the one asked for.
var ErrNoKey = errors.New("no private key matches")

// Role says what a key is to its certificate.
type Role string

// The roles of a key.
const (
	Current  Role = "current"
	Pending  Role = "pending"
	Previous Role = "previous"
)

// Key is a private key as the store holds it.
type Key struct {
	Role   Role
	Name   string // of its file
	PEM    []byte
	Signer crypto.Signer
	Fresh  bool // made by this very call: no CSR for it has been sent
}

// Change is a file of the store and what it is to hold.
type Change struct {
	Path string // absolute
	Data []byte
}

// Store is a key directory.
type Store struct{}

var errTodo = errors.New("not there yet")

// Open opens the key directory.
func Open(dir string, log *slog.Logger) (*Store, error) { return nil, errTodo }

// Close releases the directory.
func (s *Store) Close() error { return nil }

// Path is where the current key of a certificate is.
func (s *Store) Path(certID string) string { return "" }

// Pending returns the key for the CSR of one job.
func (s *Store) Pending(certID, jobID, algorithm string) (Key, error) { return Key{}, errTodo }

// Discard removes a key that was never signed.
func (s *Store) Discard(certID, jobID string) error { return errTodo }

// Find returns the key of a certificate by its public key.
func (s *Store) Find(certID string, public crypto.PublicKey) (Key, error) { return Key{}, errTodo }

// Promotion lists what makes key the current one.
func (s *Store) Promotion(certID string, key Key) ([]Change, error) { return nil, errTodo }

// Promote makes key the current one.
func (s *Store) Promote(certID string, key Key) error { return errTodo }

// Prune removes keys that nothing needs any more.
func (s *Store) Prune(certID string, deployed Key) error { return errTodo }
