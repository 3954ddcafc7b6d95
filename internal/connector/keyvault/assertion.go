package keyvault

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/pkcs12"
	"certctl-agent/internal/trustedfile"
)

const (
	// assertionLife is how long an assertion is valid, as recommended on the page about signer.
	assertionLife = 10 * time.Minute

	// maxSigner bounds the file of a certificate and its key, in bytes.
	maxSigner = 256 << 10

	// openWork bounds the cost of opening a PKCS#12 file, see pkcs12.Open.
	openWork = 256 << 20
)

// signer authenticates an application by its certificate, see
// https://learn.microsoft.com/entra/identity-platform/certificate-credentials.
type signer struct {
	certificate *x509.Certificate
	key         *rsa.PrivateKey
}

// readSigner reads a certificate and its key, as PEM or PKCS#12.
func readSigner(path, password string) (*signer, error) {
	data, err := trustedfile.ReadSecret(path, maxSigner)
	if err != nil {
		return nil, err
	}
	var found crypto.Signer
	var certificates []*x509.Certificate
	if pkcs12.Is(data) {
		found, certificates, err = fromStore(data, password)
	} else {
		found, certificates, err = fromPEM(data)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	key, ok := found.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: Entra ID accepts only RSA keys here", path)
	}
	i := slices.IndexFunc(certificates, func(c *x509.Certificate) bool { return pemutil.SamePublicKey(c.PublicKey, key.Public()) })
	if i < 0 {
		return nil, fmt.Errorf("%s: it has no certificate for its key", path)
	}
	return &signer{certificates[i], key}, nil
}

func fromStore(data []byte, password string) (crypto.Signer, []*x509.Certificate, error) {
	store, err := pkcs12.Open(data, password, openWork)
	if err != nil {
		if errors.Is(err, pkcs12.ErrPassword) {
			err = errors.New("AZURE_CLIENT_CERTIFICATE_PASSWORD is not its password")
		}
		return nil, nil, err
	}
	keys, err := store.Keys(password)
	if err != nil {
		return nil, nil, err
	}
	if len(keys) != 1 {
		return nil, nil, fmt.Errorf("it has %d private keys, but must have one", len(keys))
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keys[0].PKCS8)
	key, ok := parsed.(crypto.Signer)
	if err != nil || !ok {
		return nil, nil, errors.New("cannot parse its private key")
	}
	return key, keys[0].Chain, nil
}

func fromPEM(data []byte) (crypto.Signer, []*x509.Certificate, error) {
	key, err := pemutil.ParseKey(data)
	if err != nil {
		return nil, nil, err
	}
	var certificates []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, err
		}
		certificates = append(certificates, c)
	}
	return key, certificates, nil
}

// assertion returns a JWT (RFC 7519), signed with PS256 (RFC 7518, section 3.5).
func (s *signer) assertion(client, endpoint string, now time.Time) (string, error) {
	sum := sha256.Sum256(s.certificate.Raw)
	header := map[string]any{"alg": "PS256", "typ": "JWT", "x5t#S256": base64.RawURLEncoding.EncodeToString(sum[:])}
	claims := map[string]any{
		"aud": endpoint, "iss": client, "sub": client, "jti": rand.Text(),
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(assertionLife).Unix(),
	}
	var parts [2]string
	for i, part := range []any{header, claims} {
		data, err := json.Marshal(part)
		if err != nil {
			return "", err
		}
		parts[i] = base64.RawURLEncoding.EncodeToString(data)
	}
	signed := parts[0] + "." + parts[1]
	digest := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPSS(rand.Reader, s.key, crypto.SHA256, digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	if err != nil {
		return "", err
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}
