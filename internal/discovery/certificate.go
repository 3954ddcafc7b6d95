package discovery

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"time"

	"certctl-agent/internal/api"
)

// describe fills in everything that a report says about a certificate except
// its fingerprint, its PEM and where it was found. der is exactly one certificate.
func describe(der []byte) (api.DiscoveredCertificate, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		// crypto/x509 reads what may be trusted; discovery reads what is there.
		lenient, lenientErr := parseLenient(der)
		if lenientErr != nil {
			return api.DiscoveredCertificate{}, err
		}
		cert = lenient
	}
	algorithm, size := publicKey(cert)
	return api.DiscoveredCertificate{
		CommonName:   text(cert.Subject.CommonName),
		SANs:         subjectAltNames(cert),
		SerialNumber: cert.SerialNumber.Text(16),
		IssuerDN:     text(cert.Issuer.String()),
		SubjectDN:    text(cert.Subject.String()),
		NotBefore:    cert.NotBefore.UTC().Format(time.RFC3339),
		NotAfter:     cert.NotAfter.UTC().Format(time.RFC3339),
		KeyAlgorithm: algorithm,
		KeySize:      size,
		IsCA:         cert.IsCA,
	}, nil
}

// text makes s safe for the control plane, which drops an entry with a NUL in
// a name and stores nothing but UTF-8.
func text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

func subjectAltNames(cert *x509.Certificate) []string {
	sans := make([]string, 0, len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses)+len(cert.URIs))
	for _, name := range cert.DNSNames {
		sans = append(sans, text(name))
	}
	for _, address := range cert.EmailAddresses {
		sans = append(sans, text(address))
	}
	for _, ip := range cert.IPAddresses {
		sans = append(sans, ip.String())
	}
	for _, uri := range cert.URIs {
		sans = append(sans, text(uri.String()))
	}
	return sans
}

// curveKey stands for a key on a curve that crypto/x509 does not know.
type curveKey struct{ bits int }

func publicKey(cert *x509.Certificate) (algorithm string, bits int) {
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		return "RSA", key.N.BitLen()
	case *ecdsa.PublicKey:
		return "ECDSA", key.Curve.Params().BitSize
	case curveKey:
		return "ECDSA", key.bits
	case ed25519.PublicKey:
		return "Ed25519", 256
	}
	return cert.PublicKeyAlgorithm.String(), 0
}

// otherCurves are the named curves that are in use and that crypto/x509 does
// not know (SEC 2; RFC 5639), with their size in bits.
var otherCurves = map[string]int{
	"1.3.132.0.10":          256, // secp256k1
	"1.2.840.10045.3.1.1":   192, // P-192
	"1.3.36.3.3.2.8.1.1.7":  256, // brainpoolP256r1
	"1.3.36.3.3.2.8.1.1.8":  256, // brainpoolP256t1
	"1.3.36.3.3.2.8.1.1.11": 384, // brainpoolP384r1
	"1.3.36.3.3.2.8.1.1.12": 384, // brainpoolP384t1
	"1.3.36.3.3.2.8.1.1.13": 512, // brainpoolP512r1
	"1.3.36.3.3.2.8.1.1.14": 512, // brainpoolP512t1
}

var (
	oidECDSA            = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidDSA              = asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
)

// parseLenient reads the fields that a report needs of a certificate that
// crypto/x509 refuses as a whole: a negative serial number, a curve that it
// does not know, an extension that it cannot read.
func parseLenient(der []byte) (*x509.Certificate, error) {
	var outer struct {
		TBS struct {
			Version    int `asn1:"optional,explicit,default:0,tag:0"`
			Serial     *big.Int
			Signature  asn1.RawValue
			Issuer     pkix.RDNSequence
			Validity   struct{ NotBefore, NotAfter time.Time }
			Subject    pkix.RDNSequence
			PublicKey  publicKeyInfo
			IssuerUID  asn1.BitString   `asn1:"optional,tag:1"`
			SubjectUID asn1.BitString   `asn1:"optional,tag:2"`
			Extensions []pkix.Extension `asn1:"omitempty,optional,explicit,tag:3"`
		}
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if rest, err := asn1.Unmarshal(der, &outer); err != nil {
		return nil, err
	} else if len(rest) > 0 {
		return nil, errors.New("trailing data after the certificate")
	}
	tbs := outer.TBS
	cert := &x509.Certificate{
		SerialNumber: tbs.Serial,
		NotBefore:    tbs.Validity.NotBefore,
		NotAfter:     tbs.Validity.NotAfter,
	}
	cert.Issuer.FillFromRDNSequence(&tbs.Issuer)
	cert.Subject.FillFromRDNSequence(&tbs.Subject)
	cert.PublicKeyAlgorithm, cert.PublicKey = tbs.PublicKey.read()
	for _, extension := range tbs.Extensions {
		switch {
		case extension.Id.Equal(oidSubjectAltName):
			lenientNames(cert, extension.Value)
		case extension.Id.Equal(oidBasicConstraints):
			var constraints struct {
				IsCA bool          `asn1:"optional"`
				Path asn1.RawValue `asn1:"optional"`
			}
			if _, err := asn1.Unmarshal(extension.Value, &constraints); err == nil {
				cert.IsCA = constraints.IsCA
			}
		}
	}
	return cert, nil
}

type publicKeyInfo struct {
	Algorithm struct {
		ID         asn1.ObjectIdentifier
		Parameters asn1.RawValue `asn1:"optional"`
	}
	Key asn1.BitString
}

func (p publicKeyInfo) read() (x509.PublicKeyAlgorithm, any) {
	switch {
	case p.Algorithm.ID.Equal(oidDSA):
		return x509.DSA, nil
	case p.Algorithm.ID.Equal(oidECDSA):
		var curve asn1.ObjectIdentifier
		if _, err := asn1.Unmarshal(p.Algorithm.Parameters.FullBytes, &curve); err == nil && otherCurves[curve.String()] > 0 {
			return x509.ECDSA, curveKey{otherCurves[curve.String()]}
		}
	}
	if spki, err := asn1.Marshal(p); err == nil {
		if key, err := x509.ParsePKIXPublicKey(spki); err == nil {
			return x509.UnknownPublicKeyAlgorithm, key
		}
	}
	if p.Algorithm.ID.Equal(oidECDSA) {
		return x509.ECDSA, nil
	}
	return x509.UnknownPublicKeyAlgorithm, nil
}

// lenientNames reads the names of RFC 5280, 4.2.1.6 that a report has.
func lenientNames(cert *x509.Certificate, extension []byte) {
	outer, _, err := element(extension)
	if err != nil || outer.tag != tagSequence {
		return
	}
	for name, err := range outer.children() {
		if err != nil {
			return
		}
		switch name.tag {
		case 0x81:
			cert.EmailAddresses = append(cert.EmailAddresses, string(name.body))
		case 0x82:
			cert.DNSNames = append(cert.DNSNames, string(name.body))
		case 0x87:
			cert.IPAddresses = append(cert.IPAddresses, net.IP(name.body))
		case 0x86:
			cert.URIs = append(cert.URIs, &url.URL{Opaque: string(name.body)})
		}
	}
}

// errNoCertificate: well-formed, but something else.
var errNoCertificate = errors.New("not a certificate")

// firstCertificate is the certificate at the start of b, judged by its outer
// shape (RFC 5280, 4.1): its own bytes, and what follows it, which OpenSSL
// ignores too.
func firstCertificate(b []byte) (der, rest []byte, err error) {
	outer, rest, err := element(b)
	if err != nil {
		if len(b) > 0 && b[0] == tagSequence {
			return nil, nil, fmt.Errorf("damaged certificate: %w", err)
		}
		return nil, nil, errNoCertificate
	}
	if outer.tag != tagSequence {
		return nil, rest, errNoCertificate
	}
	parts := fields{rest: outer.body}
	parts.next(tagSequence)
	parts.next(tagSequence)
	parts.next(tagBitString)
	if errors.Is(parts.err, errTruncated) {
		return nil, rest, fmt.Errorf("damaged certificate: %w", parts.err)
	}
	if parts.err != nil {
		return nil, rest, errNoCertificate
	}
	return outer.full, rest, nil
}
