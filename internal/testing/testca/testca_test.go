package testca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"net/url"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
)

// verify verifies the first certificate of chain.
func verify(t *testing.T, ca *testca.CA, chain []*x509.Certificate, name string) {
	t.Helper()
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: ca.Pool(), Intermediates: intermediates, DNSName: name}); err != nil {
		t.Errorf("the chain does not verify: %v", err)
	}
}

func TestIssue(t *testing.T) {
	ca := testca.Must(t)
	own, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name      string
		template  testca.Template
		wantNames string // as Verify sees it
		wantChain int
		wantCN    string
	}{
		{"zero value", testca.Template{}, "localhost", 2, "localhost"},
		{"names", testca.Template{Names: []string{"a.example", "*.b.example"}}, "x.b.example", 2, "a.example"},
		{"address", testca.Template{Names: []string{"::1"}, CommonName: "cn"}, "::1", 2, "cn"},
		{"intermediates", testca.Template{Intermediates: 2}, "localhost", 4, "localhost"},
		{"without root", testca.Template{Intermediates: 2, OmitRoot: true}, "localhost", 3, "localhost"},
		{"leaf alone", testca.Template{OmitRoot: true}, "localhost", 1, "localhost"},
		{"own key", testca.Template{Key: own}, "localhost", 2, "localhost"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			issued, err := ca.Issue(test.template)
			if err != nil {
				t.Fatal(err)
			}
			verify(t, ca, issued.Chain, test.wantNames)
			if got := len(issued.Chain); got != test.wantChain {
				t.Errorf("the chain has %d certificates, want %d", got, test.wantChain)
			}
			for i, c := range issued.Chain[:len(issued.Chain)-1] {
				if err := c.CheckSignatureFrom(issued.Chain[i+1]); err != nil {
					t.Errorf("certificate %d was not issued by the next: %v", i, err)
				}
			}
			if got := issued.Leaf.Subject.CommonName; got != test.wantCN {
				t.Errorf("common name = %q, want %q", got, test.wantCN)
			}
			if _, err := tls.X509KeyPair(issued.PEM(), issued.KeyPEM()); err != nil {
				t.Errorf("chain and key do not match: %v", err)
			}
			if !bytes.HasPrefix(issued.PEM(), issued.LeafPEM()) {
				t.Error("the chain does not begin with the leaf")
			}
		})
	}
}

func TestIssueForAPublicKey(t *testing.T) {
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	before, after := time.Unix(1_000_000_000, 0), time.Unix(1_100_000_000, 0)
	issued, err := testca.Must(t).Issue(testca.Template{PublicKey: public, NotBefore: before, NotAfter: after})
	if err != nil {
		t.Fatal(err)
	}
	if !pemutil.SamePublicKey(issued.Leaf.PublicKey, public) || issued.Key != nil {
		t.Error("the certificate is not for the given key")
	}
	if !issued.Leaf.NotBefore.Equal(before) || !issued.Leaf.NotAfter.Equal(after) {
		t.Errorf("validity = %v to %v, want %v to %v", issued.Leaf.NotBefore, issued.Leaf.NotAfter, before, after)
	}
}

func TestSignCSR(t *testing.T) {
	ca := testca.Must(t)
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	request := &x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: "a.example"},
		DNSNames:       []string{"a.example", "b.example"},
		IPAddresses:    []net.IP{net.IPv4(192, 0, 2, 1)},
		EmailAddresses: []string{"who@a.example"},
		URIs:           []*url.URL{{Scheme: "spiffe", Host: "a.example", Path: "/x"}},
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, request, key)
	if err != nil {
		t.Fatal(err)
	}
	csrPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	chain, err := ca.SignCSR(csrPEM, testca.CSROptions{Intermediates: 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 3 {
		t.Errorf("the chain has %d certificates, want 3", len(chain))
	}
	leaf := chain[0]
	verify(t, ca, chain, "b.example")
	if !pemutil.SamePublicKey(leaf.PublicKey, key.Public()) {
		t.Error("the certificate is not for the key of the request")
	}
	if leaf.Subject.CommonName != "a.example" || !slices.Equal(leaf.DNSNames, request.DNSNames) ||
		len(leaf.IPAddresses) != 1 || len(leaf.EmailAddresses) != 1 || len(leaf.URIs) != 1 {
		t.Errorf("names changed: %v %v %v %v %v", leaf.Subject, leaf.DNSNames, leaf.IPAddresses, leaf.EmailAddresses, leaf.URIs)
	}

	der[len(der)-1] ^= 1
	damaged := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	for _, bad := range [][]byte{nil, ca.PEM(), damaged, []byte("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")} {
		if _, err := ca.SignCSR(bad, testca.CSROptions{}); err == nil {
			t.Errorf("SignCSR(%.40q) succeeded", bad)
		}
	}
}

// TestInBubble: the clock of a bubble starts in 2000.
func TestInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := testca.Must(t)
		certificate, err := ca.TLSCertificate("localhost")
		if err != nil {
			t.Fatal(err)
		}
		verify(t, ca, []*x509.Certificate{certificate.Leaf}, "localhost")
		time.Sleep(91 * 24 * time.Hour)
		if _, err := certificate.Leaf.Verify(x509.VerifyOptions{Roots: ca.Pool()}); err == nil {
			t.Error("the certificate is valid for longer than 90 days")
		}
	})
}
