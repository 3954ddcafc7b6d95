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

// Store is a key store with a single password. Everything that Put does not replace is written byte
// for byte as it was read: bags, and the encryption of unchanged parts.
type Store struct {
	password string
	work     int64
	legacy   bool // write it with older methods
	parts    []*part
	entries  int // number of entries read

	mac     bool // it has a MAC
	once    bool // the password cannot be guessed: few iterations suffice
	sha1MAC bool // the MAC uses SHA-1
}

// part is a ContentInfo of the store: a SafeContents, which may be encrypted.
type part struct {
	raw     []byte // as read; nil if it has changed
	sealed  bool
	modern  bool // encrypted with PBES2
	entries []*Entry
}

// maxEntries bounds the entries of a store. The work of matching keys and certificates is
// quadratic.
const maxEntries = 10_000

var errEntries = fmt.Errorf("PKCS#12: the store has more than %d entries", maxEntries)

var (
	// ErrAlias means that an entry other than a private key has the alias.
	ErrAlias = errors.New("the alias belongs to a trusted certificate or a secret key")

	// ErrNameless means that Put would add a second key beside one without localKeyId. Java finds
	// the certificate of such a key only as long as it is the only key.
	ErrNameless = errors.New("another private key of the store has no localKeyId, so Java would not find its certificate if a second key were added")
)

// New returns an empty store. If legacy is set, it is written for readers of the older form of
// PKCS#12, with SHA-1 and 3DES.
func New(password string, legacy bool) *Store {
	return &Store{password: password, legacy: legacy, mac: true}
}

// NewOnce is New for a password that nobody can guess, such as a random one that is used once. It
// derives keys with few iterations.
func NewOnce(password string, legacy bool) *Store {
	return &Store{password: password, legacy: legacy, mac: true, once: true}
}

// rounds returns the number of iterations for deriving a key.
func (s *Store) rounds() int {
	if s.once {
		return fewIterations
	}
	return usualIterations
}

// Open reads a store whose MAC and encrypted parts, except keys, use password. Work is the budget
// for deriving keys, as in Reader, for all operations on the store. The error is ErrPassword or
// ErrWork, or names the damaged or unsupported part.
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

var errPart = errors.New("PKCS#12: the password is right, but a part of the store is damaged or has another password")

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
	s.mac, s.sha1MAC = true, m.prf == nil && len(digest) == sha1.Size
	s.legacy = s.sha1MAC
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

// readEntries reads a SafeContents, up to one entry more than maxEntries. Like Java, it treats a
// nested SafeContents as an entry of another kind.
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

// Encode encodes the store.
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

// encodeContent returns a ContentInfo of PKCS#7.
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

// all yields the entries of all parts.
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

// IsTrustStore reports whether the store has entries, but no private key.
func (s *Store) IsTrustStore() (some bool) {
	for e := range s.all() {
		if some = true; e.isKey() {
			return false
		}
	}
	return some
}

func (e *Entry) isKey() bool { return e.Kind == Key || e.Kind == EncryptedKey }

// hasAlias compares aliases as Java does.
func (e *Entry) hasAlias(alias string) bool {
	return e.Alias != "" && strings.EqualFold(e.Alias, alias)
}

// Find returns the private key under an alias and its chain by Java's rules, or nil if there is
// none. The error is ErrPassword or ErrWork, or says why the key cannot be read.
func (s *Store) Find(alias, password string) (*keyentry.PrivateKey, error) {
	var found *Entry
	for e := range s.all() {
		if e.isKey() && e.hasAlias(alias) {
			found = e // the last entry wins
		}
	}
	if found == nil {
		return nil, nil
	}
	return s.privateKey(found, password)
}

// Keys returns all private keys of the store, in order, each with its chain by Java's rules. All
// must have the given password.
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

// openedKey is a decrypted key.
type openedKey struct {
	password string
	pkcs8    []byte
	modern   bool
}

// openKey decrypts a key and caches the result, because decrypting it again might exceed the
// budget. Modern means that it is encrypted with PBES2.
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

// sealKey returns a new entry for a private key.
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

// newCertificate returns a new entry for a certificate. The certificate of a key has its alias and
// id.
func newCertificate(cert *x509.Certificate, alias string, id []byte) *Entry {
	value := ber.Encode(ber.TagSequence, ber.EncodeOID(oidX509Certificate),
		ber.Encode(ber.TagExplicit0, ber.Encode(ber.TagOctetString, cert.Raw)))
	return &Entry{Kind: Certificate, Alias: alias, ID: id, DER: cert.Raw, certificate: cert, bag: encodeBag(oidCertBag, value, alias, id)}
}

// encodeBag returns a SafeBag, without empty attributes.
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
