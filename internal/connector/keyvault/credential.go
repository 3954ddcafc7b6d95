package keyvault

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/trustedfile"
	"certctl-agent/internal/vendorapi"
)

// The values of credential_mode.
const (
	modeDefault  = "default"
	modeManaged  = "managed_identity"
	modeSecret   = "client_secret"
	modeWorkload = "workload_identity"
)

const (
	// margin is how long before its expiry a token is replaced.
	margin = 5 * time.Minute

	// maxToken bounds an answer with a token and a token file, in bytes.
	maxToken = 64 << 10

	// metadataURL is the metadata service of a virtual machine, on a link-local address, see
	// https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service.
	metadataURL = "http://169.254.169.254"

	// metadataDial bounds connecting to it. Outside Azure nothing answers, and other sources
	// follow.
	metadataDial = 2 * time.Second
)

// token is an access token. It is kept only in memory.
type token struct {
	value   secret.String
	expires time.Time
}

// source is one source of tokens.
type source struct {
	name string // for errors
	get  func(ctx context.Context, resource string) (*token, error)
}

// errAbsent means that a source is not available on this host.
var errAbsent = errors.New("not available")

// tokenError is a failure to get a token. It hides the status errors in it from errors.As, since
// they are not the vault's.
type tokenError struct{ err error }

func (e *tokenError) Error() string        { return e.err.Error() }
func (e *tokenError) Is(target error) bool { return errors.Is(e.err, target) }

// credentials provides tokens for a resource.
type credentials struct {
	sources  []source // in the order in which they are tried
	resource string

	chosen *source // of the last token
	last   *token
}

// token returns a token that is valid for longer than margin, if the source allows.
func (c *credentials) token(ctx context.Context) (secret.String, error) {
	if c.last != nil && time.Until(c.last.expires) > margin {
		return c.last.value, nil
	}
	var absent []string
	for i := range c.sources {
		s := &c.sources[i]
		if c.chosen != nil && c.chosen != s {
			continue
		}
		got, err := s.get(ctx, c.resource)
		if err == nil {
			c.chosen, c.last = s, got
			return got.value, nil
		}
		if !errors.Is(err, errAbsent) || len(c.sources) == 1 {
			return secret.String{}, &tokenError{fmt.Errorf("get a token for the vault by %s: %w", s.name, err)}
		}
		absent = append(absent, s.name+": "+err.Error())
	}
	return secret.String{}, fmt.Errorf("this host has no credentials for the vault: %s", strings.Join(absent, "; "))
}

// forget makes the next call of token get a new one.
func (c *credentials) forget() { c.last = nil }

// from names the source of the last token, for errors.
func (c *credentials) from() string {
	if c.chosen == nil {
		return "no credentials"
	}
	return c.chosen.name
}

// tokenMethods implements the sources of tokens on this host.
type tokenMethods struct {
	config    *config
	host      connector.Host
	authority string
	trust     vendorapi.Trust
	timeout   time.Duration // of one try
	patience  time.Duration
}

func (w *tokenMethods) getenv(name string) string { return getenv(w.host, name) }
func (w *tokenMethods) tenant() string            { return cmp.Or(w.config.TenantID, w.getenv("AZURE_TENANT_ID")) }
func (w *tokenMethods) clientID() string {
	return cmp.Or(w.config.ClientID, w.getenv("AZURE_CLIENT_ID"))
}

// sources returns the sources of the mode. If the mode names one, its settings must be complete.
func (w *tokenMethods) sources() ([]source, error) {
	bySecret := source{"client_secret", w.fromEnvironment}
	workload := source{"workload_identity", w.fromWorkload}
	managed := source{"managed_identity", w.fromManagedIdentity}
	switch w.config.CredentialMode {
	case modeSecret:
		if missing := w.missing(); missing != "" {
			return nil, targetconf.Invalid("credential_mode", "client_secret needs %s", missing)
		}
		return []source{bySecret}, nil
	case modeWorkload:
		if w.clientID() == "" || w.tenant() == "" || w.getenv("AZURE_FEDERATED_TOKEN_FILE") == "" {
			return nil, targetconf.Invalid("credential_mode", "workload_identity needs AZURE_FEDERATED_TOKEN_FILE, AZURE_CLIENT_ID and AZURE_TENANT_ID, which the webhook of Azure sets in a pod")
		}
		return []source{workload}, nil
	case modeManaged:
		return []source{managed}, nil
	}
	return []source{bySecret, workload, managed, {"az account get-access-token", w.fromCLI}}, nil
}

// missing returns the setting that the application's credentials lack, or "" if they are complete.
func (w *tokenMethods) missing() string {
	switch {
	case w.tenant() == "":
		return "AZURE_TENANT_ID, or tenant_id in an overlay"
	case w.clientID() == "":
		return "AZURE_CLIENT_ID, or client_id"
	case w.secret().IsZero() && w.getenv("AZURE_CLIENT_CERTIFICATE_PATH") == "":
		return "client_secret or client_secret_file in an overlay, AZURE_CLIENT_SECRET, or AZURE_CLIENT_CERTIFICATE_PATH"
	}
	return ""
}

func (w *tokenMethods) secret() secret.String {
	if !w.config.ClientSecret.IsZero() {
		return w.config.ClientSecret
	}
	return secret.New(w.getenv("AZURE_CLIENT_SECRET"))
}

// fromEnvironment authenticates an application by its secret or its certificate.
func (w *tokenMethods) fromEnvironment(ctx context.Context, resource string) (*token, error) {
	if missing := w.missing(); missing != "" {
		return nil, fmt.Errorf("%w: set %s", errAbsent, missing)
	}
	if secret := w.secret(); !secret.IsZero() {
		return w.ask(ctx, resource, url.Values{"client_secret": {secret.Reveal()}})
	}
	signer, err := readSigner(w.getenv("AZURE_CLIENT_CERTIFICATE_PATH"), w.getenv("AZURE_CLIENT_CERTIFICATE_PASSWORD"))
	if err != nil {
		return nil, fmt.Errorf("AZURE_CLIENT_CERTIFICATE_PATH: %w", err)
	}
	signed, err := signer.assertion(w.clientID(), w.endpoint(), time.Now())
	if err != nil {
		return nil, err
	}
	return w.ask(ctx, resource, asserted(signed))
}

// fromWorkload authenticates a pod by its token from Kubernetes, see
// https://learn.microsoft.com/entra/workload-id/workload-identity-federation.
func (w *tokenMethods) fromWorkload(ctx context.Context, resource string) (*token, error) {
	path := w.getenv("AZURE_FEDERATED_TOKEN_FILE")
	if path == "" || w.clientID() == "" || w.tenant() == "" {
		return nil, fmt.Errorf("%w: AZURE_FEDERATED_TOKEN_FILE, AZURE_CLIENT_ID and AZURE_TENANT_ID are not all set", errAbsent)
	}
	data, _, _, err := trustedfile.Read(path, maxToken) // each time, since it rotates
	if err != nil {
		return nil, fmt.Errorf("AZURE_FEDERATED_TOKEN_FILE: %w", err)
	}
	text := strings.TrimSpace(string(data))
	if !isToken(text) {
		return nil, fmt.Errorf("AZURE_FEDERATED_TOKEN_FILE: %s does not contain a token", path)
	}
	return w.ask(ctx, resource, asserted(text))
}

func asserted(jwt string) url.Values {
	return url.Values{"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}, "client_assertion": {jwt}}
}

// isToken reports whether text is a valid token for a header field.
func isToken(text string) bool {
	return text != "" && !strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' })
}

func (w *tokenMethods) endpoint() string {
	return "https://" + w.authority + "/" + w.tenant() + "/oauth2/v2.0/token"
}

// ask asks the authority for a token, see
// https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow.
func (w *tokenMethods) ask(ctx context.Context, resource string, proof url.Values) (*token, error) {
	if !idForm().MatchString(w.tenant()) {
		return nil, fmt.Errorf("AZURE_TENANT_ID: %s is not a tenant", printable.Quote(w.tenant()))
	}
	form := url.Values{"grant_type": {"client_credentials"}, "client_id": {w.clientID()}, "scope": {resource + "/.default"}}
	hidden := make([]string, 0, len(proof))
	for key, values := range proof {
		form[key] = values
		hidden = append(hidden, values...)
	}
	endpoint, err := url.Parse(w.endpoint())
	if err != nil {
		return nil, err
	}
	api := vendorapi.New(vendorapi.Options{
		Proxy: w.host.ProxyFor(endpoint), TLS: w.trust.Config, Timeout: w.timeout, Patience: w.patience,
		Message: func(body []byte) string { return redact(entraMessage(body), hidden...) },
	})
	answer, err := api.Do(ctx, &vendorapi.Request{
		Method: http.MethodPost, URL: endpoint.String(), Header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}, "Accept": {"application/json"}},
		Body: []byte(form.Encode()), Reads: true, MaxAnswer: maxToken,
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.authority, err)
	}
	t, err := parseToken(answer.Body, time.Now())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.authority, err)
	}
	return t, nil
}

// entraMessage returns the error message of the token endpoint or a metadata service.
func entraMessage(body []byte) string {
	return cmp.Or(readEntraError(body), "the answer is not from Azure")
}

// readEntraError returns the error in body, or "" if there is none.
func readEntraError(body []byte) string {
	var answer struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}
	if json.Unmarshal(body, &answer) != nil || answer.Error == "" {
		return ""
	}
	return strings.TrimSuffix(answer.Error+": "+answer.Description, ": ")
}

// parseToken parses an answer with a token. Some services send numbers as strings.
func parseToken(body []byte, now time.Time) (*token, error) {
	var answer struct {
		Token     string          `json:"access_token"`
		ExpiresIn json.RawMessage `json:"expires_in"`
		ExpiresOn json.RawMessage `json:"expires_on"`
	}
	if json.Unmarshal(body, &answer) != nil || !isToken(answer.Token) {
		return nil, errors.New("the answer has no token")
	}
	t := &token{value: secret.New(answer.Token)}
	if seconds, ok := number(answer.ExpiresIn); ok {
		t.expires = now.Add(time.Duration(seconds) * time.Second)
	} else if at, ok := number(answer.ExpiresOn); ok {
		t.expires = time.Unix(at, 0)
	} else {
		return nil, errors.New("the answer does not say how long the token is valid")
	}
	return t, nil
}

// number parses a positive integer, with or without quotes. It refuses implausibly large ones.
func number(raw json.RawMessage) (int64, bool) {
	n, err := strconv.ParseInt(strings.Trim(string(raw), `"`), 10, 64)
	return n, err == nil && n > 0 && n < 1<<33
}

// fromManagedIdentity gets a token for this host's managed identity from App Service, see
// https://learn.microsoft.com/azure/app-service/overview-managed-identity#rest-endpoint-reference,
// or from the metadata service of a virtual machine, see
// https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token.
// These calls never use a proxy, which would get a token for the proxy's host.
func (w *tokenMethods) fromManagedIdentity(ctx context.Context, resource string) (*token, error) {
	query := url.Values{"resource": {resource}}
	client := w.config.ClientID
	if client == "" && w.config.CredentialMode == modeDefault {
		client = w.getenv("AZURE_CLIENT_ID")
	}
	if client != "" {
		query.Set("client_id", client)
	}
	header := http.Header{}
	endpoint, key := w.getenv("IDENTITY_ENDPOINT"), w.getenv("IDENTITY_HEADER")
	switch {
	case endpoint != "" && key != "" && w.getenv("IDENTITY_SERVER_THUMBPRINT") == "":
		query.Set("api-version", "2019-08-01")
		header.Set("X-IDENTITY-HEADER", key)
	case endpoint != "":
		return nil, errors.New("IDENTITY_ENDPOINT belongs to Azure Arc or Service Fabric, which this version does not support: use client_secret or workload_identity")
	default:
		endpoint = strings.TrimSuffix(cmp.Or(w.getenv("AZURE_POD_IDENTITY_AUTHORITY_HOST"), metadataURL), "/") + "/metadata/identity/oauth2/token"
		query.Set("api-version", "2018-02-01")
		header.Set("Metadata", "true")
	}
	at, err := url.Parse(endpoint)
	if err != nil || at.Host == "" || at.Scheme != "http" && at.Scheme != "https" || at.RawQuery != "" {
		return nil, errors.New("IDENTITY_ENDPOINT or AZURE_POD_IDENTITY_AUTHORITY_HOST is not a URL")
	}
	api := vendorapi.New(vendorapi.Options{
		Timeout: w.timeout, Patience: w.patience,
		Message: func(body []byte) string { return redact(entraMessage(body), key) },
		Busy: func(e *vendorapi.StatusError) bool { // while it is updated
			return e.Status == http.StatusNotFound && w.config.CredentialMode == modeManaged || e.Status == http.StatusGone || e.Status >= 500
		},
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{Timeout: metadataDial}).DialContext(ctx, "tcp", address)
			if err != nil && ctx.Err() == nil {
				// The error is not wrapped, so that the call is not retried where the service does
				// not exist.
				err = fmt.Errorf("%w: nothing answers at %s (%v)", errAbsent, address, err)
			}
			return conn, err
		},
	})
	answer, err := api.Do(ctx, &vendorapi.Request{Method: http.MethodGet, URL: endpoint + "?" + query.Encode(), Header: header, MaxAnswer: maxToken})
	status, _ := errors.AsType[*vendorapi.StatusError](err)
	switch {
	case status != nil && (status.Status == http.StatusBadRequest || status.Status < 500 && readEntraError(status.Body) == ""): // other clouds have a service at this address too
		who := "no identity"
		if client != "" {
			who = "no identity with the client id " + client
		}
		return nil, fmt.Errorf("%w: %s is assigned to this host, or it is not in Azure: %w", errAbsent, who, err)
	case err != nil:
		return nil, err
	}
	return parseToken(answer.Body, time.Now())
}

// fromCLI gets a token from the Azure CLI, after an interactive login. Errors must not contain
// its output, which has the token.
func (w *tokenMethods) fromCLI(ctx context.Context, resource string) (*token, error) {
	line := "az account get-access-token --output json --resource " + resource
	if w.config.TenantID != "" {
		line += " --tenant " + w.config.TenantID
	}
	command, err := w.host.Policy.Command(line, w.timeout)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errAbsent, err)
	}
	if w.host.Query == nil {
		return nil, fmt.Errorf("%w: commands cannot run here", errAbsent)
	}
	if dir := w.getenv("AZURE_CONFIG_DIR"); dir != "" {
		command.Env = append(command.Env, "AZURE_CONFIG_DIR="+dir)
	}
	// https://learn.microsoft.com/cli/azure/use-azure-cli-successfully-troubleshooting#work-behind-a-proxy
	if proxy := w.host.ProxyFor(&url.URL{Scheme: "https", Host: w.authority}); proxy != nil {
		command.Env = append(command.Env, "HTTPS_PROXY="+proxy.String())
	}
	if w.config.CABundle != "" {
		command.Env = append(command.Env, "REQUESTS_CA_BUNDLE="+string(w.config.CABundle))
	}
	out, err := w.host.Query(ctx, command)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errAbsent, err)
	}
	var printed struct {
		Token     string          `json:"accessToken"`
		ExpiresOn json.RawMessage `json:"expires_on"` // since version 2.54; expiresOn is local time
	}
	if json.Unmarshal(out, &printed) != nil || !isToken(printed.Token) {
		return nil, errors.New("az printed no token")
	}
	t := &token{value: secret.New(printed.Token), expires: time.Now()} // used only once if its expiry is unknown
	if at, ok := number(printed.ExpiresOn); ok {
		t.expires = time.Unix(at, 0)
	}
	return t, nil
}

// redact removes secrets from a message, since servers may repeat the request.
func redact(text string, secrets ...string) string {
	for _, secret := range secrets {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "[redacted]")
		}
	}
	return text
}
