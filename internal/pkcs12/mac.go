package pkcs12

import (
	"cmp"
	"crypto/hmac"
	"crypto/pbkdf2"
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

	// maxMACKey bounds the key that a PBMAC1 asks for, in bytes: no hash uses more.
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

// macScheme is a MAC under a password with its parameters: that of RFC 7292, appendix B, or PBMAC1
// (RFC 9579).
type macScheme struct {
	hash    func() hash.Hash
	derived scheme // its prf is that of PBMAC1; nil: the key is derived as RFC 7292 does
}

// readMAC reads MacData.
func readMAC(data *ber.Fields) (m macScheme, digest []byte, err error) {
	info := data.Inside(ber.TagSequence)
	algorithm := info.Inside(ber.TagSequence)
	id := algorithm.OID()
	digest = info.Octets(ber.TagOctetString)
	m.derived = scheme{salt: data.Octets(ber.TagOctetString), rounds: 1}
	if data.At(ber.TagInteger) {
		m.derived.rounds = data.Integer()
	}
	if err := cmp.Or(algorithm.Err, info.Err, data.Err); err != nil {
		return m, nil, err
	}
	if id == oidPBMAC1 {
		parameters := algorithm.Inside(ber.TagSequence)
		if m.derived, m.derived.keySize, err = readPBKDF2(parameters.Inside(ber.TagSequence)); err != nil {
			return m, nil, err
		}
		id = parameters.Inside(ber.TagSequence).OID()
		if m.hash = hmacHashes[id]; m.derived.keySize < 1 || m.derived.keySize > maxMACKey {
			return m, nil, fmt.Errorf("a MAC with a key of %d bytes", m.derived.keySize)
		}
	} else if m.hash = macHashes[id]; m.hash != nil {
		m.derived.keySize = m.hash().Size()
	}
	if m.hash == nil {
		return m, nil, errMethod("its integrity is protected with", id)
	}
	return m, digest, m.derived.check(nil)
}

// work is what a try costs, as scheme.work has it.
func (m macScheme) work(content int) int64 {
	if m.derived.prf != nil {
		return m.derived.work(0) + int64(content)
	}
	return int64(m.derived.rounds)*int64(m.hash().BlockSize()) + int64(content)
}

// sum is the MAC of content.
func (m macScheme) sum(password string, content []byte) ([]byte, error) {
	form := m.derived.forms(password)[0]
	key := []byte(nil)
	if m.derived.prf == nil {
		key = pkcs12KDF(m.hash, form, m.derived.salt, m.derived.rounds, idMAC, m.derived.keySize)
	} else {
		var err error
		if key, err = pbkdf2.Key(m.derived.prf, string(form), m.derived.salt, m.derived.rounds, m.derived.keySize); err != nil {
			return nil, err
		}
	}
	mac := hmac.New(m.hash, key)
	mac.Write(content)
	return mac.Sum(nil), nil
}

// encodeMAC is MacData for content: with SHA-256, or for the sake of older readers SHA-1.
func encodeMAC(password string, content []byte, legacy bool) ([]byte, error) {
	id, m := oidSHA256, macScheme{hash: sha256.New}
	if legacy {
		id, m.hash = oidSHA1, sha1.New
	}
	m.derived = scheme{salt: random(saltSize), rounds: rounds, keySize: m.hash().Size()}
	digest, err := m.sum(password, content)
	if err != nil {
		return nil, err
	}
	algorithm := ber.Encode(ber.TagSequence, encodeOID(id), ber.Encode(ber.TagNull))
	return ber.Encode(ber.TagSequence,
		ber.Encode(ber.TagSequence, algorithm, ber.Encode(ber.TagOctetString, digest)),
		ber.Encode(ber.TagOctetString, m.derived.salt),
		ber.EncodeInteger(m.derived.rounds)), nil
}
