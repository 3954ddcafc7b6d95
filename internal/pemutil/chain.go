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

// maxChain bounds the work that OrderChain does for a chain that came from
// elsewhere. Chains in use have up to five certificates.
const maxChain = 32

// maxRSABits bounds the key that a signature is checked with. The work grows with the square of its
// length, and a megabyte would hold one that takes minutes.
const maxRSABits = 16384

// OrderChain returns rest in issuing order, without leaf: each certificate issued the one before
// it, which is the order that TLS asks for (RFC 5246, section 7.4.2). A self-signed root ends it,
// where there is one. Repeated certificates are dropped. Where an issuer is there more than once,
// as with cross-signed ones, the path through the first of them comes first.
//
// Certificates that issued none of the others are no use to a client, and are
// returned as stray. It is an error when all are: then the issuer of leaf has
// been lost, and clients would not find a path.
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
		return nil, nil, fmt.Errorf("none of its %d certificates issued the leaf; the first is %q",
			len(unused), printable.Line(unused[0].Subject.String(), 200))
	}
	return ordered, unused, nil
}

// IsSelfSigned reports whether cert is signed with its own key, as roots are.
func IsSelfSigned(cert *x509.Certificate) bool { return issued(cert, cert) }

// issued reports whether child was signed with the key of parent, under its name.
func issued(parent, child *x509.Certificate) bool {
	// RFC 5280, section 7.1: names match without regard to case, and some CAs
	// encode the same name in two string types.
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
	// What cannot be checked (MD5, DSA, algorithms of tomorrow) is believed when the
	// key identifiers agree: the order of a chain is not a question of trust.
	_, insecure := errors.AsType[x509.InsecureAlgorithmError](err)
	return (insecure || errors.Is(err, x509.ErrUnsupportedAlgorithm)) &&
		(len(child.AuthorityKeyId) == 0 || bytes.Equal(parent.SubjectKeyId, child.AuthorityKeyId))
}
