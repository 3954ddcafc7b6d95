package pkcs12

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"testing"
	"time"

	"certctl-agent/internal/ber"
	"certctl-agent/internal/keyentry"
)

const password = "correct horse"

// authority signs certificates.
type authority struct {
	Root *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key := ecKey(t)
	return &authority{certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true}, nil, key, key), key}
}

// certificate returns a certificate signed by parent, or self-signed without one.
func certificate(t testing.TB, template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<60))
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.BasicConstraintsValid = serial, true
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(1000*time.Hour)
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// newKey returns a private key for an alias with its certificate and an intermediate.
func newKey(t testing.TB, ca *authority, alias string) keyentry.PrivateKey {
	t.Helper()
	middle, key := ecKey(t), ecKey(t)
	issuer := certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: "middle of " + alias}, IsCA: true}, ca.Root, middle, ca.key)
	leaf := certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: alias}, DNSNames: []string{"localhost"}}, issuer, key, middle)
	return keyentry.PrivateKey{Alias: alias, PKCS8: pkcs8(t, key), Chain: []*x509.Certificate{leaf, issuer}, Created: time.UnixMilli(1_600_000_000_000), Password: password}
}

func pkcs8(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// mustPut stores k, encodes the store and opens it again.
func mustPut(t testing.TB, s *Store, k keyentry.PrivateKey, legacy bool) *Store {
	t.Helper()
	if changed, err := s.Put(k, legacy); err != nil || !changed {
		t.Fatalf("put %q: changed %v, %v", k.Alias, changed, err)
	}
	return reopen(t, s)
}

func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	data, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return mustOpen(t, data)
}

func mustOpen(t testing.TB, data []byte) *Store {
	t.Helper()
	s, err := Open(data, password, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// checkKey fails the test unless the store has k.
func checkKey(t testing.TB, s *Store, k keyentry.PrivateKey) {
	t.Helper()
	got, err := s.Find(k.Alias, k.Password)
	if err != nil || got == nil {
		t.Fatalf("find %q: %v, %v", k.Alias, got, err)
	}
	if !bytes.Equal(got.PKCS8, k.PKCS8) || !slices.EqualFunc(got.Chain, k.Chain, (*x509.Certificate).Equal) {
		t.Errorf("%q has another key, or a chain of %d certificates, want %d", k.Alias, len(got.Chain), len(k.Chain))
	}
}

// bags returns the encodings of all entries, sorted.
func bags(s *Store) (all []string) {
	for e := range s.all() {
		all = append(all, string(e.bag))
	}
	slices.Sort(all)
	return all
}

// without returns the elements of a that are not in b.
func without(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(bag string) bool { return slices.Contains(b, bag) })
}

func TestPut(t *testing.T) {
	ca := newAuthority(t)
	for _, legacy := range []bool{false, true} {
		first, other := newKey(t, ca, "Server"), newKey(t, ca, "other")
		other.Password = "another password"
		s := mustPut(t, New(password, legacy), first, legacy)
		checkKey(t, s, first)
		s = mustPut(t, s, other, legacy)
		checkKey(t, s, first)
		checkKey(t, s, other)

		before, err := s.Encode()
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range []keyentry.PrivateKey{first, other} {
			k.Created = time.Now()
			s := mustOpen(t, before)
			checkKey(t, s, k)
			s.work = 0 // the key is already decrypted
			if changed, err := s.Put(k, legacy); changed || err != nil {
				t.Errorf("legacy %v: storing the same key again under %q: changed %v, %v", legacy, k.Alias, changed, err)
			}
		}

		// A renewal replaces key, certificate and intermediate, and nothing else.
		renewed := newKey(t, ca, "sERVER")
		was := bags(s)
		s = mustPut(t, s, renewed, legacy)
		checkKey(t, s, renewed)
		checkKey(t, s, other)
		if gone, came := without(was, bags(s)), without(bags(s), was); len(gone) != 3 || len(came) != 3 {
			t.Errorf("legacy %v: %d entries removed and %d added, want a key, a certificate and an intermediate", legacy, len(gone), len(came))
		}
		if _, err := s.Find("server", "another password"); !errors.Is(err, ErrPassword) {
			t.Errorf("a key under a wrong password: %v", err)
		}
		if k, err := s.Find("nobody", password); k != nil || err != nil {
			t.Errorf("an unknown alias: %v, %v", k, err)
		}
	}
}

// TestPutParts checks that parts without changes are written as they were read.
func TestPutParts(t *testing.T) {
	ca := newAuthority(t)
	k := newKey(t, ca, "server")
	s := mustPut(t, New(password, false), k, false)
	keys := slices.IndexFunc(s.parts, func(p *part) bool { return !p.sealed })
	raw := s.parts[keys].raw
	issuer := k.Chain[1]
	k.Chain = k.Chain[:1]
	if s = mustPut(t, s, k, false); s.certificate(issuer) != nil {
		t.Error("an intermediate that is no longer sent is still there")
	}
	if checkKey(t, s, k); !bytes.Equal(s.parts[keys].raw, raw) {
		t.Error("a new chain caused the key to be encrypted again")
	}
	key, err := x509.ParsePKCS8PrivateKey(k.PKCS8)
	if err != nil {
		t.Fatal(err)
	}
	k.Chain = []*x509.Certificate{certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: "server"}}, ca.Root, key.(*ecdsa.PrivateKey), ca.key)}
	s = mustPut(t, s, k, false)
	if checkKey(t, s, k); !bytes.Equal(s.parts[keys].raw, raw) || len(bags(s)) != 2 {
		t.Errorf("a new certificate caused the key to be encrypted again, or %d entries are not two", len(bags(s)))
	}
	k.Password = "different"
	s = mustPut(t, s, k, false)
	checkKey(t, s, k)
}

// TestPutLegacy checks that Put encrypts again what older readers cannot open, and nothing else.
func TestPutLegacy(t *testing.T) {
	ca := newAuthority(t)
	k := newKey(t, ca, "server")
	s := mustPut(t, New(password, false), k, false)
	if s = mustPut(t, s, k, true); !s.sha1MAC {
		t.Error("the MAC is not a legacy one")
	}
	for _, p := range s.parts {
		if p.modern {
			t.Error("a part still uses PBES2")
		}
	}
	if _, modern, err := s.openKey(s.parts[0].entries[0], password); modern || err != nil {
		t.Errorf("the key still uses PBES2: %v, %v", modern, err)
	}
	for _, legacy := range []bool{true, false} {
		if changed, err := s.Put(k, legacy); changed || err != nil {
			t.Errorf("legacy %v, store in the older form: changed %v, %v", legacy, changed, err)
		}
	}
}

// made returns a certificate without AuthorityKeyId and SubjectKeyId.
func made(t testing.TB, name, issuer string, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	return certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}}, &x509.Certificate{Subject: pkix.Name{CommonName: issuer}}, key, signer)
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestSharedIssuers covers keys that share issuers: Java builds chains by the names of
// certificates.
func TestSharedIssuers(t *testing.T) {
	root, middle := ecKey(t), ecKey(t)
	issuer := made(t, "middle", "root", middle, root)
	entry := func(alias string, chain ...*x509.Certificate) keyentry.PrivateKey {
		key := ecKey(t)
		leaf := made(t, alias, "middle", key, middle)
		return keyentry.PrivateKey{Alias: alias, PKCS8: pkcs8(t, key), Chain: append([]*x509.Certificate{leaf}, chain...), Password: password}
	}
	a, b := entry("a", issuer), entry("b", issuer)
	s := mustPut(t, mustPut(t, New(password, false), a, false), b, false)
	if n := len(bags(s)); n != 5 {
		t.Errorf("%d entries, want two keys, their certificates, and one intermediate", n)
	}

	// The intermediate of one is reissued with the same key.
	again := made(t, "middle", "root", middle, root)
	was := bags(s)
	a2 := entry("a", again)
	s = mustPut(t, s, a2, false)
	checkKey(t, s, a2)
	if gone := without(was, bags(s)); len(gone) != 2 {
		t.Errorf("%d entries removed, want the key of a and its certificate: b needs the intermediate", len(gone))
	}
	if k, err := s.Find("b", password); err != nil || len(k.Chain) != 2 || !bytes.Equal(k.Chain[1].RawSubjectPublicKeyInfo, issuer.RawSubjectPublicKeyInfo) {
		t.Errorf("b has lost its chain: %v", err)
	}
	if changed, err := s.Put(a2, false); changed || err != nil {
		t.Errorf("again: changed %v, %v", changed, err)
	}

	// And with another key, so Java cannot tell the two apart.
	foreign := ecKey(t)
	leaf := ecKey(t)
	c := keyentry.PrivateKey{Alias: "c", PKCS8: pkcs8(t, leaf), Password: password,
		Chain: []*x509.Certificate{made(t, "c", "middle", leaf, foreign), made(t, "middle", "root", foreign, root)}}
	if _, err := s.Put(c, false); err == nil {
		t.Error("Java would serve c with the intermediate of another")
	}
}

// TestOccupied checks that a private key replaces only private keys.
func TestOccupied(t *testing.T) {
	ca := newAuthority(t)
	s := New(password, false)
	trusted := newCertificate(ca.Root, "root", nil)
	usage := ber.Encode(ber.TagSequence, ber.EncodeOID(oidTrustedKeyUsage), ber.Encode(ber.TagSet, ber.EncodeOID("\x55\x1d\x25\x00")))
	name := ber.Encode(ber.TagSequence, ber.EncodeOID(oidFriendlyName), ber.Encode(ber.TagSet, ber.Encode(ber.TagBMPString, []byte("\x00R\x00o\x00o\x00t"))))
	value := ber.Encode(ber.TagSequence, ber.EncodeOID(oidX509Certificate), ber.Encode(ber.TagExplicit0, ber.Encode(ber.TagOctetString, ca.Root.Raw)))
	trusted.bag = ber.Encode(ber.TagSequence, ber.EncodeOID(oidCertBag), ber.Encode(ber.TagExplicit0, value), ber.Encode(ber.TagSet, name, usage))
	s.place(trusted, nil)
	s = reopen(t, s)
	if _, err := s.Put(newKey(t, ca, "rOOT"), false); !errors.Is(err, ErrAlias) {
		t.Errorf("the alias of a trusted certificate: %v, want %v", err, ErrAlias)
	}
	// It may end the chain of a key, and must stay when that key is removed.
	k := newKey(t, ca, "server")
	k.Chain = append(k.Chain, ca.Root)
	s = mustPut(t, s, k, false)
	checkKey(t, s, k)
	s = mustPut(t, s, newKey(t, ca, "server"), false)
	if !slices.Contains(bags(s), string(trusted.bag)) {
		t.Error("the trusted certificate is gone")
	}
}

// TestNameless covers keys without localKeyId, whose certificates Java finds only if the store has
// one key.
func TestNameless(t *testing.T) {
	ca := newAuthority(t)
	k := newKey(t, ca, "server")
	nameless := New(password, false)
	key, err := nameless.sealKey(k, nil)
	if err != nil {
		t.Fatal(err)
	}
	nameless.place(key, nil)
	nameless.place(newCertificate(k.Chain[0], "", nil), nil)
	nameless.place(newCertificate(k.Chain[1], "", nil), nil)
	s := reopen(t, nameless)
	checkKey(t, s, k)
	if _, err := s.Put(newKey(t, ca, "second"), false); !errors.Is(err, ErrNameless) {
		t.Errorf("a second key: %v, want %v", err, ErrNameless)
	}
	renewed := newKey(t, ca, "server")
	s = mustPut(t, s, renewed, false)
	if checkKey(t, s, renewed); len(bags(s)) != 3 {
		t.Errorf("%d entries, want only the new ones", len(bags(s)))
	}
}

func TestOpenRefuses(t *testing.T) {
	ca := newAuthority(t)
	good, err := mustPut(t, New(password, false), newKey(t, ca, "server"), false).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(good, "wrong", 1<<30); !errors.Is(err, ErrPassword) {
		t.Errorf("a wrong password: %v", err)
	}
	if _, err := Open(good, password, 1000); !errors.Is(err, ErrWork) {
		t.Errorf("without a budget: %v", err)
	}
	for _, end := range []int{0, 1, 20, len(good) / 2, len(good) - 1} {
		if _, err := Open(good[:end], password, 1<<30); err == nil {
			t.Errorf("opened the first %d bytes", end)
		}
	}
	flipped := bytes.Clone(good)
	flipped[len(good)/2] ^= 1
	if _, err := Open(flipped, password, 1<<30); err == nil {
		t.Error("no error for a wrong bit")
	}
	rounds := bytes.Clone(good) // the iterations of the MAC come last
	copy(rounds[bytes.LastIndex(good, ber.EncodeInteger(10_000)):], ber.EncodeInteger(0x7fff))
	if _, err := Open(rounds, password, 1<<20); !errors.Is(err, ErrWork) {
		t.Errorf("many rounds: %v", err)
	}
}

// TestMAC covers each hash and checks the object identifiers.
func TestMAC(t *testing.T) {
	content := []byte("content")
	for _, id := range slices.Sorted(func(yield func(string) bool) {
		for id := range macHashes {
			if !yield(id) {
				return
			}
		}
	}) {
		m := macScheme{hash: macHashes[id], kdf: kdf{salt: []byte("salt"), iterations: 2, keySize: macHashes[id]().Size()}}
		sum, err := m.sum(password, content)
		if err != nil {
			t.Fatal(err)
		}
		data := ber.Encode(ber.TagSequence,
			ber.Encode(ber.TagSequence, ber.Encode(ber.TagSequence, ber.EncodeOID(id)), ber.Encode(ber.TagOctetString, sum)),
			ber.Encode(ber.TagOctetString, []byte("salt")), ber.EncodeInteger(2))
		s := &Store{password: password, work: 1 << 20}
		if err := s.checkMAC(ber.Sequence(data), content); err != nil {
			t.Errorf("%s: %v", hex.EncodeToString([]byte(id)), err)
		}
		if err := s.checkMAC(ber.Sequence(data), []byte("other")); !errors.Is(err, ErrPassword) {
			t.Errorf("%s: other content: %v", hex.EncodeToString([]byte(id)), err)
		}
	}
	for _, test := range []struct {
		oid  asn1.ObjectIdentifier
		want string
	}{
		{asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}, oidSHA1},
		{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}, oidSHA256},
		{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 14}, oidPBMAC1},
		{asn1.ObjectIdentifier{2, 16, 840, 1, 113894, 746875, 1, 1}, oidTrustedKeyUsage},
	} {
		if der, err := asn1.Marshal(test.oid); err != nil || string(der[2:]) != test.want {
			t.Errorf("%v is %x, %v", test.oid, der[2:], err)
		}
	}
}

// TestTooMany checks the limit of entries, whose work is quadratic.
func TestTooMany(t *testing.T) {
	s := New(password, false)
	bag := encodeBag(oidBag+"\x05", ber.Encode(ber.TagNull), "", nil)
	for range 2 {
		p := &part{}
		for range maxEntries/2 + 1 {
			p.entries = append(p.entries, &Entry{bag: bag})
		}
		s.parts = append(s.parts, p)
	}
	data, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(data, password, 1<<30); !errors.Is(err, errEntries) {
		t.Errorf("got %v, want %v", err, errEntries)
	}

	// Each takes about thirty times its size in memory.
	contents := ber.Encode(ber.TagSequence, bytes.Repeat(bag, 3*maxEntries))
	if entries, err := readEntries(contents); len(entries) != maxEntries+1 || err != nil {
		t.Errorf("read %d entries of a part, %v, want %d", len(entries), err, maxEntries+1)
	}
}

// TestManyEntries renews one of a thousand keys.
func TestManyEntries(t *testing.T) {
	ca := newAuthority(t)
	k := newKey(t, ca, "")
	s := New(password, false)
	for i := range 1000 {
		id := fmt.Appendf(nil, "id %d", i)
		key := &Entry{Kind: EncryptedKey, Alias: fmt.Sprint("alias", i), ID: id}
		key.bag = encodeBag(oidShroudedKeyBag, ber.Encode(ber.TagSequence, ber.Encode(ber.TagSequence, ber.EncodeOID(oidPBES2)), ber.Encode(ber.TagOctetString, id)), key.Alias, id)
		s.place(key, nil)
		s.place(newCertificate(k.Chain[0], key.Alias, id), nil)
	}
	s = reopen(t, s)
	k.Alias = "alias500"
	begun := time.Now()
	was := bags(s)
	s = mustPut(t, s, k, false)
	checkKey(t, s, k)
	t.Logf("a renewal among a thousand entries takes %v", time.Since(begun))
	if gone := without(was, bags(s)); len(gone) != 2 || len(bags(s)) != len(was)+1 {
		t.Errorf("%d of %d entries removed, %d left", len(gone), len(was), len(bags(s)))
	}
}
