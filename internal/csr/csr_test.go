package csr_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/csr"
	"certctl-agent/internal/pemutil"
)

func parse(t *testing.T, data []byte) *x509.CertificateRequest {
	t.Helper()
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) != 0 {
		t.Fatalf("not one CERTIFICATE REQUEST block: %q", data)
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if err := request.CheckSignature(); err != nil {
		t.Fatal(err)
	}
	return request
}

// kinds returns the SANs of a request, each with its kind.
func kinds(request *x509.CertificateRequest) []string {
	var all []string
	for _, name := range request.DNSNames {
		all = append(all, "DNS "+name)
	}
	for _, name := range request.EmailAddresses {
		all = append(all, "email "+name)
	}
	for _, ip := range request.IPAddresses {
		all = append(all, "IP "+ip.String())
	}
	for _, uri := range request.URIs {
		all = append(all, "URI "+uri.String())
	}
	return all
}

func TestNames(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	label63 := strings.Repeat("a", 63)
	tests := []struct {
		name string
		sans []string
		want []string
	}{
		{"none", nil, nil},
		{"common name is not added", []string{"b.example"}, []string{"DNS b.example"}},
		{"DNS", []string{"a.example", "localhost", "_acme.a_b.example", "*.example", "xn--bcher-kva.example", "1.example", "a--b.example"},
			[]string{"DNS a.example", "DNS localhost", "DNS _acme.a_b.example", "DNS *.example", "DNS xn--bcher-kva.example", "DNS 1.example", "DNS a--b.example"}},
		{"longest DNS", []string{label63 + "." + label63 + "." + label63 + "." + label63[:61]},
			[]string{"DNS " + label63 + "." + label63 + "." + label63 + "." + label63[:61]}},
		{"IP", []string{"192.0.2.1", "2001:DB8::1", "::1", "::ffff:192.0.2.9"},
			[]string{"IP 192.0.2.1", "IP 2001:db8::1", "IP ::1", "IP 192.0.2.9"}},
		{"e-mail", []string{"who@example.org", "a.b+c@host"}, []string{"email who@example.org", "email a.b+c@host"}},
		{"URI", []string{"spiffe://example.org/ns/a", "https://host:8443/x?y#z", "urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "https://[::1]/"},
			[]string{"URI spiffe://example.org/ns/a", "URI https://host:8443/x?y#z", "URI urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "URI https://[::1]/"}},
		{"empty and blank", []string{"", "  ", "\t", " a.example "}, []string{"DNS a.example"}},
		{"repeated", []string{"a.example", "A.Example", "::1", "0:0::1", "192.0.2.1", "::ffff:192.0.2.1", "a@b", "a@b", "A@b", "urn:x:y", "urn:x:y"},
			[]string{"DNS a.example", "email a@b", "email A@b", "IP ::1", "IP 192.0.2.1", "URI urn:x:y"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			data, err := csr.New(key, " common.example ", test.sans)
			if err != nil {
				t.Fatal(err)
			}
			request := parse(t, data)
			if got := request.Subject.String(); got != "CN=common.example" {
				t.Errorf("subject = %s, want CN=common.example", got)
			}
			if got := kinds(request); !slices.Equal(got, test.want) {
				t.Errorf("names = %q, want %q", got, test.want)
			}
			if !pemutil.SamePublicKey(request.PublicKey, key.Public()) {
				t.Error("the request is for another key")
			}
		})
	}
}

func TestBadNames(t *testing.T) {
	tests := []struct{ name, want string }{
		{"bücher.example", "A-labels"},
		{"a.example\u200b", "not ASCII"},
		{"\xff.example", "not ASCII"},
		{"a\x7fb.example", "control character"},
		{"a\nb.example", "control character"},
		{"a\x00b.example", "control character"},
		{"a b.example", "must not contain ' '"},
		{"a.example.", "end with a dot"},
		{".", "end with a dot"},
		{".example", "empty label"},
		{"a..example", "empty label"},
		{"-a.example", "hyphen"},
		{"a-.example", "hyphen"},
		{"a,b.example", "must not contain ','"},
		{"*", "wildcard"},
		{"f*.example", "wildcard"},
		{"*f.example", "wildcard"},
		{"*.*.example", "wildcard"},
		{"a.*.example", "wildcard"},
		{strings.Repeat("a", 64) + ".example", "64 bytes, more than 63"},
		{strings.Repeat("a.", 130), "260 bytes, more than 253"},
		{strings.Repeat("a", 100_000), "100000 bytes"},
		{"256.1.1.1", "neither an IP address"},
		{"10.0.0", "neither an IP address"},
		{"10.0.0.0/8", "must not contain '/'"},
		{"[::1]", "must not contain '['"},
		{"fe80::1%eth0", "zone"},
		{"host:8443", "must not contain ':'"},
		{"@example.org", "before the @"},
		{"who@", "empty label"},
		{"a@b@example.org", "must not contain '@' before the @"},
		{"a..b@example.org", "misplaced dot"},
		{"Who <who@example.org>", "must not contain ' ' before the @"},
		{"who@*.example.org", "wildcard"},
		{"mailto:who@example.org", "must not contain ':' before the @"},
		{strings.Repeat("a", 65) + "@example.org", "more than 64"},
		{"https://", "scheme and a host"},
		{"https:///path", "scheme and a host"},
		{"://host/", "missing protocol scheme"},
		{"https://user:pw@example.org/", "credentials"},
		{"https://*.example.org/", "wildcard"},
		{"https://a b.example/", "must not contain blanks"},
		{"https://a.example/%zz", "invalid URL escape"},
		{"https://" + strings.Repeat("a", 2048), "more than 2048"},
	}
	for _, test := range tests {
		err := csr.Check("a.example", []string{"b.example", test.name})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("Check(%.40q): error = %v, want one with %q", test.name, err, test.want)
			continue
		}
		if len(err.Error()) > 700 {
			t.Errorf("Check(%.40q): the error has %d bytes", test.name, len(err.Error()))
		}
		if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("Check(%.40q): the error is not printable ASCII: %q", test.name, err)
		}
	}
}

func TestCommonName(t *testing.T) {
	for _, test := range []struct{ name, want string }{
		{"a.example", ""},
		{"*.example", ""},
		{"Printer, 2nd floor", ""},
		{"who@example.org", ""},
		{"192.0.2.1", ""},
		{strings.Repeat("long-", 14) + ".example", ""},
		{"", "empty"},
		{" \t", "empty"},
		{"a*.example", "wildcard"},
		{"*", "wildcard"},
		{"münchen.example", "A-labels"},
		{"a\x1b[2J", "control character"},
		{strings.Repeat("a", 254), "more than 253"},
	} {
		err := csr.Check(test.name, nil)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("Check(%.40q): error = %v, want %q", test.name, err, test.want)
		}
	}
}

// TestSignatureAlgorithm checks that the hash suits the key.
func TestSignatureAlgorithm(t *testing.T) {
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	data, err := csr.New(p521, "a.example", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := parse(t, data).SignatureAlgorithm; got != x509.ECDSAWithSHA512 {
		t.Errorf("P-521: %v", got)
	}
	for algorithm, want := range map[string]x509.SignatureAlgorithm{
		"ecdsa-p256": x509.ECDSAWithSHA256, "ecdsa-p384": x509.ECDSAWithSHA384, "rsa-2048": x509.SHA256WithRSA, "ed25519": x509.PureEd25519,
	} {
		key, err := csr.GenerateKey(algorithm)
		if err != nil {
			t.Fatal(err)
		}
		data, err := csr.New(key, "a.example", []string{"a.example"})
		if err != nil {
			t.Fatal(err)
		}
		if got := parse(t, data).SignatureAlgorithm; got != want {
			t.Errorf("%s: %v, want %v", algorithm, got, want)
		}
	}
}

// FuzzNames checks that names that Check accepts make a request that a CA can read, without
// additional names.
func FuzzNames(f *testing.F) {
	for _, name := range []string{"a.example", "*.example", "::1", "who@example.org", "spiffe://a/b", "urn:a:b", "host:80", "https://[::1]:8/%2f", "xn--a", "é"} {
		f.Add("cn", name)
		f.Add(name, "")
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, commonName, san string) {
		if csr.Check(commonName, []string{san}) != nil {
			return
		}
		data, err := csr.New(key, commonName, []string{san, san})
		if err != nil {
			t.Fatalf("New(%q, %q): %v, but Check accepts it", commonName, san, err)
		}
		request := parse(t, data)
		if got := request.Subject.CommonName; got != strings.TrimSpace(commonName) {
			t.Errorf("common name = %q, want %q", got, commonName)
		}
		want := 1
		if strings.TrimSpace(san) == "" {
			want = 0
		}
		if got := kinds(request); len(got) != want {
			t.Errorf("%q becomes %q", san, got)
		}
	})
}
