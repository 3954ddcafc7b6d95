package azure

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"
)

// App is an application registered in the tenant.
type App struct {
	Secret       string              // "": none
	Certificates []*x509.Certificate // for its assertions

	// Federated configures trust in tokens of another issuer, see
	// https://learn.microsoft.com/entra/workload-id/workload-identity-federation.
	Federated *Federation
}

// Federation is the issuer whose tokens an application trusts.
type Federation struct {
	Issuer, Subject string
	Key             *rsa.PublicKey
}

// exchange is the audience of federated tokens.
const exchange = "api://AzureADTokenExchange"

type token struct {
	resource string
	expires  time.Time
}

// Register registers an application under its client id.
func (s *Server) Register(id string, app App) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.apps[id] = &app
}

// Assign assigns a managed identity to the host. "" is the system-assigned one.
func (s *Server) Assign(clientID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identities[clientID] = true
}

// SetLife sets how long new tokens are valid.
func (s *Server) SetLife(life time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life = life
}

// ExpireTokens makes all existing tokens expire.
func (s *Server) ExpireTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// Refuse sets whether vaults reject all tokens.
func (s *Server) Refuse(all bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse = all
}

// Tokens returns the valid tokens.
func (s *Server) Tokens() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for t := range s.tokens {
		all = append(all, t)
	}
	return all
}

// Issue issues a token for a resource. It is opaque: Entra's are JWTs, but only the resource may
// rely on their contents.
func (s *Server) Issue(resource string) (value string, life time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	claims, _ := json.Marshal(map[string]any{"aud": resource, "tid": Tenant, "exp": time.Now().Add(s.life).Unix()})
	encode := base64.RawURLEncoding.EncodeToString
	value = encode([]byte(`{"typ":"JWT","alg":"RS256"}`)) + "." + encode(claims) + "." + encode([]byte(random()))
	s.tokens[value] = token{resource, time.Now().Add(s.life)}
	return value, s.life
}

// valid returns an error unless the Authorization permits requests to a resource.
func (s *Server) valid(authorization, resource string) *problem {
	value, ok := strings.CutPrefix(authorization, "Bearer ")
	if !ok {
		return &problem{http.StatusUnauthorized, "Unauthorized", "AKV10000: Request is missing a Bearer or PoP token.", ""}
	}
	s.mu.Lock()
	t, known := s.tokens[value]
	known = known && !s.refuse
	s.mu.Unlock()
	switch {
	case !known || time.Now().After(t.expires):
		return &problem{http.StatusUnauthorized, "Unauthorized", "AKV10046: Unable to resolve the key used for signature validation.", ""}
	case t.resource != resource:
		return &problem{http.StatusUnauthorized, "Unauthorized", "AKV10022: Invalid audience. Expected " + resource + ", found: " + t.resource, ""}
	}
	return nil
}

// refusal is an error of the token endpoint, see
// https://learn.microsoft.com/entra/identity-platform/reference-error-codes.
type refusal struct {
	status      int
	code, words string
}

// serveAuthority answers requests to Entra ID.
func (s *Server) serveAuthority(w http.ResponseWriter, r *http.Request, c Cloud) {
	base := "https://" + c.Authority + "/"
	tenant, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch {
	case r.Method == http.MethodGet && path == "v2.0/.well-known/openid-configuration":
		answer(w, http.StatusOK, map[string]any{
			"token_endpoint": base + tenant + "/oauth2/v2.0/token", "authorization_endpoint": base + tenant + "/oauth2/v2.0/authorize",
			"issuer": base + tenant + "/v2.0",
		})
	case r.Method == http.MethodGet && tenant == "common" && path == "discovery/instance": // MSAL asks which names mean the same cloud
		answer(w, http.StatusOK, map[string]any{"metadata": []any{map[string]any{
			"preferred_network": c.Authority, "preferred_cache": c.Authority, "aliases": []string{c.Authority},
		}}})
	case r.Method == http.MethodPost && path == "oauth2/v2.0/token":
		r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
		if err := r.ParseForm(); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		proceed, instead := s.begin(w, r, "token", r.PostForm.Get("client_id"))
		if !proceed {
			return
		}
		resource, refused := s.grant(r, c, tenant)
		if refused != nil {
			answer(w, refused.status, map[string]any{"error": refused.code, "error_description": refused.words + " Trace ID: " + random(), "error_codes": []int{}})
			return
		}
		value, life := s.Issue(resource)
		if instead != nil {
			instead()
			return
		}
		answer(w, http.StatusOK, map[string]any{"token_type": "Bearer", "expires_in": int(life.Seconds()), "ext_expires_in": int(life.Seconds()), "access_token": value})
	default:
		http.NotFound(w, r)
	}
}

// grant decides on a request for a token, see
// https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow.
func (s *Server) grant(r *http.Request, c Cloud, tenant string) (resource string, refused *refusal) {
	f := r.PostForm
	if tenant != Tenant {
		return "", &refusal{http.StatusBadRequest, "invalid_request", "AADSTS90002: Tenant '" + tenant + "' not found."}
	}
	if len(r.URL.RawQuery) > 0 || r.Header.Get("Content-Type") != "application/x-www-form-urlencoded" && !strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded;") {
		return "", &refusal{http.StatusBadRequest, "invalid_request", "AADSTS900144: The request body must contain the parameters."}
	}
	if f.Get("grant_type") != "client_credentials" {
		return "", &refusal{http.StatusBadRequest, "unsupported_grant_type", "AADSTS70003: The app requested an unsupported grant type '" + f.Get("grant_type") + "'."}
	}
	if f.Get("scope") != c.Resource()+"/.default" {
		return "", &refusal{http.StatusBadRequest, "invalid_resource", "AADSTS500011: The resource principal named " + f.Get("scope") + " was not found in the tenant."}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id := f.Get("client_id")
	app := s.apps[id]
	switch {
	case app == nil:
		return "", &refusal{http.StatusBadRequest, "unauthorized_client", "AADSTS700016: Application with identifier '" + id + "' was not found in the directory."}
	case f.Has("client_secret"):
		if app.Secret == "" || f.Get("client_secret") != app.Secret {
			return "", &refusal{http.StatusUnauthorized, "invalid_client", "AADSTS7000215: Invalid client secret provided."}
		}
	case f.Get("client_assertion_type") == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer":
		if problem := app.check(f.Get("client_assertion"), id, "https://"+c.Authority+"/"+tenant+"/oauth2/v2.0/token"); problem != "" {
			return "", &refusal{http.StatusUnauthorized, "invalid_client", problem}
		}
	default:
		return "", &refusal{http.StatusUnauthorized, "invalid_client", "AADSTS7000216: 'client_assertion', 'client_secret' or 'request' is required for the 'client_credentials' grant type."}
	}
	return c.Resource(), nil
}

// assertion is a JWT (RFC 7519).
type assertion struct {
	header struct {
		Alg  string `json:"alg"`
		Typ  string `json:"typ"`
		X5T  string `json:"x5t"`
		S256 string `json:"x5t#S256"`
	}
	claims struct {
		Aud, Iss, Sub, Jti string
		Exp, Nbf           float64 // MSAL has fractions of a second
	}
	signed    []byte
	signature []byte
}

func parseAssertion(text string) (*assertion, bool) {
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return nil, false
	}
	a := &assertion{signed: []byte(parts[0] + "." + parts[1])}
	var decoded [3][]byte
	for i, part := range parts {
		var err error
		if decoded[i], err = base64.RawURLEncoding.DecodeString(part); err != nil {
			return nil, false
		}
	}
	a.signature = decoded[2]
	return a, json.Unmarshal(decoded[0], &a.header) == nil && json.Unmarshal(decoded[1], &a.claims) == nil
}

func (a *assertion) signedBy(key *rsa.PublicKey) bool {
	digest := sha256.Sum256(a.signed)
	switch a.header.Alg {
	case "RS256":
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], a.signature) == nil
	case "PS256":
		return rsa.VerifyPSS(key, crypto.SHA256, digest[:], a.signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
	}
	return false
}

// check returns the error of an assertion, or "", see
// https://learn.microsoft.com/entra/identity-platform/certificate-credentials.
func (app *App) check(text, id, endpoint string) string {
	const skew = 5 * time.Minute
	a, ok := parseAssertion(text)
	if !ok {
		return "AADSTS50027: JWT token is invalid or malformed."
	}
	now := time.Now()
	if exp := time.Unix(int64(a.claims.Exp), 0); now.After(exp.Add(skew)) || time.Unix(int64(a.claims.Nbf), 0).After(now.Add(skew)) {
		return "AADSTS700024: Client assertion is not within its valid time range."
	}
	if f := app.Federated; f != nil && a.claims.Iss != id {
		switch {
		case a.claims.Iss != f.Issuer || a.claims.Sub != f.Subject:
			return "AADSTS700213: No matching federated identity record found for presented assertion subject '" + a.claims.Sub + "'."
		case a.claims.Aud != exchange:
			return "AADSTS700212: No matching federated identity record found for presented assertion audience '" + a.claims.Aud + "'."
		case !a.signedBy(f.Key):
			return "AADSTS50013: Assertion failed signature validation."
		}
		return ""
	}
	i := slices.IndexFunc(app.Certificates, func(c *x509.Certificate) bool {
		old, new := sha1.Sum(c.Raw), sha256.Sum256(c.Raw)
		return a.header.S256 == base64.RawURLEncoding.EncodeToString(new[:]) ||
			a.header.S256 == "" && strings.TrimRight(a.header.X5T, "=") == base64.RawURLEncoding.EncodeToString(old[:])
	})
	switch {
	case i < 0:
		return "AADSTS700027: The certificate with identifier used to sign the client assertion is not registered on application."
	case a.header.Typ != "JWT" || a.claims.Iss != id || a.claims.Sub != id:
		return "AADSTS700021: Client assertion application identifier doesn't match 'client_id' parameter."
	case a.claims.Aud != endpoint:
		return "AADSTS700023: Client assertion audience claim does not match Realm issuer."
	case a.claims.Jti == "":
		return "AADSTS700025: The assertion has no id."
	}
	key, ok := app.Certificates[i].PublicKey.(*rsa.PublicKey)
	if !ok || !a.signedBy(key) {
		return "AADSTS700027: The certificate's key did not sign the client assertion."
	}
	return ""
}
