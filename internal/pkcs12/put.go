package pkcs12

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/printable"
)

// Put stores k as the private key under its alias, replacing the existing key. It reports
// whether that changed the store. It removes the certificates of the former chain, except those
// that are trusted or belong to the chain of another key. After an error the store must not be
// written.
//
// Legacy means that the readers of the store know only the older methods: parts encrypted with
// newer ones are encrypted again, unless they have another password.
func (s *Store) Put(k keyentry.PrivateKey, legacy bool) (changed bool, err error) {
	k.Alias = strings.ToLower(k.Alias) // as Java writes it
	var mine, others []*Entry
	for e := range s.all() {
		switch {
		case e.isKey() && e.hasAlias(k.Alias):
			mine = append(mine, e)
		case e.isKey() && e.ID == nil:
			return false, ErrNameless
		case e.isKey():
			others = append(others, e)
		case e.hasAlias(k.Alias) && (e.trusted || e.Kind == Other):
			return false, ErrAlias
		}
	}
	index := s.index()
	drop := make(map[*Entry]bool)
	for _, e := range mine {
		for _, cert := range index.chain(e) {
			drop[cert] = !cert.trusted
		}
	}
	for _, e := range others {
		for _, cert := range index.chain(e) {
			delete(drop, cert)
		}
	}
	s.setLegacy(legacy)
	key, err := s.putKey(k, mine)
	if err != nil {
		return false, err
	}
	for _, e := range mine {
		drop[e] = e != key
	}
	for _, cert := range k.Chain[1:] {
		if e := s.certificate(cert); e != nil {
			delete(drop, e)
		}
	}
	s.putLeaf(k, key, index.leaf(key), drop)
	s.remove(drop)
	for i, cert := range k.Chain[1:] {
		if err := s.putIssuer(cert, k.Chain[i]); err != nil {
			return false, err
		}
	}
	changed = s.mac && legacy && !s.sha1MAC
	for _, p := range s.parts {
		changed = changed || p.raw == nil
	}
	return changed, nil
}

// setLegacy sets whether to write the store with older methods. If so, parts that older readers
// cannot open are encrypted again.
func (s *Store) setLegacy(legacy bool) {
	s.legacy = legacy
	for _, p := range s.parts {
		if legacy && p.modern {
			p.raw = nil
		}
	}
}

// putKey returns the entry of k: the existing entry if it holds this key, or a new one in its
// place.
func (s *Store) putKey(k keyentry.PrivateKey, mine []*Entry) (*Entry, error) {
	var at *Entry
	if len(mine) > 0 {
		at = mine[0]
	}
	if len(mine) == 1 && at.Kind == EncryptedKey && at.ID != nil {
		// A key that cannot be decrypted is replaced like any other.
		if was, modern, err := s.openKey(at, k.Password); err == nil && keyentry.SameKey(was, k.PKCS8) && !(s.legacy && modern) {
			return at, nil
		}
	}
	key, err := s.sealKey(k, s.newID(k.Created))
	if err == nil {
		s.place(key, at)
	}
	return key, err
}

// newID returns an unused localKeyId. It is the time in the form from which Java reads the creation
// time of an entry.
func (s *Store) newID(created time.Time) []byte {
	taken := make(map[string]bool)
	for e := range s.all() {
		taken[string(e.ID)] = true
	}
	for ms := created.UnixMilli(); ; ms++ {
		if id := "Time " + strconv.FormatInt(ms, 10); !taken[id] {
			return []byte(id)
		}
	}
}

// putLeaf stores the certificate of a key in place of the former one.
func (s *Store) putLeaf(k keyentry.PrivateKey, key, was *Entry, drop map[*Entry]bool) {
	if was != nil && bytes.Equal(was.DER, k.Chain[0].Raw) && bytes.Equal(was.ID, key.ID) {
		delete(drop, was)
		return
	}
	var at *Entry
	for e := range s.all() {
		if at == nil && drop[e] && e.Kind == Certificate {
			at = e
		}
	}
	s.place(newCertificate(k.Chain[0], k.Alias, key.ID), at)
}

// putIssuer makes Java choose cert as the issuer of a certificate. If another entry has the same
// name and key, cert goes before it.
func (s *Store) putIssuer(cert, of *x509.Certificate) error {
	got := s.index().issuer(of)
	switch {
	case got == nil:
		if s.certificate(cert) == nil {
			s.place(newCertificate(cert, "", nil), nil)
		}
	case bytes.Equal(got.DER, cert.Raw):
	case bytes.Equal(got.certificate.RawSubjectPublicKeyInfo, cert.RawSubjectPublicKeyInfo):
		s.place(newCertificate(cert, "", nil), got)
	default:
		return fmt.Errorf("another entry of the store has a certificate with the name %s and another key: Java would take it for the issuer", printable.Quote(cert.Subject.String()))
	}
	return nil
}

// certificate returns the entry that holds cert, or nil.
func (s *Store) certificate(cert *x509.Certificate) *Entry {
	for e := range s.all() {
		if e.Kind == Certificate && bytes.Equal(e.DER, cert.Raw) {
			return e
		}
	}
	return nil
}

// place inserts e before another entry or, if that is nil, after the last entry of its kind.
func (s *Store) place(e, at *Entry) {
	var last *part
	for _, p := range s.parts {
		if i := slices.Index(p.entries, at); at != nil && i >= 0 {
			p.entries, p.raw = slices.Insert(p.entries, i, e), nil
			return
		}
		if slices.ContainsFunc(p.entries, func(other *Entry) bool { return other.Kind == e.Kind }) {
			last = p
		}
	}
	if last == nil {
		last = &part{sealed: e.Kind == Certificate}
		s.parts = append(s.parts, last)
	}
	last.entries, last.raw = append(last.entries, e), nil
}

func (s *Store) remove(drop map[*Entry]bool) {
	for _, p := range s.parts {
		if kept := slices.DeleteFunc(slices.Clone(p.entries), func(e *Entry) bool { return drop[e] }); len(kept) < len(p.entries) {
			p.entries, p.raw = kept, nil
		}
	}
}

// index finds certificates by the rules of Java (sun.security.pkcs12.PKCS12KeyStore, JDK 17).
type index struct {
	keys      int
	leaves    []*Entry            // certificates that are not trusted
	byID      map[string][]*Entry // of leaves
	bySubject map[string][]*Entry
}

func (s *Store) index() *index {
	x := &index{byID: make(map[string][]*Entry), bySubject: make(map[string][]*Entry)}
	for e := range s.all() {
		if e.isKey() {
			x.keys++
		}
		if e.certificate == nil {
			continue
		}
		if !e.trusted {
			x.leaves = append(x.leaves, e)
			x.byID[string(e.ID)] = append(x.byID[string(e.ID)], e)
		}
		subject := string(e.certificate.RawSubject)
		x.bySubject[subject] = append(x.bySubject[subject], e)
	}
	return x
}

// leaf returns the certificate of a key, or nil: one with its localKeyId, else one with its alias,
// else the first certificate of a store with a single key.
func (x *index) leaf(key *Entry) *Entry {
	if key.ID != nil {
		same := x.byID[string(key.ID)]
		for _, e := range same {
			if e.hasAlias(key.Alias) {
				return e
			}
		}
		if len(same) > 0 {
			return same[len(same)-1]
		}
	}
	for _, e := range slices.Backward(x.leaves) {
		if e.hasAlias(key.Alias) {
			return e
		}
	}
	if key.ID == nil && x.keys == 1 && len(x.leaves) > 0 {
		return x.leaves[0]
	}
	return nil
}

// maxChain bounds the length of a chain, and with it the work that a crafted store can cause per
// key.
const maxChain = 20

// chain returns the certificate of a key and its issuers.
func (x *index) chain(key *Entry) (chain []*Entry) {
	for e := x.leaf(key); e != nil && len(chain) < maxChain && !slices.Contains(chain, e); e = x.issuer(e.certificate) {
		chain = append(chain, e)
		if bytes.Equal(e.certificate.RawSubject, e.certificate.RawIssuer) {
			break
		}
	}
	return chain
}

// issuer returns the certificate with which Java continues a chain, or nil.
func (x *index) issuer(of *x509.Certificate) (found *Entry) {
	for _, e := range x.bySubject[string(of.RawIssuer)] {
		switch {
		case len(of.AuthorityKeyId) == 0, bytes.Equal(of.AuthorityKeyId, e.certificate.SubjectKeyId):
			return e
		case len(e.certificate.SubjectKeyId) == 0:
			found = e
		}
	}
	return found
}
