package pkcs12

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"hash"
	"slices"

	"certctl-agent/internal/ber"
)

// kdf derives keys from passwords with PBKDF2 (RFC 8018, section 5.2) or as in RFC 7292, appendix
// B.
type kdf struct {
	prf        func() hash.Hash // of PBKDF2; nil for RFC 7292
	salt       []byte
	iterations int
	keySize    int // in bytes
}

// derive returns size bytes. PBKDF2 ignores newHash and id.
func (k kdf) derive(newHash func() hash.Hash, password []byte, id byte, size int) ([]byte, error) {
	if k.prf != nil {
		return pbkdf2.Key(k.prf, string(password), k.salt, k.iterations, size)
	}
	return pkcs12KDF(newHash, password, k.salt, k.iterations, id, size), nil
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

// readPBKDF2 reads the parameters of RFC 8018, appendix A.2. The optional key size is 0 if missing.
func readPBKDF2(algorithm *ber.Fields) (k kdf, err error) {
	if id := algorithm.OID(); algorithm.Err == nil && id != oidPBKDF2 {
		return k, errMethod("the key derivation method is", id)
	}
	derivation := algorithm.Inside(ber.TagSequence)
	k.salt = derivation.Octets(ber.TagOctetString)
	k.iterations = derivation.Integer()
	if derivation.At(ber.TagInteger) {
		k.keySize = derivation.Integer()
	}
	k.prf = sha1.New
	if derivation.At(ber.TagSequence) {
		id := derivation.Inside(ber.TagSequence).OID()
		if k.prf = hmacHashes[id]; k.prf == nil {
			return k, errMethod("the key derivation method is", id)
		}
	}
	return k, k.check(derivation.Err)
}

func (k kdf) check(err error) error {
	if err == nil && k.iterations < 1 {
		return errors.New("the key derivation has no iterations")
	}
	return err
}

// forms returns the possible encodings of a password. PBES2 uses UTF-8. RFC 7292 uses UTF-16 with
// two zero octets at the end, which some tools omit for an empty password.
func (k kdf) forms(password string) [][]byte {
	if k.prf != nil {
		return [][]byte{[]byte(password)}
	}
	form := ber.EncodeBMP(password + "\x00")
	if password == "" {
		return [][]byte{form, nil}
	}
	return [][]byte{form}
}

// Purposes of derived keys (RFC 7292, appendix B.3).
const (
	idKey = 1
	idIV  = 2
	idMAC = 3
)

// pkcs12KDF is the key derivation of RFC 7292, appendix B.2.
func pkcs12KDF(newHash func() hash.Hash, password, salt []byte, iterations int, id byte, size int) []byte {
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
		for range iterations - 1 {
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
