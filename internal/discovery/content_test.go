package discovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"certctl-agent/internal/api"
	"certctl-agent/internal/discovery/corpus"
)

func testCertificate(t testing.TB) (text, der []byte) {
	t.Helper()
	text, err := os.ReadFile("testdata/ed25519.pem")
	if err != nil {
		t.Fatal(err)
	}
	return text, mustDecode(text)
}

func TestParse(t *testing.T) {
	text, der := testCertificate(t)
	lines := strings.SplitAfter(string(text), "\n")
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})
	utf16 := func(b []byte) []byte {
		var wide []byte
		for _, c := range b {
			wide = append(wide, c, 0)
		}
		return wide
	}
	tests := []struct {
		what  string
		name  string
		data  []byte
		found int
		cause string // part of the only one, or ""
	}{
		{"PEM", "a.pem", text, 1, ""},
		{"upper case", "A.CRT", text, 1, ""},
		{"no extension", "fullchain", text, 1, ""},
		{"any extension", "a.conf", text, 1, ""},
		{"not of a key", "a.key", text, 0, ""},
		{"PEM in .der", "a.der", text, 1, ""},
		{"PEM in .p12", "a.p12", text, 1, ""},
		{"DER", "a.der", der, 1, ""},
		{"DER in .crt", "a.crt", der, 1, ""},
		{"DER in .pem", "a.pem", der, 1, ""},
		{"no DER under other names", "a.bin", der, 0, ""},
		{"nor without a name", "a", der, 0, ""},
		{"twice", "a.pem", slices.Concat(text, text), 2, ""},
		{"key between", "a.pem", slices.Concat(text, key, text), 2, ""},
		{"CRLF", "a.pem", bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n")), 1, ""},
		{"CR alone", "a.pem", bytes.ReplaceAll(text, []byte("\n"), []byte("\r")), 1, ""},
		{"byte order mark", "a.pem", append([]byte("\xef\xbb\xbf"), text...), 1, ""},
		{"no line feed between", "a.pem", bytes.ReplaceAll(slices.Concat(text, text), []byte("-----\n-----"), []byte("----------")), 2, ""},
		{"no line feed at the end", "a.pem", bytes.TrimSpace(text), 1, ""},
		{"indented", "a.yaml", []byte("  x: |\n    " + strings.Join(lines, "    ")), 1, ""},
		{"JSON", "a.json", []byte(`{"x":"` + strings.ReplaceAll(string(text), "\n", `\n`) + `"}`), 1, ""},
		{"header", "a.pem", []byte(lines[0] + "Comment: this\n\n" + strings.Join(lines[1:], "")), 1, ""},
		{"text around", "a.pem", slices.Concat([]byte("subject=x\n"), text, []byte("trailing")), 1, ""},
		{"binary behind", "a.pem", slices.Concat(text, []byte{0, 1, 2, 0xff}), 1, ""},
		{"DER and garbage", "a.der", slices.Concat(der, []byte{0, 0, 0}), 1, ""},
		{"DER twice", "a.der", slices.Concat(der, der), 2, ""},
		{"X509 CERTIFICATE", "a.pem", bytes.ReplaceAll(text, []byte(" CERT"), []byte(" X509 CERT")), 1, ""},
		{"PKCS#7 labelled as a certificate", "a.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: corpus.PKCS7(der, der)}), 2, ""},
		{"PKCS#7 in .cer", "a.cer", corpus.PKCS7(der), 1, ""},
		{"JKS of any name", "cacerts", corpus.JKS(2, der), 1, ""},
		{"old JKS", "a.ks", corpus.JKS(1, der, der), 2, ""},

		{"no certificate", "a.pem", key, 0, ""},
		{"text", "a.crt", []byte("this is not a certificate"), 0, ""},
		{"text that begins like DER", "a.crt", []byte("0123456789 is text"), 0, ""},
		{"empty", "a.pem", nil, 0, ""},
		{"DER of a key", "a.der", []byte{0x30, 3, 2, 1, 0}, 0, ""},
		{"an example in a text", "a.md", []byte("like `-----BEGIN CERTIFICATE-----...-----END CERTIFICATE-----`"), 0, ""},
		{"BEGIN in a program", "a.c", []byte(`#define X "-----BEGIN CERTIFICATE-----"`), 0, ""},

		{"damaged base64", "a.pem", bytes.Replace(text, []byte("MII"), []byte("M=I"), 1), 0, errPEM.Error()},
		{"no certificate in the block", "a.pem", bytes.ReplaceAll(key, []byte("PRIVATE KEY"), []byte("CERTIFICATE")), 0, errNoCertificate.Error()},
		{"no end", "a.txt", text[:len(text)-30], 0, errPEM.Error()},
		{"one without an end before a good one", "a.pem", slices.Concat(text[:100], []byte("\n"), text), 1, errPEM.Error()},
		{"truncated DER", "a.der", der[:len(der)-9], 0, errTruncated.Error()},
		{"damaged inside", "a.der", bytes.Replace(der, []byte("261123"), []byte("26xx23"), 1), 0, "x509: "},
		{"damaged JKS", "a.jks", corpus.JKS(2, der, der)[:len(der)+100], 1, errJKSTruncated.Error()},
		{"unknown entry of a JKS", "a.jks", bytes.Replace(corpus.JKS(2, der), []byte{0, 0, 0, 2, 0, 6}, []byte{0, 0, 0, 9, 0, 6}, 1), 0, "unknown kind 9"},
		{"secret key in a JCEKS", "a.jks", bytes.Replace(bytes.Replace(corpus.JKS(2, der), []byte{0xfe, 0xed, 0xfe, 0xed}, []byte{0xce, 0xce, 0xce, 0xce}, 1), []byte{0, 0, 0, 2, 0, 6}, []byte{0, 0, 0, 3, 0, 6}, 1), 0, errJKSSecret.Error()},
		{"damaged PKCS#7", "a.p7b", corpus.PKCS7(der)[:200], 0, "damaged PKCS#7"},
		{"UTF-16", "a.pem", utf16(text), 0, errUnknown.Error()},
		{"not DER", "a.der", []byte("text"), 0, errUnknown.Error()},
		{"unknown store", "a.jks", []byte{1, 2, 3, 4}, 0, errUnknown.Error()},
	}
	for _, test := range tests {
		c := parse(test.name, test.data, nil)
		var known certificates
		var found []api.DiscoveredCertificate
		var causes []string
		err := emitOutcome(appendOutcome(nil, c, &known), "/x/"+test.name,
			func(cert api.DiscoveredCertificate) error { found = append(found, cert); return nil },
			func(cause string) { causes = append(causes, cause) })
		if err != nil {
			t.Errorf("%s: %v", test.what, err)
		}
		if len(found) != test.found {
			t.Errorf("%s: found %d certificates, want %d; causes %q", test.what, len(found), test.found, causes)
		}
		for _, cert := range found {
			if cert.PEMData != string(text) || cert.CommonName != "ed.example.org" {
				t.Errorf("%s: found %+v", test.what, cert)
			}
		}
		if test.cause == "" && len(causes) > 0 || test.cause != "" && (len(causes) != 1 || !strings.Contains(causes[0], test.cause)) {
			t.Errorf("%s: causes %q, want %q", test.what, causes, test.cause)
		}
		if len(found) > 0 && len(test.data) >= headSize && !worthReading(test.name, test.data[:headSize]) {
			t.Errorf("%s: the head hides the certificate", test.what)
		}
	}
}

func TestNamesAreSafeText(t *testing.T) {
	for in, want := range map[string]string{"plain": "plain", "a\x00b": "a\uFFFDb", "a\xffb": "a\uFFFDb", "": ""} {
		if got := text(in); got != want {
			t.Errorf("text(%q) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{"/a/é": "/a/é", "/a/\xe9": `/a/\xe9`, "/a/\xff\x01": "/a/\\xff\x01"} {
		if got := printablePath(in); got != want {
			t.Errorf("printablePath(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestEncodePEM(t *testing.T) {
	for size := range 200 {
		der := bytes.Repeat([]byte{0xa5}, size)
		if got, want := encodePEM(der), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); got != want {
			t.Fatalf("%d bytes: %q, want %q", size, got, want)
		}
	}
}

// addSeeds adds one file of each kind.
func addSeeds(f *testing.F) {
	text, der := testCertificate(f)
	store, err := os.ReadFile("testdata/secret.p12")
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range [][]byte{text, der, store, corpus.PKCS7(der), corpus.JKS(1, der), corpus.JKS(2, der),
		pem.EncodeToMemory(&pem.Block{Type: "PKCS7", Bytes: corpus.PKCS7(der)})} {
		f.Add(data)
	}
	files, err := filepath.Glob("testdata/seeds/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
}

// fuzzFile parses data as a file of that name, and checks what comes out.
func fuzzFile(t *testing.T, name string, data []byte) {
	const limit = 1 << 16
	if len(data) > limit {
		return
	}
	before := bytes.Clone(data)
	var known certificates
	outcome := appendOutcome(nil, parse(name, data, []string{"correct horse"}), &known)
	err := emitOutcome(outcome, "/x", func(cert api.DiscoveredCertificate) error {
		block, rest := pem.Decode([]byte(cert.PEMData))
		if block == nil || len(rest) > 0 || block.Type != "CERTIFICATE" {
			t.Errorf("PEM of a certificate: %q", cert.PEMData)
		}
		for _, s := range append([]string{cert.CommonName, cert.SubjectDN, cert.IssuerDN}, cert.SANs...) {
			if s != text(s) {
				t.Errorf("unsafe text %q", s)
			}
		}
		return nil
	}, func(string) {})
	if err != nil {
		t.Error(err)
	}
	if !bytes.Equal(before, data) {
		t.Error("the file's bytes were changed")
	}
}

func FuzzStore(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) { fuzzFile(t, "a.p12", data) })
}

func FuzzDER(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) { fuzzFile(t, "a.der", data) })
}

func FuzzJKS(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		fuzzFile(t, "a.jks", append([]byte{0xfe, 0xed, 0xfe, 0xed, 0, 0, 0, 2, 0, 0, 0, 2}, data...))
	})
}

func FuzzPKCS7(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		var c content
		_ = c.pkcs7(data)
		var known certificates
		appendOutcome(nil, c, &known)
	})
}

func FuzzPKCS12(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		if bytes.Contains(data, []byte("\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0c")) && len(data) > 2000 {
			return // key derivation takes its time
		}
		var c content
		c.pkcs12(data, []string{"correct horse"})
		var known certificates
		appendOutcome(nil, c, &known)
	})
}

// FuzzPEM: every certificate that encoding/pem finds is found.
func FuzzPEM(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		fuzzFile(t, "a.pem", data)
		found := make(map[[sha256.Size]byte]bool)
		pemBlocks(data, func(block pemBlock) { found[sha256.Sum256(block.der)] = true })
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if block.Type != "CERTIFICATE" || len(block.Bytes) == 0 || bytes.ContainsAny(data, ":\\\v\f\x85\xa0") {
				continue // pem takes some of these, in places where no tool writes them
			}
			if !found[sha256.Sum256(block.Bytes)] {
				t.Errorf("encoding/pem finds a block that was not found in %q", data)
			}
		}
	})
}

func FuzzCertificate(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, der []byte) {
		checkAgainstGo(t, der)
	})
}

// FuzzOutcome: what a damaged index holds is an error, and no more.
func FuzzOutcome(f *testing.F) {
	text, _ := testCertificate(f)
	var known certificates
	f.Add(appendOutcome(nil, parse("a.pem", text, nil), &known))
	f.Add(appendOutcome(nil, parse("a.der", []byte("x"), nil), &known))
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = emitOutcome(data, "/x", func(api.DiscoveredCertificate) error { return nil }, func(string) {})
	})
}

func FuzzIndex(f *testing.F) {
	header := indexHeader([]string{"/a"})
	f.Add([]byte{})
	f.Add(make([]byte, blockHeader))
	f.Add([]byte("\x03\x00\x00\x00\x00\x00\x00\x00\x02d\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := newIndexReader(iotest.HalfReader(bytes.NewReader(append(bytes.Clone(header), data...))), header)
		if err != nil {
			t.Fatal(err)
		}
		for {
			file, err := r.next()
			if err != nil {
				return
			}
			_ = emitOutcome(file.outcome, "/x", func(api.DiscoveredCertificate) error { return nil }, func(string) {})
		}
	})
}

// A file with many encrypted parts would ask for the work of many files.
func TestPKCS12Parts(t *testing.T) {
	tlv := func(tag byte, parts ...string) string {
		body := strings.Join(parts, "")
		return string([]byte{tag, 0x82, byte(len(body) >> 8), byte(len(body))}) + body
	}
	oid := func(id string) string { return tlv(tagOID, id) }
	method := tlv(tagSequence, oid(oidPBE+"\x03"), tlv(tagSequence, tlv(tagOctetString, "salt"), tlv(tagInteger, "\x01")))
	part := tlv(tagSequence, oid(oidEncryptedData), tlv(tagExplicit0, tlv(tagSequence, tlv(tagInteger, "\x00"),
		tlv(tagSequence, oid(oidData), method, tlv(tagContext0, strings.Repeat("x", 16))))))
	for parts, want := range map[int]error{maxEncrypted: errPKCS12Locked, maxEncrypted + 1: errPKCS12Parts} {
		var c content
		c.pkcs12([]byte(tlv(tagSequence, tlv(tagInteger, "\x03"), tlv(tagSequence, oid(oidData),
			tlv(tagExplicit0, tlv(tagOctetString, tlv(tagSequence, strings.Repeat(part, parts))))))), nil)
		if last := c.causes[len(c.causes)-1]; last != want.Error() {
			t.Errorf("%d parts: got %q", parts, c.causes)
		}
	}
}
