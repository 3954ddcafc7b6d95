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

// maxWork bounds what reading and writing a PKCS#12 store costs, in bytes that are hashed: about five
// seconds. NSS and GnuTLS ask for a quarter of it.
const maxWork = 1 << 30

// newEntry is what a deployment puts into a store.
func newEntry(m *connector.Material, alias, password string) (keyentry.PrivateKey, error) {
	key, err := pemutil.ParseKey(m.KeyPEM)
	if err != nil {
		return keyentry.PrivateKey{}, fmt.Errorf("the private key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	chain := slices.Concat([]*x509.Certificate{m.Leaf}, m.Chain)
	return keyentry.PrivateKey{Alias: alias, PKCS8: der, Chain: chain, Created: time.Now(), Password: password}, err
}

// store is a key store in one of the formats.
type store interface {
	// Find returns the private key under an alias, nil if there is none.
	Find(alias, password string) (*keyentry.PrivateKey, error)

	// Put puts a private key in place of the one with its alias, and reports whether the store changed.
	Put(keyentry.PrivateKey) (changed bool, err error)

	Encode() ([]byte, error)

	// IsTrustStore reports whether there are entries, and none that is a private key.
	IsTrustStore() bool
}

// format is a type of store, by Java's name.
type format string

const (
	pkcs12Format format = "PKCS12"
	jksFormat    format = "JKS"
)

var errFormat = errors.New("it is neither PKCS12 nor JKS, or damaged: correct the path, or have it converted (keytool -importkeystore -deststoretype PKCS12), or remove it")

// formatOf recognises a store.
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

// explain says what to do about an error.
func explain(err error) error {
	switch {
	case errors.Is(err, pkcs12.ErrPassword), errors.Is(err, jks.ErrPassword):
		return errors.New("keystore_password does not open it, or it is damaged: compare with keytool -list")
	case errors.Is(err, pkcs12.ErrWork):
		return errors.New("opening it takes too much work: have it written anew with fewer iterations (keytool -importkeystore)")
	case errors.Is(err, jks.ErrJCEKS):
		return errors.New("it is of type JCEKS, which is not written: have it converted (keytool -importkeystore -deststoretype PKCS12)")
	case errors.Is(err, pkcs12.ErrAlias), errors.Is(err, jks.ErrAlias):
		return fmt.Errorf("%w, which is not replaced: configure another alias", err)
	case errors.Is(err, pkcs12.ErrNameless):
		return fmt.Errorf("%w: have the store written anew (keytool -importkeystore), or use the alias of that key", err)
	}
	return err
}

// errKeyPassword: a server that knows the key under its own password would not find the new one under
// the store's.
var errKeyPassword = errors.New("the private key there is under another password than the store: set key_password to what the server has for it, " +
	"or delete the entry (keytool -delete)")

type pkcs12Store struct {
	*pkcs12.Store
	legacy bool
}

func (s pkcs12Store) Put(k keyentry.PrivateKey) (bool, error) { return s.Store.Put(k, s.legacy) }

type jksStore struct{ *jks.Store }

func (s jksStore) Encode() ([]byte, error) { return s.Store.Encode(), nil }
