package keyvault

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/azure"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// file writes a file that only this user can write.
func file(t *testing.T, data ...[]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, slices.Concat(data...), 0o600))
	return path
}

// signers returns files with an application's certificate: PEM, and PKCS#12 as openssl
// encodes it, with the password hunter2.
func (s *site) signers(t *testing.T) (certificate *x509.Certificate, pemFile, pfxFile string) {
	t.Helper()
	issued, err := s.ca.Issue(testca.Template{Names: []string{"app.example.org"}, Key: rsaKey(), OmitRoot: true})
	must(t, err)
	pemFile = file(t, issued.KeyPEM(), issued.LeafPEM())
	pfxFile = filepath.Join(t.TempDir(), "app.pfx")
	cmd := exec.Command(needs.Need(t, "openssl"), "pkcs12", "-export", "-in", pemFile, "-out", pfxFile, "-passout", "pass:hunter2")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("openssl: %v: %s", err, out)
	}
	must(t, os.Chmod(pfxFile, 0o600))
	return issued.Leaf, pemFile, pfxFile
}

// podToken returns a token as Kubernetes issues it to a pod.
func podToken(t *testing.T, audience string) []byte {
	t.Helper()
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"RS256","typ":"JWT"}`)) + "." + encode(fmt.Appendf(nil, `{"iss":"https://issuer.example","sub":"agent","aud":%q,"exp":%d}`, audience, time.Now().Add(time.Hour).Unix()))
	digest := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, rsaKey(), crypto.SHA256, digest[:])
	must(t, err)
	return []byte(signed + "." + encode(signature) + "\n")
}

// Each mode, in each cloud, gets tokens only from the right source.
func TestCredentials(t *testing.T) {
	s := newSite(t)
	certificate, pemFile, pfxFile := s.signers(t)
	const app, other = "0f4e1f4a-0000-4000-8000-000000000002", "0f4e1f4a-0000-4000-8000-000000000003"
	s.Register(app, azure.App{Certificates: []*x509.Certificate{certificate}, Federated: &azure.Federation{Issuer: "https://issuer.example", Subject: "agent", Key: &rsaKey().PublicKey}})
	s.Assign("")
	s.Assign(other)
	tenant := map[string]string{"AZURE_TENANT_ID": azure.Tenant, "AZURE_CLIENT_ID": app}
	with := func(base map[string]string, more ...string) map[string]string {
		env := maps.Clone(base)
		for i := 0; i < len(more); i += 2 {
			env[more[i]] = more[i+1]
		}
		return env
	}
	machine := map[string]string{"AZURE_POD_IDENTITY_AUTHORITY_HOST": s.MetadataURL}
	appService := map[string]string{"IDENTITY_ENDPOINT": s.AppURL, "IDENTITY_HEADER": s.AppHeader}
	federated := with(tenant, "AZURE_FEDERATED_TOKEN_FILE", file(t, podToken(t, "api://AzureADTokenExchange")))
	inEach := map[string]bool{"secret": true, "certificate, PEM": true, "virtual machine": true} // modes to test in each cloud
	for _, test := range []struct {
		name  string
		mode  string
		env   map[string]string
		more  []any
		calls string // that get the token
		says  string // "": no error
	}{
		{"secret", "client_secret", environment(), nil, "token " + client, ""},
		{"secret, default", "default", with(environment(), "IDENTITY_ENDPOINT", s.AppURL, "IDENTITY_HEADER", s.AppHeader), nil, "token " + client, ""},
		{"wrong secret", "client_secret", with(environment(), "AZURE_CLIENT_SECRET", "hunter3"), nil, "", "client_secret: login.microsoftonline.com: 401 Unauthorized: invalid_client: AADSTS7000215"},
		{"wrong secret, default", "default", with(environment(), "AZURE_CLIENT_SECRET", "hunter3", "IDENTITY_ENDPOINT", s.AppURL, "IDENTITY_HEADER", s.AppHeader), nil, "", "a token for the vault by client_secret: login.microsoftonline.com: 401 Unauthorized: invalid_client: AADSTS7000215"},
		{"wrong tenant", "client_secret", with(environment(), "AZURE_TENANT_ID", "00000000-0000-4000-8000-000000000000"), nil, "", "the vault is in the tenant " + azure.Tenant},
		{"tenant by its name", "client_secret", with(environment(), "AZURE_TENANT_ID", "other.example"), nil, "", "AADSTS90002"},
		{"certificate, PEM", "client_secret", with(tenant, "AZURE_CLIENT_CERTIFICATE_PATH", pemFile), nil, "token " + app, ""},
		{"certificate, PKCS#12", "default", with(tenant, "AZURE_CLIENT_CERTIFICATE_PATH", pfxFile, "AZURE_CLIENT_CERTIFICATE_PASSWORD", "hunter2"), nil, "token " + app, ""},
		{"certificate, wrong password", "client_secret", with(tenant, "AZURE_CLIENT_CERTIFICATE_PATH", pfxFile, "AZURE_CLIENT_CERTIFICATE_PASSWORD", "hunter3"), nil, "", "AZURE_CLIENT_CERTIFICATE_PASSWORD is not its password"},
		{"no such certificate", "client_secret", with(tenant, "AZURE_CLIENT_CERTIFICATE_PATH", pemFile+"2"), nil, "", "AZURE_CLIENT_CERTIFICATE_PATH: "},
		{"not a certificate", "client_secret", with(tenant, "AZURE_CLIENT_CERTIFICATE_PATH", federated["AZURE_FEDERATED_TOKEN_FILE"]), nil, "", "AZURE_CLIENT_CERTIFICATE_PATH: "},
		{"workload identity", "workload_identity", federated, nil, "token " + app, ""},
		{"workload identity, default", "default", federated, nil, "token " + app, ""},
		{"another's token", "workload_identity", with(tenant, "AZURE_FEDERATED_TOKEN_FILE", file(t, podToken(t, "api://other"))), nil, "", "AADSTS700212"},
		{"no token in the file", "workload_identity", with(tenant, "AZURE_FEDERATED_TOKEN_FILE", file(t, []byte("a b"))), nil, "", "does not contain a token"},
		{"virtual machine", "managed_identity", machine, nil, "imds", ""},
		{"virtual machine, default", "default", machine, nil, "imds", ""},
		{"virtual machine, its own identity", "managed_identity", with(machine, "AZURE_CLIENT_ID", app), nil, "imds", ""},
		{"virtual machine, by client_id", "managed_identity", machine, []any{"client_id", other}, "imds", ""},
		{"virtual machine, by AZURE_CLIENT_ID", "default", with(machine, "AZURE_CLIENT_ID", other), nil, "imds", ""},
		{"virtual machine, unknown identity", "managed_identity", machine, []any{"client_id", app}, "", "no identity with the client id " + app},
		{"App Service", "managed_identity", appService, nil, "app", ""},
		{"App Service, by client_id", "default", appService, []any{"client_id", other}, "app", ""},
		{"App Service, wrong header", "managed_identity", with(appService, "IDENTITY_HEADER", "hunter3"), nil, "", "401 Unauthorized"},
		{"Azure Arc", "managed_identity", map[string]string{"IDENTITY_ENDPOINT": s.AppURL}, nil, "", "Azure Arc"},
		{"not a URL", "managed_identity", map[string]string{"AZURE_POD_IDENTITY_AUTHORITY_HOST": "nowhere"}, nil, "", "is not a URL"},
		{"nobody there", "managed_identity", map[string]string{"AZURE_POD_IDENTITY_AUTHORITY_HOST": "http://127.0.0.1:1"}, nil, "", "nothing answers at 127.0.0.1:1"},
	} {
		for _, cloud := range []azure.Cloud{azure.Public(), azure.USGovernment(), azure.China()} {
			if cloud != azure.Public() && !inEach[test.name] {
				continue
			}
			f := s.fixture(t, test.env)
			f.vault = s.vaultIn(cloud)
			f.config["vault_url"] = f.vault.URL()
			s.Forget()
			m := f.material()
			_, err := f.deploy(m, append(slices.Clone(test.more), "credential_mode", test.mode)...)
			if test.says != "" {
				conformance.WantError(t, err, test.says)
				if err != nil && strings.Contains(err.Error(), "before the vault") {
					t.Errorf("%s: the error takes what gives tokens for the vault: %v", test.name, err)
				}
				for _, secret := range []string{"hunter", test.env["IDENTITY_HEADER"]} {
					if err != nil && secret != "" && strings.Contains(err.Error(), secret) {
						t.Errorf("%s: the error shows a secret: %v", test.name, err)
					}
				}
				if s.made("import www") > 0 {
					t.Errorf("%s: it was imported", test.name)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s, %s: %v", test.name, cloud.Vaults, err)
				continue
			}
			f.holds(m)
			got := slices.DeleteFunc(s.Calls(), func(call string) bool { return strings.HasSuffix(call, " www") })
			if !slices.Equal(got, []string{test.calls}) {
				t.Errorf("%s: tokens came by %q, want %q once", test.name, got, test.calls)
			}
			for _, at := range s.Connected() {
				if at != f.vault.Host+":443" && at != cloud.Authority+":443" {
					t.Errorf("%s: the proxy was asked for %s", test.name, at)
				}
			}
		}
	}
}

// Mode default uses the Azure CLI last, under the rules for commands. The error says for each
// source why it is not available.
func TestCLI(t *testing.T) {
	s := newSite(t)
	nowhere := map[string]string{"AZURE_POD_IDENTITY_AUTHORITY_HOST": "http://127.0.0.1:1", "AZURE_CONFIG_DIR": "/etc/certctl/azure"}
	f := s.fixture(t, nowhere)
	var asked policy.Command
	printed, failed := "", error(nil)
	f.Query = func(_ context.Context, c policy.Command) ([]byte, error) {
		asked = c
		return []byte(printed), failed
	}
	value, _ := s.Issue(azure.Public().Resource())
	printed = fmt.Sprintf(`{"accessToken": %q, "expiresOn": "2030-01-01 00:00:00.000000", "expires_on": %d, "tokenType": "Bearer"}`, value, time.Now().Add(time.Hour).Unix())
	m := f.material()
	f.mustDeploy(m)
	f.holds(m)
	if got := strings.Join(asked.Argv, " "); got != "az account get-access-token --output json --resource https://vault.azure.net" || asked.Timeout <= 0 || !slices.Equal(asked.Env, []string{"AZURE_CONFIG_DIR=/etc/certctl/azure", "HTTPS_PROXY=" + s.ProxyURL, "REQUESTS_CA_BUNDLE=" + s.bundle}) {
		t.Errorf("ran %q for %v with %q", got, asked.Timeout, asked.Env)
	}
	f.overlay(map[string]any{"tenant_id": azure.Tenant})
	f.mustDeploy(f.material())
	if got := strings.Join(asked.Argv, " "); !strings.HasSuffix(got, " --tenant "+azure.Tenant) {
		t.Errorf("ran %q", got)
	}
	f.Policy.Commands = [][]string{{"az", "account", "get-access-token", "*"}}
	f.mustDeploy(f.material())
	printed = `{"accessToken": "hunter2 hunter2"}`
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "az account get-access-token: az printed no token")
	if strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the error shows what az printed: %v", err)
	}
	failed = errors.New("az: exit status 1: Please run 'az login' to setup account.")
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "this host has no credentials for the vault", "client_secret: not available: set AZURE_CLIENT_ID", "workload_identity: not available: AZURE_FEDERATED_TOKEN_FILE",
		"managed_identity: not available: nothing answers at 127.0.0.1:1", "az account get-access-token: not available: az: exit status 1: Please run 'az login'")
	f.Policy.Commands = [][]string{{"/bin/true"}}
	asked = policy.Command{}
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "CERTCTL_ALLOWED_COMMANDS")
	if asked.Argv != nil {
		t.Errorf("it ran %q", asked.Argv)
	}
}

// Tokens are reused until shortly before they expire, and replaced
// once if the vault does not accept one.
func TestTokens(t *testing.T) {
	s := newSite(t)
	tokens := func() int { return s.made("token " + client) }
	f := s.fixture(t, environment())
	f.mustDeploy(f.material())
	if tokens() != 1 {
		t.Errorf("%d tokens for one deployment", tokens())
	}
	for _, op := range []string{"change", "restore"} {
		s.Forget()
		f := s.fixture(t, environment())
		f.theirs(nil)
		before := current(f.vault)
		f.Before = func(step transaction.Step) error {
			if step.Op == op {
				s.ExpireTokens()
			}
			return nil
		}
		_, err := f.deploy(f.material(), unverified()...)
		if at := current(f.vault); conformance.Broken(err) || !at.Certificate.Equal(before.Certificate) || tokens() != 2 {
			t.Errorf("%s: %v with %d tokens", op, err, tokens())
		}
	}
	s.Forget()
	s.SetLife(margin - time.Second)
	f = s.fixture(t, environment())
	m := f.material()
	f.mustDeploy(m)
	f.holds(m)
	if tokens() < 3 {
		t.Errorf("%d tokens that soon expire, for %q", tokens(), s.Calls())
	}
	s.Forget()
	s.SetLife(time.Hour)
	s.Refuse(true)
	f = s.fixture(t, environment())
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "the vault does not accept the token of client_secret")
	if tokens() != 2 {
		t.Errorf("%d tokens that are refused", tokens())
	}
}

// A vault that requests a token for another resource or tenant gets none.
func TestChallenge(t *testing.T) {
	s := newSite(t)
	tenant := "https://login.microsoftonline.com/" + azure.Tenant
	for header, want := range map[string]string{
		`Bearer authorization="` + tenant + `", resource="https://management.azure.com"`:                                                    "it requests a token for \"https://management.azure.com\", but a vault of this cloud needs one for https://vault.azure.net",
		`Bearer authorization="` + tenant + `", resource="https://vault.azure.net.evil.example"`:                                            "it requests a token for",
		`Bearer authorization="` + tenant + `", resource="https://vault.usgovcloudapi.net"`:                                                 "it requests a token for",
		`Bearer authorization="https://login.microsoftonline.com/00000000-0000-4000-8000-000000000000", resource="https://vault.azure.net"`: "the vault is in the tenant 00000000-0000-4000-8000-000000000000",
		`Basic realm="vault"`: "it does not request a token like a vault",
		`Bearer authorization="` + tenant + `", resource="https://vault.azure.net", error="insufficient_claims", claims="eyJ9"`: "continuous access evaluation",
	} {
		s.Forget()
		f := s.fixture(t, environment())
		f.vault.Challenge(header)
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, want)
		if calls := s.Calls(); !slices.Equal(calls, []string{"challenge www"}) {
			t.Errorf("%s: made %q", header, calls)
		}
	}
	// Credentials are not sent to the authority in the challenge.
	s.Forget()
	f := s.fixture(t, environment())
	f.vault.Challenge(`Bearer authorization="https://login.evil.example/` + azure.Tenant + `", resource="https://vault.azure.net"`)
	f.mustDeploy(f.material())
	if slices.ContainsFunc(s.Connected(), func(at string) bool { return strings.Contains(at, "evil") }) {
		t.Errorf("connected to %q", s.Connected())
	}
	s.Next("challenge", azure.Fault{Status: 200, Body: "{}"})
	f = s.fixture(t, environment())
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "so it is not a vault")
}

// While Azure updates its metadata service, it is unavailable in several ways.
func TestMetadataIsUpdated(t *testing.T) {
	s := newSite(t)
	s.Assign("")
	for _, status := range []int{404, 410, 500} {
		s.Next("imds", azure.Fault{Status: status, Body: "<html>"})
	}
	f := s.fixture(t, map[string]string{"AZURE_POD_IDENTITY_AUTHORITY_HOST": s.MetadataURL})
	m := f.material()
	f.mustDeploy(m, "credential_mode", "managed_identity")
	f.holds(m)
}

// A server other than Azure gets no secrets, and its answers are not shown
// unchanged.
func TestForeignMetadata(t *testing.T) {
	s := newSite(t)
	for status, want := range map[int]string{404: "it is not in Azure", 200: "the answer has no token", 401: "it is not in Azure", 403: "the answer is not from Azure"} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(status)
			fmt.Fprint(w, "<html>\x1b[31m", r.Header)
		}))
		env := map[string]string{"AZURE_POD_IDENTITY_AUTHORITY_HOST": server.URL}
		f := s.fixture(t, env)
		f.typ = s.typ(env, waits{patience: time.Nanosecond})
		_, err := f.deploy(f.material(), "credential_mode", "managed_identity")
		conformance.WantError(t, err, "a token for the vault by managed_identity: ", want)
		if strings.Contains(err.Error(), "\x1b") {
			t.Errorf("got %q", err)
		}
		server.Close()
	}
}
