package winrmhost

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"

	"certctl-agent/internal/ntlm"
)

// conn is a connection. It has one request at a time.
type conn struct {
	net.Conn
	user      string // "" before a logon
	negotiate []byte // the messages of the current logon
	challenge []byte
	session   *ntlm.Session
}

// authenticate reports whether the request or its connection is logged on. If not, it answers the
// request.
func (h *Host) authenticate(w http.ResponseWriter, r *http.Request, c *conn) bool {
	authorization := r.Header.Get("Authorization")
	if authorization == "" && c.user != "" {
		return true
	}
	if authorization == "" {
		h.unauthorized(w, "")
		return false
	}
	if h.happens(w, r, c, h.troubleOf("Logon")) {
		return false
	}
	scheme, token, _ := strings.Cut(authorization, " ")
	switch {
	case strings.EqualFold(scheme, "Negotiate"):
		message, err := base64.StdEncoding.DecodeString(token)
		if err != nil {
			h.unauthorized(w, "")
			return false
		}
		if c.challenge == nil {
			challenge, err := h.challenge(c, message)
			if err != nil {
				challenge = nil
			}
			h.unauthorized(w, base64.StdEncoding.EncodeToString(challenge))
			return false
		}
		err = h.logOn(c, message)
		c.challenge, c.negotiate = nil, nil
		return h.decide(w, c, err)
	case scheme == "Basic" && h.options.Basic && h.isTLS():
		user, password, _ := r.BasicAuth()
		return h.decide(w, c, h.check(user, password))
	case authorization == "http://schemas.dmtf.org/wbem/wsman/1/wsman/secprofile/https/mutual" && h.options.ClientCA != nil:
		err := errors.New("no certificate")
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			_, err = r.TLS.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: h.options.ClientCA, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		}
		return h.decide(w, c, err)
	}
	h.unauthorized(w, "")
	return false
}

func (h *Host) unauthorized(w http.ResponseWriter, token string) {
	w.Header().Add("WWW-Authenticate", strings.TrimSpace("Negotiate "+token))
	if h.options.Basic && h.isTLS() {
		w.Header().Add("WWW-Authenticate", `Basic realm="WSMAN"`)
	}
	w.WriteHeader(http.StatusUnauthorized)
}

// decide counts a logon, and answers a failed one. A locked account rejects even the right
// password.
func (h *Host) decide(w http.ResponseWriter, c *conn, err error) bool {
	h.mu.Lock()
	if err != nil {
		h.counts.Failed++
		h.counts.Locked = h.counts.Locked || h.options.LockAfter > 0 && h.counts.Failed >= h.options.LockAfter
	} else if h.counts.Locked {
		err = errors.New("the account is locked")
	} else {
		h.counts.Logons++
		c.user = h.options.User
	}
	h.mu.Unlock()
	if err != nil {
		c.user, c.session = "", nil
		h.unauthorized(w, "")
	}
	return err == nil
}

func (h *Host) check(account, password string) error {
	domain, user, ok := strings.Cut(account, `\`)
	if !ok {
		domain, user = "", account
	}
	if !h.isUser(domain, user) || password != h.options.Password {
		return errors.New("wrong user or password")
	}
	return nil
}

func (h *Host) isUser(domain, user string) bool {
	return strings.EqualFold(user, h.options.User) && (domain == "" || strings.EqualFold(domain, h.options.Domain))
}

// oem is the flag for the older alternative to Unicode ([MS-NLMP] 2.2.2.5).
const oem = 0x00000002

const (
	targetTypeServer = 0x00020000

	supported = ntlm.Unicode | oem | ntlm.RequestTarget | ntlm.Sign | ntlm.Seal | ntlm.NTLM | ntlm.AlwaysSign | ntlm.ExtendedSessionSecurity |
		ntlm.Version | ntlm.Key128 | ntlm.KeyExchange | ntlm.Key56
)

// maxAge is the maximum age of a response: half an hour on the strictest Windows, according to the
// notes on MaxLifetime in [MS-NLMP].
const maxAge = 30 * time.Minute

// challenge returns a challenge ([MS-NLMP] 3.2.5.1.1, 2.2.1.2).
func (h *Host) challenge(c *conn, m []byte) ([]byte, error) {
	if len(m) < 32 || string(m[:8]) != "NTLMSSP\x00" || binary.LittleEndian.Uint32(m[8:]) != 1 {
		return nil, errors.New("not a NEGOTIATE_MESSAGE")
	}
	flags := binary.LittleEndian.Uint32(m[12:]) & supported
	if flags&ntlm.Unicode != 0 {
		flags &^= oem
	}
	flags |= ntlm.TargetInfo | ntlm.RequestTarget | targetTypeServer
	pairs := []ntlm.AvPair{{ID: ntlm.AvDomainName, Value: ntlm.UTF16("WINHOST")}, {ID: ntlm.AvComputerName, Value: ntlm.UTF16("WINHOST")}}
	if !h.options.HideClock {
		pairs = append(pairs, ntlm.AvPair{ID: ntlm.AvTimestamp, Value: binary.LittleEndian.AppendUint64(nil, ntlm.Filetime(time.Now().Add(h.options.Clock)))})
	}
	info, target := ntlm.AppendPairs(nil, pairs), ntlm.UTF16("WINHOST")
	out := append([]byte("NTLMSSP\x00"), 2, 0, 0, 0)
	out = field(out, target, 56)
	out = binary.LittleEndian.AppendUint32(out, flags)
	var nonce [8]byte
	rand.Read(nonce[:])
	out = append(out, nonce[:]...)
	out = append(out, make([]byte, 8)...)
	out = field(out, info, 56+len(target))
	out = append(out, "\x0a\x00\x63\x45\x00\x00\x00\x0f"...)
	out = append(append(out, target...), info...)
	c.negotiate, c.challenge = m, out
	return out, nil
}

func field(out, value []byte, offset int) []byte {
	out = binary.LittleEndian.AppendUint16(out, uint16(len(value)))
	out = binary.LittleEndian.AppendUint16(out, uint16(len(value)))
	return binary.LittleEndian.AppendUint32(out, uint32(offset))
}

// logOn checks the response to the challenge ([MS-NLMP] 3.2.5.1.2).
func (h *Host) logOn(c *conn, m []byte) error {
	if len(m) < 88 || string(m[:8]) != "NTLMSSP\x00" || binary.LittleEndian.Uint32(m[8:]) != 3 {
		return errors.New("not an AUTHENTICATE_MESSAGE with a MIC")
	}
	var fields [6][]byte
	for i := range fields {
		var err error
		if fields[i], err = ntlm.Field(m, 12+8*i); err != nil {
			return err
		}
	}
	lm, nt, key := fields[0], fields[1], fields[5]
	flags := binary.LittleEndian.Uint32(m[60:])
	offered := binary.LittleEndian.Uint32(c.challenge[20:])
	if missing := (ntlm.Required &^ ntlm.Unicode) &^ flags; missing != 0 || flags&^offered != 0 {
		return fmt.Errorf("flags %08x, offered %08x", flags, offered)
	}
	domain, user := decode(fields[2], flags), decode(fields[3], flags)
	if len(nt) < 16+28+4 || len(key) != 16 || !h.isUser(domain, user) {
		return errors.New("no such user, or not NTLMv2")
	}
	temp := nt[16:]
	info := temp[28 : len(temp)-4]
	stamp := binary.LittleEndian.Uint64(temp[8:])
	responseKey := ntlm.ResponseKey(user, domain, h.options.Password)
	want, base := ntlm.Response(responseKey, [8]byte(c.challenge[24:32]), [8]byte(temp[16:24]), stamp, info)
	if !bytes.Equal(want, nt) {
		return errors.New("wrong password")
	}
	if age := time.Now().Add(h.options.Clock).Sub(ntlm.ParseFiletime(stamp)); age.Abs() > maxAge {
		return fmt.Errorf("the response is %v old", age)
	}
	exported := [16]byte(ntlm.RC4(base, key))
	pairs, err := ntlm.ParsePairs(info)
	if err != nil {
		return err
	}
	told := ntlm.Pair(pairs, ntlm.AvTimestamp) != nil
	if told && !bytes.Equal(lm, make([]byte, 24)) { // 3.1.5.1.2
		return errors.New("an LM response beside a time")
	}
	if flags := ntlm.Pair(pairs, ntlm.AvFlags); len(flags) != 4 || binary.LittleEndian.Uint32(flags)&ntlm.HasMIC == 0 {
		return errors.New("no MIC")
	}
	bare := bytes.Clone(m)
	copy(bare[72:88], make([]byte, 16))
	if mic := ntlm.HMAC(exported[:], c.negotiate, c.challenge, bare); !bytes.Equal(mic[:], m[72:88]) {
		return errors.New("wrong MIC")
	}
	if err := h.checkBindings(ntlm.Pair(pairs, ntlm.AvChannelBindings)); err != nil {
		return err
	}
	c.session = ntlm.NewSession(exported, true)
	return nil
}

// checkBindings checks channel bindings like CbtHardeningLevel Strict.
func (h *Host) checkBindings(sent []byte) error {
	if !h.isTLS() {
		return nil
	}
	leaf, err := x509.ParseCertificate(h.options.Certificate.Certificate[0])
	if err != nil {
		return err
	}
	if want := ntlm.Bindings(leaf); !bytes.Equal(want[:], sent) {
		return errors.New("wrong channel bindings")
	}
	return nil
}

func decode(text []byte, flags uint32) string {
	if flags&ntlm.Unicode == 0 {
		return string(text)
	}
	var units []uint16
	for ; len(text) >= 2; text = text[2:] {
		units = append(units, binary.LittleEndian.Uint16(text))
	}
	return string(utf16.Decode(units))
}

// Encrypted messages ([MS-WSMV] 2.2.9.1.1).

const (
	partOne = "--Encrypted Boundary\r\n\tContent-Type: application/HTTP-SPNEGO-session-encrypted\r\n\tOriginalContent: type=application/soap+xml;charset=UTF-8;Length="
	partTwo = "\r\n--Encrypted Boundary\r\n\tContent-Type: application/octet-stream\r\n"
	end     = "--Encrypted Boundary--\r\n"
)

func (c *conn) decrypt(body []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(body, []byte(partOne))
	number, rest, ok2 := bytes.Cut(rest, []byte(partTwo))
	rest, ok3 := bytes.CutSuffix(rest, []byte(end))
	length, err := strconv.Atoi(string(number))
	if !ok || !ok2 || !ok3 || err != nil || len(rest) != 4+16+length || binary.LittleEndian.Uint32(rest) != 16 {
		return nil, errors.New("not an encrypted message")
	}
	return c.session.Unwrap(rest[4:20], rest[20:])
}

func (c *conn) encrypt(message []byte) []byte {
	signature, sealed := c.session.Wrap(message)
	out := append([]byte(partOne), strconv.Itoa(len(message))+partTwo...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(signature)))
	out = append(append(out, signature...), sealed...)
	return append(out, end...)
}
