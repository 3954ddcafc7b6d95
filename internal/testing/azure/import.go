package azure

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/pkcs12"
)

// work is the budget for opening a store.
const work = 256 << 20

func bad(words string) *problem { return &problem{http.StatusBadRequest, "BadParameter", words, ""} }

// newVersion imports the body of a request, see
// https://learn.microsoft.com/rest/api/keyvault/certificates/import-certificate/import-certificate?view=rest-keyvault-certificates-7.4
// and
// https://learn.microsoft.com/azure/key-vault/certificates/tutorial-import-certificate#import-a-certificate-to-your-key-vault.
func (v *Vault) newVersion(body []byte) (*Version, *problem) {
	var asked struct {
		Value      string `json:"value"`
		Password   string `json:"pwd"`
		Policy     *Policy
		Attributes *struct {
			Enabled *bool `json:"enabled"`
		}
		Tags map[string]string
	}
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&asked); err != nil {
		return nil, bad("the body is not a valid import: " + err.Error())
	}
	v.server.imported = append(v.server.imported, asked.Value, asked.Password)
	if refused := checkTags(asked.Tags); refused != nil {
		return nil, refused
	}
	at := &Version{ID: random(), Enabled: true, Tags: asked.Tags, created: time.Now(), updated: time.Now()}
	if asked.Policy != nil {
		at.Policy = *asked.Policy
	}
	if at.Policy.Secret.ContentType == "" {
		at.Policy.Secret.ContentType = PFX
	}
	if asked.Attributes != nil && asked.Attributes.Enabled != nil {
		at.Enabled = *asked.Attributes.Enabled
	}
	key, refused := at.read(asked.Value, asked.Password)
	if refused != nil {
		return nil, refused
	}
	return at, at.Policy.fit(key)
}

// read extracts the certificate and its key from the value.
func (at *Version) read(value, password string) (crypto.Signer, *problem) {
	const unreadable = "The specified PKCS#12 X.509 certificate content can not be read. Please check if certificate is in valid PKCS#12 format."
	var certificates []*x509.Certificate
	switch at.Policy.Secret.ContentType {
	case PEM:
		data := []byte(value)
		if decoded, err := base64.StdEncoding.DecodeString(value); err == nil {
			data = decoded // the Azure SDK for Python encodes PEM again, others do not
		}
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			switch block.Type {
			case "PRIVATE KEY":
				at.Key = block.Bytes
			case "CERTIFICATE":
				c, err := x509.ParseCertificate(block.Bytes)
				if err != nil {
					return nil, bad("The specified PEM X.509 certificate content can not be read.")
				}
				certificates = append(certificates, c)
			default:
				return nil, bad("The specified PEM X.509 certificate content is in an unexpected format. Please check if certificate is in valid PEM format.")
			}
		}
	case PFX:
		data, err := base64.StdEncoding.DecodeString(value)
		if err != nil || !pkcs12.Is(data) {
			return nil, bad(unreadable)
		}
		// The service has refused AES: https://github.com/MicrosoftDocs/azure-docs/issues/39861,
		// https://github.com/hashicorp/packer-plugin-azure/pull/571.
		if pbes2 := []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x05, 0x0d}; bytes.Contains(data, pbes2) {
			return nil, bad(unreadable)
		}
		store, err := pkcs12.Open(data, password, work)
		if err != nil {
			return nil, bad("The specified network password is not correct.")
		}
		keys, err := store.Keys(password)
		if err != nil || len(keys) != 1 {
			return nil, bad(unreadable)
		}
		at.Key, certificates = keys[0].PKCS8, keys[0].Chain
	default:
		return nil, bad("The property policy.secret_props.contentType has an invalid value.")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(at.Key)
	key, ok := parsed.(crypto.Signer)
	if err != nil || !ok {
		return nil, bad("Private key is not specified in the specified X.509 certificate content. Please specify private key in the X.509 certificate content.")
	}
	i := slices.IndexFunc(certificates, func(c *x509.Certificate) bool { return pemutil.SamePublicKey(c.PublicKey, key.Public()) })
	if i < 0 {
		return nil, bad("The private key does not belong to a certificate of the content.")
	}
	at.Certificate = certificates[i]
	at.Chain = slices.Delete(certificates, i, i+1)
	return key, nil
}

// fit completes the key properties of the policy, or returns an error if they do not match the key,
// see
// https://learn.microsoft.com/azure/key-vault/certificates/about-certificates#supported-key-types.
func (p *Policy) fit(key crypto.Signer) *problem {
	kind, curve, size := "", "", 0
	switch public := key.Public().(type) {
	case *rsa.PublicKey:
		kind, size = "RSA", public.N.BitLen()
		if !slices.Contains([]int{2048, 3072, 4096}, size) {
			return bad("The key size is not supported.")
		}
	case *ecdsa.PublicKey:
		kind, curve, size = "EC", public.Curve.Params().Name, public.Curve.Params().BitSize
		if !slices.Contains([]string{"P-256", "P-384", "P-521"}, curve) {
			return bad("The curve is not supported.")
		}
	default:
		return bad("The key type is not supported.")
	}
	exportable := p.Key.Exportable == nil || *p.Key.Exportable
	switch {
	case p.Key.Type != "" && strings.TrimSuffix(p.Key.Type, "-HSM") != kind,
		p.Key.Size != 0 && p.Key.Size != size, p.Key.Curve != "" && p.Key.Curve != curve:
		return bad("The policy's key properties do not match the key of the certificate.")
	case strings.HasSuffix(p.Key.Type, "-HSM") && exportable:
		return bad("Keys that an HSM protects cannot be exportable.")
	}
	if p.Key.Type == "" {
		p.Key.Type = kind
	}
	p.Key.Exportable, p.Key.Size, p.Key.Curve = &exportable, size, curve
	if p.Issuer == nil {
		p.Issuer = json.RawMessage(`{"name":"Unknown"}`)
	}
	return nil
}

// export returns the value of the secret. It contains the key only if that is exportable.
func (at *Version) export() (string, error) {
	exportable := *at.Policy.Key.Exportable
	if at.Policy.Secret.ContentType == PEM {
		all := pemutil.EncodeCertificates(append([]*x509.Certificate{at.Certificate}, at.Chain...)...)
		if exportable {
			all = append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: at.Key}), all...)
		}
		return string(all), nil
	}
	store := pkcs12.NewOnce("", true) // nothing to protect, and it must be fast
	if exportable {
		entry := keyentry.PrivateKey{Alias: at.ID, PKCS8: at.Key, Chain: append([]*x509.Certificate{at.Certificate}, at.Chain...), Created: at.created}
		if _, err := store.Put(entry, true); err != nil {
			return "", err
		}
	}
	data, err := store.Encode()
	return base64.StdEncoding.EncodeToString(data), err
}
