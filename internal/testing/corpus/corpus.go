// Package corpus writes trees of files that contain certificates, with the same structure for the
// same seed, and returns what a scan must find.
package corpus

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// perDirectory is the number of files per directory.
const perDirectory = 64

// Options configures a tree.
type Options struct {
	Seed         uint64
	Files        int
	Certificates int

	// Odd adds unusual and damaged forms of certificates. Without it all certificates are plain PEM
	// or DER.
	Odd bool

	// TextSize, if set, is the approximate size of files without certificates, in bytes. These are
	// then all configuration-like text, and all certificates are PEM, so that a scan can be
	// compared with a text search.
	TextSize int
}

// Certificate is a certificate that a scan must find.
type Certificate struct {
	Path        string
	Fingerprint string // lower-case hex SHA-256 of the DER
	Format      string
}

// Tree describes the tree that was written.
type Tree struct {
	Files        int
	Certificates []Certificate
	Damaged      []string // files that a scan must report as errors
}

// Write fills dir.
func Write(dir string, o Options) (*Tree, error) {
	w, err := newWriter(dir, o)
	if err != nil {
		return nil, err
	}
	for w.tree.Files < o.Files {
		left := o.Files - w.tree.Files
		// Spread certificates evenly, so that every prefix of the tree contains some.
		certificate := w.random.IntN(left) < o.Certificates-len(w.tree.Certificates)
		switch {
		case certificate && o.TextSize > 0:
			err = w.certificateOf(plainForms[w.random.IntN(3)])
		case certificate:
			err = w.certificate(o.Odd)
		case o.TextSize > 0:
			err = w.text(o.TextSize)
		default:
			err = w.other(o.Odd)
		}
		if err != nil {
			return nil, err
		}
	}
	return &w.tree, nil
}

type writer struct {
	dir    string
	random *rand.Rand
	tree   Tree
	made   string // last directory created

	ca     *x509.Certificate
	caKey  crypto.Signer
	keys   []crypto.PublicKey
	serial int64
	words  []byte
	lines  []byte // configuration text
	noise  []byte
}

func newWriter(dir string, o Options) (*writer, error) {
	w := &writer{dir: dir, random: rand.New(rand.NewPCG(o.Seed, 1))}
	var err error
	if w.caKey, err = ecdsa.GenerateKey(elliptic.P256(), crand.Reader); err != nil {
		return nil, err
	}
	for _, curve := range []elliptic.Curve{elliptic.P224(), elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, crand.Reader)
		if err != nil {
			return nil, err
		}
		w.keys = append(w.keys, key.Public())
	}
	for _, bits := range []int{2048, 2048, 3072} {
		// The key never signs, so any odd number of that size will do.
		modulus := make([]byte, bits/8)
		for i := range modulus {
			modulus[i] = byte(w.random.Uint32())
		}
		modulus[0] |= 0x80
		modulus[len(modulus)-1] |= 1
		w.keys = append(w.keys, &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: 65537})
	}
	public, _, err := ed25519.GenerateKey(crand.Reader)
	if err != nil {
		return nil, err
	}
	w.keys = append(w.keys, public)
	w.ca = &x509.Certificate{Subject: pkix.Name{CommonName: "Corpus CA", Organization: []string{"Corpus"}}}

	for len(w.words) < 64<<10 {
		w.words = fmt.Appendf(w.words, "setting_%d = %x # as shipped\n", w.random.IntN(1000), w.random.Uint64())
		w.noise = binary.LittleEndian.AppendUint64(w.noise, w.random.Uint64())
		w.noise = binary.LittleEndian.AppendUint64(w.noise, w.random.Uint64N(1<<20)) // contains zeros
		w.noise = append(w.noise, make([]byte, 24)...)
	}
	return w, nil
}

// write writes the next file of the tree.
func (w *writer) write(ext string, data []byte) (string, error) {
	n := w.tree.Files
	group := n / perDirectory
	dir := filepath.Join(w.dir, fmt.Sprintf("d%02d", group/256%100), fmt.Sprintf("e%02x", group/16%16), fmt.Sprintf("f%05d", group))
	if dir != w.made {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
		w.made = dir
	}
	path := filepath.Join(dir, fmt.Sprintf("file%06d%s", n, ext))
	w.tree.Files++
	return path, os.WriteFile(path, data, 0o644)
}

// new creates a certificate.
func (w *writer) new() ([]byte, error) {
	w.serial++
	name := fmt.Sprintf("host%d.example.org", w.serial)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(w.serial<<16 | w.random.Int64N(1<<16)),
		Subject:      pkix.Name{CommonName: name, Organization: []string{"Corpus"}, Country: []string{"CH"}},
		DNSNames:     []string{name, "www." + name},
		KeyUsage:     x509.KeyUsageDigitalSignature,
		NotBefore:    time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC),
		IPAddresses:  []net.IP{net.IPv4(192, 0, 2, byte(w.serial))},

		BasicConstraintsValid: true,
		IsCA:                  w.random.IntN(10) == 0,
	}
	switch w.random.IntN(10) {
	case 0:
		template.NotAfter = template.NotBefore.AddDate(0, 3, 0) // expired
	case 1:
		template.NotBefore = template.NotAfter.AddDate(-1, 0, 0) // not yet valid
	}
	return x509.CreateCertificate(crand.Reader, template, w.ca, w.keys[w.random.IntN(len(w.keys))], w.caKey)
}

func (w *writer) found(path, format string, ders ...[]byte) {
	for _, der := range ders {
		digest := sha256.Sum256(der)
		w.tree.Certificates = append(w.tree.Certificates, Certificate{path, hex.EncodeToString(digest[:]), format})
	}
}

func encode(ders ...[]byte) []byte {
	var all []byte
	for _, der := range ders {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return all
}

// form is a format for certificates in a file.
type form struct {
	ext    string
	format string
	certs  int
	bytes  func(w *writer, ders [][]byte) []byte
}

var plainForms = []form{
	{".pem", "PEM", 1, func(_ *writer, ders [][]byte) []byte { return encode(ders...) }},
	{".crt", "PEM", 1, func(_ *writer, ders [][]byte) []byte { return encode(ders...) }},
	{"", "PEM", 1, func(_ *writer, ders [][]byte) []byte { return encode(ders...) }},
	{".der", "DER", 1, func(_ *writer, ders [][]byte) []byte { return ders[0] }},
	{".cer", "DER", 1, func(_ *writer, ders [][]byte) []byte { return ders[0] }},
	{".pem", "PEM", 3, func(_ *writer, ders [][]byte) []byte { return encode(ders...) }},
}

var oddForms = []form{
	{".conf", "PEM", 1, func(w *writer, ders [][]byte) []byte {
		return append(append(bytes.Clone(w.words[:6000]), encode(ders...)...), w.words[:300]...)
	}},
	{".yaml", "PEM", 2, func(_ *writer, ders [][]byte) []byte {
		return []byte("tls:\n  ca: |\n    " + strings.ReplaceAll(string(encode(ders...)), "\n", "\n    "))
	}},
	{".json", "PEM", 1, func(_ *writer, ders [][]byte) []byte {
		return []byte(`{"ca":"` + strings.ReplaceAll(string(encode(ders...)), "\n", `\n`) + `"}`)
	}},
	{".pem", "PEM", 2, func(_ *writer, ders [][]byte) []byte {
		return bytes.ReplaceAll(encode(ders...), []byte("\n"), []byte("\r\n"))
	}},
	{".pem", "PEM", 2, func(_ *writer, ders [][]byte) []byte { // no line feed between the blocks
		return bytes.ReplaceAll(encode(ders...), []byte("\n-----BEGIN"), []byte("-----BEGIN"))
	}},
	{".crt", "PEM", 1, func(_ *writer, ders [][]byte) []byte { // one long line
		return []byte("-----BEGIN CERTIFICATE-----\n" + base64.StdEncoding.EncodeToString(ders[0]) + "\n-----END CERTIFICATE-----")
	}},
	{".PEM", "PEM", 1, func(w *writer, ders [][]byte) []byte { // a key before, garbage after
		key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: w.noise[:200]})
		return append(append(key, encode(ders...)...), w.noise[:500]...)
	}},
	{".crt", "PEM", 1, func(_ *writer, ders [][]byte) []byte { // like openssl x509 -trustout
		return pem.EncodeToMemory(&pem.Block{Type: "TRUSTED CERTIFICATE", Bytes: append(bytes.Clone(ders[0]), 0x30, 0x00)})
	}},
	{".der", "DER", 1, func(_ *writer, ders [][]byte) []byte { return append(bytes.Clone(ders[0]), 0, 0, '\n') }},
	{".cert", "DER", 2, func(_ *writer, ders [][]byte) []byte { return bytes.Join(ders, nil) }},
	{".p7b", "PKCS7", 2, func(_ *writer, ders [][]byte) []byte { return PKCS7(ders...) }},
	{".p7c", "PKCS7", 2, func(_ *writer, ders [][]byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "PKCS7", Bytes: PKCS7(ders...)})
	}},
	{".jks", "JKS", 2, func(_ *writer, ders [][]byte) []byte { return JKS(2, ders...) }},
	{".ks", "JKS", 1, func(_ *writer, ders [][]byte) []byte { return JKS(1, ders...) }},
	{"", "JKS", 1, func(_ *writer, ders [][]byte) []byte { return JKS(2, ders...) }}, // cacerts
}

func (w *writer) certificate(odd bool) error {
	forms := plainForms
	if odd {
		forms = append(forms[:len(forms):len(forms)], oddForms...)
	}
	return w.certificateOf(forms[w.random.IntN(len(forms))])
}

func (w *writer) certificateOf(form form) error {
	var ders [][]byte
	for range form.certs {
		der, err := w.new()
		if err != nil {
			return err
		}
		ders = append(ders, der)
	}
	path, err := w.write(form.ext, form.bytes(w, ders))
	w.found(path, form.format, ders...)
	return err
}

// text writes a configuration file of up to twice the given size.
func (w *writer) text(size int) error {
	for len(w.lines) < 4*size {
		key, value := w.random.IntN(len(textLines)), w.random.Uint64()
		w.lines = fmt.Appendf(w.lines, textLines[key], value)
	}
	length := 64 + w.random.IntN(2*size)
	at := w.random.IntN(len(w.lines) - length)
	_, err := w.write([]string{".conf", ".ini", ".yaml", ".json", ".service", ""}[w.random.IntN(6)], w.lines[at:at+length])
	return err
}

// textLines are formats of configuration lines with a number.
var textLines = []string{
	"# ------------------------------------------------------------ section %d\n",
	"    server_name www%d.example.org; # as shipped\n",
	"  - name: worker-%d\n    image: registry.example.org/app\n",
	"[Section %d]\n",
	"LogLevel = INFO%d\n",
	"\n# BEGIN of block %d: do not edit by hand\n",
	"    \"key-%d\": {\"enabled\": true, \"limit\": 100},\n",
	"Environment=\"JAVA_OPTS=-Xmx%dm -XX:+UseG1GC --add-opens\"\n",
	"    proxy_pass http://10.0.0.1:%d/;\n\n",
	"checksum = %x\n",
}

// other writes a file without certificates to find.
func (w *writer) other(odd bool) error {
	kinds := 10
	if odd {
		kinds = 18
	}
	at := w.random.IntN(1024) * 8
	var err error
	switch w.random.IntN(kinds) {
	case 0, 1, 2, 3, 4:
		_, err = w.write([]string{".conf", ".txt", ".log", "", ".py", ".yaml"}[w.random.IntN(6)], w.words[at:at+64+w.random.IntN(6<<10)])
	case 5, 6, 7, 8:
		_, err = w.write([]string{".png", ".so", ".gz", ".db", ""}[w.random.IntN(5)], w.noise[at:at+64+w.random.IntN(16<<10)])
	case 9:
		_, err = w.write(".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: w.noise[at : at+138]}))
	case 10:
		_, err = w.write(".txt", nil)
	case 11: // PEM of other kinds
		_, err = w.write(".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: w.noise[at : at+300]}))
	case 12: // over the limit
		_, err = w.write(".log", bytes.Repeat([]byte("line\n"), 1<<20/5+1))
	case 13: // a certificate in a file that a scan ignores
		var der []byte
		if der, err = w.new(); err == nil {
			_, err = w.write([]string{".key", ".bin"}[w.random.IntN(2)], append([]byte{0x30, 0x00}, der...))
		}
	default:
		err = w.damaged()
	}
	return err
}

// damaged writes a file that a scan must report as an error.
func (w *writer) damaged() error {
	der, err := w.new()
	if err != nil {
		return err
	}
	var path string
	switch w.random.IntN(5) {
	case 0: // a block that is not a certificate
		path, err = w.write(".pem", encode(w.noise[:100]))
	case 1: // a truncated block
		block := encode(der)
		path, err = w.write(".crt", block[:len(block)/2])
	case 2:
		path, err = w.write(".der", der[:len(der)-20])
	case 3: // not base64
		path, err = w.write(".pem", bytes.Replace(encode(der), []byte("MII"), []byte("M*I"), 1))
	default:
		store := JKS(2, der)
		path, err = w.write(".jks", store[:len(store)/2])
	}
	w.tree.Damaged = append(w.tree.Damaged, path)
	return err
}

// PKCS7 returns a bundle of certificates without a signature (RFC 5652).
func PKCS7(ders ...[]byte) []byte {
	signed := bytes.Join([][]byte{
		{0x02, 0x01, 0x01, 0x31, 0x00},
		element(0x30, []byte("\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01")),
		element(0xa0, bytes.Join(ders, nil)),
		{0x31, 0x00},
	}, nil)
	info := append([]byte("\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02"), element(0xa0, element(0x30, signed))...)
	return element(0x30, info)
}

func element(tag byte, body []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{tag, 0x84}, uint32(len(body))), body...)
}

// JKS returns a Java key store of trusted certificates. Its digest is wrong, but only readers with
// a password check that.
func JKS(version byte, ders ...[]byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{0xfe, 0xed, 0xfe, 0xed, 0, 0, 0, version}, uint32(len(ders)))
	text := func(s string) { b = append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...) }
	for i, der := range ders {
		b = binary.BigEndian.AppendUint32(b, 2)
		text(fmt.Sprintf("alias%d", i))
		b = binary.BigEndian.AppendUint64(b, 1_600_000_000_000)
		if version == 2 {
			text("X.509")
		}
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(der))), der...)
	}
	return append(b, make([]byte, 20)...)
}

// TLV returns an element of DER.
func TLV(tag byte, parts ...string) string {
	body := strings.Join(parts, "")
	switch n := len(body); {
	case n < 0x80:
		return string([]byte{tag, byte(n)}) + body
	case n < 1<<8:
		return string([]byte{tag, 0x81, byte(n)}) + body
	case n < 1<<16:
		return string([]byte{tag, 0x82, byte(n >> 8), byte(n)}) + body
	default:
		return string([]byte{tag, 0x83, byte(n >> 16), byte(n >> 8), byte(n)}) + body
	}
}

const (
	pkcs7Data      = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01"
	pkcs7Encrypted = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x06"
)

// PKCS12 returns a key store (RFC 7292) of parts from the next two functions. It has no MAC.
func PKCS12(parts ...string) []byte {
	return []byte(TLV(0x30, "\x02\x01\x03", TLV(0x30, pkcs7Data, TLV(0xa0, TLV(0x04, TLV(0x30, parts...))))))
}

// PKCS12Certificate returns a part with an unencrypted certificate.
func PKCS12Certificate(der []byte) string {
	const certBag, x509Certificate = "\x06\x0b\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x0a\x01\x03", "\x06\x0a\x2a\x86\x48\x86\xf7\x0d\x01\x09\x16\x01"
	bag := TLV(0x30, certBag, TLV(0xa0, TLV(0x30, x509Certificate, TLV(0xa0, TLV(0x04, string(der))))))
	return TLV(0x30, pkcs7Data, TLV(0xa0, TLV(0x04, TLV(0x30, bag))))
}

// PKCS12Locked returns an encrypted part that no password opens. rounds, as the octets of an
// INTEGER, is the number of iterations; ciphertext is the size in bytes.
func PKCS12Locked(rounds string, ciphertext int) string {
	const with3DES = "\x06\x0a\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x01\x03"
	method := TLV(0x30, with3DES, TLV(0x30, TLV(0x04, "salt"), TLV(0x02, rounds)))
	return TLV(0x30, pkcs7Encrypted, TLV(0xa0, TLV(0x30, "\x02\x01\x00", TLV(0x30, pkcs7Data, method, TLV(0x80, strings.Repeat("x", ciphertext))))))
}
