package certfile

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"certctl-agent/internal/api"
	"certctl-agent/internal/ber"
	"certctl-agent/internal/testing/corpus"
	"certctl-agent/internal/testing/needs"
)

// isUncommon reports whether pkix has no name for an attribute.
func isUncommon(a pkix.AttributeTypeAndValue) bool {
	return !slices.Contains(commonAttributes, a.Type.String())
}

// checkAgainstGo checks that certificates that crypto/x509 can read are described the same way.
func checkAgainstGo(t *testing.T, der []byte) {
	t.Helper()
	got, err := describe(der)
	if err == nil && (got.NotBefore == "" || got.NotAfter == "" || got.SANs == nil) {
		t.Errorf("incomplete certificate: %+v", got)
	}
	cert, goErr := x509.ParseCertificate(der)
	if goErr != nil || err == errCut {
		return
	}
	want := api.DiscoveredCertificate{
		CommonName:   api.Text(cert.Subject.CommonName),
		SANs:         []string{},
		SerialNumber: cert.SerialNumber.Text(16),
		IssuerDN:     got.IssuerDN,
		SubjectDN:    got.SubjectDN,
		NotBefore:    cert.NotBefore.UTC().Format(time.RFC3339),
		NotAfter:     cert.NotAfter.UTC().Format(time.RFC3339),
		KeyAlgorithm: got.KeyAlgorithm,
		KeySize:      got.KeySize,
		IsCA:         cert.IsCA,
	}
	for _, name := range cert.DNSNames {
		want.SANs = append(want.SANs, api.Text(name))
	}
	for _, address := range cert.EmailAddresses {
		want.SANs = append(want.SANs, api.Text(address))
	}
	for _, ip := range cert.IPAddresses {
		want.SANs = append(want.SANs, ip.String())
	}
	for _, uri := range cert.URIs {
		want.SANs = append(want.SANs, api.Text(uri.String()))
	}
	if !slices.ContainsFunc(cert.Issuer.Names, isUncommon) {
		want.IssuerDN = api.Text(cert.Issuer.String())
	}
	if !slices.ContainsFunc(cert.Subject.Names, isUncommon) {
		want.SubjectDN = api.Text(cert.Subject.String())
	}
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		want.KeyAlgorithm, want.KeySize = "RSA", key.N.BitLen()
	case *ecdsa.PublicKey:
		want.KeyAlgorithm, want.KeySize = "ECDSA", key.Curve.Params().BitSize
	case ed25519.PublicKey:
		want.KeyAlgorithm, want.KeySize = "Ed25519", 256
	}
	if cert.PublicKeyAlgorithm == x509.DSA {
		want.KeyAlgorithm, want.KeySize = "DSA", got.KeySize // TestKeysOpenSSLMakes knows the size
	}
	if cert.Version < 3 {
		// Go reads no extensions here, and openssl does.
		want.IsCA, want.SANs = got.IsCA, got.SANs
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%x:\n got %+v, %v\nwant %+v", der, got, err, want)
	}
}

// TestNamesAsGoWritesThem checks that names with only common attributes have Go's format.
func TestNamesAsGoWritesThem(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	values := []string{"", "a", "Example, Inc.", " lead", "trail ", "#hash", "a#b", `q"uo\te`, "a+b=c;d<e>f", "grüezi", "日本", " ", "  ", "a b", "\x00", "\U0001F600"}
	types := []byte{3, 5, 6, 7, 8, 9, 10, 11, 17}
	for range 20_000 {
		var rdns []string
		for range random.IntN(8) {
			var set []string
			for range 1 + random.IntN(4)/3*random.IntN(3) {
				value := values[random.IntN(len(values))]
				tag := byte(ber.TagUTF8String)
				switch random.IntN(4) {
				case 0:
					tag = ber.TagT61String
				case 1:
					tag = ber.TagBMPString
					var wide []byte
					for _, unit := range utf16.Encode([]rune(strings.ReplaceAll(value, "\U0001F600", "x"))) {
						wide = append(wide, byte(unit>>8), byte(unit))
					}
					value = string(wide)
				}
				set = append(set, tlv(ber.TagSequence, tlv(ber.TagOID, "\x55\x04"+string(types[random.IntN(len(types))])), tlv(tag, value)))
			}
			rdns = append(rdns, tlv(0x31, set...))
		}
		p := ordinaryParts()
		p.subject, p.issuer = tlv(ber.TagSequence, rdns...), tlv(ber.TagSequence, slices.Concat(rdns, rdns)...)
		cert, err := x509.ParseCertificate(p.der())
		if err != nil {
			t.Fatalf("crypto/x509 does not read the name %x: %v", p.subject, err)
		}
		got, err := describe(p.der())
		if err != nil || got.SubjectDN != api.Text(cert.Subject.String()) || got.IssuerDN != api.Text(cert.Issuer.String()) || got.CommonName != api.Text(cert.Subject.CommonName) {
			t.Fatalf("%x: got %q, %q, %q, %v\nwant %q, %q, %q", p.der(), got.SubjectDN, got.IssuerDN, got.CommonName, err,
				cert.Subject, cert.Issuer, cert.Subject.CommonName)
		}
	}
}

func tlv(tag byte, parts ...string) string { return corpus.TLV(tag, parts...) }

// rdn returns an RDN with one attribute of type 2.5.4.id.
func rdn(id, tag byte, text string) string {
	return tlv(0x31, tlv(ber.TagSequence, tlv(ber.TagOID, "\x55\x04"+string(id)), tlv(tag, text)))
}

// parts are the fields of a certificate to encode. Its signature is invalid.
type parts struct {
	version, serial, issuer, notBefore, notAfter, subject, key, extensions string
}

func ordinaryParts() parts {
	return parts{
		version:   tlv(ber.TagExplicit0, tlv(ber.TagInteger, "\x02")),
		serial:    tlv(ber.TagInteger, "\x07"),
		issuer:    tlv(ber.TagSequence, rdn(3, ber.TagUTF8String, "ca")),
		notBefore: tlv(ber.TagUTCTime, "250101000000Z"),
		notAfter:  tlv(ber.TagUTCTime, "350101000000Z"),
		subject:   tlv(ber.TagSequence, rdn(3, ber.TagUTF8String, "host")),
		key:       tlv(ber.TagSequence, tlv(ber.TagSequence, tlv(ber.TagOID, "\x2b\x65\x70")), tlv(ber.TagBitString, "\x00"+strings.Repeat("k", 32))),
	}
}

func (p parts) der() []byte {
	extensions := ""
	if p.extensions != "" {
		extensions = tlv(ber.TagExplicit3, tlv(ber.TagSequence, p.extensions))
	}
	algorithm := tlv(ber.TagSequence, tlv(ber.TagOID, "\x2b\x65\x70"))
	return []byte(tlv(ber.TagSequence, tlv(ber.TagSequence, p.version, p.serial, algorithm, p.issuer, tlv(ber.TagSequence, p.notBefore, p.notAfter),
		p.subject, p.key, extensions), algorithm, tlv(ber.TagBitString, "\x00"+strings.Repeat("s", 64))))
}

func extension(id string, content ...string) string {
	return tlv(ber.TagSequence, tlv(ber.TagOID, id), tlv(ber.TagOctetString, content...))
}

// TestOddCertificates covers certificates that crypto/x509 refuses because of one field. All other
// fields must be described. If openssl is installed, it must read the certificate, too, and agree.
func TestOddCertificates(t *testing.T) {
	t.Parallel()
	const alone = "openssl refuses it"
	subject := func(rdns ...string) func(*parts) {
		return func(p *parts) { p.subject = tlv(ber.TagSequence, rdns...) }
	}
	extensions := func(list ...string) func(*parts) {
		return func(p *parts) { p.extensions = strings.Join(list, "") }
	}
	constraints := func(content string) func(*parts) { return extensions(extension(oidBasicConstraints, content)) }
	names := func(list ...string) string { return extension(oidSubjectAltName, tlv(ber.TagSequence, list...)) }
	notBefore := func(tag byte, text string) func(*parts) { return func(p *parts) { p.notBefore = tlv(tag, text) } }
	serial := func(octets string) func(*parts) { return func(p *parts) { p.serial = tlv(ber.TagInteger, octets) } }
	ca := tlv(ber.TagSequence, tlv(ber.TagBoolean, "\xff"))

	tests := []struct {
		what   string
		change func(*parts)
		want   string // the fields that differ from those of the ordinary certificate
		remark string
	}{
		{"underscore in a PrintableString", subject(rdn(3, ber.TagPrintableString, "a_b")), "cn=a_b dn=CN=a_b", ""},
		{"at sign in a PrintableString", subject(rdn(10, ber.TagPrintableString, "a@b"), rdn(3, ber.TagUTF8String, "x")), "cn=x dn=CN=x,O=a@b", ""},
		{"letters in a NumericString", subject(rdn(3, ber.TagNumericString, "abc")), "cn=abc dn=CN=abc", ""},
		{"VisibleString", subject(rdn(3, ber.TagVisibleString, "abc")), "cn=abc dn=CN=abc", alone},
		{"UniversalString", subject(rdn(3, ber.TagUniversalString, "\x00\x00\x00a\x00\x01\xf6\x00")), "cn=a\U0001F600 dn=CN=a\U0001F600", ""},
		{"Latin-1 in an IA5String", subject(rdn(3, ber.TagIA5String, "gr\xfcezi")), "cn=grüezi dn=CN=grüezi", ""},
		{"Latin-1 in a UTF8String", subject(rdn(3, ber.TagUTF8String, "gr\xfcezi")), "cn=grüezi dn=CN=grüezi", alone},
		{"UTF-8 in a PrintableString", subject(rdn(3, ber.TagPrintableString, "gr\xc3\xbcezi")), "cn=grüezi dn=CN=grüezi", alone},
		{"half a character in a BMPString", subject(rdn(3, ber.TagBMPString, "\x00a\x00")), "cn=a dn=CN=a", alone},
		{"an INTEGER as a name", subject(rdn(10, ber.TagInteger, "\x05"), rdn(3, ber.TagUTF8String, "x")), "cn=x dn=CN=x,O=#020105", alone},
		{"an unknown attribute", subject(rdn(3, ber.TagUTF8String, "x"), tlv(0x31, tlv(ber.TagSequence, tlv(ber.TagOID, "\x2a\x03\x04"), tlv(ber.TagIA5String, "y")))),
			"cn=x dn=1.2.3.4=#160179,CN=x", ""},
		{"no attribute", subject(rdn(3, ber.TagUTF8String, "x"), tlv(0x31, tlv(ber.TagSequence, tlv(ber.TagInteger, "\x01")))), "cn=x dn=#31053003020101,CN=x", alone},
		{"an attribute without a value", subject(rdn(3, ber.TagUTF8String, "x"), tlv(0x31, tlv(ber.TagSequence, tlv(ber.TagOID, "\x55\x04\x0a")))), "cn=x dn=#31073005060355040a,CN=x", alone},
		{"a truncated name", subject(rdn(3, ber.TagUTF8String, "x"), "\x31\x20"), "cn=x dn=#310a300806035504030c01783120,CN=x", alone},
		{"TRUE as 1", constraints(tlv(ber.TagSequence, tlv(ber.TagBoolean, "\x01"))), "ca=true", ""},
		{"FALSE said", constraints(tlv(ber.TagSequence, tlv(ber.TagBoolean, "\x00"))), "", ""},
		{"a long length", constraints("\x30\x81\x03" + tlv(ber.TagBoolean, "\xff")), "ca=true", ""},
		{"a length with leading zeros", constraints("\x30\x85\x00\x00\x00\x00\x03" + tlv(ber.TagBoolean, "\xff")), "ca=true", ""},
		{"an indefinite length", constraints("\x30\x80" + tlv(ber.TagBoolean, "\xff") + "\x00\x00"), "ca=true", ""},
		{"critical as 1", extensions(tlv(ber.TagSequence, tlv(ber.TagOID, oidBasicConstraints), tlv(ber.TagBoolean, "\x01"), tlv(ber.TagOctetString, ca))), "ca=true", ""},
		{"an extension of noise", extensions(extension("\x55\x1d\x0f", "noise"), extension(oidBasicConstraints, ca)), "ca=true", ""},
		{"names of noise", extensions(extension(oidSubjectAltName, "noise"), extension(oidBasicConstraints, ca)), "ca=true", ""},
		{"an extension twice", extensions(extension(oidBasicConstraints, ca), names(tlv(0x82, "a")), names(tlv(0x82, "b"))), "ca=true san=a,b", ""},
		{"extensions of version 1", func(p *parts) { p.version = ""; p.extensions = extension(oidBasicConstraints, ca) }, "ca=true", ""},
		{"damage after a name", extensions(names(tlv(0x82, "a"), "\x82\x20")), "san=a", ""},
		{"an address of five bytes", extensions(names(tlv(0x87, "\x01\x02\x03\x04\x05"), tlv(0x82, "a"))), "san=a,?0102030405", ""},
		{"an invalid URI", extensions(names(tlv(0x86, "http://a b/%zz"))), "san=http://a b/%zz", ""},
		{"Latin-1 in a host name", extensions(names(tlv(0x82, "a\xfc"))), "san=a\uFFFD", ""},
		{"a host name in a directory name", extensions(names(tlv(0xa4, tlv(ber.TagSequence)), tlv(0x82, "a"))), "san=a", ""},
		{"no seconds", notBefore(ber.TagUTCTime, "2501021530Z"), "from=2025-01-02T15:30:00Z", alone},
		{"an offset", notBefore(ber.TagUTCTime, "250102153000+0130"), "from=2025-01-02T14:00:00Z", ""},
		{"no zone", notBefore(ber.TagUTCTime, "250102153000"), "from=2025-01-02T15:30:00Z", alone},
		{"a fraction", notBefore(ber.TagGeneralizedTime, "20250102153000.25Z"), "from=2025-01-02T15:30:00Z", alone},
		{"four digits of a year in a UTCTime", notBefore(ber.TagUTCTime, "20250102153000Z"), "from=2025-01-02T15:30:00Z", alone},
		{"GeneralizedTime before 2050", notBefore(ber.TagGeneralizedTime, "20250102153000Z"), "from=2025-01-02T15:30:00Z", ""},
		{"a leap second", notBefore(ber.TagUTCTime, "161231235960Z"), "from=2017-01-01T00:00:00Z", alone},
		{"30 February", notBefore(ber.TagUTCTime, "250230000000Z"), "from=2025-03-02T00:00:00Z", alone},
		{"year 9999 and an offset", notBefore(ber.TagGeneralizedTime, "99991231235959-0100"), "from=9999-12-31T23:59:59Z", alone},
		{"a negative serial number", serial("\xff\x01"), "serial=-ff", ""},
		{"a serial number of 40 octets", serial("\x01" + strings.Repeat("\x00", 39)), "serial=1" + strings.Repeat("0", 78), ""},
		{"a serial number with leading zeros", serial("\x00\x00\x05"), "serial=5", alone},
		{"an empty serial number", serial(""), "serial=0", alone},
		{"no issuer", func(p *parts) { p.issuer = tlv(ber.TagSequence) }, "issuer=", ""},
		{"RSA without NULL", func(p *parts) {
			p.key = tlv(ber.TagSequence, tlv(ber.TagSequence, tlv(ber.TagOID, "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01")),
				tlv(ber.TagBitString, "\x00", tlv(ber.TagSequence, tlv(ber.TagInteger, "\x00\xc1"+strings.Repeat("\x01", 127)), tlv(ber.TagInteger, "\x03"))))
		}, "key=RSA/1024", ""},
		{"a key of noise", func(p *parts) { p.key = tlv(ber.TagSequence, "noise") }, "key=unreadable/0", alone},
		{"an RSA key of noise", func(p *parts) {
			p.key = tlv(ber.TagSequence, tlv(ber.TagSequence, tlv(ber.TagOID, "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01"), "\x05\x00"), tlv(ber.TagBitString, "\x00noise"))
		}, "key=RSA/0", ""},
	}
	openssl := needs.Need(t, "openssl")
	dir := t.TempDir()
	for _, test := range tests {
		p := ordinaryParts()
		test.change(&p)
		der := p.der()
		want, err := describe(ordinaryParts().der())
		if err != nil {
			t.Fatal(err)
		}
		for field := range strings.SplitSeq(test.want, " ") {
			key, value, _ := strings.Cut(field, "=")
			switch key {
			case "cn":
				want.CommonName = value
			case "dn":
				want.SubjectDN = value
			case "issuer":
				want.IssuerDN = value
			case "ca":
				want.IsCA = value == "true"
			case "from":
				want.NotBefore = value
			case "serial":
				want.SerialNumber = value
			case "san":
				_, all, _ := strings.Cut(test.want, "san=")
				want.SANs = strings.Split(all, ",")
			case "key":
				name, size, _ := strings.Cut(value, "/")
				want.KeyAlgorithm = name
				want.KeySize, _ = strconv.Atoi(size)
			}
		}
		got, err := describe(der)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n got %+v, %v\nwant %+v", test.what, got, err, want)
		}
		if c := parse("a.der", der, nil); len(c.certs) != 1 || len(c.causes) > 0 {
			t.Errorf("%s: the file holds %d certificates, %q", test.what, len(c.certs), c.causes)
		}
		if test.remark == alone {
			continue
		}
		file := filepath.Join(dir, "a.der")
		if err := os.WriteFile(file, der, 0o600); err != nil {
			t.Fatal(err)
		}
		output, err := exec.CommandContext(t.Context(), openssl, "x509", "-in", file, "-inform", "DER", "-noout", "-subject", "-startdate",
			"-dateopt", "iso_8601", "-nameopt", "RFC2253,-esc_msb", "-ext", "basicConstraints").CombinedOutput()
		said := string(output)
		if err != nil {
			t.Errorf("%s: openssl: %v\n%s", test.what, err, said)
		}
		for _, line := range []string{"subject=" + want.SubjectDN, "notBefore=" + strings.Replace(want.NotBefore, "T", " ", 1)} {
			if !strings.Contains(said, line+"\n") {
				t.Errorf("%s: openssl does not say %q but\n%s", test.what, line, said)
			}
		}
		if strings.Contains(said, "CA:TRUE") != want.IsCA {
			t.Errorf("%s: is_ca %v, openssl says\n%s", test.what, want.IsCA, said)
		}
	}
}

// TestKeyAlgorithms covers keys that none of the installed tools can make.
func TestKeyAlgorithms(t *testing.T) {
	sample, err := os.ReadFile("testdata/keys/mldsa44.spki")
	if err != nil {
		t.Fatal(err)
	}
	key := func(oid string, bytes int, parameters ...string) string {
		return tlv(ber.TagSequence, tlv(ber.TagSequence, tlv(ber.TagOID, oid), strings.Join(parameters, "")), tlv(ber.TagBitString, "\x00"+strings.Repeat("k", bytes)))
	}
	const nist, ec = "\x60\x86\x48\x01\x65\x03\x04", "\x2a\x86\x48\xce\x3d\x02\x01"
	for _, test := range []struct {
		key       string
		algorithm string
		size      int
	}{
		{string(sample), "ML-DSA-44", 8 * 1312},
		{key(nist+"\x03\x12", 1952), "ML-DSA-65", 8 * 1952},
		{key(nist+"\x03\x13", 2592), "ML-DSA-87", 8 * 2592},
		{key(nist+"\x03\x14", 32), "SLH-DSA-SHA2-128s", 256},
		{key(nist+"\x03\x1f", 64), "SLH-DSA-SHAKE-256f", 512},
		{key(nist+"\x04\x02", 1184), "ML-KEM-768", 8 * 1184},
		{key("\x2a\x85\x03\x07\x01\x01\x01\x01", 66), "GOST R 34.10-2012", 256},
		{key("\x2a\x85\x03\x07\x01\x01\x01\x02", 131), "GOST R 34.10-2012", 512},
		{key("\x2a\x85\x03\x02\x02\x13", 66), "GOST R 34.10-2001", 256},
		{key("\x2a\x03\x04", 66), "1.2.3.4", 0},
		{key("\x69\x83\xb1\xdb\x9b\xe2\xb3\x98\x97\xc6\xfb\x88\x9e\xe4\x8a\xa4\xd8\xc8\x6a", 66), "2.25.2251964738561382262029280714062963818", 0},
		{key(ec, 65, tlv(ber.TagOID, "\x2a\x03\x04")), "ECDSA", 0},
		{key(ec, 65, "\x05\x00"), "ECDSA", 0},
		{key("\x2a\x86\x48\xce\x38\x04\x01", 65), "DSA", 0}, // parameters of the issuer
	} {
		p := ordinaryParts()
		p.key = test.key
		if got, err := describe(p.der()); err != nil || got.KeyAlgorithm != test.algorithm || got.KeySize != test.size {
			t.Errorf("got %s %d, %v; want %s %d", got.KeyAlgorithm, got.KeySize, err, test.algorithm, test.size)
		}
	}
}

// TestHugeCertificates checks that the description of a certificate is bounded in time and space.
func TestHugeCertificates(t *testing.T) {
	many := func(n int, s string) string { return strings.Repeat(s, n) }
	names := func(list string) func(*parts) {
		return func(p *parts) { p.extensions = extension(oidSubjectAltName, tlv(ber.TagSequence, list)) }
	}
	subject := func(rdns string) func(*parts) { return func(p *parts) { p.subject = tlv(ber.TagSequence, rdns) } }
	for _, test := range []struct {
		what   string
		change func(*parts)
		err    error
	}{
		{"the maximum number of names", names(many(maxNames, tlv(0x82, "a"))), nil},
		{"one more", names(many(maxNames+1, tlv(0x82, "a"))), errCut},
		{"350,000 names", names(many(350_000, tlv(0x82, "a"))), errCut},
		{"350,000 URIs", names(many(350_000, tlv(0x86, "a"))), errCut},
		{"names of the maximum length", names(many(maxNameBytes/1024, tlv(0x82, many(1024, "a")))), nil},
		{"longer ones", names(many(maxNameBytes/1024, tlv(0x82, many(1025, "a")))), errCut},
		{"one very long name", names(tlv(0x82, many(1_000_000, "a"))), errCut},
		{"a subject of many attributes", subject(many(80_000, rdn(10, ber.TagUTF8String, "a")) + rdn(3, ber.TagUTF8String, "host")), errCut},
		{"a subject of one RDN", subject(tlv(0x31, many(80_000, rdn(10, ber.TagUTF8String, "a")[2:])) + rdn(3, ber.TagUTF8String, "host")), errCut},
		{"a subject of many unknown attributes", subject(many(80_000, tlv(0x31, tlv(ber.TagSequence, tlv(ber.TagOID, "\x2a\x03"), tlv(ber.TagUTF8String, "a")))) + rdn(3, ber.TagUTF8String, "host")), errCut},
		{"a long attribute", subject(rdn(10, ber.TagBMPString, many(1_000_000, "\x20\xac")) + rdn(3, ber.TagUTF8String, "host")), errCut},
		{"a long serial number", func(p *parts) { p.serial = tlv(ber.TagInteger, many(1_000_000, "\x81")) }, errCut},
		{"a long name of an algorithm", func(p *parts) {
			p.key = tlv(ber.TagSequence, tlv(ber.TagSequence, tlv(ber.TagOID, many(1_000_000, "\x81")+"\x01")))
		}, nil},
	} {
		p := ordinaryParts()
		test.change(&p)
		der := p.der()
		var got api.DiscoveredCertificate
		var err error
		began := time.Now()
		spent := testing.AllocsPerRun(1, func() { got, err = describe(der) })
		took := time.Since(began) / 2
		if err != test.err || got.CommonName != "host" {
			t.Errorf("%s: common name %q, %v; want %v", test.what, got.CommonName, err, test.err)
		}
		size := len(got.SubjectDN) + len(got.SerialNumber) + len(got.KeyAlgorithm)
		for _, name := range got.SANs {
			size += len(name)
		}
		if len(got.SANs) > maxNames || size > maxNameBytes+3*(maxText+len("…")) {
			t.Errorf("%s: %d names, %d bytes", test.what, len(got.SANs), size)
		}
		if spent > 4*maxNames || took > time.Second {
			t.Errorf("%s: %v allocations, %v", test.what, spent, took)
		}
		var parser Parser
		for range 2 { // the cache must not hide the second one
			c := content{certs: []found{{der, formatDER}}}
			outcome := parser.outcome(c)
			if named := bytes.Contains(outcome, []byte(errCut.Error())); named != (test.err != nil) {
				t.Errorf("%s: errCut reported: %v", test.what, named)
			}
		}
	}
}
