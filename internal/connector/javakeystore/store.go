package javakeystore

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/jks"
	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/pkcs12"
)

// maxWork bounds the key derivation of a PKCS#12 store, in hashed bytes: about five seconds. Stores
// of NSS and GnuTLS need a quarter of it.
const maxWork = 1 << 30

// newEntry returns the store entry for m.
func newEntry(m *connector.Material, alias, password string) (keyentry.PrivateKey, error) {
	key, err := pemutil.ParseKey(m.KeyPEM)
	if err != nil {
		return keyentry.PrivateKey{}, fmt.Errorf("the private key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	chain := slices.Concat([]*x509.Certificate{m.Leaf}, m.Chain)
	return keyentry.PrivateKey{Alias: alias, PKCS8: der, Chain: chain, Created: time.Now(), Password: password}, err
}

// store is a key store of any format.
type store interface {
	// Find returns the private key under alias, or nil if there is none.
	Find(alias, password string) (*keyentry.PrivateKey, error)

	// Put sets the private key under its alias, and reports whether the store changed.
	Put(keyentry.PrivateKey) (changed bool, err error)

	Encode() ([]byte, error)

	// IsTrustStore reports whether the store has entries but no private keys.
	IsTrustStore() bool
}

// format is a store type by its Java name.
type format string

const (
	pkcs12Format format = "PKCS12"
	jksFormat    format = "JKS"
)

var errFormat = errors.New("it is neither PKCS12 nor JKS, or it is damaged: correct the path, convert the file (keytool -importkeystore -deststoretype PKCS12), or remove it")

// formatOf returns the format of a store.
func formatOf(data []byte) (format, error) {
	switch {
	case pkcs12.Is(data):
		return pkcs12Format, nil
	case jks.Is(data):
		return jksFormat, nil
	}
	return "", errFormat
}

func (f format) create(password string, legacy bool) store {
	if f == jksFormat {
		return jksStore{jks.New(password)}
	}
	return pkcs12Store{pkcs12.New(password, legacy), legacy}
}

func (f format) open(data []byte, password string, legacy bool) (store, error) {
	if f == jksFormat {
		s, err := jks.Open(data, password)
		return jksStore{s}, err
	}
	s, err := pkcs12.Open(data, password, maxWork)
	return pkcs12Store{s, legacy}, err
}

// explain adds to an error what to do about it.
func explain(err error) error {
	switch {
	case errors.Is(err, pkcs12.ErrPassword), errors.Is(err, jks.ErrPassword):
		return errors.New("keystore_password does not open it, or it is damaged: try keytool -list")
	case errors.Is(err, pkcs12.ErrWork):
		return errors.New("opening it takes too much work: write it again with fewer iterations (keytool -importkeystore)")
	case errors.Is(err, jks.ErrJCEKS):
		return errors.New("its type JCEKS is not supported: convert it (keytool -importkeystore -deststoretype PKCS12)")
	case errors.Is(err, pkcs12.ErrAlias), errors.Is(err, jks.ErrAlias):
		return fmt.Errorf("%w and is not replaced: configure another alias", err)
	case errors.Is(err, pkcs12.ErrNameless):
		return fmt.Errorf("%w: write the store again (keytool -importkeystore), or use the alias of that key", err)
	}
	return err
}

// errKeyPassword is returned because a server that has a separate password for the key could not
// open a new key under the store's password.
var errKeyPassword = errors.New("the existing private key has another password than the store: set key_password to the one that the server uses, " +
	"or delete the entry (keytool -delete)")

type pkcs12Store struct {
	*pkcs12.Store
	legacy bool
}

func (s pkcs12Store) Put(k keyentry.PrivateKey) (bool, error) { return s.Store.Put(k, s.legacy) }

type jksStore struct{ *jks.Store }

func (s jksStore) Encode() ([]byte, error) { return s.Store.Encode(), nil }
