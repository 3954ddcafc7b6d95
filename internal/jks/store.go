package jks

import (
	"bytes"
	"crypto/rand"
	"crypto/sha1"
	"crypto/subtle"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"

	"certctl-agent/internal/ber"
	"certctl-agent/internal/keyentry"
)

var (
	// ErrPassword means that the digest of a store or a private key does not match the password.
	ErrPassword = errors.New("JKS: wrong password")

	// ErrAlias means that an entry other than a private key has the alias.
	ErrAlias = errors.New("the alias belongs to a trusted certificate")

	// ErrJCEKS means that the store is in a format that this package can read but not write.
	ErrJCEKS = errors.New("writing key stores of type JCEKS is not supported")
)

// maxEntries bounds the entries of a store that Open accepts. Small entries take several times
// their size in memory.
const maxEntries = 10_000

var errEntries = fmt.Errorf("the Java key store has more than %d entries", maxEntries)

// Store is a store that can be changed. Entries that Put does not replace are written byte for byte
// as they were read.
type Store struct {
	password string
	version  byte
	entries  []stored
}

// stored is an entry with its encoding.
type stored struct {
	Entry
	raw []byte
}

// New returns an empty store.
func New(password string) *Store { return &Store{password: password, version: 2} }

// Open reads a store and checks its digest. The error is ErrPassword or ErrJCEKS, or describes the
// damage.
func Open(data []byte, password string) (*Store, error) {
	switch {
	case !Is(data):
		return nil, errFormat
	case binary.BigEndian.Uint32(data) == magicJCEKS:
		return nil, ErrJCEKS
	case binary.BigEndian.Uint32(data[8:]) > maxEntries:
		return nil, errEntries
	}
	s := &Store{password: password, version: data[7]}
	r := &reader{rest: data[headerSize:], typed: s.version == 2}
	for range binary.BigEndian.Uint32(data[8:]) {
		before := r.rest
		e, err := r.entry()
		if err != nil {
			return nil, err
		}
		s.entries = append(s.entries, stored{e, before[:len(before)-len(r.rest)]})
	}
	if len(r.rest) != sha1.Size {
		return nil, fmt.Errorf("the Java key store has %d bytes after its entries, not a digest of %d", len(r.rest), sha1.Size)
	}
	content := data[:len(data)-sha1.Size]
	if sum := digest(password, content); subtle.ConstantTimeCompare(sum, r.rest) != 1 {
		return nil, ErrPassword
	}
	return s, nil
}

// digest returns the digest that protects a store. Passwords are hashed in UTF-16.
func digest(password string, content []byte) []byte {
	h := sha1.New()
	h.Write(ber.EncodeBMP(password))
	h.Write([]byte("Mighty Aphrodite"))
	h.Write(content)
	return h.Sum(nil)
}

// Encode encodes the store.
func (s *Store) Encode() []byte {
	data := binary.BigEndian.AppendUint32(nil, magicJKS)
	data = binary.BigEndian.AppendUint32(data, uint32(s.version))
	data = binary.BigEndian.AppendUint32(data, uint32(len(s.entries)))
	for _, e := range s.entries {
		data = append(data, e.raw...)
	}
	return append(data, digest(s.password, data)...)
}

// IsTrustStore reports whether the store has entries, but no private key.
func (s *Store) IsTrustStore() bool {
	return len(s.entries) > 0 && !slices.ContainsFunc(s.entries, func(e stored) bool { return e.Key != nil })
}

// find returns the index of an encoded alias, or -1. Java searches for lower-case aliases only, and
// the last entry wins.
func (s *Store) find(alias string) int {
	for i, e := range slices.Backward(s.entries) {
		if e.Alias == alias {
			return i
		}
	}
	return -1
}

// Find returns the private key under an alias, or nil if there is none. The error is ErrPassword or
// says why the entry cannot be read.
func (s *Store) Find(alias, password string) (*keyentry.PrivateKey, error) {
	alias = encodeAlias(alias)
	i := s.find(alias)
	if i < 0 || s.entries[i].Key == nil {
		return nil, nil
	}
	e := s.entries[i]
	k := &keyentry.PrivateKey{Alias: alias, Created: e.Created, Password: password}
	for _, cert := range e.Chain {
		parsed, err := x509.ParseCertificate(cert.Encoded)
		if err != nil {
			return nil, fmt.Errorf("JKS: a certificate of type %.40q: %w", cert.Type, err)
		}
		k.Chain = append(k.Chain, parsed)
	}
	var err error
	k.PKCS8, err = openKey(e.Key, password)
	return k, err
}

// Put stores k as the private key under its alias, replacing the existing key. It reports
// whether that changed the store.
func (s *Store) Put(k keyentry.PrivateKey) (changed bool, err error) {
	alias := encodeAlias(k.Alias)
	i := s.find(alias)
	if i >= 0 {
		e := s.entries[i]
		if e.Key == nil {
			return false, ErrAlias
		}
		if was, err := openKey(e.Key, k.Password); err == nil && keyentry.SameKey(was, k.PKCS8) && sameChain(e.Chain, k.Chain) {
			return false, nil
		}
	}
	e := stored{Entry: Entry{Alias: alias, Created: k.Created, Key: sealKey(k.PKCS8, k.Password)}}
	for _, cert := range k.Chain {
		e.Chain = append(e.Chain, Certificate{X509, cert.Raw})
	}
	if e.raw, err = e.encode(s.version == 2); err != nil {
		return false, err
	}
	if i >= 0 {
		s.entries[i] = e
	} else {
		s.entries = append(s.entries, e)
	}
	return true, nil
}

func sameChain(was []Certificate, chain []*x509.Certificate) bool {
	return slices.EqualFunc(was, chain, func(a Certificate, b *x509.Certificate) bool {
		return a.Type == X509 && bytes.Equal(a.Encoded, b.Raw)
	})
}

// encodeAlias returns the stored form of an alias: lower case, in Java's modified UTF-8.
func encodeAlias(alias string) string {
	var b []byte
	for _, unit := range utf16.Encode([]rune(strings.ToLower(alias))) {
		switch {
		case unit > 0 && unit < 0x80:
			b = append(b, byte(unit))
		case unit < 0x800: // also 0
			b = append(b, 0xc0|byte(unit>>6), 0x80|byte(unit&0x3f))
		default: // also each half of a surrogate pair
			b = append(b, 0xe0|byte(unit>>12), 0x80|byte(unit>>6&0x3f), 0x80|byte(unit&0x3f))
		}
	}
	return string(b)
}

func (e Entry) encode(typed bool) ([]byte, error) {
	if len(e.Alias) > 1<<16-1 {
		return nil, fmt.Errorf("the alias has %d bytes, which is too long", len(e.Alias))
	}
	data := binary.BigEndian.AppendUint32(nil, tagKey)
	data = binary.BigEndian.AppendUint16(data, uint16(len(e.Alias)))
	data = append(data, e.Alias...)
	data = binary.BigEndian.AppendUint64(data, uint64(e.Created.UnixMilli()))
	data = binary.BigEndian.AppendUint32(data, uint32(len(e.Key)))
	data = append(data, e.Key...)
	data = binary.BigEndian.AppendUint32(data, uint32(len(e.Chain)))
	for _, cert := range e.Chain {
		if typed {
			data = binary.BigEndian.AppendUint16(data, uint16(len(cert.Type)))
			data = append(data, cert.Type...)
		}
		data = binary.BigEndian.AppendUint32(data, uint32(len(cert.Encoded)))
		data = append(data, cert.Encoded...)
	}
	return data, nil
}

// oidProtector is the algorithm of sun.security.provider.KeyProtector: 1.3.6.1.4.1.42.2.17.1.1.
const oidProtector = "\x2b\x06\x01\x04\x01\x2a\x02\x11\x01\x01"

// openKey decrypts a private key, which is stored as a salt, the encrypted key and a digest of the
// key.
func openKey(encrypted []byte, password string) ([]byte, error) {
	f := ber.Sequence(encrypted)
	id := f.Inside(ber.TagSequence).OID()
	protected := f.Octets(ber.TagOctetString)
	switch {
	case f.Err != nil:
		return nil, fmt.Errorf("JKS: the private key is damaged: %w", f.Err)
	case id != oidProtector:
		return nil, fmt.Errorf("JKS: the private key is encrypted with an unknown method (OID %s)", ber.OIDText([]byte(id)))
	case len(protected) < 2*sha1.Size:
		return nil, fmt.Errorf("JKS: the private key is damaged: %w", ber.ErrTruncated)
	}
	end := len(protected) - sha1.Size
	key := mask(protected[sha1.Size:end], protected[:sha1.Size], password)
	if subtle.ConstantTimeCompare(keyDigest(key, password), protected[end:]) != 1 {
		return nil, ErrPassword
	}
	return key, nil
}

func sealKey(key []byte, password string) []byte {
	salt := make([]byte, sha1.Size)
	_, _ = rand.Read(salt) // never fails
	algorithm := ber.Encode(ber.TagSequence, ber.EncodeOID(oidProtector), ber.Encode(ber.TagNull))
	protected := slices.Concat(salt, mask(key, salt, password), keyDigest(key, password))
	return ber.Encode(ber.TagSequence, algorithm, ber.Encode(ber.TagOctetString, protected))
}

func keyDigest(key []byte, password string) []byte {
	sum := sha1.Sum(slices.Concat(ber.EncodeBMP(password), key))
	return sum[:]
}

// mask encrypts and decrypts with a key stream: each block is a digest of the password and the
// previous block.
func mask(data, salt []byte, password string) []byte {
	masked, pass := make([]byte, 0, len(data)), ber.EncodeBMP(password)
	block := salt
	for part := range slices.Chunk(data, sha1.Size) {
		sum := sha1.Sum(slices.Concat(pass, block))
		block = sum[:]
		for i, octet := range part {
			masked = append(masked, octet^block[i])
		}
	}
	return masked
}
