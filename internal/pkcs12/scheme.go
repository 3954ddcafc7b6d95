package pkcs12

import (
	"bytes"
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/rand"
	"crypto/rc4"
	"crypto/sha1"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"certctl-agent/internal/ber"
)

// Object identifiers of PBES2 (RFC 8018) and of the older schemes (RFC 7292, appendix C).
const (
	oidPBES2  = "\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0d"
	oidPBKDF2 = "\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0c"
	oidPBE    = "\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x01" // plus one octet for the cipher

	oidHMACSHA256 = "\x2a\x86\x48\x86\xf7\x0d\x02\x09"
	oidAES256     = "\x60\x86\x48\x01\x65\x03\x04\x01\x2a" // in CBC mode

	// usualIterations and saltSize are the values of keytool.
	usualIterations = 10_000
	saltSize        = 20

	// fewIterations is the value of Windows. RFC 8018, section 4.2, recommends at least 1,000.
	fewIterations = 2_000
)

// scheme is a password-based encryption with its parameters: PBES2, or an older scheme of RFC 7292.
type scheme struct {
	kdf
	block newBlock // nil for RC4
	iv    []byte   // PBES2 only; the older schemes derive it from the password
}

type newBlock func(key []byte) (cipher.Block, error)

// algorithm is a cipher with its key size in bytes.
type algorithm struct {
	block   newBlock
	keySize int
}

// pbeCiphers are the ciphers of RFC 7292, appendix C. OpenSSL before 3 and Java before 17 encrypt
// certificates with 40-bit RC2. Entries without a block cipher are RC4.
var pbeCiphers = map[byte]algorithm{
	1: {keySize: 16},
	2: {keySize: 5},
	3: {block: des.NewTripleDESCipher, keySize: 24},
	4: {block: twoKeyTripleDES, keySize: 16},
	5: {block: newRC2, keySize: 16},
	6: {block: newRC2, keySize: 5},
}

// methods names methods that are in use but not supported.
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

// errMethod returns an error for an unsupported method. what is the start of its text.
func errMethod(what, id string) error {
	dotted := ber.OIDText([]byte(id))
	return fmt.Errorf("%s %s (OID %s), which is not supported: export the file again with OpenSSL 3 or Java 17",
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
		return scheme{}, errMethod("the encryption method is", id)
	}
	cipher := pbeCiphers[which[0]]
	parameters := algorithm.Inside(ber.TagSequence)
	derived := kdf{salt: parameters.Octets(ber.TagOctetString), iterations: parameters.Integer(), keySize: cipher.keySize}
	return scheme{kdf: derived, block: cipher.block}, derived.check(parameters.Err)
}

func twoKeyTripleDES(key []byte) (cipher.Block, error) {
	return des.NewTripleDESCipher(slices.Concat(key, key[:8]))
}

var pbes2Ciphers = map[string]algorithm{
	"\x60\x86\x48\x01\x65\x03\x04\x01\x02": {block: aes.NewCipher, keySize: 16},
	"\x60\x86\x48\x01\x65\x03\x04\x01\x16": {block: aes.NewCipher, keySize: 24},
	oidAES256:                              {block: aes.NewCipher, keySize: 32},
	"\x2a\x86\x48\x86\xf7\x0d\x03\x07":     {block: des.NewTripleDESCipher, keySize: 24},
}

// pbes2 reads the parameters of RFC 8018, appendix A.4.
func pbes2(parameters *ber.Fields) (scheme, error) {
	derived, err := readPBKDF2(parameters.Inside(ber.TagSequence))
	if err != nil {
		return scheme{}, err
	}
	encryption := parameters.Inside(ber.TagSequence)
	id := encryption.OID()
	cipher, ok := pbes2Ciphers[id]
	if encryption.Err == nil && !ok {
		return scheme{}, errMethod("the encryption method is", id)
	}
	derived.keySize = cipher.keySize
	iv := encryption.Octets(ber.TagOctetString)
	return scheme{kdf: derived, block: cipher.block, iv: iv}, encryption.Err
}

// work returns the cost of trying one password, in bytes hashed. Decrypting a byte costs as much as
// hashing eight.
func (s scheme) work(ciphertext int) int64 {
	hashed, blocks := sha1.BlockSize, (s.keySize+sha1.Size-1)/sha1.Size
	switch {
	case s.prf != nil:
		prf := s.prf()
		hashed, blocks = 2*prf.BlockSize(), (s.keySize+prf.Size()-1)/prf.Size() // HMAC hashes twice
	case s.block != nil:
		blocks++ // the initialization vector
	}
	return int64(s.iterations)*int64(hashed*blocks) + int64(blocks*len(s.salt)) + 8*int64(ciphertext)
}

// try decrypts with each password in turn until accept returns nil for the plaintext. It deducts
// the cost from work and returns ErrWork if that is used up.
func (s scheme) try(passwords []string, work *int64, ciphertext []byte, accept func(plain []byte) error) error {
	cost := s.work(len(ciphertext))
	for _, password := range passwords {
		for _, form := range s.forms(password) {
			if cost > *work {
				return ErrWork
			}
			*work -= cost
			if plain, err := s.open(form, ciphertext); err == nil && accept(plain) == nil {
				return nil
			}
		}
	}
	return ErrPassword
}

// open decrypts and, for block ciphers in CBC mode, removes the padding (RFC 8018, section 6.1.1).
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
			return nil, ber.ErrInvalid // without padding, only the structure reveals a wrong password
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

// derive returns the key and the initialization vector for a password.
func (s scheme) derive(password []byte) (key, iv []byte, err error) {
	key, err = s.kdf.derive(sha1.New, password, idKey, s.keySize)
	if err != nil || s.prf != nil || s.block == nil {
		return key, s.iv, err
	}
	iv, err = s.kdf.derive(sha1.New, password, idIV, des.BlockSize) // RC2 has the same block size
	return key, iv, err
}

// newScheme returns the scheme for encryption and its AlgorithmIdentifier: PBES2 with AES-256 and
// HMAC-SHA-256, or SHA-1 and 3DES for older readers.
func newScheme(legacy bool, iterations int) (s scheme, algorithm []byte) {
	salt := random(saltSize)
	if legacy {
		const tripleDES = 3
		cipher := pbeCiphers[tripleDES]
		s = scheme{kdf: kdf{salt: salt, iterations: iterations, keySize: cipher.keySize}, block: cipher.block}
		parameters := ber.Encode(ber.TagSequence, ber.Encode(ber.TagOctetString, salt), ber.EncodeInteger(iterations))
		return s, ber.Encode(ber.TagSequence, ber.EncodeOID(oidPBE+string(rune(tripleDES))), parameters)
	}
	cipher := pbes2Ciphers[oidAES256]
	s = scheme{kdf: kdf{prf: sha256.New, salt: salt, iterations: iterations, keySize: cipher.keySize}, block: cipher.block, iv: random(aes.BlockSize)}
	derivation := ber.Encode(ber.TagSequence, ber.Encode(ber.TagOctetString, salt), ber.EncodeInteger(iterations), ber.EncodeInteger(s.keySize),
		ber.Encode(ber.TagSequence, ber.EncodeOID(oidHMACSHA256), ber.Encode(ber.TagNull)))
	parameters := ber.Encode(ber.TagSequence,
		ber.Encode(ber.TagSequence, ber.EncodeOID(oidPBKDF2), derivation),
		ber.Encode(ber.TagSequence, ber.EncodeOID(oidAES256), ber.Encode(ber.TagOctetString, s.iv)))
	return s, ber.Encode(ber.TagSequence, ber.EncodeOID(oidPBES2), parameters)
}

func random(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.Read(b) // never fails
	return b
}

// seal encrypts. The scheme must come from newScheme.
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
