// Package ntlm implements the client of NTLM version 2 [MS-NLMP]: it logs on, and seals the
// messages that follow. It rejects older versions and weaker keys. The parts that a server shares
// are exported for a server in tests.
//
// Clause numbers refer to https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-nlmp/.
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

// Negotiate flags (2.2.2.5).
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

// Required are the flags that a server must offer. Without them the key would be weak enough for an
// eavesdropper to find by brute force.
const Required = Unicode | Sign | Seal | ExtendedSessionSecurity | TargetInfo | Key128 | KeyExchange

const offered = Required | RequestTarget | NTLM | AlwaysSign | Version | Key56

// Message types (2.2.1).
const (
	negotiateMessage    = 1
	challengeMessage    = 2
	authenticateMessage = 3
)

const signature = "NTLMSSP\x00"

// Types of AV_PAIR (2.2.2.1).
const (
	AvEOL             = 0
	AvComputerName    = 1
	AvDomainName      = 2
	AvFlags           = 6
	AvTimestamp       = 7
	AvTargetName      = 9
	AvChannelBindings = 10
)

// HasMIC is the bit of AvFlags that announces a MIC (2.2.2.1).
const HasMIC = 0x2

// version is the client's version (2.2.2.10), which is for debugging only: Windows 10, and the
// current revision of NTLMSSP.
const version = "\x0a\x00\x00\x00\x00\x00\x00\x0f"

// Client performs one logon.
type Client struct {
	user, domain string
	password     secret.String
	target       string // service, such as HTTP/host
	bindings     [16]byte

	random    func([]byte)
	negotiate []byte // the first message
}

// New returns a client for an account: user, DOMAIN\user or user@domain. target is the service to
// log on to, such as HTTP/host. bindings are those of the TLS connection, or zero.
func New(account string, password secret.String, target string, bindings [16]byte) *Client {
	domain, user, ok := strings.Cut(account, `\`)
	if !ok {
		domain, user = "", account
	}
	return &Client{user: user, domain: domain, password: password, target: target, bindings: bindings,
		random: func(b []byte) { rand.Read(b) }}
}

// Negotiate returns the first message (2.2.1.1). It contains neither a domain nor the name of this
// host.
func (c *Client) Negotiate() []byte {
	m := append([]byte(signature), negotiateMessage, 0, 0, 0)
	m = binary.LittleEndian.AppendUint32(m, offered)
	m = append(m, make([]byte, 16)...) // DomainNameFields, WorkstationFields
	c.negotiate = append(m, version...)
	return c.negotiate
}

// Challenge is a CHALLENGE_MESSAGE (2.2.1.2).
type Challenge struct {
	Flags  uint32
	Server [8]byte // ServerChallenge
	Pairs  []AvPair

	raw []byte
}

// AvPair is an element of the target information (2.2.2.1).
type AvPair struct {
	ID    uint16
	Value []byte
}

// maxChallenge bounds the server's message, in bytes. It contains a few names of the server and its
// domain. The response, which includes them, must fit in 16 bits.
const maxChallenge = 16 << 10

// ParseChallenge parses the server's message.
func ParseChallenge(m []byte) (*Challenge, error) {
	if len(m) < 48 || len(m) > maxChallenge || string(m[:8]) != signature || binary.LittleEndian.Uint32(m[8:]) != challengeMessage {
		return nil, errors.New("the server's NTLM message is not a challenge")
	}
	c := &Challenge{Flags: binary.LittleEndian.Uint32(m[20:]), Server: [8]byte(m[24:32]), raw: slices.Clone(m)}
	if missing := Required &^ c.Flags; missing != 0 {
		return nil, fmt.Errorf("the server does not support NTLMv2 with 128 bits (flags %08x are missing)", missing)
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

// Field returns the data of the field whose length and offset are at index at of a message.
func Field(m []byte, at int) ([]byte, error) {
	if len(m) < at+8 {
		return nil, errors.New("the NTLM message is truncated")
	}
	length, offset := uint64(binary.LittleEndian.Uint16(m[at:])), uint64(binary.LittleEndian.Uint32(m[at+4:]))
	if length == 0 {
		return nil, nil
	}
	if offset+length > uint64(len(m)) {
		return nil, errors.New("a field of the NTLM message lies outside of the message")
	}
	return m[offset : offset+length], nil
}

// ParsePairs parses target information up to its end mark.
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
	return nil, errors.New("the target information of the NTLM message is truncated")
}

// AppendPairs appends target information with its end mark.
func AppendPairs(info []byte, pairs []AvPair) []byte {
	for _, pair := range append(slices.Clip(pairs), AvPair{ID: AvEOL}) {
		info = binary.LittleEndian.AppendUint16(info, pair.ID)
		info = binary.LittleEndian.AppendUint16(info, uint16(len(pair.Value)))
		info = append(info, pair.Value...)
	}
	return info
}

// Pair returns the value of the pair with an ID, or nil.
func Pair(pairs []AvPair, id uint16) []byte {
	for _, pair := range pairs {
		if pair.ID == id {
			return pair.Value
		}
	}
	return nil
}

// Time returns the server's time, or the zero time if the challenge does not contain it.
func (c *Challenge) Time() time.Time {
	value := Pair(c.Pairs, AvTimestamp)
	if len(value) != 8 {
		return time.Time{}
	}
	return ParseFiletime(binary.LittleEndian.Uint64(value))
}

// epoch is 1970 as a FILETIME ([MS-DTYP] 2.3.3), in units of 100 ns since 1601.
const epoch = 116444736000000000

// Filetime returns t as a FILETIME.
func Filetime(t time.Time) uint64 { return uint64(t.UnixNano()/100) + epoch }

// ParseFiletime returns the time of a FILETIME.
func ParseFiletime(f uint64) time.Time {
	ticks := int64(f) - epoch
	return time.Unix(ticks/1e7, ticks%1e7*100)
}

// Authenticate returns the last message (2.2.1.3), which answers a challenge, and the session for
// the messages after it. The steps are those of 3.1.5.1.2.
func (c *Client) Authenticate(challenge *Challenge) ([]byte, *Session) {
	var nonce [8]byte
	var key [16]byte // ExportedSessionKey
	c.random(nonce[:])
	c.random(key[:])

	// Send the MIC even if the server has not sent its time, although the clause requires that.
	// Otherwise an attacker in between could get rid of the MIC by removing the time.
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
	now, lm := Filetime(time.Now()), lmResponse(responseKey, challenge.Server, nonce)
	if value := Pair(challenge.Pairs, AvTimestamp); len(value) == 8 {
		now, lm = binary.LittleEndian.Uint64(value), make([]byte, 24)
	}
	nt, base := Response(responseKey, challenge.Server, nonce, now, AppendPairs(nil, pairs))
	m := c.message(challenge.Flags&offered, lm, nt, RC4(base, key[:]))
	mic := HMAC(key[:], c.negotiate, challenge.raw, m)
	copy(m[micOffset:], mic[:])
	return m, NewSession(key, false)
}

// Offsets in an AUTHENTICATE_MESSAGE (2.2.1.3).
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
	m = append(m, make([]byte, 16)...) // MIC, zero while it is computed
	return append(m, slices.Concat(payload...)...)
}

// ResponseKey computes NTOWFv2 (3.3.2).
func ResponseKey(user, domain, password string) [16]byte {
	hash := md4(UTF16(password))
	return HMAC(hash[:], UTF16(strings.Map(unicode.ToUpper, user)+domain))
}

// Response computes NtChallengeResponse and SessionBaseKey for NTLMv2 (ComputeResponse, 3.3.2).
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

// lmResponse computes LmChallengeResponse for NTLMv2 (3.3.2).
func lmResponse(key [16]byte, server, client [8]byte) []byte {
	proof := HMAC(key[:], server[:], client[:])
	return append(proof[:], client[:]...)
}

// HMAC computes HMAC_MD5 of the concatenated parts.
func HMAC(key []byte, parts ...[]byte) [16]byte {
	mac := hmac.New(md5.New, key)
	for _, part := range parts {
		mac.Write(part)
	}
	return [16]byte(mac.Sum(nil))
}

// RC4 encrypts or decrypts data with a new key stream.
func RC4(key [16]byte, data []byte) []byte {
	cipher, err := rc4.NewCipher(key[:])
	if err != nil {
		panic(err) // impossible: 16 bytes are a valid key size
	}
	out := make([]byte, len(data))
	cipher.XORKeyStream(out, data)
	return out
}

// UTF16 encodes a text as in messages, in UTF-16LE.
func UTF16(s string) []byte {
	var out []byte
	for _, unit := range utf16.Encode([]rune(s)) {
		out = binary.LittleEndian.AppendUint16(out, unit)
	}
	return out
}
