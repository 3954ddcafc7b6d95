// Package ntlm is the client's part of NTLM version 2, as [MS-NLMP] has it: it
// logs on, and seals what is then said. Older versions and weaker keys are refused.
// What a server has in common with it is exported for a server in tests.
//
// Clauses are those of
// https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-nlmp/.
package ntlm

import (
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"crypto/rc4"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"

	"certctl-agent/internal/secret"
)

// The negotiate flags, 2.2.2.5.
const (
	Unicode                 = 0x00000001
	RequestTarget           = 0x00000004
	Sign                    = 0x00000010
	Seal                    = 0x00000020
	NTLM                    = 0x00000200
	AlwaysSign              = 0x00008000
	ExtendedSessionSecurity = 0x00080000
	TargetInfo              = 0x00800000
	Version                 = 0x02000000
	Key128                  = 0x20000000
	KeyExchange             = 0x40000000
	Key56                   = 0x80000000
)

// Required are the flags without which nothing is sent: there is then no key
// that an eavesdropper could not find by trying all.
const Required = Unicode | Sign | Seal | ExtendedSessionSecurity | TargetInfo | Key128 | KeyExchange

const offered = Required | RequestTarget | NTLM | AlwaysSign | Version | Key56

// Kinds of message, 2.2.1.
const (
	negotiateMessage    = 1
	challengeMessage    = 2
	authenticateMessage = 3
)

const signature = "NTLMSSP\x00"

// Kinds of AV_PAIR, 2.2.2.1.
const (
	AvEOL             = 0
	AvComputerName    = 1
	AvDomainName      = 2
	AvFlags           = 6
	AvTimestamp       = 7
	AvTargetName      = 9
	AvChannelBindings = 10
)

// HasMIC is the bit of AvFlags that says that there is a MIC, 2.2.2.1.
const HasMIC = 0x2

// version is what a client says of itself, 2.2.2.10, for debugging only: Windows
// 10, and the revision of NTLMSSP that is in use.
const version = "\x0a\x00\x00\x00\x00\x00\x00\x0f"

// Client logs on once.
type Client struct {
	user, domain string
	password     secret.String
	target       string // the service, such as HTTP/host
	bindings     [16]byte

	random    func([]byte)
	negotiate []byte // the first message
}

// New returns a client for an account: user, DOMAIN\user or user@domain. Target is
// the service that it logs on to, such as HTTP/host, and bindings are those of the
// TLS connection, or zero.
func New(account string, password secret.String, target string, bindings [16]byte) *Client {
	domain, user, ok := strings.Cut(account, `\`)
	if !ok {
		domain, user = "", account
	}
	return &Client{user: user, domain: domain, password: password, target: target, bindings: bindings,
		random: func(b []byte) { rand.Read(b) }}
}

// Negotiate returns the first message, 2.2.1.1. It names neither a domain nor this
// host.
func (c *Client) Negotiate() []byte {
	m := append([]byte(signature), negotiateMessage, 0, 0, 0)
	m = binary.LittleEndian.AppendUint32(m, offered)
	m = append(m, make([]byte, 16)...) // DomainNameFields, WorkstationFields
	c.negotiate = append(m, version...)
	return c.negotiate
}

// Challenge is a CHALLENGE_MESSAGE, 2.2.1.2.
type Challenge struct {
	Flags  uint32
	Server [8]byte // the server's challenge
	Pairs  []AvPair

	raw []byte
}

// AvPair is an element of the target information, 2.2.2.1.
type AvPair struct {
	ID    uint16
	Value []byte
}

// maxChallenge bounds the server's message, in bytes: it has a few names of the
// server and of its domain. What is made of it has to fit in 16 bits.
const maxChallenge = 16 << 10

// ParseChallenge reads the server's message.
func ParseChallenge(m []byte) (*Challenge, error) {
	if len(m) < 48 || len(m) > maxChallenge || string(m[:8]) != signature || binary.LittleEndian.Uint32(m[8:]) != challengeMessage {
		return nil, errors.New("the server's NTLM message is not a challenge")
	}
	c := &Challenge{Flags: binary.LittleEndian.Uint32(m[20:]), Server: [8]byte(m[24:32]), raw: slices.Clone(m)}
	if missing := Required &^ c.Flags; missing != 0 {
		return nil, fmt.Errorf("the server does not offer what NTLMv2 with 128 bits needs (flags %08x are missing)", missing)
	}
	info, err := Field(m, 40)
	if err != nil {
		return nil, err
	}
	if c.Pairs, err = ParsePairs(info); err != nil {
		return nil, err
	}
	if Pair(c.Pairs, AvComputerName) == nil || Pair(c.Pairs, AvDomainName) == nil { // 3.1.5.1.2
		return nil, errors.New("the server's NTLM challenge does not name the server and its domain")
	}
	return c, nil
}

// Field is the data to which the length and the offset at this place of a message
// point.
func Field(m []byte, at int) ([]byte, error) {
	if len(m) < at+8 {
		return nil, errors.New("the NTLM message is cut off")
	}
	length, offset := uint64(binary.LittleEndian.Uint16(m[at:])), uint64(binary.LittleEndian.Uint32(m[at+4:]))
	if length == 0 {
		return nil, nil
	}
	if offset+length > uint64(len(m)) {
		return nil, errors.New("a field of the NTLM message is outside of it")
	}
	return m[offset : offset+length], nil
}

// ParsePairs reads target information up to its end mark.
func ParsePairs(info []byte) (pairs []AvPair, err error) {
	for len(info) >= 4 {
		id, length := binary.LittleEndian.Uint16(info), int(binary.LittleEndian.Uint16(info[2:]))
		if id == AvEOL {
			return pairs, nil
		}
		if len(info) < 4+length {
			break
		}
		pairs = append(pairs, AvPair{id, info[4 : 4+length]})
		info = info[4+length:]
	}
	return nil, errors.New("the target information of the NTLM message is cut off")
}

// AppendPairs writes target information with its end mark.
func AppendPairs(info []byte, pairs []AvPair) []byte {
	for _, pair := range append(slices.Clip(pairs), AvPair{ID: AvEOL}) {
		info = binary.LittleEndian.AppendUint16(info, pair.ID)
		info = binary.LittleEndian.AppendUint16(info, uint16(len(pair.Value)))
		info = append(info, pair.Value...)
	}
	return info
}

// Pair is the value of one; nil: there is none.
func Pair(pairs []AvPair, id uint16) []byte {
	for _, pair := range pairs {
		if pair.ID == id {
			return pair.Value
		}
	}
	return nil
}

// Time is the clock of the server; the zero time if it has not said.
func (c *Challenge) Time() time.Time {
	value := Pair(c.Pairs, AvTimestamp)
	if len(value) != 8 {
		return time.Time{}
	}
	return ParseFiletime(binary.LittleEndian.Uint64(value))
}

// epoch is 1970 in the count of a FILETIME, [MS-DTYP] 2.3.3: tenths of a
// microsecond since 1601.
const epoch = 116444736000000000

// Filetime is t as a FILETIME.
func Filetime(t time.Time) uint64 { return uint64(t.UnixNano()/100) + epoch }

// ParseFiletime is the time that a FILETIME stands for.
func ParseFiletime(f uint64) time.Time {
	ticks := int64(f) - epoch
	return time.Unix(ticks/1e7, ticks%1e7*100)
}

// Authenticate answers a challenge with the last message, 2.2.1.3, and returns
// what seals the messages after it. The steps are those of 3.1.5.1.2.
func (c *Client) Authenticate(challenge *Challenge) ([]byte, *Session) {
	var nonce [8]byte
	var key [16]byte // ExportedSessionKey
	c.random(nonce[:])
	c.random(key[:])

	// The MIC is sent even if the server has not told its time, which the clause
	// makes a condition: otherwise someone in between who removes the time would
	// be rid of the MIC too.
	flags := uint32(HasMIC)
	if value := Pair(challenge.Pairs, AvFlags); len(value) == 4 {
		flags |= binary.LittleEndian.Uint32(value)
	}
	pairs := slices.DeleteFunc(slices.Clone(challenge.Pairs), func(p AvPair) bool {
		return p.ID == AvFlags || p.ID == AvChannelBindings || p.ID == AvTargetName
	})
	pairs = append(pairs,
		AvPair{AvFlags, binary.LittleEndian.AppendUint32(nil, flags)},
		AvPair{AvChannelBindings, c.bindings[:]},
		AvPair{AvTargetName, UTF16(c.target)})

	responseKey := ResponseKey(c.user, c.domain, c.password.Reveal())
	now, lm := Filetime(time.Now()), LMResponse(responseKey, challenge.Server, nonce)
	if value := Pair(challenge.Pairs, AvTimestamp); len(value) == 8 {
		now, lm = binary.LittleEndian.Uint64(value), make([]byte, 24)
	}
	nt, base := Response(responseKey, challenge.Server, nonce, now, AppendPairs(nil, pairs))
	m := c.message(challenge.Flags&offered, lm, nt, RC4(base, key[:]))
	mic := HMAC(key[:], c.negotiate, challenge.raw, m)
	copy(m[micOffset:], mic[:])
	return m, NewSession(key, false)
}

// Offsets in an AUTHENTICATE_MESSAGE, 2.2.1.3.
const (
	micOffset     = 72
	payloadOffset = micOffset + 16
)

func (c *Client) message(flags uint32, lm, nt, key []byte) []byte {
	m := append([]byte(signature), authenticateMessage, 0, 0, 0)
	offset := payloadOffset
	payload := [][]byte{lm, nt, UTF16(c.domain), UTF16(c.user), nil /* Workstation */, key}
	for _, field := range payload {
		m = binary.LittleEndian.AppendUint16(m, uint16(len(field)))
		m = binary.LittleEndian.AppendUint16(m, uint16(len(field)))
		m = binary.LittleEndian.AppendUint32(m, uint32(offset))
		offset += len(field)
	}
	m = binary.LittleEndian.AppendUint32(m, flags)
	m = append(m, version...)
	m = append(m, make([]byte, 16)...) // MIC: zero while it is computed
	return append(m, slices.Concat(payload...)...)
}

// ResponseKey is NTOWFv2, 3.3.2.
func ResponseKey(user, domain, password string) [16]byte {
	hash := md4(UTF16(password))
	return HMAC(hash[:], UTF16(strings.Map(unicode.ToUpper, user)+domain))
}

// Response is ComputeResponse for NTLMv2, 3.3.2: NtChallengeResponse and
// SessionBaseKey.
func Response(key [16]byte, server, client [8]byte, time uint64, targetInfo []byte) ([]byte, [16]byte) {
	temp := []byte{1, 1, 0, 0, 0, 0, 0, 0}
	temp = binary.LittleEndian.AppendUint64(temp, time)
	temp = append(temp, client[:]...)
	temp = append(temp, 0, 0, 0, 0)
	temp = append(temp, targetInfo...)
	temp = append(temp, 0, 0, 0, 0)
	proof := HMAC(key[:], server[:], temp)
	return append(proof[:], temp...), HMAC(key[:], proof[:])
}

// LMResponse is LmChallengeResponse for NTLMv2, 3.3.2.
func LMResponse(key [16]byte, server, client [8]byte) []byte {
	proof := HMAC(key[:], server[:], client[:])
	return append(proof[:], client[:]...)
}

// HMAC is HMAC_MD5 of what the parts are together.
func HMAC(key []byte, parts ...[]byte) [16]byte {
	mac := hmac.New(md5.New, key)
	for _, part := range parts {
		mac.Write(part)
	}
	return [16]byte(mac.Sum(nil))
}

// RC4 encrypts, or decrypts, with a key of its own.
func RC4(key [16]byte, data []byte) []byte {
	cipher, err := rc4.NewCipher(key[:])
	if err != nil {
		panic(err) // there are keys of 16 bytes
	}
	out := make([]byte, len(data))
	cipher.XORKeyStream(out, data)
	return out
}

// UTF16 is a text as messages have it.
func UTF16(s string) []byte {
	var out []byte
	for _, unit := range utf16.Encode([]rune(s)) {
		out = binary.LittleEndian.AppendUint16(out, unit)
	}
	return out
}
