package pkcs12

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"hash"

	"certctl-agent/internal/ber"
)

const (
	oidSHA1   = "\x2b\x0e\x03\x02\x1a"
	oidSHA256 = "\x60\x86\x48\x01\x65\x03\x04\x02\x01"
	oidPBMAC1 = "\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0e"

	// maxMACKey bounds the key of a PBMAC1, in bytes. No hash uses more.
	maxMACKey = 128
)

var macHashes = map[string]func() hash.Hash{
	oidSHA1:                                sha1.New,
	oidSHA256:                              sha256.New,
	"\x60\x86\x48\x01\x65\x03\x04\x02\x02": sha512.New384,
	"\x60\x86\x48\x01\x65\x03\x04\x02\x03": sha512.New,
	"\x60\x86\x48\x01\x65\x03\x04\x02\x04": sha256.New224,
	"\x60\x86\x48\x01\x65\x03\x04\x02\x05": sha512.New512_224,
	"\x60\x86\x48\x01\x65\x03\x04\x02\x06": sha512.New512_256,
}

// macScheme is a password-based MAC with its parameters: that of RFC 7292, appendix B, or PBMAC1
// (RFC 9579).
type macScheme struct {
	kdf
	hash func() hash.Hash
}

// readMAC reads MacData.
func readMAC(data *ber.Fields) (m macScheme, digest []byte, err error) {
	info := data.Inside(ber.TagSequence)
	algorithm := info.Inside(ber.TagSequence)
	id := algorithm.OID()
	digest = info.Octets(ber.TagOctetString)
	m.kdf = kdf{salt: data.Octets(ber.TagOctetString), iterations: 1}
	if data.At(ber.TagInteger) {
		m.iterations = data.Integer()
	}
	if err := cmp.Or(algorithm.Err, info.Err, data.Err); err != nil {
		return m, nil, err
	}
	if id == oidPBMAC1 {
		parameters := algorithm.Inside(ber.TagSequence)
		if m.kdf, err = readPBKDF2(parameters.Inside(ber.TagSequence)); err != nil {
			return m, nil, err
		}
		id = parameters.Inside(ber.TagSequence).OID()
		if m.hash = hmacHashes[id]; m.keySize < 1 || m.keySize > maxMACKey {
			return m, nil, fmt.Errorf("the MAC has a key of %d bytes, which is not supported", m.keySize)
		}
	} else if m.hash = macHashes[id]; m.hash != nil {
		m.keySize = m.hash().Size()
	}
	if m.hash == nil {
		return m, nil, errMethod("the integrity method is", id)
	}
	return m, digest, m.check(nil)
}

// work returns the cost of trying a password, in the unit of scheme.work.
func (m macScheme) work(content int) int64 {
	if m.prf != nil {
		return scheme{kdf: m.kdf}.work(0) + int64(content)
	}
	return int64(m.iterations)*int64(m.hash().BlockSize()) + int64(content)
}

// sum computes the MAC of content.
func (m macScheme) sum(password string, content []byte) ([]byte, error) {
	key, err := m.derive(m.hash, m.forms(password)[0], idMAC, m.keySize)
	if err != nil {
		return nil, err
	}
	mac := hmac.New(m.hash, key)
	mac.Write(content)
	return mac.Sum(nil), nil
}

// encodeMAC returns MacData for content, with SHA-256, or with SHA-1 for older readers.
func encodeMAC(password string, content []byte, legacy bool, iterations int) ([]byte, error) {
	id, m := oidSHA256, macScheme{hash: sha256.New}
	if legacy {
		id, m.hash = oidSHA1, sha1.New
	}
	m.kdf = kdf{salt: random(saltSize), iterations: iterations, keySize: m.hash().Size()}
	digest, err := m.sum(password, content)
	if err != nil {
		return nil, err
	}
	algorithm := ber.Encode(ber.TagSequence, ber.EncodeOID(id), ber.Encode(ber.TagNull))
	return ber.Encode(ber.TagSequence,
		ber.Encode(ber.TagSequence, algorithm, ber.Encode(ber.TagOctetString, digest)),
		ber.Encode(ber.TagOctetString, m.salt),
		ber.EncodeInteger(m.iterations)), nil
}
