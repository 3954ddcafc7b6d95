package azure

import (
	"bytes"
	"cmp"
	"crypto/sha1"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Vault is a key vault. It has soft-delete, which Azure has made mandatory.
type Vault struct {
	Host string

	cloud        Cloud
	server       *Server // its mu guards the fields below
	certificates map[string]*certificate
	denied       map[string]bool // operations without permission
	challenge    string          // replaces the usual one
	protected    bool            // purging is not allowed
}

// certificate holds all versions under a name.
type certificate struct {
	versions []*Version // oldest first
	deleted  time.Time  // zero if it is not deleted
	pending  bool       // the last version has no certificate yet
}

// Version is a version of a certificate with its secret and key.
type Version struct {
	ID          string
	Certificate *x509.Certificate   // nil if its creation is pending or was cancelled
	Chain       []*x509.Certificate // without the certificate
	Key         []byte              // PKCS#8
	Enabled     bool
	Tags        map[string]string
	Policy      Policy

	created, updated time.Time
}

// Policy is the part of a certificate's policy that matters for an import, see
// https://learn.microsoft.com/rest/api/keyvault/certificates/import-certificate/import-certificate?view=rest-keyvault-certificates-7.4#certificatepolicy.
type Policy struct {
	Key struct {
		Exportable *bool  `json:"exportable,omitempty"`
		Type       string `json:"kty,omitempty"`
		Size       int    `json:"key_size,omitempty"`
		Curve      string `json:"crv,omitempty"`
		Reuse      *bool  `json:"reuse_key,omitempty"`
	} `json:"key_props"`
	Secret struct {
		ContentType string `json:"contentType,omitempty"`
	} `json:"secret_props"`
	X509   json.RawMessage `json:"x509_props,omitempty"`
	Life   json.RawMessage `json:"lifetime_actions,omitempty"`
	Issuer json.RawMessage `json:"issuer,omitempty"`
	Attr   json.RawMessage `json:"attributes,omitempty"`
	ID     string          `json:"id,omitempty"`
}

// Content types of secrets.
const (
	PFX = "application/x-pkcs12"
	PEM = "application/x-pem-file"
)

// Vault returns a vault of a cloud. It creates it if necessary.
func (s *Server) Vault(c Cloud, name string) *Vault {
	s.mu.Lock()
	defer s.mu.Unlock()
	host := name + "." + c.Vaults
	v := s.vaults[host]
	if v == nil {
		v = &Vault{Host: host, cloud: c, server: s, certificates: make(map[string]*certificate), denied: make(map[string]bool)}
		s.vaults[host] = v
	}
	return v
}

// URL returns the address of the vault.
func (v *Vault) URL() string { return "https://" + v.Host }

// Deny denies permission for operations, named as in Server.Calls.
func (v *Vault) Deny(operations ...string) {
	v.server.mu.Lock()
	defer v.server.mu.Unlock()
	clear(v.denied)
	for _, operation := range operations {
		v.denied[operation] = true
	}
}

// Challenge sets a different authentication challenge.
func (v *Vault) Challenge(header string) {
	v.server.mu.Lock()
	defer v.server.mu.Unlock()
	v.challenge = header
}

// Versions returns the versions of a certificate that is not deleted, oldest first.
func (v *Vault) Versions(name string) []Version {
	v.server.mu.Lock()
	defer v.server.mu.Unlock()
	var all []Version
	if c := v.certificates[strings.ToLower(name)]; c != nil && c.deleted.IsZero() {
		for _, version := range c.versions {
			copied := *version
			copied.Tags = maps.Clone(version.Tags)
			all = append(all, copied)
		}
	}
	return all
}

// Put adds a version as another client would.
func (v *Vault) Put(name string, at Version) {
	v.server.mu.Lock()
	defer v.server.mu.Unlock()
	c := v.certificates[strings.ToLower(name)]
	if c == nil {
		c = new(certificate)
		v.certificates[strings.ToLower(name)] = c
	}
	at.ID, at.created, at.updated = random(), time.Now(), time.Now()
	c.versions = append(c.versions, &at)
}

// Create starts the creation of a version whose certificate will be issued by a CA unknown to the
// vault. GiveUp ends it.
func (v *Vault) Create(name string) {
	v.server.mu.Lock()
	defer v.server.mu.Unlock()
	v.create(name, Policy{})
}

// GiveUp cancels the creation of a version. The version remains, without a certificate.
func (v *Vault) GiveUp(name string) {
	v.server.mu.Lock()
	defer v.server.mu.Unlock()
	v.certificates[strings.ToLower(name)].pending = false
}

// Delete deletes a certificate. It can be recovered.
func (v *Vault) Delete(name string) {
	v.server.mu.Lock()
	defer v.server.mu.Unlock()
	v.certificates[strings.ToLower(name)].deleted = time.Now()
}

// The paths of a certificate, of its versions and secrets, and of deleted ones. Names are
// restricted as in the service.
var (
	nameForm = regexp.MustCompile(`^[0-9a-zA-Z-]{1,127}$`)
	versions = []string{"2016-10-01", "7.0", "7.1", "7.2", "7.3", "7.4", "7.5"}
)

// operationOf returns the operation of a request and its arguments.
func operationOf(method string, path []string) (operation, name, version string) {
	at := func(i int) string {
		if i < len(path) {
			return path[i]
		}
		return ""
	}
	name = at(1)
	switch kind := method + " " + at(0); {
	case len(path) < 2 || len(path) > 3:
	case kind == "POST certificates" && at(2) == "import":
		return "import", name, ""
	case kind == "POST certificates" && at(2) == "create":
		return "create", name, ""
	case kind == "GET certificates" && at(2) == "pending":
		return "pending", name, ""
	case kind == "DELETE certificates" && at(2) == "pending":
		return "give up", name, ""
	case kind == "GET certificates" && at(2) == "versions":
		return "versions", name, ""
	case kind == "GET certificates" && at(2) == "policy":
		return "policy", name, ""
	case kind == "GET certificates":
		return "get", name, at(2)
	case kind == "PATCH certificates":
		return "update", name, at(2)
	case kind == "DELETE certificates" && len(path) == 2:
		return "delete", name, ""
	case kind == "GET deletedcertificates" && len(path) == 2:
		return "deleted", name, ""
	case kind == "POST deletedcertificates" && at(2) == "recover":
		return "recover", name, ""
	case kind == "DELETE deletedcertificates" && len(path) == 2:
		return "purge", name, ""
	case kind == "GET secrets":
		return "secret", name, at(2)
	}
	return "", name, ""
}

// rights are the names of permissions in access policies, see
// https://learn.microsoft.com/azure/key-vault/certificates/certificate-access-control.
var rights = map[string]string{
	"import": "certificates/import/action", "create": "certificates/create/action", "pending": "certificates/read", "give up": "certificates/update/action", "get": "certificates/read", "versions": "certificates/read", "policy": "certificates/read", "update": "certificates/update/action",
	"delete": "certificates/delete", "deleted": "certificates/read", "recover": "certificates/recover/action", "purge": "certificates/purge/action", "secret": "secrets/getSecret/action",
}

// maxBody bounds a request, in bytes.
const maxBody = 1 << 20

func (s *Server) serveVault(w http.ResponseWriter, r *http.Request, v *Vault) {
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	operation, name, version := operationOf(r.Method, path)
	s.mu.Lock()
	challenge := v.challenge
	s.mu.Unlock()
	if challenge == "" {
		challenge = fmt.Sprintf("Bearer authorization=%q, resource=%q", "https://"+v.cloud.Authority+"/"+Tenant, v.cloud.Resource())
	}
	if refused := s.valid(r.Header.Get("Authorization"), v.cloud.Resource()); refused != nil {
		if r.Header.Get("Authorization") == "" {
			if proceed, _ := s.begin(w, r, "challenge", name); !proceed {
				return
			}
		}
		w.Header().Set("WWW-Authenticate", challenge)
		fail(w, refused)
		return
	}
	if operation == "" {
		fail(w, &problem{http.StatusMethodNotAllowed, "MethodNotAllowed", "Method " + r.Method + " does not allow operation " + r.URL.Path, ""})
		return
	}
	proceed, instead := s.begin(w, r, operation, name)
	if !proceed {
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		fail(w, &problem{http.StatusRequestEntityTooLarge, "RequestEntityTooLarge", "the request is too large", ""})
		return
	}
	s.mu.Lock()
	made, refused := v.do(r, operation, name, version, body)
	s.mu.Unlock()
	switch {
	case instead != nil:
		instead()
	case refused != nil:
		fail(w, refused)
	case made == nil:
		w.WriteHeader(http.StatusNoContent)
	case operation == "create":
		answer(w, http.StatusAccepted, made)
	default:
		answer(w, http.StatusOK, made)
	}
}

// do carries out an operation. The caller must hold the server's lock.
func (v *Vault) do(r *http.Request, operation, name, version string, body []byte) (any, *problem) {
	if !slices.Contains(versions, r.URL.Query().Get("api-version")) {
		return nil, &problem{http.StatusBadRequest, "BadParameter", "The specified version (" + r.URL.Query().Get("api-version") + ") is not recognized.", ""}
	}
	if v.denied[operation] {
		return nil, &problem{http.StatusForbidden, "Forbidden", "Caller is not authorized to perform action on resource.\r\nAction: 'Microsoft.KeyVault/vaults/" + rights[operation] +
			"'\r\nResource: '/subscriptions/0/resourcegroups/r/providers/microsoft.keyvault/vaults/" + v.Host + "/certificates/" + name + "'\r\nDecisionReason: 'DeniedWithNoValidRBAC'", "ForbiddenByRbac"}
	}
	if !nameForm.MatchString(name) {
		return nil, &problem{http.StatusBadRequest, "BadParameter", "The request URI contains an invalid name: " + name, ""}
	}
	c := v.certificates[strings.ToLower(name)]
	if c != nil && !c.deleted.IsZero() {
		return v.doDeleted(operation, name, c)
	}
	switch operation {
	case "deleted", "recover", "purge":
		return nil, &problem{http.StatusNotFound, "CertificateNotFound", "Deleted Certificate not found: " + name, ""}
	case "create", "import":
		if c != nil && c.pending {
			return nil, &problem{http.StatusConflict, "Forbidden", "A new key vault certificate can not be created or imported while a pending key vault certificate's status is inProgress.", ""}
		}
		if operation == "create" {
			var asked struct{ Policy Policy }
			if json.Unmarshal(body, &asked) != nil {
				return nil, bad("the body is not a valid creation")
			}
			return v.create(name, asked.Policy), nil
		}
		if c == nil {
			c = new(certificate)
		}
		made, refused := v.newVersion(body)
		if refused != nil {
			return nil, refused
		}
		c.versions = append(c.versions, made)
		v.certificates[strings.ToLower(name)] = c
		return v.bundle(name, made), nil
	}
	if c == nil {
		what := map[bool]string{true: "Secret", false: "Certificate"}[operation == "secret"]
		return nil, &problem{http.StatusNotFound, what + "NotFound", "A " + strings.ToLower(what) + " with (name/id) " + name + " was not found in this key vault. If you recently deleted this " +
			strings.ToLower(what) + " you may be able to recover it using the correct recovery command.", ""}
	}
	current := c.versions[len(c.versions)-1]
	if version != "" {
		i := slices.IndexFunc(c.versions, func(at *Version) bool { return at.ID == version })
		if i < 0 {
			return nil, &problem{http.StatusNotFound, "CertificateNotFound", "A certificate with (name/id) " + name + "/" + version + " was not found in this key vault.", ""}
		}
		current = c.versions[i]
	}
	switch operation {
	case "pending", "give up":
		if !c.pending {
			return nil, &problem{http.StatusNotFound, "PendingCertificateNotFound", "Pending certificate not found: " + name, ""}
		}
		c.pending = operation == "pending"
		return v.operation(name), nil
	case "get":
		return v.bundle(name, current), nil
	case "policy":
		return v.bundle(name, current)["policy"], nil
	case "versions":
		return v.list(r, name, c)
	case "update":
		return v.update(name, current, body)
	case "secret":
		return v.secret(name, current)
	}
	c.deleted = time.Now()
	return v.deletedBundle(name, c), nil
}

// doDeleted is do for a deleted certificate that can be recovered.
func (v *Vault) doDeleted(operation, name string, c *certificate) (any, *problem) {
	switch operation {
	case "deleted":
		return v.deletedBundle(name, c), nil
	case "recover":
		c.deleted = time.Time{}
		return v.bundle(name, c.versions[len(c.versions)-1]), nil
	case "purge":
		if v.protected {
			return nil, &problem{http.StatusForbidden, "Forbidden", "Operation \"purge\" is not allowed because purge protection is enabled for this vault.", "ForbiddenByPolicy"}
		}
		delete(v.certificates, strings.ToLower(name))
		return nil, nil
	case "import":
		return nil, &problem{http.StatusConflict, "Conflict", "Certificate " + name + " is currently in a deleted but recoverable state, and its name cannot be reused; in this state, the certificate can only be recovered or purged.",
			"ObjectIsDeletedButRecoverable"}
	}
	return nil, &problem{http.StatusNotFound, "CertificateNotFound", "A certificate with (name/id) " + name + " was not found in this key vault. If you recently deleted this certificate you may be able to recover it using the correct recovery command.", ""}
}

func (v *Vault) id(kind, name, version string) string {
	return v.URL() + "/" + kind + "/" + name + "/" + version
}

func attributes(at *Version) map[string]any {
	fields := map[string]any{
		"enabled": at.Enabled, "created": at.created.Unix(), "updated": at.updated.Unix(), "recoveryLevel": "Recoverable+Purgeable", "recoverableDays": 90,
	}
	if at.Certificate != nil {
		fields["nbf"], fields["exp"] = at.Certificate.NotBefore.Unix(), at.Certificate.NotAfter.Unix()
	}
	return fields
}

// create starts a creation, see
// https://learn.microsoft.com/azure/key-vault/certificates/create-certificate-scenarios.
func (v *Vault) create(name string, policy Policy) map[string]any {
	c := v.certificates[strings.ToLower(name)]
	if c == nil {
		c = new(certificate)
		v.certificates[strings.ToLower(name)] = c
	}
	policy.Key.Exportable, policy.Key.Type, policy.Secret.ContentType = new(true), cmp.Or(policy.Key.Type, "RSA"), cmp.Or(policy.Secret.ContentType, PFX)
	c.versions = append(c.versions, &Version{ID: random(), Policy: policy, created: time.Now(), updated: time.Now()})
	c.pending = true
	return v.operation(name)
}

// operation returns a CertificateOperation.
func (v *Vault) operation(name string) map[string]any {
	return map[string]any{"id": v.URL() + "/certificates/" + name + "/pending", "issuer": map[string]any{"name": "Unknown"}, "csr": "", "cancellation_requested": false,
		"status": "inProgress", "status_details": "Pending certificate created. Please Perform Merge to complete the request.", "request_id": random()}
}

func thumbprint(c *x509.Certificate) string {
	sum := sha1.Sum(c.Raw)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// bundle returns a CertificateBundle. It is shorter for a version without a certificate, as in
// Microsoft's recordings:
// https://github.com/Azure/azure-sdk-for-js/blob/011a3b4199424b9416c77958f06496cf30faca5d/sdk/keyvault/keyvault-certificates/recordings/node/certificates_client__create_read_update_and_delete/recording_can_read_cancel_and_delete_a_certificates_operation.js.
func (v *Vault) bundle(name string, at *Version) map[string]any {
	policy := at.Policy
	policy.ID = v.URL() + "/certificates/" + name + "/policy"
	if at.Certificate == nil {
		return map[string]any{"id": v.id("certificates", name, at.ID), "attributes": attributes(at), "policy": policy}
	}
	return map[string]any{
		"id": v.id("certificates", name, at.ID), "kid": v.id("keys", name, at.ID), "sid": v.id("secrets", name, at.ID), "x5t": thumbprint(at.Certificate),
		"cer": base64.StdEncoding.EncodeToString(at.Certificate.Raw), "attributes": attributes(at), "policy": policy, "tags": at.Tags,
	}
}

func (v *Vault) deletedBundle(name string, c *certificate) map[string]any {
	b := v.bundle(name, c.versions[len(c.versions)-1])
	b["recoveryId"] = v.URL() + "/deletedcertificates/" + name
	b["deletedDate"], b["scheduledPurgeDate"] = c.deleted.Unix(), c.deleted.AddDate(0, 0, 90).Unix()
	return b
}

// list returns a page of versions, newest first.
func (v *Vault) list(r *http.Request, name string, c *certificate) (any, *problem) {
	size := 25
	if text := r.URL.Query().Get("maxresults"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 25 {
			return nil, &problem{http.StatusBadRequest, "BadParameter", "maxresults is from 1 to 25", ""}
		}
		size = n
	}
	begin, _ := strconv.Atoi(r.URL.Query().Get("$skiptoken"))
	items, next := []any{}, any(nil)
	for i := range c.versions {
		if i < begin {
			continue
		}
		if len(items) == size {
			next = fmt.Sprintf("%s/certificates/%s/versions?api-version=%s&$skiptoken=%d&maxresults=%d", v.URL(), name, r.URL.Query().Get("api-version"), i, size)
			break
		}
		at := c.versions[len(c.versions)-1-i]
		item := map[string]any{"id": v.id("certificates", name, at.ID), "attributes": attributes(at), "tags": at.Tags}
		if at.Certificate != nil {
			item["x5t"] = thumbprint(at.Certificate)
		}
		items = append(items, item)
	}
	return map[string]any{"value": items, "nextLink": next}, nil
}

// maxTags bounds the tags of a version, and maxTag the length of a name or value, see
// https://learn.microsoft.com/azure/key-vault/certificates/about-certificates#certificate-tags.
const (
	maxTags = 15
	maxTag  = 256
)

func checkTags(tags map[string]string) *problem {
	if len(tags) > maxTags {
		return &problem{http.StatusBadRequest, "BadParameter", fmt.Sprintf("there are %d tags, but at most %d are allowed", len(tags), maxTags), ""}
	}
	for key, value := range tags {
		if key == "" || utf8.RuneCountInString(key) > maxTag || utf8.RuneCountInString(value) > maxTag {
			return &problem{http.StatusBadRequest, "BadParameter", "the tag " + key + " is too long", ""}
		}
	}
	return nil
}

func (v *Vault) update(name string, at *Version, body []byte) (any, *problem) {
	var asked struct {
		Attributes *struct {
			Enabled *bool `json:"enabled"`
		} `json:"attributes"`
		Tags   map[string]string `json:"tags"`
		Policy json.RawMessage   `json:"policy"`
	}
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&asked); err != nil {
		return nil, &problem{http.StatusBadRequest, "BadParameter", "the body is not a valid update: " + err.Error(), ""}
	}
	if refused := checkTags(asked.Tags); refused != nil {
		return nil, refused
	}
	if asked.Tags != nil {
		at.Tags = asked.Tags // replaces all of them
	}
	if asked.Attributes != nil && asked.Attributes.Enabled != nil {
		at.Enabled = *asked.Attributes.Enabled
	}
	at.updated = time.Now()
	return v.bundle(name, at), nil
}

// secret returns the value of a version, with the private key only if that is exportable, see
// https://learn.microsoft.com/azure/key-vault/certificates/about-certificates#exportable-or-non-exportable-key.
func (v *Vault) secret(name string, at *Version) (any, *problem) {
	if !at.Enabled {
		return nil, &problem{http.StatusForbidden, "Forbidden", "Operation get is not allowed on a disabled secret.", "SecretDisabled"}
	}
	value, err := at.export()
	if err != nil {
		return nil, &problem{http.StatusInternalServerError, "InternalServerError", err.Error(), ""}
	}
	return map[string]any{"value": value, "contentType": at.Policy.Secret.ContentType, "id": v.id("secrets", name, at.ID), "managed": true,
		"attributes": attributes(at), "kid": v.id("keys", name, at.ID), "tags": at.Tags}, nil
}
