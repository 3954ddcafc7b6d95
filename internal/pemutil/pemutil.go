// Package pemutil reads and writes certificates and private keys in PEM, orders chains, and
// compares keys.
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
	curveType       = "EC PARAMETERS" // the curve of the next key

	// byteOrderMark is written by some editors at the start of UTF-8 text.
	byteOrderMark = "\ufeff"
)

var errNoCertificate = errors.New("no CERTIFICATE block found")

// ParseCertificates returns the certificates of all CERTIFICATE blocks in order. It ignores text
// and blocks of other types, except that private keys are an error: they must not be stored where
// certificates are expected.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	// Also inside data: it may have been joined from files that begin with a mark, and encoding/pem
	// skips a block after a mark.
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
			return nil, fmt.Errorf("found a %s among the certificates", block.Type)
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
	// pem.Decode skips blocks that it cannot read. Without an intermediate that was lost that way,
	// a chain would still look complete.
	if len(certs) < begun {
		return nil, fmt.Errorf("%d of %d CERTIFICATE blocks are not valid PEM", begun-len(certs), begun)
	}
	if len(certs) == 0 {
		return nil, errNoCertificate
	}
	return certs, nil
}

// OtherBlocks returns the blocks of data, in PEM, that are not certificates, private keys or parts
// of keys.
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

// EncodeCertificates returns the PEM of the certificates, without text between the blocks. It
// returns nil for no certificates.
func EncodeCertificates(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: certificateType, Bytes: cert.Raw})...)
	}
	return out
}

// Fingerprint returns the SHA-256 of the certificate's DER in lower-case hex.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}
