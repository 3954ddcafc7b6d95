package javakeystore

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/jks"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/pkcs12"
)

// maxWork bounds what reading and writing a PKCS#12 store costs, in bytes that are hashed: about five
// seconds. NSS and GnuTLS ask for a quarter of it.
const maxWork = 1 << 30

// entry is a private key with its chain.
type entry struct {
	alias    string
	pkcs8    []byte
	chain    []*x509.Certificate
	password string
	created  time.Time
}

func newEntry(m *connector.Material, alias string) (entry, error) {
	key, err := pemutil.ParseKey(m.KeyPEM)
	if err != nil {
		return entry{}, fmt.Errorf("the private key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	chain := slices.Concat([]*x509.Certificate{m.Leaf}, m.Chain)
	return entry{alias: alias, pkcs8: der, chain: chain, created: time.Now()}, err
}

// store is a key store in one of the formats.
type store interface {
	// had is the private key under the alias of an entry, nil if there is none or if it is not under
	// that entry's password.
	had(entry) []byte

	// put puts an entry in place of the one with its alias, and reports whether the store changed.
	put(entry) (changed bool, err error)

	encode() ([]byte, error)
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
		return jksStore{s}, explain(err)
	}
	s, err := pkcs12.Open(data, password, maxWork)
	return pkcs12Store{s, legacy}, explain(err)
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

type pkcs12Store struct {
	*pkcs12.Store
	legacy bool
}

func (s pkcs12Store) had(e entry) []byte {
	if k, err := s.Find(e.alias, e.password); err == nil && k != nil {
		return k.PKCS8
	}
	return nil
}

func (s pkcs12Store) put(e entry) (bool, error) {
	changed, err := s.Put(pkcs12.PrivateKey{Alias: e.alias, PKCS8: e.pkcs8, Chain: e.chain, Created: e.created, Password: e.password}, s.legacy)
	return changed, explain(err)
}

func (s pkcs12Store) encode() ([]byte, error) { return s.Encode() }

type jksStore struct{ *jks.Store }

func (s jksStore) had(e entry) []byte {
	if k, err := s.Find(e.alias, e.password); err == nil && k != nil {
		return k.PKCS8
	}
	return nil
}

func (s jksStore) put(e entry) (bool, error) {
	changed, err := s.Put(jks.PrivateKey{Alias: e.alias, PKCS8: e.pkcs8, Chain: e.chain, Created: e.created, Password: e.password})
	return changed, explain(err)
}

func (s jksStore) encode() ([]byte, error) { return s.Encode(), nil }
