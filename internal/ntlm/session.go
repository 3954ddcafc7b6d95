package ntlm

import (
	"crypto/md5"
	"crypto/rc4"
	"crypto/subtle"
	"encoding/binary"
	"errors"
)

// SignatureSize is the length of a signature, 2.2.2.9.2.
const SignatureSize = 16

// Session seals messages and opens those of the other side, in the order in
// which they are sent.
type Session struct{ out, in direction }

type direction struct {
	key    [16]byte // to sign
	handle *rc4.Cipher
	number uint32
}

// NewSession returns one for an ExportedSessionKey.
func NewSession(key [16]byte, server bool) *Session {
	client := newDirection(key, "client-to-server")
	back := newDirection(key, "server-to-client")
	if server {
		client, back = back, client
	}
	return &Session{client, back}
}

// newDirection is SIGNKEY and SEALKEY with extended session security and 128 bits,
// 3.4.5.2 and 3.4.5.3.
func newDirection(key [16]byte, name string) direction {
	magic := func(use string) [16]byte {
		return md5.Sum(append(key[:], "session key to "+name+" "+use+" key magic constant\x00"...))
	}
	seal := magic("sealing")
	handle, err := rc4.NewCipher(seal[:])
	if err != nil {
		panic(err) // there are keys of 16 bytes
	}
	return direction{key: magic("signing"), handle: handle}
}

// Wrap is GSS_WrapEx, 3.4.6: the signature of a message, and the message sealed.
func (s *Session) Wrap(message []byte) (signature, sealed []byte) {
	sealed = make([]byte, len(message))
	s.out.handle.XORKeyStream(sealed, message)
	return s.out.sign(message), sealed
}

// Unwrap is GSS_UnwrapEx, 3.4.7. After an error nothing else can be opened.
func (s *Session) Unwrap(signature, sealed []byte) ([]byte, error) {
	message := make([]byte, len(sealed))
	s.in.handle.XORKeyStream(message, sealed)
	if subtle.ConstantTimeCompare(s.in.sign(message), signature) != 1 {
		return nil, errors.New("the signature of a message is wrong: it was changed on its way, or the server does not know the password")
	}
	return message, nil
}

// sign is MAC with extended session security and key exchange, 3.4.4.2.
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
