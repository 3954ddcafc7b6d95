package pkcs12

import (
	"bytes"
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/rc4"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strings"

	"certctl-agent/internal/ber"
)

// Object identifiers of PBES2 (RFC 8018) and of the older schemes (RFC 7292, appendix C).
const (
	oidPBES2  = "\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0d"
	oidPBKDF2 = "\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0c"
	oidPBE    = "\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x01" // and one more octet: the cipher

	oidHMACSHA256 = "\x2a\x86\x48\x86\xf7\x0d\x02\x09"
	oidAES256     = "\x60\x86\x48\x01\x65\x03\x04\x01\x2a" // in CBC mode

	// rounds and saltSize are keytool's.
	rounds   = 10_000
	saltSize = 20
)

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
		return scheme{}, errMethod("it is encrypted with", id)
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

var hmacHashes = map[string]func() hash.Hash{
	"\x2a\x86\x48\x86\xf7\x0d\x02\x07": sha1.New,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x08": sha256.New224,
	oidHMACSHA256:                      sha256.New,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x0a": sha512.New384,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x0b": sha512.New,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x0c": sha512.New512_224,
	"\x2a\x86\x48\x86\xf7\x0d\x02\x0d": sha512.New512_256,
}

var pbes2Ciphers = map[string]scheme{
	"\x60\x86\x48\x01\x65\x03\x04\x01\x02": {block: aes.NewCipher, keySize: 16},
	"\x60\x86\x48\x01\x65\x03\x04\x01\x16": {block: aes.NewCipher, keySize: 24},
	oidAES256:                              {block: aes.NewCipher, keySize: 32},
	"\x2a\x86\x48\x86\xf7\x0d\x03\x07":     {block: des.NewTripleDESCipher, keySize: 24},
}

// pbes2 reads the parameters of RFC 8018, appendix A.4.
func pbes2(parameters *ber.Fields) (scheme, error) {
	derived, _, err := readPBKDF2(parameters.Inside(ber.TagSequence))
	if err != nil {
		return scheme{}, err
	}
	encryption := parameters.Inside(ber.TagSequence)
	id := encryption.OID()
	s, ok := pbes2Ciphers[id]
	if encryption.Err == nil && !ok {
		return s, errMethod("it is encrypted with", id)
	}
	s.iv = encryption.Octets(ber.TagOctetString)
	s.salt, s.rounds, s.prf = derived.salt, derived.rounds, derived.prf
	return s, s.check(encryption.Err)
}

// readPBKDF2 reads how a key is derived (RFC 8018, appendix A.2). KeySize is 0 where that is left to
// whoever needs the key.
func readPBKDF2(kdf *ber.Fields) (s scheme, keySize int, err error) {
	if id := kdf.OID(); kdf.Err == nil && id != oidPBKDF2 {
		return s, 0, errMethod("the key is derived with", id)
	}
	derivation := kdf.Inside(ber.TagSequence)
	s.salt = derivation.Octets(ber.TagOctetString)
	s.rounds = derivation.Integer()
	if derivation.At(ber.TagInteger) {
		keySize = derivation.Integer()
	}
	s.prf = sha1.New
	if derivation.At(ber.TagSequence) {
		id := derivation.Inside(ber.TagSequence).OID()
		if s.prf = hmacHashes[id]; s.prf == nil {
			return s, 0, errMethod("the key is derived with", id)
		}
	}
	return s, keySize, s.check(derivation.Err)
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
	form := ber.EncodeBMP(password + "\x00")
	if password == "" {
		return [][]byte{form, nil}
	}
	return [][]byte{form}
}

// try decrypts with each of the passwords in turn, for as long as work allows, until what comes out
// is taken.
func (s scheme) try(passwords []string, work *int64, ciphertext []byte, taken func(plain []byte) error) error {
	cost := s.work(len(ciphertext))
	for _, password := range passwords {
		for _, form := range s.forms(password) {
			if cost > *work {
				return ErrWork
			}
			*work -= cost
			if plain, err := s.open(form, ciphertext); err == nil && taken(plain) == nil {
				return nil
			}
		}
	}
	return ErrPassword
}

// open decrypts, with a block cipher in CBC mode, and removes the padding (RFC 8018, 6.1.1).
func (s scheme) open(password, ciphertext []byte) ([]byte, error) {
	key, iv, err := s.derive(password)
	if err != nil {
		return nil, err
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
	if len(iv) != size || len(ciphertext) == 0 || len(ciphertext)%size != 0 {
		return nil, ber.ErrInvalid
	}
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(plain, ciphertext)
	padding := int(plain[len(plain)-1])
	if padding < 1 || padding > size || !bytes.HasSuffix(plain, bytes.Repeat([]byte{byte(padding)}, padding)) {
		return nil, ber.ErrInvalid
	}
	return plain[:len(plain)-padding], nil
}

// derive makes key and initialisation vector of a password.
func (s scheme) derive(password []byte) (key, iv []byte, err error) {
	if s.prf != nil {
		key, err = pbkdf2.Key(s.prf, string(password), s.salt, s.rounds, s.keySize)
		return key, s.iv, err
	}
	key = pkcs12KDF(sha1.New, password, s.salt, s.rounds, idKey, s.keySize)
	if s.block != nil {
		iv = pkcs12KDF(sha1.New, password, s.salt, s.rounds, idIV, des.BlockSize) // RC2 has the same
	}
	return key, iv, nil
}

// newScheme is what this package encrypts with, with the AlgorithmIdentifier that says so: PBES2 with
// AES-256 and HMAC-SHA-256, or for the sake of older readers SHA-1 and 3DES.
func newScheme(legacy bool) (s scheme, algorithm []byte) {
	salt := random(saltSize)
	if legacy {
		const tripleDES = 3
		s = pbeCiphers[tripleDES]
		s.salt, s.rounds = salt, rounds
		parameters := ber.Encode(ber.TagSequence, ber.Encode(ber.TagOctetString, salt), ber.EncodeInteger(rounds))
		return s, ber.Encode(ber.TagSequence, encodeOID(oidPBE+string(rune(tripleDES))), parameters)
	}
	s = pbes2Ciphers[oidAES256]
	s.salt, s.rounds, s.prf, s.iv = salt, rounds, sha256.New, random(aes.BlockSize)
	derivation := ber.Encode(ber.TagSequence, ber.Encode(ber.TagOctetString, salt), ber.EncodeInteger(rounds), ber.EncodeInteger(s.keySize),
		ber.Encode(ber.TagSequence, encodeOID(oidHMACSHA256), ber.Encode(ber.TagNull)))
	parameters := ber.Encode(ber.TagSequence,
		ber.Encode(ber.TagSequence, encodeOID(oidPBKDF2), derivation),
		ber.Encode(ber.TagSequence, encodeOID(oidAES256), ber.Encode(ber.TagOctetString, s.iv)))
	return s, ber.Encode(ber.TagSequence, encodeOID(oidPBES2), parameters)
}

func random(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.Read(b) // it never fails
	return b
}

func encodeOID(octets string) []byte { return ber.Encode(ber.TagOID, []byte(octets)) }

// seal encrypts with a scheme of newScheme.
func (s scheme) seal(password string, plain []byte) ([]byte, error) {
	key, iv, err := s.derive(s.forms(password)[0])
	if err != nil {
		return nil, err
	}
	block, err := s.block(key)
	if err != nil {
		return nil, err
	}
	padding := block.BlockSize() - len(plain)%block.BlockSize()
	sealed := slices.Concat(plain, bytes.Repeat([]byte{byte(padding)}, padding))
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(sealed, sealed)
	return sealed, nil
}

// What a key derivation is for (RFC 7292, appendix B.3).
const (
	idKey = 1
	idIV  = 2
	idMAC = 3
)

// pkcs12KDF is the key derivation of RFC 7292, appendix B.2.
func pkcs12KDF(newHash func() hash.Hash, password, salt []byte, rounds int, id byte, size int) []byte {
	h := newHash()
	v := h.BlockSize()
	fill := func(b []byte) []byte {
		filled := make([]byte, 0, (len(b)+v-1)/v*v)
		for len(filled) < cap(filled) {
			filled = append(filled, b[:min(len(b), cap(filled)-len(filled))]...)
		}
		return filled
	}
	diversifier := bytes.Repeat([]byte{id}, v)
	input := slices.Concat(fill(salt), fill(password))
	var a, out []byte
	for {
		h.Reset()
		h.Write(diversifier)
		h.Write(input)
		a = h.Sum(a[:0])
		for range rounds - 1 {
			h.Reset()
			h.Write(a)
			a = h.Sum(a[:0])
		}
		if out = append(out, a...); len(out) >= size {
			return out[:size]
		}
		// Each block of the input becomes itself + B + 1 modulo 2^(8v).
		b := fill(a)[:v]
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
