// Package pkcs12 reads key stores in PKCS#12 (RFC 7292), called .p12 and .pfx: by default those of
// Java since version 9, and what Windows and browsers export.
package pkcs12

import (
	"bytes"
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/pbkdf2"
	"crypto/rc4"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strings"
	"unicode/utf16"

	"certctl-agent/internal/ber"
)

// PKCS#12, PBES2 (RFC 8018) and the object identifiers of both, as their content octets.
const (
	oidPKCS7         = "\x2a\x86\x48\x86\xf7\x0d\x01\x07"
	oidData          = oidPKCS7 + "\x01"
	oidEnvelopedData = oidPKCS7 + "\x03"
	oidEncryptedData = oidPKCS7 + "\x06"

	oidBag             = "\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x0a\x01"
	oidKeyBag          = oidBag + "\x01"
	oidShroudedKeyBag  = oidBag + "\x02"
	oidCertBag         = oidBag + "\x03"
	oidSafeContentsBag = oidBag + "\x06"

	oidPKCS9           = "\x2a\x86\x48\x86\xf7\x0d\x01\x09"
	oidFriendlyName    = oidPKCS9 + "\x14"
	oidLocalKeyID      = oidPKCS9 + "\x15"
	oidX509Certificate = oidPKCS9 + "\x16\x01"

	oidPBES2  = "\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0d"
	oidPBKDF2 = "\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0c"
	oidPBE    = "\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x01" // and one more octet: the cipher

	// maxEncrypted bounds the encrypted parts of one store, since each asks for the work of trying
	// passwords again; tools write one.
	maxEncrypted = 4

	// maxBagDepth bounds how deep bags nest; no tool nests them at all.
	maxBagDepth = 8

	// maxAlias bounds the bytes of an entry's name.
	maxAlias = 1 << 10
)

// Is reports whether data begins as a store does (RFC 7292, 4): a SEQUENCE with version 3 and a
// ContentInfo of PKCS#7. A head of a few bytes is enough.
func Is(data []byte) bool {
	info, ok := bytes.CutPrefix(ber.Open(data), []byte("\x02\x01\x03"))
	kind := ber.Open(info)
	const want = "\x06\x09" + oidPKCS7
	return ok && kind != nil && strings.HasPrefix(want, string(kind[:min(len(kind), len(want))]))
}

// Kind is what an entry is.
type Kind int

const (
	Certificate  Kind = iota // X.509
	EncryptedKey             // EncryptedPrivateKeyInfo of PKCS#8, as it is in the store
	Key                      // PrivateKeyInfo of PKCS#8
	Other                    // a bag of another kind: a revocation list, a secret
)

// Entry is one thing in a store. Its slices may be part of the store's bytes.
type Entry struct {
	Kind  Kind
	Alias string // friendlyName; "": there is none
	ID    []byte // localKeyId: a key and its certificate have the same one
	DER   []byte
}

// Reader reads stores with the same passwords.
type Reader struct {
	Passwords []string // in the order in which they are tried

	// Work is what trying passwords may still cost, over all stores that are read, in bytes that are
	// hashed; 256 MiB take one to two seconds. A store can ask for any number of iterations, so none
	// is read without a bound.
	Work int64
}

var (
	// ErrPassword: none of the passwords decrypts a part of a store.
	ErrPassword = errors.New("PKCS#12: none of the passwords is right")

	// ErrWork: trying another password would cost more than Work.
	ErrWork = errors.New("PKCS#12: trying all passwords costs too much")

	errParts  = fmt.Errorf("PKCS#12: it has more than %d encrypted parts, and what follows is not looked into", maxEncrypted)
	errSigned = errors.New("PKCS#12: the contents are signed or enveloped with a public key, which is not supported")
)

// Read hands out the entries of a store, in their order, and a problem for each part that it cannot
// read. Keys are not decrypted. The MAC is not checked: a wrong password shows in the padding and
// in what comes out.
func (r *Reader) Read(data []byte, entry func(Entry), problem func(error)) {
	damaged := func(err error) {
		if err != nil {
			problem(fmt.Errorf("damaged PKCS#12: %w", err))
		}
	}
	pfx := ber.Sequence(data)
	pfx.Integer()
	info := pfx.Inside(ber.TagSequence)
	if kind := info.OID(); info.Err == nil && kind != oidData {
		problem(errSigned)
		return
	}
	safes := ber.Sequence(info.Inside(ber.TagExplicit0).Octets(ber.TagOctetString))
	if info.Err != nil {
		safes.Err = info.Err
	}
	encrypted := 0
	for safes.Err == nil && len(safes.Rest) > 0 {
		safe := safes.Inside(ber.TagSequence)
		kind := safe.OID()
		content := safe.Inside(ber.TagExplicit0)
		switch {
		case content.Err != nil:
			damaged(content.Err)
		case kind == oidData:
			damaged(readBags(content.Octets(ber.TagOctetString), 0, entry))
		case kind == oidEncryptedData:
			if encrypted++; encrypted > maxEncrypted {
				problem(errParts)
				return
			}
			if err := r.readEncrypted(content, entry); err != nil {
				problem(err)
			}
		case kind == oidEnvelopedData:
			problem(errSigned)
		}
	}
	damaged(safes.Err)
}

// readBags hands out the entries of a SafeContents.
func readBags(b []byte, depth int, entry func(Entry)) error {
	if depth > maxBagDepth {
		return ber.ErrInvalid
	}
	contents := ber.Sequence(b)
	for contents.Err == nil && len(contents.Rest) > 0 {
		bag := contents.Inside(ber.TagSequence)
		kind := bag.OID()
		v := bag.Inside(ber.TagExplicit0)
		if v.Err != nil {
			return v.Err
		}
		if kind == oidSafeContentsBag {
			if err := readBags(v.Rest, depth+1, entry); err != nil {
				return err
			}
			continue
		}
		e := Entry{Kind: Other, DER: v.Rest}
		switch kind {
		case oidKeyBag:
			e.Kind = Key
		case oidShroudedKeyBag:
			e.Kind = EncryptedKey
		case oidCertBag:
			cert := v.Inside(ber.TagSequence)
			if cert.OID() != oidX509Certificate {
				break // an SDSI certificate
			}
			inner := cert.Inside(ber.TagExplicit0)
			if e.Kind, e.DER = Certificate, inner.Octets(ber.TagOctetString); inner.Err != nil {
				return inner.Err
			}
		}
		e.readAttributes(bag)
		entry(e)
	}
	return contents.Err
}

// readAttributes reads what follows the value of a bag. Damage to it costs an entry no more than
// its name.
func (e *Entry) readAttributes(bag *ber.Fields) {
	for attribute, err := range bag.Next(ber.TagSet).Children() {
		if err != nil {
			return
		}
		f := ber.Fields{Rest: attribute.Body}
		kind := f.OID()
		v, _, err := ber.Element(f.Inside(ber.TagSet).Rest)
		if err != nil {
			continue
		}
		switch kind {
		case oidFriendlyName:
			e.Alias, _ = v.Text(maxAlias)
		case oidLocalKeyID:
			e.ID, _ = v.Octets()
		}
	}
}

func (r *Reader) readEncrypted(data *ber.Fields, entry func(Entry)) error {
	encrypted := data.Inside(ber.TagSequence)
	encrypted.Integer()
	info := encrypted.Inside(ber.TagSequence)
	info.OID()
	algorithm := info.Inside(ber.TagSequence)
	ciphertext := info.Octets(ber.TagContext0)
	if info.Err != nil {
		return fmt.Errorf("damaged PKCS#12: %w", info.Err)
	}
	scheme, err := encryptionScheme(algorithm)
	if err != nil {
		return fmt.Errorf("PKCS#12: %w", err)
	}
	work := scheme.work(len(ciphertext))
	for _, password := range r.Passwords {
		for _, form := range scheme.forms(password) {
			if work > r.Work {
				return ErrWork
			}
			r.Work -= work
			plain, err := scheme.open(form, ciphertext)
			if err != nil {
				continue
			}
			var opened []Entry
			if readBags(plain, 0, func(e Entry) { opened = append(opened, e) }) != nil {
				continue
			}
			for _, e := range opened {
				entry(e)
			}
			return nil
		}
	}
	return ErrPassword
}

// scheme is a password-based encryption with its parameters.
type scheme struct {
	block   func(key []byte) (cipher.Block, error)
	keySize int
	salt    []byte
	rounds  int
	iv      []byte           // nil: derived from the password (RFC 7292, appendix B)
	prf     func() hash.Hash // of PBKDF2; nil: the scheme is an older one
}

// pbeCiphers are those of RFC 7292, appendix C. OpenSSL before 3 and Java before 17 encrypt
// certificates with 40-bit RC2. A scheme without a block cipher is RC4.
var pbeCiphers = map[byte]scheme{
	1: {keySize: 16},
	2: {keySize: 5},
	3: {block: des.NewTripleDESCipher, keySize: 24},
	4: {block: twoKeyTripleDES, keySize: 16},
	5: {block: newRC2, keySize: 16},
	6: {block: newRC2, keySize: 5},
}

// methods are the names of methods that are in use and not supported.
var methods = map[string]string{
	"1.2.156.10197.1.104.2":     "SM4",
	"1.2.392.200011.61.1.1.1.2": "Camellia-128",
	"1.2.392.200011.61.1.1.1.3": "Camellia-192",
	"1.2.392.200011.61.1.1.1.4": "Camellia-256",
	"1.2.410.200004.1.4":        "SEED",
	"1.2.410.200046.1.1.2":      "ARIA-128",
	"1.2.410.200046.1.1.7":      "ARIA-192",
	"1.2.410.200046.1.1.12":     "ARIA-256",
	"1.2.643.2.2.21":            "GOST 28147-89",
	"1.2.643.7.1.1.4.2":         "HMAC with GOST R 34.11-2012",
	"1.2.840.113549.1.5.3":      "PBES1 with MD5 and DES",
	"1.2.840.113549.1.5.6":      "PBES1 with MD5 and RC2",
	"1.2.840.113549.1.5.10":     "PBES1 with SHA-1 and DES",
	"1.2.840.113549.1.5.11":     "PBES1 with SHA-1 and RC2",
	"1.2.840.113549.3.2":        "RC2 in PBES2",
	"1.3.6.1.4.1.11591.4.11":    "scrypt",
	"1.3.14.3.2.7":              "DES",
	"2.16.840.1.101.3.4.1.6":    "AES-128 in GCM",
	"2.16.840.1.101.3.4.1.46":   "AES-256 in GCM",
}

// errMethod says what a file needs and this does not have. what begins the sentence.
func errMethod(what, id string) error {
	dotted := ber.OIDText([]byte(id))
	return fmt.Errorf("%s %s (OID %s), which is not supported; writing the file anew with OpenSSL 3 or Java 17 helps",
		what, cmp.Or(methods[dotted], "an unknown method"), dotted)
}

func encryptionScheme(algorithm *ber.Fields) (scheme, error) {
	id := algorithm.OID()
	if algorithm.Err != nil {
		return scheme{}, algorithm.Err
	}
	if id == oidPBES2 {
		return pbes2(algorithm.Inside(ber.TagSequence))
	}
	which, ok := strings.CutPrefix(id, oidPBE)
	if !ok || len(which) != 1 || pbeCiphers[which[0]].keySize == 0 {
		return scheme{}, errMethod("the certificates are encrypted with", id)
	}
	s := pbeCiphers[which[0]]
	parameters := algorithm.Inside(ber.TagSequence)
	s.salt = parameters.Octets(ber.TagOctetString)
	s.rounds = parameters.Integer()
	return s, s.check(parameters.Err)
}

func twoKeyTripleDES(key []byte) (cipher.Block, error) {
	return des.NewTripleDESCipher(slices.Concat(key, key[:8]))
}

var pbes2Hashes = map[string]func() hash.Hash{
	"\x2a\x86\x48\x86\xf7\x0d\x02\x07": sha1.New,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x08": sha256.New224,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x09": sha256.New,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x0a": sha512.New384,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x0b": sha512.New,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x0c": sha512.New512_224,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x0d": sha512.New512_256,
}

var pbes2Ciphers = map[string]scheme{
	"\x60\x86\x48\x01\x65\x03\x04\x01\x02": {block: aes.NewCipher, keySize: 16},
	"\x60\x86\x48\x01\x65\x03\x04\x01\x16": {block: aes.NewCipher, keySize: 24},
	"\x60\x86\x48\x01\x65\x03\x04\x01\x2a": {block: aes.NewCipher, keySize: 32},
	"\x2a\x86\x48\x86\xf7\x0d\x03\x07":     {block: des.NewTripleDESCipher, keySize: 24},
}

// pbes2 reads the parameters of RFC 8018, appendix A.4.
func pbes2(parameters *ber.Fields) (scheme, error) {
	kdf := parameters.Inside(ber.TagSequence)
	if id := kdf.OID(); kdf.Err == nil && id != oidPBKDF2 {
		return scheme{}, errMethod("the key is derived with", id)
	}
	derivation := kdf.Inside(ber.TagSequence)
	salt := derivation.Octets(ber.TagOctetString)
	rounds := derivation.Integer()
	if derivation.At(ber.TagInteger) {
		derivation.Integer() // keyLength: the cipher has only one
	}
	prf := sha1.New
	if derivation.At(ber.TagSequence) {
		id := derivation.Inside(ber.TagSequence).OID()
		if prf = pbes2Hashes[id]; prf == nil {
			return scheme{}, errMethod("the key is derived with", id)
		}
	}
	encryption := parameters.Inside(ber.TagSequence)
	id := encryption.OID()
	s, ok := pbes2Ciphers[id]
	if encryption.Err == nil && !ok {
		return s, errMethod("the certificates are encrypted with", id)
	}
	s.iv = encryption.Octets(ber.TagOctetString)
	s.salt, s.rounds, s.prf = salt, rounds, prf
	return s, s.check(cmp.Or(kdf.Err, derivation.Err, encryption.Err))
}

func (s scheme) check(err error) error {
	if err == nil && s.rounds < 1 {
		return errors.New("a key derivation without iterations is invalid")
	}
	return err
}

// work is what trying one password costs, in bytes that are hashed. A byte of ciphertext takes as
// long as eight of them.
func (s scheme) work(ciphertext int) int64 {
	hashed, blocks := sha1.BlockSize, (s.keySize+sha1.Size-1)/sha1.Size
	switch {
	case s.prf != nil:
		prf := s.prf()
		hashed, blocks = 2*prf.BlockSize(), (s.keySize+prf.Size()-1)/prf.Size() // HMAC hashes twice
	case s.block != nil:
		blocks++ // the initialisation vector
	}
	return int64(s.rounds)*int64(hashed*blocks) + int64(blocks*len(s.salt)) + 8*int64(ciphertext)
}

// forms are the byte strings that a password can stand for. PBES2 takes UTF-8.
// The older schemes take UTF-16 with two zero octets behind, but for an empty
// password some tools leave those out too.
func (s scheme) forms(password string) [][]byte {
	if s.prf != nil {
		return [][]byte{[]byte(password)}
	}
	var form []byte
	for _, unit := range utf16.Encode([]rune(password + "\x00")) {
		form = append(form, byte(unit>>8), byte(unit))
	}
	if password == "" {
		return [][]byte{form, nil}
	}
	return [][]byte{form}
}

// open decrypts, with a block cipher in CBC mode, and removes the padding (RFC 8018, 6.1.1).
func (s scheme) open(password, ciphertext []byte) ([]byte, error) {
	var key []byte
	if s.prf != nil {
		derived, err := pbkdf2.Key(s.prf, string(password), s.salt, s.rounds, s.keySize)
		if err != nil {
			return nil, err
		}
		key = derived
	} else {
		key = pkcs12KDF(password, s.salt, s.rounds, 1, s.keySize)
	}
	plain := make([]byte, len(ciphertext))
	if s.block == nil {
		stream, err := rc4.NewCipher(key)
		if err != nil {
			return nil, err
		}
		stream.XORKeyStream(plain, ciphertext)
		if _, rest, err := ber.Element(plain); err != nil || len(rest) > 0 {
			return nil, ber.ErrInvalid // there is no padding to tell
		}
		return plain, nil
	}
	block, err := s.block(key)
	if err != nil {
		return nil, err
	}
	size := block.BlockSize()
	if s.iv == nil {
		s.iv = pkcs12KDF(password, s.salt, s.rounds, 2, size)
	}
	if len(s.iv) != size || len(ciphertext) == 0 || len(ciphertext)%size != 0 {
		return nil, ber.ErrInvalid
	}
	cipher.NewCBCDecrypter(block, s.iv).CryptBlocks(plain, ciphertext)
	padding := int(plain[len(plain)-1])
	if padding < 1 || padding > size || !bytes.HasSuffix(plain, bytes.Repeat([]byte{byte(padding)}, padding)) {
		return nil, ber.ErrInvalid
	}
	return plain[:len(plain)-padding], nil
}

// pkcs12KDF is the key derivation of RFC 7292, appendix B.2, with SHA-1. id is
// 1 for a key and 2 for an initialisation vector.
func pkcs12KDF(password, salt []byte, rounds int, id byte, size int) []byte {
	const v = sha1.BlockSize
	fill := func(b []byte) []byte {
		filled := make([]byte, 0, (len(b)+v-1)/v*v)
		for len(filled) < cap(filled) {
			filled = append(filled, b[:min(len(b), cap(filled)-len(filled))]...)
		}
		return filled
	}
	diversifier := bytes.Repeat([]byte{id}, v)
	input := slices.Concat(fill(salt), fill(password))
	var out []byte
	for {
		a := sha1.Sum(slices.Concat(diversifier, input))
		for range rounds - 1 {
			a = sha1.Sum(a[:])
		}
		if out = append(out, a[:]...); len(out) >= size {
			return out[:size]
		}
		// Each block of the input becomes itself + B + 1 modulo 2^(8v).
		b := fill(a[:])[:v]
		for block := range slices.Chunk(input, v) {
			carry := 1
			for i := v - 1; i >= 0; i-- {
				carry += int(block[i]) + int(b[i])
				block[i] = byte(carry)
				carry >>= 8
			}
		}
	}
}
