package discovery

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"certctl-agent/internal/api"
)

// An outcome is what a file held, as bytes: the form in which it goes from the
// reader to whoever emits it, and into the index. An unchanged file is emitted
// from there without being parsed.
//
//	flags, causes (list of strings), certificates (list of format, certificate)
//
// Lists and strings have their length before them, as a varint.
const flagLocked = 1

var formats = []string{formatPEM, formatDER, formatPKCS7, formatPKCS12, formatJKS}

func appendString[S ~string | ~[]byte](b []byte, s S) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendOutcome(b []byte, c content, known *certificates) []byte {
	// Describing may add causes, so certificates are put aside first.
	var certs []byte
	n := 0
	for _, cert := range c.certs {
		encoded, err := known.encode(cert.der)
		if err != nil && (cert.format != formatDER || !isOtherSigned(cert.der)) {
			c.fail(err)
		}
		if encoded == nil {
			continue
		}
		for i, format := range formats {
			if format == cert.format {
				certs = append(certs, byte(i))
			}
		}
		certs = appendString(certs, encoded)
		n++
	}
	flags := byte(0)
	if c.locked {
		flags = flagLocked
	}
	b = append(b, flags)
	b = binary.AppendUvarint(b, uint64(len(c.causes)))
	for _, cause := range c.causes {
		b = appendString(b, cause)
	}
	b = binary.AppendUvarint(b, uint64(n))
	return append(b, certs...)
}

// isLocked reports whether a password would show more.
func isLocked(outcome []byte) bool { return len(outcome) > 0 && outcome[0]&flagLocked != 0 }

// holdsNothing reports whether there is nothing to emit.
func holdsNothing(outcome []byte) bool { return len(outcome) == 3 && outcome[1]|outcome[2] == 0 }

// emitOutcome hands out what a file held. source is the path to report.
func emitOutcome(outcome []byte, source string, cert func(api.DiscoveredCertificate) error, cause func(string)) error {
	d := decoder{rest: outcome}
	d.byte()
	for range d.length() {
		if text := d.string(); !d.damaged {
			cause(text)
		}
	}
	for range d.length() {
		format := int(d.byte())
		found := decodeCertificate(d.bytes())
		if d.damaged || format >= len(formats) {
			return errDamagedOutcome
		}
		found.SourcePath, found.SourceFormat = source, formats[format]
		if err := cert(found); err != nil {
			return err
		}
	}
	if d.damaged {
		return errDamagedOutcome
	}
	return nil
}

var errDamagedOutcome = errors.New("a file's record in the index is damaged")

func appendCertificate(b []byte, c api.DiscoveredCertificate, der []byte) []byte {
	b = appendString(b, der)
	for _, s := range []string{c.FingerprintSHA256, c.CommonName, c.SerialNumber, c.IssuerDN, c.SubjectDN, c.NotBefore, c.NotAfter, c.KeyAlgorithm} {
		b = appendString(b, s)
	}
	b = binary.AppendUvarint(b, uint64(c.KeySize))
	b = append(b, 0)
	if c.IsCA {
		b[len(b)-1] = 1
	}
	b = binary.AppendUvarint(b, uint64(len(c.SANs)))
	for _, san := range c.SANs {
		b = appendString(b, san)
	}
	return b
}

func decodeCertificate(b []byte) api.DiscoveredCertificate {
	d := decoder{rest: b}
	der := d.bytes()
	d.shared = string(d.rest) // one string for all fields saves a dozen
	c := api.DiscoveredCertificate{
		FingerprintSHA256: d.string(),
		CommonName:        d.string(),
		SerialNumber:      d.string(),
		IssuerDN:          d.string(),
		SubjectDN:         d.string(),
		NotBefore:         d.string(),
		NotAfter:          d.string(),
		KeyAlgorithm:      d.string(),
		KeySize:           int(d.uvarint()),
		IsCA:              d.byte() == 1,
	}
	c.SANs = make([]string, d.length())
	for i := range c.SANs {
		c.SANs[i] = d.string()
	}
	c.PEMData = encodePEM(der)
	return c
}

// encodePEM is pem.EncodeToMemory for a certificate, at a third of the cost:
// it is most of what an unchanged certificate costs.
func encodePEM(der []byte) string {
	const (
		begin = "-----BEGIN CERTIFICATE-----\n"
		end   = "-----END CERTIFICATE-----\n"
		line  = 48 // bytes that make 64 characters (RFC 7468, 2)
	)
	var b strings.Builder
	b.Grow(len(begin) + base64.StdEncoding.EncodedLen(len(der)) + len(der)/line + 1 + len(end))
	b.WriteString(begin)
	var text [65]byte
	for part := range slices.Chunk(der, line) {
		b.Write(append(base64.StdEncoding.AppendEncode(text[:0], part), '\n'))
	}
	b.WriteString(end)
	return b.String()
}

// decoder reads what the functions above append. Damage makes it return zeros.
type decoder struct {
	rest    []byte
	shared  string // the same bytes up to its end, or ""
	damaged bool
}

func (d *decoder) uvarint() uint64 {
	n, size := binary.Uvarint(d.rest)
	if size <= 0 {
		d.damaged, d.rest = true, nil
		return 0
	}
	d.rest = d.rest[size:]
	return n
}

// length is the number of elements of a list, each of which takes a byte or
// more.
func (d *decoder) length() int {
	n := d.uvarint()
	if n > uint64(len(d.rest)) {
		d.damaged, d.rest = true, nil
		return 0
	}
	return int(n)
}

func (d *decoder) bytes() []byte {
	n := d.length()
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) string() string {
	b := d.bytes()
	if d.shared == "" {
		return string(b)
	}
	end := len(d.shared) - len(d.rest)
	return d.shared[end-len(b) : end]
}

func (d *decoder) byte() byte {
	if len(d.rest) == 0 {
		d.damaged = true
		return 0
	}
	b := d.rest[0]
	d.rest = d.rest[1:]
	return b
}

// certificates remembers the encoded form of certificates seen lately: hosts
// have many copies of the same authorities, and of each chain.
type certificates struct {
	mu     sync.Mutex
	size   int // bytes in recent
	recent map[[sha256.Size]byte][]byte
}

// maxRecentBytes bounds what is remembered: about 500 certificates.
const maxRecentBytes = 1 << 20

// encode returns the encoded form of a certificate, with errCut when some of it was left out.
func (c *certificates) encode(der []byte) ([]byte, error) {
	digest := sha256.Sum256(der)
	c.mu.Lock()
	encoded := c.recent[digest]
	c.mu.Unlock()
	if encoded != nil {
		return encoded, nil
	}
	described, err := describe(der)
	if err != nil && err != errCut {
		return nil, err
	}
	described.FingerprintSHA256 = hex.EncodeToString(digest[:])
	encoded = appendCertificate(nil, described, der)
	if err != nil {
		return encoded, err // not remembered: each file that holds it has to be named
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if len(encoded) > maxRecentBytes/8 {
		return encoded, nil
	}
	if c.recent == nil || c.size+len(encoded) > maxRecentBytes {
		// Starting over is simpler than ageing and as good here: what is
		// common comes back with its next copy.
		c.recent, c.size = make(map[[sha256.Size]byte][]byte), 0
	}
	c.recent[digest] = encoded
	c.size += len(encoded)
	return encoded, nil
}

// printablePath is path as text that every control plane stores: bytes that
// are not UTF-8 are written \xNN, so that two such names stay two.
func printablePath(path string) string {
	if utf8.ValidString(path) {
		return path
	}
	var b strings.Builder
	for i := 0; i < len(path); {
		r, size := utf8.DecodeRuneInString(path[i:])
		if r == utf8.RuneError && size == 1 {
			b.WriteString(`\x` + strconv.FormatUint(uint64(path[i])|0x100, 16)[1:])
		} else {
			b.WriteString(path[i : i+size])
		}
		i += size
	}
	return b.String()
}
