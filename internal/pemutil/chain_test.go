package pemutil_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
)

func TestOrderChain(t *testing.T) {
	ca := testca.Must(t)
	issued := issue(t, ca, testca.Template{Intermediates: 2})
	leaf, low, high, root := issued.Chain[0], issued.Chain[1], issued.Chain[2], issued.Chain[3]
	stranger := issue(t, testca.Must(t), testca.Template{}).Chain[1]
	other := issue(t, ca, testca.Template{}).Leaf

	type chain []*x509.Certificate
	tests := []struct {
		name  string
		rest  chain
		want  chain
		stray chain
		err   string
	}{
		{"empty", nil, nil, nil, ""},
		{"in order", chain{low, high, root}, chain{low, high, root}, nil, ""},
		{"reversed", chain{root, high, low}, chain{low, high, root}, nil, ""},
		{"without root", chain{high, low}, chain{low, high}, nil, ""},
		{"repeated", chain{low, low, high, root, low}, chain{low, high, root}, nil, ""},
		{"leaf repeated", chain{leaf, low, high}, chain{low, high}, nil, ""},
		{"stranger", chain{low, stranger, high}, chain{low, high}, chain{stranger}, ""},
		{"strangers around", chain{stranger, high, low, other, stranger}, chain{low, high}, chain{stranger, other}, ""},
		{"gap", chain{low, root}, chain{low}, chain{root}, ""},
		{"the issuer is missing", chain{high, root}, nil, nil, "none of the 2 certificates issued the leaf"},
		{"strangers alone", chain{stranger}, nil, nil, "issued the leaf"},
		{"too long", slices.Repeat(chain{low}, 33), nil, nil, "more than 32"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, stray, err := pemutil.OrderChain(leaf, test.rest)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error = %v, want one with %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !slices.EqualFunc(got, test.want, (*x509.Certificate).Equal) {
				t.Errorf("order = %v, want %v", subjects(got), subjects(test.want))
			}
			if !slices.EqualFunc(stray, test.stray, (*x509.Certificate).Equal) {
				t.Errorf("stray = %v, want %v", subjects(stray), subjects(test.stray))
			}
		})
	}
}

func subjects(certs []*x509.Certificate) (names []string) {
	for _, c := range certs {
		names = append(names, c.Subject.CommonName)
	}
	return names
}

// TestOrderChainCrossSigned covers a key with certificates from two issuers.
func TestOrderChainCrossSigned(t *testing.T) {
	newKey := func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }
	serial := int64(0)
	sign := func(subject string, key *ecdsa.PrivateKey, issuer string, issuerKey *ecdsa.PrivateKey) *x509.Certificate {
		serial++
		template := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: subject},
			NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
		parent := &x509.Certificate{Subject: pkix.Name{CommonName: issuer}}
		return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, parent, key.Public(), issuerKey))))
	}
	oldRoot, newRoot, middle := newKey(), newKey(), newKey()
	leaf := sign("leaf", newKey(), "Middle CA", middle)
	byNew := sign("Middle CA", middle, "New Root", newRoot)
	newSelf := sign("New Root", newRoot, "New Root", newRoot)
	newByOld := sign("New Root", newRoot, "Old Root", oldRoot)
	oldSelf := sign("Old Root", oldRoot, "Old Root", oldRoot)

	got, _, err := pemutil.OrderChain(leaf, []*x509.Certificate{oldSelf, newByOld, byNew})
	if err != nil || !slices.Equal(got, []*x509.Certificate{byNew, newByOld, oldSelf}) {
		t.Errorf("one path: %v, %v", subjects(got), err)
	}
	got, _, err = pemutil.OrderChain(leaf, []*x509.Certificate{newSelf, byNew, newByOld, oldSelf})
	if err != nil || !slices.Equal(got, []*x509.Certificate{byNew, newSelf, newByOld, oldSelf}) {
		t.Errorf("two paths: %v, %v", subjects(got), err)
	}

	// A self-signed leaf has no issuer that could be missing.
	if got, stray, err := pemutil.OrderChain(newSelf, []*x509.Certificate{byNew}); err != nil || len(got) > 0 || !slices.Equal(stray, []*x509.Certificate{byNew}) {
		t.Errorf("self-signed: %v, %v, %v", subjects(got), subjects(stray), err)
	}
	// A matching name alone is not enough.
	impostor := sign("Middle CA", newKey(), "New Root", newRoot)
	if _, _, err := pemutil.OrderChain(leaf, []*x509.Certificate{impostor}); err == nil {
		t.Error("a certificate with the issuer's name and another key was taken")
	}
	// Names that differ only in case match (RFC 5280).
	other := sign("leaf", newKey(), "MIDDLE ca", middle)
	if _, _, err := pemutil.OrderChain(other, []*x509.Certificate{byNew}); err != nil {
		t.Errorf("issuer in another case: %v", err)
	}
}

// TestOrderChainUnknownAlgorithm checks that a signature that cannot be verified is accepted if
// names and key identifiers match.
func TestOrderChainUnknownAlgorithm(t *testing.T) {
	issued := issue(t, testca.Must(t), testca.Template{Intermediates: 1})
	for _, algorithm := range []x509.SignatureAlgorithm{x509.UnknownSignatureAlgorithm, x509.MD5WithRSA} {
		leaf := *issued.Leaf
		leaf.SignatureAlgorithm = algorithm
		if _, _, err := pemutil.OrderChain(&leaf, issued.Chain[1:]); err != nil {
			t.Errorf("%v: %v", algorithm, err)
		}
		leaf.AuthorityKeyId = []byte("of another key")
		if _, _, err := pemutil.OrderChain(&leaf, issued.Chain[1:]); err == nil {
			t.Errorf("%v: an issuer with another key identifier was taken", algorithm)
		}
	}
}

// TestOrderChainHugeKey checks that a key so long that verifying a signature would take minutes is
// not used, and that its signatures count as unknown.
func TestOrderChainHugeKey(t *testing.T) {
	issued := issue(t, testca.Must(t), testca.Template{Intermediates: 1})
	leaf, low := *issued.Leaf, *issued.Chain[1]
	leaf.SignatureAlgorithm = x509.SHA256WithRSA
	low.PublicKey = &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 32768, 1), E: 65537}
	if _, _, err := pemutil.OrderChain(&leaf, []*x509.Certificate{&low, issued.Chain[2]}); err != nil {
		t.Errorf("the signature was checked: %v", err)
	}
}

func TestIsSelfSigned(t *testing.T) {
	issued := issue(t, testca.Must(t), testca.Template{Intermediates: 1})
	for i, want := range []bool{false, false, true} {
		if got := pemutil.IsSelfSigned(issued.Chain[i]); got != want {
			t.Errorf("%s: %v, want %v", issued.Chain[i].Subject, got, want)
		}
	}
}

// FuzzOrderChain drops, repeats and reorders the certificates of two CAs. The result must be in
// issuing order, and nothing else may be lost.
func FuzzOrderChain(f *testing.F) {
	chain := issue(f, testca.Must(f), testca.Template{Intermediates: 3}).Chain
	pool := append(chain[1:], issue(f, testca.Must(f), testca.Template{}).Chain[1])
	f.Add([]byte{3, 2, 1, 0})
	f.Add([]byte{0, 0, 1, 4})
	f.Fuzz(func(t *testing.T, order []byte) {
		rest := make([]*x509.Certificate, len(order))
		for i, b := range order {
			rest[i] = pool[int(b)%len(pool)]
		}
		got, stray, err := pemutil.OrderChain(chain[0], rest)
		if err != nil {
			return
		}
		for _, c := range rest {
			if kept, dropped := slices.Contains(got, c), slices.Contains(stray, c); kept == dropped {
				t.Errorf("%s: kept is %v, stray is %v", c.Subject, kept, dropped)
			}
		}
		for i, c := range append([]*x509.Certificate{chain[0]}, got...)[:len(got)] {
			if err := c.CheckSignatureFrom(got[i]); err != nil {
				t.Errorf("%v: certificate %d was not issued by the next: %v", subjects(got), i, err)
			}
		}
	})
}
