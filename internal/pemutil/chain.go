package pemutil

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"certctl-agent/internal/printable"
)

// maxChain bounds the work of OrderChain for untrusted chains. Real chains have up to five
// certificates.
const maxChain = 32

// maxRSABits bounds the keys with which signatures are verified. The work is quadratic in the
// length, and a key of a megabyte would take minutes.
const maxRSABits = 16384

// OrderChain returns rest in issuing order, without leaf: each certificate issued the previous one,
// as TLS requires (RFC 5246, section 7.4.2). If there is a self-signed root, it comes last.
// Duplicates are dropped. If an issuer has several certificates, as with cross-signing, the path
// through the first of them comes first.
//
// Certificates that did not issue any of the others are useless to clients and are returned as
// stray. If all are stray, OrderChain returns an error: the issuer of leaf is missing, and clients
// would not find a path.
func OrderChain(leaf *x509.Certificate, rest []*x509.Certificate) (ordered, stray []*x509.Certificate, err error) {
	if len(rest) > maxChain {
		return nil, nil, fmt.Errorf("the chain has %d certificates, more than %d", len(rest), maxChain)
	}
	var unused []*x509.Certificate
	for _, cert := range rest {
		if !cert.Equal(leaf) && !slices.ContainsFunc(unused, cert.Equal) {
			unused = append(unused, cert)
		}
	}
	var follow func(child *x509.Certificate)
	follow = func(child *x509.Certificate) {
		for {
			i := slices.IndexFunc(unused, func(c *x509.Certificate) bool { return issued(c, child) })
			if i < 0 {
				return
			}
			parent := unused[i]
			unused = slices.Delete(unused, i, i+1)
			ordered = append(ordered, parent)
			follow(parent)
		}
	}
	follow(leaf)
	if len(unused) > 0 && len(ordered) == 0 && !IsSelfSigned(leaf) {
		return nil, nil, fmt.Errorf("none of the %d certificates issued the leaf; the first is %q",
			len(unused), printable.Line(unused[0].Subject.String(), 200))
	}
	return ordered, unused, nil
}

// IsSelfSigned reports whether cert is signed with its own key, like a root.
func IsSelfSigned(cert *x509.Certificate) bool { return issued(cert, cert) }

// issued reports whether child names parent as its issuer and is signed with its key.
func issued(parent, child *x509.Certificate) bool {
	// RFC 5280, section 7.1: names match case-insensitively, and some CAs encode one name in two
	// string types.
	if !bytes.Equal(parent.RawSubject, child.RawIssuer) &&
		!strings.EqualFold(parent.Subject.String(), child.Issuer.String()) {
		return false
	}
	err := x509.ErrUnsupportedAlgorithm
	if key, isRSA := parent.PublicKey.(*rsa.PublicKey); !isRSA || key.N.BitLen() <= maxRSABits {
		err = parent.CheckSignature(child.SignatureAlgorithm, child.RawTBSCertificate, child.Signature)
	}
	if err == nil {
		return true
	}
	// If a signature cannot be verified (MD5, DSA, future algorithms), matching key identifiers are
	// enough: the order of a chain does not establish trust.
	_, insecure := errors.AsType[x509.InsecureAlgorithmError](err)
	return (insecure || errors.Is(err, x509.ErrUnsupportedAlgorithm)) &&
		(len(child.AuthorityKeyId) == 0 || bytes.Equal(parent.SubjectKeyId, child.AuthorityKeyId))
}
