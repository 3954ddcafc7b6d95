package pkcs12

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"certctl-agent/internal/ber"
	"certctl-agent/internal/keyentry"
)

// Store is a key store that one password opens. Whatever Put does not replace is written as it was
// read, byte for byte: its bags, and parts without a change even with their encryption.
type Store struct {
	password string
	work     int64
	legacy   bool // it is written with older methods
	parts    []*part
	entries  int // that were read

	mac      bool // it has one
	once     bool // the password cannot be guessed
	macIsOld bool // with SHA-1
}

// part is a ContentInfo of the store: a SafeContents, which may be encrypted.
type part struct {
	raw     []byte // as it was read; nil: it has changed
	sealed  bool
	modern  bool // encrypted with PBES2
	entries []*Entry
}

// maxEntries bounds the entries of a store. The work of matching keys and certificates grows with
// their square.
const maxEntries = 10_000

var errEntries = fmt.Errorf("PKCS#12: the store has more than %d entries", maxEntries)

var (
	// ErrAlias: the alias is that of an entry which is not a private key.
	ErrAlias = errors.New("the alias belongs to a trusted certificate or a secret key")

	// ErrNameless: Java finds the certificate of a key without localKeyId only as long as it is the
	// store's only key.
	ErrNameless = errors.New("another private key of the store has no localKeyId, so that Java would lose its certificate if a second key came")
)

// New is an empty store. It is written for readers of PKCS#12 in its older form, SHA-1 and 3DES, if
// legacy is set.
func New(password string, legacy bool) *Store {
	return &Store{password: password, legacy: legacy, mac: true}
}

// NewOnce is New for a password that nobody can guess, such as a random one which is used once. So
// deriving keys from it costs little.
func NewOnce(password string, legacy bool) *Store {
	return &Store{password: password, legacy: legacy, mac: true, once: true}
}

// rounds is how often a password is hashed for a key that is derived from it.
func (s *Store) rounds() int {
	if s.once {
		return fewIterations
	}
	return usualIterations
}

// Open reads a store whose integrity, and whatever is encrypted but for keys, is protected with
// password. Work bounds what deriving keys may cost, as that of a Reader; it is for everything that
// is done with the store. The error is ErrPassword or ErrWork, or says what is damaged or not
// supported.
func Open(data []byte, password string, work int64) (*Store, error) {
	content, rest, err := openPFX(data)
	if err != nil {
		return nil, err
	}
	s := &Store{password: password, work: work}
	if rest.At(ber.TagSequence) {
		if err := s.checkMAC(rest.Inside(ber.TagSequence), content); err != nil {
			return nil, err
		}
	}
	safes := ber.Sequence(content)
	for safes.Err == nil && len(safes.Rest) > 0 {
		safe := safes.Next(ber.TagSequence)
		if safes.Err != nil {
			break
		}
		if err := s.openPart(safe); err != nil {
			return nil, err
		}
	}
	if safes.Err != nil {
		return nil, damaged(safes.Err)
	}
	return s, nil
}

var errPart = errors.New("PKCS#12: the password is right, and a part of the store is damaged or encrypted with another")

func (s *Store) checkMAC(data *ber.Fields, content []byte) error {
	m, digest, err := readMAC(data)
	if err != nil {
		return fmt.Errorf("PKCS#12: %w", err)
	}
	cost := m.work(len(content))
	if cost > s.work {
		return ErrWork
	}
	s.work -= cost
	sum, err := m.sum(s.password, content)
	if err != nil {
		return err
	}
	if !hmac.Equal(sum, digest) {
		return ErrPassword
	}
	s.mac, s.macIsOld = true, m.prf == nil && len(digest) == sha1.Size
	s.legacy = s.macIsOld
	return nil
}

func (s *Store) openPart(safe ber.Value) error {
	p := &part{raw: safe.Full}
	f := &ber.Fields{Rest: safe.Body}
	kind := f.OID()
	content := f.Inside(ber.TagExplicit0)
	if content.Err != nil {
		return damaged(content.Err)
	}
	read := func(contents []byte) (err error) {
		p.entries, err = readEntries(contents)
		return err
	}
	switch kind {
	case oidData:
		if err := read(content.Octets(ber.TagOctetString)); err != nil {
			return damaged(err)
		}
	case oidEncryptedData:
		scheme, ciphertext, err := readEncryptedData(content)
		if err != nil {
			return err
		}
		p.sealed, p.modern = true, scheme.prf != nil
		err = scheme.try([]string{s.password}, &s.work, ciphertext, read)
		if errors.Is(err, ErrPassword) && s.mac {
			return errPart
		}
		if err != nil {
			return err
		}
	default:
		return errSigned
	}
	if s.entries += len(p.entries); s.entries > maxEntries {
		return errEntries
	}
	s.parts = append(s.parts, p)
	return nil
}

// readEntries reads a SafeContents, but no more of it than is too much. One inside it is an entry of
// another kind, as Java looks into none.
func readEntries(b []byte) (entries []*Entry, err error) {
	contents := ber.Sequence(b)
	for contents.Err == nil && len(contents.Rest) > 0 && len(entries) <= maxEntries {
		whole := contents.Next(ber.TagSequence)
		if contents.Err != nil {
			break
		}
		e, _, err := readBag(whole)
		if err != nil {
			return nil, err
		}
		if e.Kind == Certificate {
			e.certificate, _ = x509.ParseCertificate(e.DER)
		}
		entries = append(entries, &e)
	}
	return entries, contents.Err
}

// Encode is the store as it is written.
func (s *Store) Encode() ([]byte, error) {
	var safes [][]byte
	for _, p := range s.parts {
		safe, err := p.encode(s)
		if err != nil {
			return nil, err
		}
		safes = append(safes, safe)
	}
	content := ber.Encode(ber.TagSequence, safes...)
	var mac []byte
	if s.mac {
		var err error
		if mac, err = encodeMAC(s.password, content, s.legacy, s.rounds()); err != nil {
			return nil, err
		}
	}
	return ber.Encode(ber.TagSequence, ber.EncodeInteger(3), encodeContent(oidData, ber.Encode(ber.TagOctetString, content)), mac), nil
}

// encodeContent is a ContentInfo of PKCS#7.
func encodeContent(kind string, content []byte) []byte {
	return ber.Encode(ber.TagSequence, ber.EncodeOID(kind), ber.Encode(ber.TagExplicit0, content))
}

func (p *part) encode(s *Store) ([]byte, error) {
	if p.raw != nil {
		return p.raw, nil
	}
	var bags [][]byte
	for _, e := range p.entries {
		bags = append(bags, e.bag)
	}
	contents := ber.Encode(ber.TagSequence, bags...)
	if !p.sealed {
		return encodeContent(oidData, ber.Encode(ber.TagOctetString, contents)), nil
	}
	scheme, algorithm := newScheme(s.legacy, s.rounds())
	sealed, err := scheme.seal(s.password, contents)
	if err != nil {
		return nil, err
	}
	info := ber.Encode(ber.TagSequence, ber.EncodeOID(oidData), algorithm, ber.Encode(ber.TagContext0, sealed))
	return encodeContent(oidEncryptedData, ber.Encode(ber.TagSequence, ber.EncodeInteger(0), info)), nil
}

// all yields each entry.
func (s *Store) all() iter.Seq[*Entry] {
	return func(yield func(*Entry) bool) {
		for _, p := range s.parts {
			for _, e := range p.entries {
				if !yield(e) {
					return
				}
			}
		}
	}
}

// IsTrustStore reports whether there are entries, and none that is a private key.
func (s *Store) IsTrustStore() (some bool) {
	for e := range s.all() {
		if some = true; e.isKey() {
			return false
		}
	}
	return some
}

func (e *Entry) isKey() bool { return e.Kind == Key || e.Kind == EncryptedKey }

// is compares aliases as Java does.
func (e *Entry) is(alias string) bool {
	return e.Alias != "" && strings.EqualFold(e.Alias, alias)
}

// Find returns the private key under an alias, and its chain as Java puts it together, or nil. The
// error is ErrPassword or ErrWork, or says why the key cannot be read.
func (s *Store) Find(alias, password string) (*keyentry.PrivateKey, error) {
	var found *Entry
	for e := range s.all() {
		if e.isKey() && e.is(alias) {
			found = e // the last one counts
		}
	}
	if found == nil {
		return nil, nil
	}
	return s.privateKey(found, password)
}

// Keys returns the private keys of the store that are under the password, in their order, whether they
// have an alias or not, each with its chain as Java puts it together.
func (s *Store) Keys(password string) ([]*keyentry.PrivateKey, error) {
	var keys []*keyentry.PrivateKey
	for e := range s.all() {
		if !e.isKey() {
			continue
		}
		k, err := s.privateKey(e, password)
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, nil
}

func (s *Store) privateKey(e *Entry, password string) (*keyentry.PrivateKey, error) {
	key, _, err := s.openKey(e, password)
	if err != nil {
		return nil, err
	}
	k := &keyentry.PrivateKey{Alias: strings.ToLower(e.Alias), PKCS8: key, Password: password}
	for _, e := range s.index().chain(e) {
		k.Chain = append(k.Chain, e.certificate)
	}
	return k, nil
}

// openedKey is a key that a password has decrypted.
type openedKey struct {
	password string
	pkcs8    []byte
	modern   bool
}

// openKey decrypts a key, and not again for who asks with the same password: that may be more work
// than is left. Modern says that it is encrypted with PBES2.
func (s *Store) openKey(e *Entry, password string) (pkcs8 []byte, modern bool, err error) {
	if e.Kind == Key {
		return e.DER, false, nil
	}
	if e.opened != nil && e.opened.password == password {
		return e.opened.pkcs8, e.opened.modern, nil
	}
	f := ber.Sequence(e.DER)
	algorithm := f.Inside(ber.TagSequence)
	ciphertext := f.Octets(ber.TagOctetString)
	if f.Err != nil {
		return nil, false, damaged(f.Err)
	}
	scheme, err := encryptionScheme(algorithm)
	if err != nil {
		return nil, false, fmt.Errorf("PKCS#12: the private key: %w", err)
	}
	err = scheme.try([]string{password}, &s.work, ciphertext, func(plain []byte) error {
		pkcs8 = plain
		return ber.Sequence(plain).Err
	})
	if err != nil {
		return nil, false, err
	}
	e.opened = &openedKey{password, pkcs8, scheme.prf != nil}
	return pkcs8, e.opened.modern, nil
}

// sealKey is the bag of a private key.
func (s *Store) sealKey(k keyentry.PrivateKey, id []byte) (*Entry, error) {
	scheme, algorithm := newScheme(s.legacy, s.rounds())
	sealed, err := scheme.seal(k.Password, k.PKCS8)
	if err != nil {
		return nil, err
	}
	e := &Entry{Kind: EncryptedKey, Alias: k.Alias, ID: id}
	e.DER = ber.Encode(ber.TagSequence, algorithm, ber.Encode(ber.TagOctetString, sealed))
	e.bag = encodeBag(oidShroudedKeyBag, e.DER, k.Alias, id)
	return e, nil
}

// newCertificate is the bag of a certificate; that of a key has its alias and id.
func newCertificate(cert *x509.Certificate, alias string, id []byte) *Entry {
	value := ber.Encode(ber.TagSequence, ber.EncodeOID(oidX509Certificate),
		ber.Encode(ber.TagExplicit0, ber.Encode(ber.TagOctetString, cert.Raw)))
	return &Entry{Kind: Certificate, Alias: alias, ID: id, DER: cert.Raw, certificate: cert, bag: encodeBag(oidCertBag, value, alias, id)}
}

// encodeBag is a SafeBag. Attributes that are empty are left out.
func encodeBag(kind string, value []byte, alias string, id []byte) []byte {
	var attributes [][]byte
	add := func(oid string, tag byte, value []byte) {
		if len(value) > 0 {
			attributes = append(attributes, ber.Encode(ber.TagSequence, ber.EncodeOID(oid), ber.Encode(ber.TagSet, ber.Encode(tag, value))))
		}
	}
	add(oidFriendlyName, ber.TagBMPString, ber.EncodeBMP(alias))
	add(oidLocalKeyID, ber.TagOctetString, id)
	slices.SortFunc(attributes, bytes.Compare) // X.690, 11.6
	var set []byte
	if len(attributes) > 0 {
		set = ber.Encode(ber.TagSet, attributes...)
	}
	return ber.Encode(ber.TagSequence, ber.EncodeOID(kind), ber.Encode(ber.TagExplicit0, value), set)
}
