package discovery

import (
	"bytes"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/testing/needs"
)

// tool runs a program in a directory and returns its output.
func tool(t *testing.T, dir, program string, args ...string) string {
	t.Helper()
	command := exec.CommandContext(t.Context(), program, args...)
	command.Dir = dir
	output, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(program), strings.Join(args, " "), err, output)
	}
	return string(output)
}

// selfSigned creates name.pem and name.key.
func selfSigned(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	tool(t, dir, needs.Need(t, "openssl"), append([]string{"req", "-x509", "-nodes", "-days", "30", "-keyout", name + ".key", "-out", name + ".pem"}, args...)...)
}

var certificateText = regexp.MustCompile(`(?s)-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n`)

// TestAgainstOpenSSL compares every field with the output of openssl.
func TestAgainstOpenSSL(t *testing.T) {
	t.Parallel()
	openssl := needs.Need(t, "openssl")
	dir := t.TempDir()
	names := make([]string, 0, 3000)
	for i := range cap(names) {
		names = append(names, fmt.Sprintf("DNS:host%d.example.org", i))
	}
	tests := []struct {
		name      string
		algorithm string
		size      int
		args      []string
	}{
		{"rsa1024", "RSA", 1024, []string{"-newkey", "rsa:1024", "-subj", "/C=CH/O=A, \"B\" + C;/CN=rsa"}},
		{"rsa2048", "RSA", 2048, []string{"-newkey", "rsa:2048", "-subj", "/CN=many", "-addext", "subjectAltName=" + strings.Join(names, ",")}},
		{"p192", "ECDSA", 192, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime192v1", "-subj", "/CN=p192"}},
		{"p224", "ECDSA", 224, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp224r1", "-subj", "/CN=p224"}},
		{"p256", "ECDSA", 256, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/C=CH/O=Example/OU=One/CN=p256",
			"-addext", "subjectAltName=DNS:*.example.org,email:a@example.org,IP:192.0.2.1,IP:2001:db8::1,URI:spiffe://example.org/a"}},
		{"p384", "ECDSA", 384, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1", "-subj", "/CN=p384", "-set_serial", "0x00ff00"}},
		{"p521", "ECDSA", 521, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp521r1", "-subj", "/O=no common name"}},
		{"secp256k1", "ECDSA", 256, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1", "-subj", "/O=K/CN=k1",
			"-addext", "subjectAltName=DNS:k.example.org,email:k@example.org,IP:192.0.2.2,URI:urn:k"}},
		{"brainpool", "ECDSA", 384, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:brainpoolP384r1", "-subj", "/CN=bp"}},
		{"ed25519", "Ed25519", 256, []string{"-newkey", "ed25519", "-subj", "/CN=gr\xc3\xbcezi", "-utf8"}},
		{"ed448", "Ed448", 456, []string{"-newkey", "ed448", "-subj", "/CN=ed448"}},
		{"pss", "RSASSA-PSS", 1024, []string{"-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:1024", "-subj", "/CN=pss"}},
		{"explicit", "ECDSA", 256, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-pkeyopt", "ec_param_enc:explicit", "-subj", "/CN=explicit"}},
		{"binary", "ECDSA", 570, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:sect571r1", "-pkeyopt", "ec_param_enc:explicit", "-subj", "/CN=binary"}},
		{"sect233k1", "ECDSA", 232, []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:sect233k1", "-subj", "/CN=sect233k1"}},
		{"dc", "Ed25519", 256, []string{"-newkey", "ed25519", "-subj", "/DC=com/DC=example/O=A, Inc./OU=one/OU=two/UID=u1/emailAddress=a@example.com/CN=dc"}},
		{"ev", "Ed25519", 256, []string{"-newkey", "ed25519", "-subj",
			"/jurisdictionC=CH/jurisdictionST=Zug/jurisdictionL=Zug/businessCategory=Private Organization/C=CH/O=Ev/organizationIdentifier=VATCH-1/1.2.3.4=odd/CN=ev"}},
		{"person", "Ed25519", 256, []string{"-newkey", "ed25519", "-subj", "/GN=Ada/SN=L/initials=A/title=Dr/pseudonym=a/dnQualifier=q/generationQualifier=I/name=n/description=d/telephoneNumber=1/mail=m@example.org/unstructuredName=u/x500UniqueIdentifier=x/CN=person"}},
		{"negative", "Ed25519", 256, []string{"-newkey", "ed25519", "-subj", "/CN=negative", "-set_serial", "-5"}},
		{"leaf", "Ed25519", 256, []string{"-newkey", "ed25519", "-subj", "/CN=leaf", "-addext", "basicConstraints=CA:FALSE", "-set_serial", "0"}},
	}
	made := make(map[string]int)
	for i, test := range tests {
		selfSigned(t, dir, test.name, test.args...)
		made[test.name+".pem"] = i
		tool(t, dir, openssl, "x509", "-in", test.name+".pem", "-outform", "DER", "-out", test.name+".der")
		made[test.name+".der"] = i
	}
	found, summary := scanAll(t, newScanner(t, Options{Dirs: []string{dir}}))
	if len(found) != len(made) || len(summary.Errors) > 0 {
		t.Errorf("found %d, want %d; errors %q", len(found), len(made), summary.Errors)
	}
	for _, cert := range found {
		base := filepath.Base(cert.SourcePath)
		test := tests[made[base]]
		said := tool(t, dir, openssl, "x509", "-in", cert.SourcePath, "-noout", "-fingerprint", "-sha256", "-serial", "-subject", "-issuer",
			"-startdate", "-enddate", "-dateopt", "iso_8601", "-nameopt", "RFC2253,-esc_msb", "-ext", "basicConstraints,subjectAltName")
		line := func(prefix string) string {
			for text := range strings.Lines(said) {
				if rest, ok := strings.CutPrefix(text, prefix); ok {
					return strings.TrimSpace(rest)
				}
			}
			return ""
		}
		serial := strings.ToLower(line("serial="))
		sign := ""
		if rest, negative := strings.CutPrefix(serial, "-"); negative {
			sign, serial = "-", rest
		}
		if serial = strings.TrimLeft(serial, "0"); serial == "" {
			serial = "0"
		}
		want := api.DiscoveredCertificate{
			FingerprintSHA256: strings.ToLower(strings.ReplaceAll(line("sha256 Fingerprint="), ":", "")),
			SerialNumber:      sign + serial,
			SubjectDN:         line("subject="),
			IssuerDN:          line("issuer="),
			NotBefore:         strings.Replace(line("notBefore="), " ", "T", 1),
			NotAfter:          strings.Replace(line("notAfter="), " ", "T", 1),
			IsCA:              strings.Contains(said, "CA:TRUE"),
			KeyAlgorithm:      test.algorithm, KeySize: test.size,
			SourcePath: cert.SourcePath, SourceFormat: strings.ToUpper(strings.TrimPrefix(filepath.Ext(base), ".")),
			PEMData: certificateText.FindString(tool(t, dir, openssl, "x509", "-in", cert.SourcePath)),
		}
		want.CommonName = commonName(want.SubjectDN)
		var sans []string
		for name := range strings.SplitSeq(lastLine(said), ", ") {
			if _, value, ok := strings.Cut(strings.TrimSpace(name), ":"); ok && strings.Contains(said, "Subject Alternative Name") {
				sans = append(sans, value)
			}
		}
		cert.SANs = slices.Clone(cert.SANs)
		for i, san := range cert.SANs {
			if san == "2001:db8::1" {
				cert.SANs[i] = "2001:DB8:0:0:0:0:0:1" // as openssl writes it
			}
		}
		slices.Sort(sans)
		slices.Sort(cert.SANs)
		if !slices.Equal(sans, cert.SANs) {
			t.Errorf("%s: names %q, openssl says %q", base, cert.SANs, sans)
		}
		cert.SANs = nil
		if got, want := fmt.Sprintf("%+v", cert), fmt.Sprintf("%+v", want); got != want {
			t.Errorf("%s:\n got %s\nwant %s", base, got, want)
		}
	}
}

// TestOpenSSLKeys covers kinds of keys that cannot sign certificates, or that openssl req
// cannot create.
func TestOpenSSLKeys(t *testing.T) {
	t.Parallel()
	openssl := needs.Need(t, "openssl")
	dir := t.TempDir()
	selfSigned(t, dir, "ca", "-newkey", "ed25519", "-subj", "/CN=ca")
	tool(t, dir, openssl, "genpkey", "-genparam", "-algorithm", "DSA", "-pkeyopt", "dsa_paramgen_bits:1024", "-out", "dsa.parameters")
	for _, test := range []struct {
		algorithm string
		size      int
		args      []string
	}{
		{"X25519", 256, []string{"-algorithm", "X25519"}},
		{"X448", 448, []string{"-algorithm", "X448"}},
		{"DSA", 1024, []string{"-paramfile", "dsa.parameters"}},
		{"DH", 2048, []string{"-algorithm", "DH", "-pkeyopt", "group:ffdhe2048"}},
		{"DH", 1024, []string{"-algorithm", "DHX", "-pkeyopt", "group:dh_1024_160"}},
		{"SM2", 256, []string{"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:SM2"}},
		{"ECDSA", 512, []string{"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:brainpoolP512t1", "-pkeyopt", "ec_param_enc:explicit"}},
	} {
		tool(t, dir, openssl, append([]string{"genpkey", "-out", "key"}, test.args...)...)
		tool(t, dir, openssl, "pkey", "-in", "key", "-pubout", "-out", "public")
		made := t.TempDir()
		tool(t, dir, openssl, "x509", "-new", "-subj", "/CN=k", "-force_pubkey", "public", "-key", "ca.key", "-days", "30", "-outform", "DER", "-out", filepath.Join(made, "k.der"))
		found, summary := scanAll(t, newScanner(t, Options{Dirs: []string{made}}))
		if len(found) != 1 || len(summary.Errors) > 0 {
			t.Errorf("%q: found %d certificates, errors %q", test.args, len(found), summary.Errors)
			continue
		}
		if got := found[0]; got.KeyAlgorithm != test.algorithm || got.KeySize != test.size || got.CommonName != "k" {
			t.Errorf("%q: got %s %d; want %s %d", test.args, got.KeyAlgorithm, got.KeySize, test.algorithm, test.size)
		}
	}
}

// commonName returns the common name that Go takes if there are several.
func commonName(dn string) string {
	if cn, ok := strings.CutPrefix(dn, "CN="); ok {
		cn, _, _ = strings.Cut(cn, ",")
		return cn
	}
	return ""
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

func fingerprints(found []api.DiscoveredCertificate) []string {
	var list []string
	for _, cert := range found {
		list = append(list, cert.FingerprintSHA256)
	}
	slices.Sort(list)
	return list
}

// TestOpenSSLBundles covers PKCS#7 and PKCS#12 written by openssl.
func TestOpenSSLBundles(t *testing.T) {
	t.Parallel()
	openssl := needs.Need(t, "openssl")
	made := t.TempDir()
	for _, name := range []string{"one", "two"} {
		selfSigned(t, made, name, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN="+name)
	}
	export := func(password string, args ...string) []string {
		return append([]string{"pkcs12", "-export", "-in", "one.pem", "-inkey", "one.key", "-certfile", "two.pem", "-passout", "pass:" + password, "-out", "OUT"}, args...)
	}
	tests := []struct {
		name   string // of the file
		args   []string
		format string
		cause  string // instead of the certificates
	}{
		{"der.p7b", []string{"crl2pkcs7", "-nocrl", "-certfile", "one.pem", "-certfile", "two.pem", "-outform", "DER", "-out", "OUT"}, "PKCS7", ""},
		{"pem.p7c", []string{"crl2pkcs7", "-nocrl", "-certfile", "one.pem", "-certfile", "two.pem", "-out", "OUT"}, "PKCS7", ""},
		{"pem.txt", []string{"crl2pkcs7", "-nocrl", "-certfile", "one.pem", "-certfile", "two.pem", "-out", "OUT"}, "PKCS7", ""},
		{"stream.p7b", []string{"cms", "-sign", "-signer", "one.pem", "-inkey", "one.key", "-certfile", "two.pem", "-in", "one.pem", "-nodetach", "-binary", "-stream", "-outform", "DER", "-out", "OUT"}, "PKCS7", ""},
		{"default.p12", export("secret"), "PKCS12", ""},
		{"empty.pfx", export(""), "PKCS12", ""},
		{"unicode.p12", export("p\xc3\xa4ssw\xc3\xb6rd"), "PKCS12", ""},
		{"unicode3des.p12", export("p\xc3\xa4ssw\xc3\xb6rd", "-legacy", "-certpbe", "PBE-SHA1-3DES"), "PKCS12", ""},
		{"aes128.p12", export("secret", "-certpbe", "AES-128-CBC"), "PKCS12", ""},
		{"aes192.p12", export("secret", "-certpbe", "AES-192-CBC", "-iter", "10000"), "PKCS12", ""},
		{"des3pbes2.p12", export("secret", "-certpbe", "DES-EDE3-CBC"), "PKCS12", ""},
		{"clear.p12", export("unknown", "-certpbe", "NONE"), "PKCS12", ""},
		{"nomac.p12", export("secret", "-nomac"), "PKCS12", ""},
		{"3des.p12", export("secret", "-legacy", "-certpbe", "PBE-SHA1-3DES"), "PKCS12", ""},
		{"3desempty.p12", export("", "-legacy", "-certpbe", "PBE-SHA1-3DES"), "PKCS12", ""},
		{"2des.p12", export("secret", "-legacy", "-certpbe", "PBE-SHA1-2DES"), "PKCS12", ""},
		{"keystore", export("secret"), "PKCS12", ""},
		{"locked.p12", export("unknown"), "", "no configured password opens"},
		{"locked3des.p12", export("unknown", "-legacy", "-certpbe", "PBE-SHA1-3DES"), "", "no configured password opens"},
		{"legacy.p12", export("secret", "-legacy"), "PKCS12", ""},
		{"rc2-128.p12", export("secret", "-legacy", "-certpbe", "PBE-SHA1-RC2-128"), "PKCS12", ""},
		{"rc4.p12", export("secret", "-legacy", "-certpbe", "PBE-SHA1-RC4-128"), "PKCS12", ""},
		{"rc4-40.p12", export("p\xc3\xa4ssw\xc3\xb6rd", "-legacy", "-certpbe", "PBE-SHA1-RC4-40"), "PKCS12", ""},
		{"legacyempty.p12", export("", "-legacy"), "PKCS12", ""},
		{"lockedrc2.p12", export("unknown", "-legacy"), "", "no configured password opens"},
		{"lockedrc4.p12", export("unknown", "-legacy", "-certpbe", "PBE-SHA1-RC4-128"), "", "no configured password opens"},
		{"million.p12", export("wrong", "-iter", "1000000"), "PKCS12", ""}, // as Firefox does; "wrong" is the first password
		{"costly.p12", export("secret", "-iter", "1000000"), "", "PKCS#12: trying every password takes too long"},
		{"tencostly.p12", export("secret", "-iter", "10000000"), "", "PKCS#12: trying every password takes too long"},
		{"camellia.p12", export("secret", "-certpbe", "CAMELLIA-128-CBC"), "", "Camellia-128 (OID 1.2.392.200011.61.1.1.1.2)"},
		{"aria.p12", export("secret", "-certpbe", "ARIA-256-CBC"), "", "ARIA-256 (OID"},
		{"des.p12", export("secret", "-legacy", "-certpbe", "PBE-MD5-DES"), "", "PBES1 with MD5 and DES"},
	}
	passwords := func() ([]secret.String, error) {
		return []secret.String{secret.New("wrong"), secret.New("secret"), secret.New("p\xc3\xa4ssw\xc3\xb6rd")}, nil
	}
	both, _ := scanAll(t, newScanner(t, Options{Dirs: []string{made}}))
	for _, test := range tests {
		dir := t.TempDir()
		args := slices.Clone(test.args)
		args[slices.Index(args, "OUT")] = filepath.Join(dir, test.name)
		tool(t, made, openssl, args...)
		found, summary := scanAll(t, newScanner(t, Options{Dirs: []string{dir}, Passwords: passwords}))
		if test.cause != "" {
			if len(found) > 0 || len(summary.Errors) != 1 || !strings.Contains(summary.Errors[0], test.cause) {
				t.Errorf("%s: found %d, errors %q; want one that says %q", test.name, len(found), summary.Errors, test.cause)
			}
			continue
		}
		if !slices.Equal(fingerprints(found), fingerprints(both)) || len(summary.Errors) > 0 {
			t.Errorf("%s: found %d of 2, errors %q", test.name, len(found), summary.Errors)
		}
		for _, cert := range found {
			if cert.SourceFormat != test.format {
				t.Errorf("%s: format %s, want %s", test.name, cert.SourceFormat, test.format)
			}
		}
	}
}

var keytoolFingerprint = regexp.MustCompile(`SHA256: ([0-9A-F:]{95})`)

// TestAgainstKeytool compares certificates with the list that keytool prints.
func TestAgainstKeytool(t *testing.T) {
	if testing.Short() {
		t.Skip("keytool takes seconds")
	}
	t.Parallel()
	keytool := needs.Need(t, "keytool")
	made := t.TempDir()
	selfSigned(t, made, "one", "-newkey", "rsa:2048", "-subj", "/CN=one")
	java := func(args ...string) string {
		return tool(t, made, keytool, append([]string{"-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC"}, args...)...)
	}
	store := func(file, kind string) []string {
		return []string{"-keystore", filepath.Join(made, file), "-storetype", kind, "-storepass", "changeit"}
	}
	tests := []struct {
		file, kind string
		args       []string
		trusted    bool // also a trusted certificate beside the key's
		format     string
		cause      string // instead of the certificates
	}{
		{"a.jks", "JKS", nil, true, "JKS", ""},
		{"cacerts", "PKCS12", nil, true, "PKCS12", ""},
		{"c.ks", "JCEKS", nil, false, "JKS", ""},
		{"d.p12", "PKCS12", []string{"-J-Dkeystore.pkcs12.legacy"}, false, "PKCS12", ""},
	}
	t.Run("stores", func(t *testing.T) {
		for _, test := range tests {
			t.Run(test.file, func(t *testing.T) {
				t.Parallel()
				java(slices.Concat([]string{"-genkeypair", "-alias", "key", "-keyalg", "EC", "-dname", "CN=key", "-keypass", "changeit"}, test.args, store(test.file, test.kind))...)
				if test.trusted {
					java(slices.Concat([]string{"-importcert", "-noprompt", "-alias", "one", "-file", "one.pem"}, store(test.file, test.kind))...)
				}
				var want []string
				if test.cause == "" {
					listed := java(append([]string{"-list", "-v"}, store(test.file, test.kind)...)...)
					for _, match := range keytoolFingerprint.FindAllStringSubmatch(listed, -1) {
						want = append(want, strings.ToLower(strings.ReplaceAll(match[1], ":", "")))
					}
					if len(want) == 0 {
						t.Fatalf("keytool lists no certificate:\n%s", listed)
					}
				}
				slices.Sort(want)
				data, err := os.ReadFile(filepath.Join(made, test.file))
				if err != nil {
					t.Fatal(err)
				}
				dir := t.TempDir()
				write(t, filepath.Join(dir, test.file), data)
				found, summary := scanAll(t, newScanner(t, Options{Dirs: []string{dir}, Passwords: func() ([]secret.String, error) {
					return []secret.String{secret.New("changeit")}, nil
				}}))
				if !slices.Equal(fingerprints(found), want) || (test.cause == "") != (len(summary.Errors) == 0) {
					t.Errorf("found %q, keytool lists %q; errors %q", fingerprints(found), want, summary.Errors)
				}
				if test.cause != "" && (len(summary.Errors) != 1 || !strings.Contains(summary.Errors[0], test.cause)) {
					t.Errorf("errors %q, want one that says %q", summary.Errors, test.cause)
				}
				for _, cert := range found {
					if cert.SourceFormat != test.format {
						t.Errorf("format %s, want %s", cert.SourceFormat, test.format)
					}
				}
			})
		}
	})
}

// TestNoKeyLeaves checks that only certificates leave the package, whatever else a file holds.
func TestNoKeyLeaves(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	selfSigned(t, dir, "a", "-newkey", "rsa:2048", "-subj", "/CN=a")
	key, err := os.ReadFile(filepath.Join(dir, "a.key"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := os.ReadFile(filepath.Join(dir, "a.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(key)
	for name, data := range map[string][]byte{
		"both.pem":     slices.Concat(key, cert),
		"after.txt":    slices.Concat(cert, key),
		"key.pem":      key,
		"key.der":      block.Bytes,
		"labelled.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes}),
		"behind.crt":   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: append(mustDecode(cert), block.Bytes...)}),
		"behind.der":   append(mustDecode(cert), block.Bytes...),
		"broken.pem":   bytes.Replace(slices.Concat(cert, key), []byte("-----END CERTIFICATE-----"), nil, 1),
	} {
		write(t, filepath.Join(dir, name), data)
	}
	found, summary := scanAll(t, newScanner(t, Options{Dirs: []string{dir}}))
	if len(found) != 5 {
		t.Errorf("found %d certificates, want 5: %q", len(found), summary.Errors)
	}
	text := fmt.Sprint(found, summary)
	body := strings.Split(string(key), "\n")[3]
	if strings.Contains(text, body) || strings.Contains(text, "PRIVATE") || strings.Contains(text, hex.EncodeToString(block.Bytes[100:120])) {
		t.Error("the results contain key material")
	}
	for _, cert := range found {
		if fmt.Sprint(cert.PEMData) != string(certificateText.Find([]byte(cert.PEMData))) {
			t.Errorf("%s: PEM is more than one certificate: %s", cert.SourcePath, cert.PEMData)
		}
		if _, err := time.Parse(time.RFC3339, cert.NotAfter); err != nil {
			t.Error(err)
		}
	}
}

func mustDecode(cert []byte) []byte {
	block, _ := pem.Decode(cert)
	return block.Bytes
}
