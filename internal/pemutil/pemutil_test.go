package pemutil_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
)

func issue(t testing.TB, ca *testca.CA, template testca.Template) *testca.Issued {
	t.Helper()
	issued, err := ca.Issue(template)
	if err != nil {
		t.Fatal(err)
	}
	return issued
}

func TestParseCertificates(t *testing.T) {
	issued := issue(t, testca.Must(t), testca.Template{Intermediates: 1})
	leaf, chain := issued.LeafPEM(), pemutil.EncodeCertificates(issued.Chain[1:]...)
	join := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	other := pem.EncodeToMemory(&pem.Block{Type: "DH PARAMETERS", Bytes: []byte("x")})

	tests := []struct {
		name string
		data []byte
		want int
		err  string // part of the error, or ""
	}{
		{"leaf", leaf, 1, ""},
		{"leaf and chain", join(leaf, chain), 3, ""},
		{"blank lines between", join(leaf, []byte("\n\n"), chain, []byte("\n")), 3, ""},
		{"CRLF", bytes.ReplaceAll(join(leaf, chain), []byte("\n"), []byte("\r\n")), 3, ""},
		{"text around", join([]byte("subject: x\n"), leaf, []byte("Bag Attributes\n"), chain), 3, ""},
		{"byte order marks", join([]byte("\ufeff"), leaf, []byte("\ufeff"), chain), 3, ""},
		{"no final newline", bytes.TrimSpace(leaf), 1, ""},
		{"other blocks", join(other, leaf, other), 1, ""},
		{"key in it", join(leaf, issued.KeyPEM()), 0, "EC PRIVATE KEY"},
		{"empty", nil, 0, "no CERTIFICATE block"},
		{"no PEM", []byte("hello"), 0, "no CERTIFICATE block"},
		{"only another block", other, 0, "no CERTIFICATE block"},
		{"damaged base64 in the middle", join(leaf, bytes.Replace(chain, []byte("\nM"), []byte("\n*"), 1), leaf), 0, "not valid PEM"},
		{"cut short", join(leaf, chain[:len(chain)/3]), 0, "not valid PEM"},
		{"damaged DER", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issued.Leaf.Raw[:100]}), 0, "certificate 1"},
		{"bytes after the DER", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: append(bytes.Clone(issued.Leaf.Raw), 0)}), 0, "certificate 1"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			certs, err := pemutil.ParseCertificates(test.data)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("error = %v, want one with %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(certs) != test.want || !certs[0].Equal(issued.Leaf) {
				t.Errorf("got %d certificates, want %d, the leaf first", len(certs), test.want)
			}
		})
	}
	const none = "no CERTIFICATE block found"
	if _, err := pemutil.ParseCertificates(nil); err == nil || err.Error() != none {
		t.Errorf("error = %v, want %q", err, none)
	}
}

func TestEncodeCertificates(t *testing.T) {
	issued := issue(t, testca.Must(t), testca.Template{})
	data := pemutil.EncodeCertificates(issued.Chain...)
	if bytes.Contains(data, []byte("\n\n")) || !bytes.HasSuffix(data, []byte("-----\n")) {
		t.Errorf("want blocks without text between them and one newline at the end:\n%s", data)
	}
	certs, err := pemutil.ParseCertificates(data)
	if err != nil || !slices.EqualFunc(certs, issued.Chain, (*x509.Certificate).Equal) {
		t.Errorf("the certificates did not come back: %v", err)
	}
	if got := pemutil.EncodeCertificates(); len(got) != 0 {
		t.Errorf("no certificates are encoded as %q", got)
	}
}

func TestFingerprint(t *testing.T) {
	issued := issue(t, testca.Must(t), testca.Template{})
	sum := sha256.Sum256(issued.Leaf.Raw)
	if got, want := pemutil.Fingerprint(issued.Leaf), hex.EncodeToString(sum[:]); got != want {
		t.Errorf("Fingerprint = %q, want %q", got, want)
	}
}

func FuzzParseCertificates(f *testing.F) {
	issued := issue(f, testca.Must(f), testca.Template{Intermediates: 1})
	f.Add(issued.PEM())
	f.Add(append(issued.LeafPEM(), issued.KeyPEM()...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := pemutil.ParseCertificates(data)
		if err != nil {
			return
		}
		again, err := pemutil.ParseCertificates(pemutil.EncodeCertificates(certs...))
		if err != nil || !slices.EqualFunc(certs, again, (*x509.Certificate).Equal) {
			t.Errorf("%d certificates do not survive encoding: %v", len(certs), err)
		}
	})
}

func TestOtherBlocks(t *testing.T) {
	block := func(name string) string {
		return "-----BEGIN " + name + "-----\nMAA=\n-----END " + name + "-----\n"
	}
	dh, x942 := block("DH PARAMETERS"), block("X9.42 DH PARAMETERS")
	var data strings.Builder
	for _, text := range []string{
		"a comment\n", block("CERTIFICATE"), dh, block("X509 CERTIFICATE"), block("TRUSTED CERTIFICATE"), "\n\n",
		block("EC PARAMETERS"), block("EC PRIVATE KEY"), block("PRIVATE KEY"), block("ENCRYPTED PRIVATE KEY"), block("OPENSSH PRIVATE KEY"),
		block("PGP PRIVATE KEY BLOCK"), x942, "-----BEGIN DH PARAMETERS-----\ncut",
	} {
		data.WriteString(text)
	}
	if got, want := string(pemutil.OtherBlocks([]byte(data.String()))), dh+x942; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got := pemutil.OtherBlocks([]byte("no PEM")); got != nil {
		t.Errorf("got %q from no data", got)
	}
}
