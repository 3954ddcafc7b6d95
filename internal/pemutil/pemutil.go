// Package pemutil reads and writes PEM certificates and private keys in the
// forms that servers use, and tells which of them belong together.
package pemutil

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

const (
	certificateType = "CERTIFICATE"
	curveType       = "EC PARAMETERS" // the curve of the key that follows

	// byteOrderMark is what some editors put before UTF-8 text.
	byteOrderMark = "\ufeff"
)

// errNoCertificate means that there is no CERTIFICATE block.
var errNoCertificate = errors.New("there is no CERTIFICATE block in it")

// ParseCertificates returns the certificates of all CERTIFICATE blocks in their
// order. Text around the blocks and blocks of other types are ignored, except
// for private keys, which must not be where certificates are expected.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	// Within as well: the text may have been joined from files that begin with
	// one, and encoding/pem passes over a block that follows one.
	data = bytes.ReplaceAll(data, []byte(byteOrderMark), nil)
	begun := bytes.Count(data, []byte("-----BEGIN "+certificateType+"-----"))
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if strings.HasSuffix(block.Type, privateKeySuffix) {
			clear(block.Bytes)
			return nil, fmt.Errorf("there is a %s among the certificates", block.Type)
		}
		if block.Type != certificateType {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	// pem.Decode passes over a block that it cannot read. A chain that has lost
	// an intermediate that way would look complete.
	if len(certs) < begun {
		return nil, fmt.Errorf("%d of %d CERTIFICATE blocks cannot be read: no valid PEM", begun-len(certs), begun)
	}
	if len(certs) == 0 {
		return nil, errNoCertificate
	}
	return certs, nil
}

// OtherBlocks returns the blocks of data that are neither a certificate nor a
// private key or a part of one, each as it was encoded.
func OtherBlocks(data []byte) []byte {
	var others []byte
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			return others
		}
		switch {
		case strings.HasSuffix(block.Type, certificateType): // also OpenSSL's X509 CERTIFICATE and TRUSTED CERTIFICATE
		case strings.Contains(block.Type, privateKeySuffix), block.Type == curveType:
			clear(block.Bytes)
		default:
			others = append(others, pem.EncodeToMemory(block)...)
		}
	}
}

// EncodeCertificates returns one PEM block for each certificate, one directly
// after the other, with a newline at the end. No certificates make no bytes.
func EncodeCertificates(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: certificateType, Bytes: cert.Raw})...)
	}
	return out
}

// Fingerprint is the SHA-256 of the certificate's DER, in lower-case hex.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}
