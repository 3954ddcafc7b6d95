// Package testca issues throw-away certificates for tests and the demo. They are valid from about
// time.Now, also inside a synctest bubble.
package testca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"time"

	"certctl-agent/internal/pemutil"
)

// CA is a certificate authority with an ECDSA key. It is safe for concurrent use.
type CA struct {
	Root *x509.Certificate
	key  crypto.Signer
}

// New creates a CA that is valid for ten years.
func New() (*CA, error) {
	now := time.Now()
	root, key, err := sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "Test Root " + rand.Text()[:8]},
		NotBefore:             now.Add(-24 * time.Hour),
		NotAfter:              now.AddDate(10, 0, 0),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("make a test CA: %w", err)
	}
	return &CA{Root: root, key: key}, nil
}

// TB is the part of testing.TB that Must needs.
type TB interface {
	Helper()
	Fatal(...any)
}

// Must is like New, but ends the test on an error.
func Must(t TB) *CA {
	t.Helper()
	ca, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// PEM returns the root certificate.
func (ca *CA) PEM() []byte { return pemutil.EncodeCertificates(ca.Root) }

// Pool returns a pool with the root certificate.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.Root)
	return pool
}

// Template says what to issue. The zero value is a certificate for localhost
// with a new P-256 key, valid from an hour ago for 90 days.
type Template struct {
	CommonName string   // "": the first of Names
	Names      []string // subject alternative names of any kind; nil: localhost

	Key       crypto.Signer    // nil: a new one
	PublicKey crypto.PublicKey // instead of Key, if only the public key is known

	KeyUsage    x509.KeyUsage      // 0: signatures
	ExtKeyUsage []x509.ExtKeyUsage // nil: servers and clients

	NotBefore, NotAfter time.Time // zero: an hour ago, 90 days ahead
	Intermediates       int       // number of CAs between root and leaf
	OmitRoot            bool      // leave the root out of the chain
}

// CSROptions sets what a CSR does not. For the fields see Template.
type CSROptions struct {
	NotBefore, NotAfter time.Time
	Intermediates       int
	OmitRoot            bool
}

// Issued is a certificate with its chain and, if known, its key.
type Issued struct {
	Leaf  *x509.Certificate
	Chain []*x509.Certificate // leaf, intermediates, root
	Key   crypto.Signer       // nil for a Template with a PublicKey
}

// PEM returns the whole chain, leaf first.
func (i *Issued) PEM() []byte { return pemutil.EncodeCertificates(i.Chain...) }

// LeafPEM returns only the leaf.
func (i *Issued) LeafPEM() []byte { return pemutil.EncodeCertificates(i.Leaf) }

// KeyPEM returns the private key.
func (i *Issued) KeyPEM() []byte {
	data, err := pemutil.EncodeKey(i.Key)
	if err != nil {
		panic(err) // cannot happen with the supported key types
	}
	return data
}

// TLS returns the certificate for use in a server.
func (i *Issued) TLS() tls.Certificate {
	certificate := tls.Certificate{PrivateKey: i.Key, Leaf: i.Leaf}
	for _, c := range i.Chain {
		certificate.Certificate = append(certificate.Certificate, c.Raw)
	}
	return certificate
}

// Issue issues a certificate.
func (ca *CA) Issue(t Template) (*Issued, error) {
	if t.Names == nil {
		t.Names = []string{"localhost"}
	}
	if t.CommonName == "" && len(t.Names) > 0 {
		t.CommonName = t.Names[0]
	}
	leaf := &x509.Certificate{Subject: pkix.Name{CommonName: t.CommonName}, KeyUsage: t.KeyUsage, ExtKeyUsage: t.ExtKeyUsage}
	for _, name := range t.Names {
		if err := addName(leaf, name); err != nil {
			return nil, err
		}
	}
	if t.Key == nil && t.PublicKey == nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		t.Key = key
	}
	public := t.PublicKey
	if public == nil {
		public = t.Key.Public()
	}
	chain, err := ca.issue(leaf, public, CSROptions{t.NotBefore, t.NotAfter, t.Intermediates, t.OmitRoot})
	if err != nil {
		return nil, err
	}
	return &Issued{Leaf: chain[0], Chain: chain, Key: t.Key}, nil
}

// SignCSR issues a certificate for a PEM PKCS#10 request and returns it with its chain, leaf first.
func (ca *CA) SignCSR(csrPEM []byte, options CSROptions) ([]*x509.Certificate, error) {
	block, _ := pem.Decode(csrPEM)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, errors.New("sign CSR: no CERTIFICATE REQUEST block")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("sign CSR: %w", err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("sign CSR: %w", err)
	}
	return ca.issue(&x509.Certificate{
		Subject:        request.Subject,
		DNSNames:       request.DNSNames,
		EmailAddresses: request.EmailAddresses,
		IPAddresses:    request.IPAddresses,
		URIs:           request.URIs,
	}, request.PublicKey, options)
}

// TLSCertificate issues a certificate for use in a server of hosts.
func (ca *CA) TLSCertificate(hosts ...string) (tls.Certificate, error) {
	issued, err := ca.Issue(Template{Names: hosts})
	if err != nil {
		return tls.Certificate{}, err
	}
	return issued.TLS(), nil
}

// issue completes leaf, signs it and returns the chain.
func (ca *CA) issue(leaf *x509.Certificate, public crypto.PublicKey, o CSROptions) ([]*x509.Certificate, error) {
	now := time.Now()
	leaf.NotBefore, leaf.NotAfter = o.NotBefore, o.NotAfter
	if leaf.NotBefore.IsZero() {
		leaf.NotBefore = now.Add(-time.Hour)
	}
	if leaf.NotAfter.IsZero() {
		leaf.NotAfter = now.AddDate(0, 0, 90)
	}
	leaf.BasicConstraintsValid = true
	if leaf.KeyUsage == 0 {
		leaf.KeyUsage = x509.KeyUsageDigitalSignature
	}
	if leaf.ExtKeyUsage == nil {
		leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}

	parent, key := ca.Root, ca.key
	var above []*x509.Certificate // from the root down
	if !o.OmitRoot {
		above = append(above, ca.Root)
	}
	for n := range o.Intermediates {
		var err error
		parent, key, err = sign(&x509.Certificate{
			Subject:               pkix.Name{CommonName: fmt.Sprintf("Test Intermediate %d %s", n+1, rand.Text()[:8])},
			NotBefore:             ca.Root.NotBefore,
			NotAfter:              ca.Root.NotAfter,
			IsCA:                  true,
			BasicConstraintsValid: true,
			KeyUsage:              x509.KeyUsageCertSign,
		}, parent, key)
		if err != nil {
			return nil, err
		}
		above = append(above, parent)
	}
	cert, err := create(leaf, parent, public, key)
	if err != nil {
		return nil, err
	}
	chain := []*x509.Certificate{cert}
	for i := len(above) - 1; i >= 0; i-- {
		chain = append(chain, above[i])
	}
	return chain, nil
}

// sign creates a key and a certificate for it. Without a parent the certificate is self-signed.
func sign(template, parent *x509.Certificate, parentKey crypto.Signer) (*x509.Certificate, crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	cert, err := create(template, parent, key.Public(), parentKey)
	return cert, key, err
}

func create(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] = serial[0]&0x7f | 0x40 // positive and of constant length
	template.SerialNumber = new(big.Int).SetBytes(serial)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, fmt.Errorf("issue a certificate for %q: %w", template.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

func addName(cert *x509.Certificate, name string) error {
	if ip := net.ParseIP(name); ip != nil {
		cert.IPAddresses = append(cert.IPAddresses, ip)
	} else if strings.Contains(name, "://") {
		uri, err := url.Parse(name)
		if err != nil {
			return fmt.Errorf("issue a certificate: %w", err)
		}
		cert.URIs = append(cert.URIs, uri)
	} else if strings.Contains(name, "@") {
		cert.EmailAddresses = append(cert.EmailAddresses, name)
	} else {
		cert.DNSNames = append(cert.DNSNames, name)
	}
	return nil
}
