package certfile

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/ber"
	"certctl-agent/internal/testing/corpus"
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
	sample := func(path string) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	store := corpus.PKCS12(corpus.PKCS12Certificate(der))
	rc2, rc4 := sample("../../pkcs12/testdata/rc2-40.p12"), sample("../../pkcs12/testdata/rc4.p12")
	wrapped := base64.StdEncoding.EncodeToString
	base64Of := func(b []byte) []byte {
		lines := strings.Split(string(pem.EncodeToMemory(&pem.Block{Type: "X", Bytes: b})), "\n")
		return []byte(strings.Join(lines[1:len(lines)-2], "\n"))
	}
	tests := []struct {
		what  string
		name  string
		data  []byte
		found int
		cause string // part of the only cause, or ""
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
		{"DER without an extension", "a", der, 1, ""},
		{"DER of a hash", "5ed36f99.0", der, 1, ""},
		{"DER of another hash", "5ed36f99.12", der, 1, ""},
		{"PKCS#7 without an extension", "a", corpus.PKCS7(der), 1, ""},
		{"no DER of a key by its shape", "a", []byte("\x30\x81\x87\x02\x01\x00\x30\x13\x06\x07"), 0, ""},
		{"noise", "a", append([]byte("\x30\x82\x01\x00\x30\x82\x01\x00\xa0\x03\x02\x01\x02"), make([]byte, 300)...), 0, ""},
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
		{"binary data after it", "a.pem", slices.Concat(text, []byte{0, 1, 2, 0xff}), 1, ""},
		{"DER and garbage", "a.der", slices.Concat(der, []byte{0, 0, 0}), 1, ""},
		{"DER twice", "a.der", slices.Concat(der, der), 2, ""},
		{"X509 CERTIFICATE", "a.pem", bytes.ReplaceAll(text, []byte(" CERT"), []byte(" X509 CERT")), 1, ""},
		{"PKCS#7 labelled as a certificate", "a.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: corpus.PKCS7(der, der)}), 2, ""},
		{"PKCS#7 in .cer", "a.cer", corpus.PKCS7(der), 1, ""},
		{"JKS of any name", "cacerts", corpus.JKS(2, der), 1, ""},
		{"old JKS", "a.ks", corpus.JKS(1, der, der), 2, ""},
		{"base64 without markers", "a.cer", base64Of(der), 1, ""},
		{"base64 in one line", "a.der", bytes.ReplaceAll(base64Of(der), []byte("\n"), nil), 1, ""},
		{"base64 of a key store", "a.jks", base64Of(corpus.JKS(2, der)), 1, ""},
		{"base64 of PKCS#12", "a.p12", base64Of(store), 1, ""},
		{"but not under the name of a certificate", "a.cer", base64Of(store), 0, errBase64Store.Error()},
		{"base64 of PKCS#7", "a.p7b", base64Of(corpus.PKCS7(der, der)), 2, ""},
		{"base64 of a key", "a.pem", base64Of([]byte("\x30\x81\x87\x02\x01\x00\x30\x13\x06\x07")), 0, ""},
		{"PKCS#12 with markers", "a.pem", pem.EncodeToMemory(&pem.Block{Type: "PKCS12", Bytes: store}), 1, ""},
		{"and without an extension", "a", pem.EncodeToMemory(&pem.Block{Type: "PKCS12", Bytes: store}), 1, ""},
		{"PKCS#12 labelled as a certificate", "a.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: store}), 0, errNoCertificate.Error()},
		{"PKCS#12 with markers in base64", "a.yaml", []byte("a: " + wrapped(slices.Concat(text, pem.EncodeToMemory(&pem.Block{Type: "PKCS12", Bytes: store})))), 1, ""},
		{"PKCS#12 in 40-bit RC2", "a.p12", rc2, 1, ""},
		{"PKCS#12 in RC4", "a.p12", rc4, 1, ""},
		{"kubeconfig", "config", []byte("clusters:\n- cluster:\n    certificate-authority-data: " + wrapped(text) + "\n    server: https://x\nusers:\n- user:\n    client-certificate-data: " +
			wrapped(text) + "\n    client-key-data: " + wrapped(key) + "\n"), 2, ""},
		{"kubeconfig in JSON", "config", []byte(`{"certificate-authority-data":"` + wrapped(text) + `","client-key-data":"` + wrapped(key) + `"}`), 1, ""},
		{"Traefik", "acme.json", []byte(`{"le":{"Certificates":[{"certificate":"` + wrapped(slices.Concat(text, text)) + `","key":"` + wrapped(key) + `"}]}}`), 2, ""},
		{"secret in folded YAML", "a.yaml", []byte("data:\n  tls.crt: >\n    " + wrapped(text)[:100] + "\n    " + wrapped(text)[100:] + "\n  tls.key: " + wrapped(key) + "\n"), 1, ""},
		{"without padding", "a.yaml", []byte("tls.crt: " + strings.TrimRight(wrapped(append(text, '\n')), "=") + "\ntls.key: " + wrapped(key) + "\n"), 1, ""},
		{"certificate and key in one value", "a.yaml", []byte("a: " + wrapped(slices.Concat(text, key))), 1, ""},
		{"the beginning of a value, as an example", "a.md", []byte("`" + wrapped(text)[:64] + "...`"), 0, ""},
		{"a damaged value", "a.yaml", []byte("a: " + wrapped(text[:90])), 0, ""},

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
		{"truncated DER", "a.der", der[:len(der)-9], 0, ber.ErrTruncated.Error()},
		{"truncated DER without an extension", "a", der[:len(der)-9], 0, ber.ErrTruncated.Error()},
		{"damaged PKCS#12 with markers", "a.pem", pem.EncodeToMemory(&pem.Block{Type: "PKCS12", Bytes: store[:200]}), 0, "damaged PKCS#12"},
		{"BKS", "a.bks", sample("testdata/seeds/bc.bks"), 0, errBouncyCastle.Error()},
		{"UBER", "a.jks", sample("testdata/seeds/bc.uber"), 0, errBouncyCastle.Error()},
		{"BCFKS", "a.keystore", sample("testdata/seeds/bc.bcfks"), 0, errBouncyCastle.Error()},
		{"DER of another kind as a store", "a.p12", []byte{0x30, 3, 2, 1, 0}, 0, errUnknown.Error()},
		{"damaged inside", "a.der", bytes.Replace(der, []byte("261123"), []byte("26xx23"), 1), 0, "x509: "},
		{"damaged JKS", "a.jks", corpus.JKS(2, der, der)[:len(der)+100], 1, "the Java key store is truncated"},
		{"unknown entry of a JKS", "a.jks", bytes.Replace(corpus.JKS(2, der), []byte{0, 0, 0, 2, 0, 6}, []byte{0, 0, 0, 9, 0, 6}, 1), 0, "unknown kind 9"},
		{"secret key in a JCEKS", "a.jks", bytes.Replace(bytes.Replace(corpus.JKS(2, der), []byte{0xfe, 0xed, 0xfe, 0xed}, []byte{0xce, 0xce, 0xce, 0xce}, 1), []byte{0, 0, 0, 2, 0, 6}, []byte{0, 0, 0, 3, 0, 6}, 1), 0, "the Java key store holds a secret key"},
		{"damaged PKCS#7", "a.p7b", corpus.PKCS7(der)[:200], 0, "damaged PKCS#7"},
		{"UTF-16", "a.pem", utf16(text), 0, errUnknown.Error()},
		{"not DER", "a.der", []byte("text"), 0, errUnknown.Error()},
		{"unknown store", "a.jks", []byte{1, 2, 3, 4}, 0, errUnknown.Error()},
	}
	for _, test := range tests {
		parser := Parser{Passwords: []string{"correct horse"}}
		var found []api.DiscoveredCertificate
		var causes []string
		err := parser.Parse(test.name, test.data).Report("/x/"+test.name,
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
		if len(found) > 0 && len(test.data) >= HeadSize && !WorthReading(test.name, test.data[:HeadSize]) {
			t.Errorf("%s: WorthReading rejects it", test.what)
		}
		if len(found)+len(causes) > 0 && !WorthParsing(test.name, test.data) {
			t.Errorf("%s: WorthParsing rejects a file with content", test.what)
		}
	}
}

func TestIndexMarker(t *testing.T) {
	text := []byte("B-----BEGIM -----BEGIN-----BEGIN X " + wrappedBegin[1:] + wrappedBegin + "BB")
	for from := range text {
		for _, marker := range []string{pemBegin, wrappedBegin} {
			for _, data := range [][]byte{text[from:], text[:from]} {
				if got, want := indexMarker(data, marker), bytes.Index(data, []byte(marker)); got != want {
					t.Errorf("%q is at %d of %q, want %d", marker, got, data, want)
				}
			}
		}
		if got := text[from:]; hasMarker(got) != (bytes.Contains(got, []byte(pemBegin)) || bytes.Contains(got, []byte(wrappedBegin))) {
			t.Errorf("%q has a marker: %v", got, hasMarker(got))
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
	store, err := os.ReadFile("../../pkcs12/testdata/secret.p12")
	if err != nil {
		f.Fatal(err)
	}
	wrapped := base64.StdEncoding.EncodeToString
	for _, data := range [][]byte{[]byte("tls.crt: " + wrapped(text) + "\n"), []byte(wrapped(store)), []byte(wrapped(der)),
		pem.EncodeToMemory(&pem.Block{Type: "PKCS12", Bytes: store}), text, der, store, corpus.PKCS7(der), corpus.JKS(1, der), corpus.JKS(2, der),
		pem.EncodeToMemory(&pem.Block{Type: "PKCS7", Bytes: corpus.PKCS7(der)})} {
		f.Add(data)
	}
	var files []string
	for _, pattern := range []string{"testdata/seeds/*", "../../pkcs12/testdata/*.p12", "../../jks/testdata/*.jceks"} {
		matches, err := filepath.Glob(pattern)
		if err != nil || len(matches) == 0 {
			f.Fatalf("no samples in %s: %v", pattern, err)
		}
		files = append(files, matches...)
	}
	for _, file := range files {
		if name := filepath.Base(file); name == "gnutls.p12" || name == "nss.p12" {
			continue // 600,000 iterations each take seconds; under load the fuzzer would see a hang
		}
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
}

// fuzzFile parses data as a file with that name and checks the outcome.
func fuzzFile(t *testing.T, name string, data []byte) {
	const limit = 1 << 16
	if len(data) > limit {
		return
	}
	before := bytes.Clone(data)
	parser := Parser{Passwords: []string{"correct horse"}}
	outcome := parser.Parse(name, data)
	if !outcome.Empty() && !WorthParsing(name, data) {
		t.Error("WorthParsing rejects a file with content")
	}
	err := outcome.Report("/x", func(cert api.DiscoveredCertificate) error {
		block, rest := pem.Decode([]byte(cert.PEMData))
		if block == nil || len(rest) > 0 || block.Type != "CERTIFICATE" {
			t.Errorf("PEM of a certificate: %q", cert.PEMData)
		}
		for _, s := range append([]string{cert.CommonName, cert.SubjectDN, cert.IssuerDN}, cert.SANs...) {
			if s != api.Text(s) {
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

// FuzzShape parses files whose names suggest nothing.
func FuzzShape(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) { fuzzFile(t, "a", data) })
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
		new(Parser).outcome(c)
	})
}

// FuzzPEM checks that every certificate that encoding/pem finds is found.
func FuzzPEM(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		fuzzFile(t, "a.pem", data)
		found := make(map[[sha256.Size]byte]bool)
		pemBlocks(data, func(block pemBlock) { found[sha256.Sum256(block.der)] = true })
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if block.Type != "CERTIFICATE" || len(block.Bytes) == 0 || bytes.ContainsAny(data, ":\\\v\f\x85\xa0") {
				continue // encoding/pem accepts some of these, in places where no tool writes them
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

// FuzzOutcome checks that damaged outcomes cause errors and no panics.
func FuzzOutcome(f *testing.F) {
	text, _ := testCertificate(f)
	var parser Parser
	f.Add([]byte(parser.Parse("a.pem", text)))
	f.Add([]byte(parser.Parse("a.der", []byte("x"))))
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = Outcome(data).Report("/x", func(api.DiscoveredCertificate) error { return nil }, func(string) {})
	})
}

// TestPKCS12Work checks that the cost of a file does not grow with its iterations, its parts, its
// size or the number of passwords.
func TestPKCS12Work(t *testing.T) {
	many := make([]string, 1000)
	armour := func(stores ...[]byte) (all []byte) {
		for _, store := range stores {
			all = append(all, pem.EncodeToMemory(&pem.Block{Type: "PKCS12", Bytes: store})...)
		}
		return all
	}
	const million = "\x0f\x42\x40"
	for _, test := range []struct {
		what      string
		data      []byte
		passwords []string
		costly    bool
	}{
		{"a thousand iterations, ten passwords", corpus.PKCS12(corpus.PKCS12Locked("\x03\xe8", 16)), many[:10], false},
		{"a million iterations, ten passwords", corpus.PKCS12(corpus.PKCS12Locked(million, 16)), many[:10], true},
		{"two thousand million", corpus.PKCS12(corpus.PKCS12Locked("\x7f\xff\xff\xff", 16)), nil, true},
		{"300,000 in each of four parts", corpus.PKCS12(strings.Repeat(corpus.PKCS12Locked("\x04\x93\xe0", 16), 4)), many[:1], true},
		{"a megabyte, a thousand passwords", corpus.PKCS12(corpus.PKCS12Locked("\x01", 1<<20-8)), many, true},
		{"several in one file", armour(corpus.PKCS12(corpus.PKCS12Locked(million, 16)), corpus.PKCS12(corpus.PKCS12Locked(million, 16)), corpus.PKCS12(corpus.PKCS12Locked(million, 16))), nil, true},
	} {
		c := parse("a.p12", test.data, test.passwords)
		if !c.locked || c.stores.Work < 0 {
			t.Errorf("%s: locked %v, %d of %d work left", test.what, c.locked, c.stores.Work, maxWork)
		}
		if named := slices.Contains(c.causes, errCostly.Error()); named != test.costly {
			t.Errorf("%s: %q", test.what, c.causes)
		}
	}
}

func mustDecode(cert []byte) []byte {
	block, _ := pem.Decode(cert)
	return block.Bytes
}
