package keyvault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/vendorapi"
)

// apiVersion is the version described in https://learn.microsoft.com/rest/api/keyvault/certificates/operation-groups?view=rest-keyvault-certificates-7.4.
const apiVersion = "7.4"

// vault makes calls about one certificate in one vault.
type vault struct {
	address
	name        string // of the certificate
	tenant      string // of the credentials; "": unknown
	credentials *credentials
	api         *vendorapi.Client

	asked  bool     // the vault asked for a valid kind of token
	hidden []string // secrets of the current call, to remove from messages
}

// newAPI returns a client for the vault if the policy allows sending keys there.
func newAPI(v *vault, c *targetconf.Config, host connector.Host, trust vendorapi.Trust, patience time.Duration) (*vendorapi.Client, error) {
	at, err := url.Parse(v.url())
	if err != nil {
		return nil, err
	}
	dial, proxy, err := host.Route(at, c.Local("vault_url"))
	if err != nil {
		return nil, targetconf.Invalid("vault_url", "%v", err)
	}
	return vendorapi.New(vendorapi.Options{
		TLS: trust.Config, Timeout: time.Duration(c.Common.CommandTimeout), Patience: patience, Dial: dial, Proxy: proxy,
		Message: func(body []byte) string { return redact(parseProblem(body).message, v.hidden...) },
		Busy: func(e *vendorapi.StatusError) bool {
			inner := parseProblem(e.Body).inner
			return e.Status == http.StatusConflict && (inner == "ObjectIsBeingDeleted" || inner == "ObjectIsBeingRecovered")
		},
	}), nil
}

// problem is an error that Key Vault reports.
type problem struct{ code, inner, message string }

// parseProblem reads an error, see
// https://learn.microsoft.com/azure/key-vault/general/authentication-requests-and-responses#error-responses.
func parseProblem(body []byte) problem {
	var answer struct {
		Error struct {
			Code    string `json:"code"`
			Message string `json:"message"`
			Inner   struct {
				Code string `json:"code"`
			} `json:"innererror"`
		} `json:"error"`
	}
	if json.Unmarshal(body, &answer) != nil || answer.Error.Code == "" {
		return problem{message: "the answer is not from a vault"}
	}
	e := answer.Error
	p := problem{e.Code, e.Inner.Code, e.Code + ": " + e.Message}
	if p.inner != "" {
		p.message = e.Code + " (" + e.Inner.Code + "): " + e.Message
	}
	return p
}

// problemOf returns the problem that a vault answered, or a zero one for other errors.
func problemOf(err error) problem {
	if e, ok := errors.AsType[*vendorapi.StatusError](err); ok {
		return parseProblem(e.Body)
	}
	return problem{}
}

// call makes a call to the vault. Hidden are the secrets in its body.
func (v *vault) call(ctx context.Context, method, path string, body any, hidden ...string) ([]byte, error) {
	r := &vendorapi.Request{Method: method, URL: v.url() + path + "?api-version=" + apiVersion, Header: http.Header{"Accept": {"application/json"}}}
	if body != nil {
		var err error
		if r.Body, err = json.Marshal(body); err != nil {
			return nil, err
		}
		r.Header.Set("Content-Type", "application/json")
	}
	if !v.asked {
		if err := v.ask(ctx); err != nil {
			return nil, err
		}
	}
	for retry := true; ; retry = false {
		token, err := v.credentials.token(ctx)
		if err != nil {
			return nil, err
		}
		r.Header.Set("Authorization", "Bearer "+token.Reveal())
		v.hidden = append(hidden, token.Reveal())
		answer, err := v.api.Do(ctx, r)
		if err == nil {
			return answer.Body, nil
		}
		status, _ := errors.AsType[*vendorapi.StatusError](err)
		if status == nil || status.Status != http.StatusUnauthorized || !retry {
			return nil, err
		}
		// The token has expired or was revoked. The vault did nothing.
		if err := v.checkChallenge(status); err != nil {
			return nil, err
		}
		v.credentials.forget()
	}
}

// ask makes a request without a token, to learn which kind of token the vault requires.
func (v *vault) ask(ctx context.Context) error {
	_, err := v.api.Do(ctx, &vendorapi.Request{Method: http.MethodGet, URL: v.url() + v.certificate() + "?api-version=" + apiVersion})
	status, _ := errors.AsType[*vendorapi.StatusError](err)
	switch {
	case err == nil:
		return errors.New("it answers requests without a token, so it is not a vault")
	case status == nil || status.Status != http.StatusUnauthorized:
		return err
	}
	if err := v.checkChallenge(status); err != nil {
		return err
	}
	v.asked = true
	return nil
}

func (v *vault) checkChallenge(status *vendorapi.StatusError) error {
	c, err := parseChallenge(status.Header.Get("WWW-Authenticate"))
	if err != nil {
		return err
	}
	if err := c.check(v.cloud, v.tenant); err != nil {
		return err
	}
	if c.problem == "insufficient_claims" {
		return errors.New("it requires a token with more claims (continuous access evaluation), which this version cannot get")
	}
	return nil
}

func (v *vault) certificate() string { return "/certificates/" + v.name }

// cli returns a command of the Azure CLI for the certificate, for error messages.
func (v *vault) cli(command string) string {
	return fmt.Sprintf("az keyvault certificate %s --vault-name %s --name %s", command, v.vault, v.name)
}

// bundle is a version of a certificate, see
// https://learn.microsoft.com/rest/api/keyvault/certificates/get-certificate/get-certificate?view=rest-keyvault-certificates-7.4#certificatebundle.
type bundle struct {
	ID         string            `json:"id"`
	DER        []byte            `json:"cer"` // empty: its creation in the vault is pending or was cancelled
	Tags       map[string]string `json:"tags"`
	Attributes struct {
		Enabled bool `json:"enabled"`
	} `json:"attributes"`
	Policy certificatePolicy `json:"policy"`
}

type certificatePolicy struct {
	Key    keyProps    `json:"key_props"`
	Secret secretProps `json:"secret_props"`
}

type keyProps struct {
	Exportable bool   `json:"exportable"`
	Type       string `json:"kty,omitempty"`
	Size       int    `json:"key_size,omitempty"`
	Curve      string `json:"crv,omitempty"`
	Reuse      bool   `json:"reuse_key"`
}

type secretProps struct {
	ContentType string `json:"contentType,omitempty"`
}

// The content types of secrets behind certificates.
const (
	typePFX = "application/x-pkcs12"
	typePEM = "application/x-pem-file"
)

// version returns the name of the version.
func (b *bundle) version() string { return b.ID[strings.LastIndexByte(b.ID, '/')+1:] }

func (v *vault) parseBundle(answer []byte) (*bundle, error) {
	b := new(bundle)
	if json.Unmarshal(answer, b) != nil || b.ID == "" || len(b.DER) == 0 && b.Attributes.Enabled {
		return nil, errors.New("the answer is not a certificate from a vault")
	}
	path := strings.ToLower(v.url() + v.certificate() + "/")
	if !strings.HasPrefix(strings.ToLower(b.ID), path) || !nameForm().MatchString(b.version()) || len(b.ID) != len(path)+len(b.version()) {
		return nil, fmt.Errorf("the answer is about another certificate: %s", printable.Quote(b.ID))
	}
	return b, nil
}

// get returns the current version, or nil if the certificate does not exist.
func (v *vault) get(ctx context.Context) (*bundle, error) {
	answer, err := v.call(ctx, http.MethodGet, v.certificate(), nil)
	if vendorapi.StatusOf(err) == http.StatusNotFound && problemOf(err).code == "CertificateNotFound" {
		return nil, nil
	}
	if err != nil {
		return nil, v.explain("get", err)
	}
	b, err := v.parseBundle(answer)
	if err != nil {
		return nil, fmt.Errorf("get: %w", err)
	}
	return b, nil
}

// checkName returns an error if a deleted certificate that can be recovered blocks the name. It
// returns nil for vaults without soft-delete, or if the agent may not ask.
func (v *vault) checkName(ctx context.Context) error {
	answer, err := v.call(ctx, http.MethodGet, "/deletedcertificates/"+v.name, nil)
	if status := vendorapi.StatusOf(err); status >= 400 && status < 500 {
		return nil
	}
	if err != nil {
		return v.explain("get deleted", err)
	}
	var deleted struct {
		PurgedOn int64 `json:"scheduledPurgeDate"`
	}
	if json.Unmarshal(answer, &deleted) != nil || deleted.PurgedOn == 0 {
		return v.deleted("")
	}
	return v.deleted(" until " + time.Unix(deleted.PurgedOn, 0).UTC().Format(time.DateOnly))
}

func (v *vault) deleted(until string) error {
	return fmt.Errorf("a certificate of this name was deleted and can be recovered%s, so the name is blocked: recover it to renew it (%s), "+
		"purge it permanently (%s), or give the target another certificate_name", until, v.cli("recover"), v.cli("purge"))
}

// secret returns the certificate and key of a version, as they were imported.
func (v *vault) secret(ctx context.Context, version string) (value, contentType string, err error) {
	answer, err := v.call(ctx, http.MethodGet, "/secrets/"+v.name+"/"+version, nil)
	if err != nil {
		return "", "", v.explain("get the secret", err)
	}
	var secret struct {
		Value       string `json:"value"`
		ContentType string `json:"contentType"`
	}
	if json.Unmarshal(answer, &secret) != nil || secret.Value == "" {
		return "", "", errors.New("get the secret: the answer is not a secret from a vault")
	}
	return secret.Value, secret.ContentType, nil
}

// importRequest is the body of an import, see
// https://learn.microsoft.com/rest/api/keyvault/certificates/import-certificate/import-certificate?view=rest-keyvault-certificates-7.4#request-body.
type importRequest struct {
	Value    string            `json:"value"`
	Password string            `json:"pwd,omitempty"`
	Policy   certificatePolicy `json:"policy"`
	Tags     map[string]string `json:"tags"`
}

func (v *vault) importVersion(ctx context.Context, i *importRequest) error {
	_, err := v.call(ctx, http.MethodPost, v.certificate()+"/import", i, i.Value, i.Password)
	return v.explain("import", err)
}

// updateRequest is the body of an update of a version. It replaces all tags.
type updateRequest struct {
	Attributes struct {
		Enabled bool `json:"enabled"`
	} `json:"attributes"`
	Tags map[string]string `json:"tags"`
}

func (v *vault) update(ctx context.Context, version string, enabled bool, tags map[string]string) error {
	u := &updateRequest{Tags: tags}
	u.Attributes.Enabled = enabled
	if u.Tags == nil {
		u.Tags = map[string]string{}
	}
	_, err := v.call(ctx, http.MethodPatch, v.certificate()+"/"+version, u)
	if _, lost := errors.AsType[*vendorapi.LostError](err); lost { // an update is idempotent
		_, err = v.call(ctx, http.MethodPatch, v.certificate()+"/"+version, u)
	}
	return v.explain("update", err)
}

// action returns the RBAC action of a call, see
// https://learn.microsoft.com/azure/role-based-access-control/permissions/security#microsoftkeyvault.
func action(call string) string {
	switch call {
	case "import":
		return "certificates/import/action"
	case "update":
		return "certificates/update/action"
	case "get the secret":
		return "secrets/getSecret/action"
	}
	return "certificates/read"
}

// explain adds to an error what it means and what to do.
func (v *vault) explain(call string, err error) error {
	if err == nil {
		return nil
	}
	p := problemOf(err)
	switch status := vendorapi.StatusOf(err); {
	case p.inner == "ObjectIsDeletedButRecoverable":
		return fmt.Errorf("%s: %w", call, v.deleted(""))
	case call == "import" && status == http.StatusConflict && p.code == "Forbidden":
		// https://learn.microsoft.com/azure/key-vault/certificates/create-certificate-scenarios#create-or-import-when-pending-request-exists---status-is-inprogress
		return fmt.Errorf("%s: %w: the vault is creating a certificate of this name itself: let it finish, or cancel it (%s)", call, err, v.cli("pending delete"))
	case call == "import" && strings.Contains(p.message, "Unsupported key operation"):
		// https://github.com/Azure/AzureKeyVault/issues/22: an ECDSA key cannot encrypt
		return fmt.Errorf("%s: %w: issue the certificate with only the key usage digitalSignature", call, err)
	case status >= 300 && status < 500 && p.code == "" && status != http.StatusTooManyRequests:
		return fmt.Errorf("%s: %w: the answer is not from the vault but perhaps from a proxy", call, err)
	case status == http.StatusUnauthorized:
		return fmt.Errorf("%s: %w: the vault does not accept the token of %s: it belongs to another tenant or was revoked", call, err, v.credentials.from())
	case status == http.StatusForbidden && (p.inner == "ForbiddenByFirewall" || p.inner == "ForbiddenByConnection"):
		return fmt.Errorf("%s: %w: the vault's firewall blocks this host: allow its address, or use a private endpoint", call, err)
	case status == http.StatusForbidden:
		return fmt.Errorf("%s: %w: unless the message says otherwise, the identity of %s needs a role with Microsoft.KeyVault/vaults/%s on this vault (or the equivalent access policy)",
			call, err, v.credentials.from(), action(call))
	}
	return fmt.Errorf("%s: %w", call, err)
}
