package ntlm

import (
	"crypto/md5"
	"crypto/rc4"
	"crypto/subtle"
	"encoding/binary"
	"errors"
)

// SignatureSize is the length of a signature (2.2.2.9.2), in bytes.
const SignatureSize = 16

// Session seals messages and opens those of the other side. Messages must be opened in the order in
// which they were sealed.
type Session struct{ out, in direction }

type direction struct {
	key    [16]byte // signing key
	handle *rc4.Cipher
	number uint32
}

// NewSession returns a session for an ExportedSessionKey.
func NewSession(key [16]byte, server bool) *Session {
	client := newDirection(key, "client-to-server")
	back := newDirection(key, "server-to-client")
	if server {
		client, back = back, client
	}
	return &Session{client, back}
}

// newDirection derives the keys with SIGNKEY and SEALKEY for extended session security and 128 bits
// (3.4.5.2, 3.4.5.3).
func newDirection(key [16]byte, name string) direction {
	magic := func(use string) [16]byte {
		return md5.Sum(append(key[:], "session key to "+name+" "+use+" key magic constant\x00"...))
	}
	seal := magic("sealing")
	handle, err := rc4.NewCipher(seal[:])
	if err != nil {
		panic(err) // impossible: 16 bytes are a valid key size
	}
	return direction{key: magic("signing"), handle: handle}
}

// Wrap returns the signature of a message and the sealed message (GSS_WrapEx, 3.4.6).
func (s *Session) Wrap(message []byte) (signature, sealed []byte) {
	sealed = make([]byte, len(message))
	s.out.handle.XORKeyStream(sealed, message)
	return s.out.sign(message), sealed
}

// Unwrap opens a message (GSS_UnwrapEx, 3.4.7). After an error the session is unusable.
func (s *Session) Unwrap(signature, sealed []byte) ([]byte, error) {
	message := make([]byte, len(sealed))
	s.in.handle.XORKeyStream(message, sealed)
	if subtle.ConstantTimeCompare(s.in.sign(message), signature) != 1 {
		return nil, errors.New("the signature of a message is wrong: the message was modified in transit, or the server does not know the password")
	}
	return message, nil
}

// sign computes a MAC with extended session security and key exchange (3.4.4.2).
func (d *direction) sign(message []byte) []byte {
	number := binary.LittleEndian.AppendUint32(nil, d.number)
	d.number++
	sum := HMAC(d.key[:], number, message)
	signature := make([]byte, SignatureSize)
	signature[0] = 1
	d.handle.XORKeyStream(signature[4:12], sum[:8])
	copy(signature[12:], number)
	return signature
}
