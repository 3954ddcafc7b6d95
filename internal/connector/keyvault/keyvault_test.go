package keyvault

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/azure"
	"certctl-agent/internal/testing/needs"
)

func TestNew(t *testing.T) {
	host := conformance.NewHost(t, nil)
	for _, test := range []struct {
		key   string
		value any
		says  string // "": no error
	}{
		{"", nil, ""},
		{"vault_url", "https://Example.vault.azure.net/", ""},
		{"vault_url", "https://example.vault.azure.net:443", ""},
		{"vault_url", "https://example.vault.usgovcloudapi.net", ""},
		{"vault_url", "https://example.vault.azure.cn", ""},
		{"vault_url", "http://example.vault.azure.net", "expected the URL of a vault"},
		{"vault_url", "https://example.vault.azure.net:8443", "expected the URL of a vault"},
		{"vault_url", "https://user:hunter2@example.vault.azure.net", "expected the URL of a vault"},
		{"vault_url", "https://example.vault.azure.net/certificates/www", "expected the URL of a vault"},
		{"vault_url", "https://example.vault.azure.net/?x=y", "expected the URL of a vault"},
		{"vault_url", "example.vault.azure.net", "expected the URL of a vault"},
		{"vault_url", "https://vault.azure.net", "is not a vault"},
		{"vault_url", "https://a.b.vault.azure.net", "is not a vault"},
		{"vault_url", "https://example.vault.azure.net.evil.example", "is not a vault"},
		{"vault_url", "https://evilvault.azure.net", "is not a vault"},
		{"vault_url", "https://example.vault.microsoftazure.de", "is not a vault"},
		{"vault_url", "https://169.254.169.254", "is not a vault"},
		{"vault_url", "https://x.vault.azure.net", "is not the name of a vault"},
		{"vault_url", "https://example.managedhsm.azure.net", "managed HSM"},
		{"vault_url", "https://example.managedhsm.usgovcloudapi.net", "managed HSM"},
		{"vault_url", "https://example.privatelink.vaultcore.azure.net", "private endpoint"},
		{"certificate_name", "w_w", "not a valid name"},
		{"certificate_name", "../secrets", "not a valid name"},
		{"certificate_name", strings.Repeat("x", 128), "not a valid name"},
		{"tags", `{"team": "web"}`, ""},
		{"tags", "", ""},
		{"tags", map[string]any{"team": "wéb"}, ""},
		{"tags", map[string]any{"team": 1}, "tags"},
		{"tags", "team=web", "tags"},
		{"tags", map[string]any{"Certctl-Target-Id": "x"}, "reserved for the agent"},
		{"tags", map[string]any{"team": strings.Repeat("é", 256)}, ""},
		{"tags", map[string]any{"team": strings.Repeat("é", 257)}, "1 to 256 characters"},
		{"tags", map[string]any{"1": "", "2": "", "3": "", "4": "", "5": "", "6": "", "7": "", "8": "", "9": "", "10": "", "11": "", "12": ""}, "Key Vault allows 15"},
		{"credential_mode", "cli", "expected one of"},
		{"credential_mode", "managed_identity", ""},
		{"credential_mode", "client_secret", "AZURE_TENANT_ID"},
		{"credential_mode", "workload_identity", "AZURE_FEDERATED_TOKEN_FILE"},
		{"client_id", "a b", "not a valid id"},
		{"client_id", client, ""},
		{"client_secret", "********", "overlay"},
		{"tenant_id", azure.Tenant, "only from an overlay"},
		{"ca_bundle", "/etc/ssl/certs/ca-certificates.crt", "only from an overlay"},
		{"post_deploy_verify", map[string]any{"enabled": true}, "post_deploy_verify.endpoint"},
	} {
		err := host.Try(t, Type(), map[string]any{"vault_url": "https://example.vault.azure.net", "certificate_name": "www"}, test.key, test.value, test.says)
		if err != nil && !strings.Contains(err.Error(), test.key) {
			t.Errorf("%s %v: the error does not name the key: %v", test.key, test.value, err)
		}
		if test.key == "vault_url" && err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error shows a password: %v", err)
		}
	}
}

// A job cannot send credentials to a host of its choice.
func TestAuthority(t *testing.T) {
	for _, test := range []struct {
		vault, job, overlay, env string
		want                     string
		says                     string // "": no error
	}{
		{"vault.azure.net", "", "", "", "login.microsoftonline.com", ""},
		{"vault.usgovcloudapi.net", "", "", "", "login.microsoftonline.us", ""},
		{"vault.azure.cn", "", "", "", "login.chinacloudapi.cn", ""},
		{"vault.azure.cn", "https://login.partner.microsoftonline.cn/", "", "", "login.partner.microsoftonline.cn", ""},
		{"vault.azure.net", "LOGIN.windows.net", "", "", "login.windows.net", ""},
		{"vault.azure.net", "login.microsoftonline.us", "", "", "", "only if an overlay"},
		{"vault.azure.net", "https://evil.example", "", "", "", "only if an overlay"},
		{"vault.azure.net", "login.microsoftonline.com:8443", "", "", "", "only if an overlay"},
		{"vault.azure.net", "https://login.microsoftonline.com@evil.example", "", "", "", "expected a host"},
		{"vault.azure.net", "http://login.microsoftonline.com", "", "", "", "expected a host"},
		{"vault.azure.net", "https://login.microsoftonline.com/evil", "", "", "", "expected a host"},
		{"vault.azure.net", "https://evil.example", "https://login.example.org", "", "login.example.org", ""},
		{"vault.azure.net", "", "", "https://login.example.org/", "login.example.org", ""},
		{"vault.azure.net", "login.windows.net", "", "https://login.example.org/", "login.windows.net", ""},
	} {
		host := conformance.NewHost(t, nil)
		host.Getenv = func(name string) string { return map[string]string{"AZURE_AUTHORITY_HOST": test.env}[name] }
		if test.overlay != "" {
			must(t, os.WriteFile(filepath.Join(host.Overlays, "default.json"), fmt.Appendf(nil, `{"authority_host": %q}`, test.overlay), 0o600))
		}
		c, err := host.Connector(Type(), map[string]any{"vault_url": "https://example." + test.vault, "certificate_name": "www", "authority_host": test.job})
		if test.says != "" {
			conformance.WantError(t, err, test.says, "authority_host")
			continue
		}
		must(t, err)
		k := c.(*keyVault)
		got, err := k.authority(k.vault.cloud, host.Host)
		if err != nil || got != test.want {
			t.Errorf("%+v: got %s, %v", test, got, err)
		}
	}
}

// The policy is checked before anything is sent, also through a proxy.
func TestAllowedHosts(t *testing.T) {
	s := newSite(t)
	f := s.fixture(t, environment())
	f.Policy.Hosts = []policy.HostRule{}
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "CERTCTL_ALLOWED_HOSTS", f.vault.Host)
	block, err := policy.ParseHostRule("127.0.0.0/8")
	must(t, err)
	f.Policy.Hosts = []policy.HostRule{block}
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "CERTCTL_ALLOWED_HOSTS", "which a proxy connects to")
	if calls := s.Connected(); len(calls) > 0 {
		t.Errorf("connected to %q", calls)
	}
	rule, err := policy.ParseHostRule("*.vault.azure.net:443")
	must(t, err)
	f.Policy.Hosts = []policy.HostRule{rule}
	f.mustDeploy(f.material())
	f.Policy.Hosts = []policy.HostRule{}
	f.overlay(map[string]any{"vault_url": f.vault.URL()})
	f.mustDeploy(f.material())
	if _, err := f.Connector(Type(), f.config); err != nil {
		t.Errorf("one that an overlay names, without a proxy: %v", err)
	}
}

// Certificates that Key Vault would refuse are refused before anything is sent.
func TestKeys(t *testing.T) {
	s := newSite(t)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	must(t, err)
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	leaf := func(public any, algorithm x509.PublicKeyAlgorithm) *x509.Certificate {
		return &x509.Certificate{PublicKey: public, PublicKeyAlgorithm: algorithm}
	}
	odd := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2559), E: 65537}
	for want, certificate := range map[string]*x509.Certificate{
		"an RSA key of 2560 bits": leaf(odd, x509.RSA), "an ECDSA key on P-224": leaf(p224.Public(), x509.ECDSA), "a key of type Ed25519": leaf(edwards.Public(), x509.Ed25519),
	} {
		f := s.fixture(t, environment())
		m := f.material()
		m.Leaf = certificate
		c, err := f.Connector(f.typ, f.config)
		must(t, err)
		_, err = c.Plan(t.Context(), m)
		conformance.WantError(t, err, want, "issue the certificate with a key")
	}
	if calls := s.Connected(); len(calls) > 0 {
		t.Errorf("connected to %q", calls)
	}
}

// The PKCS#12 holds the key and the whole chain, as openssl reads it, and the vault
// accepts each type of key.
func TestPFX(t *testing.T) {
	openssl := needs.Need(t, "openssl")
	s := newSite(t)
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	must(t, err)
	f := s.fixture(t, environment())
	for want, m := range map[string]*connector.Material{"RSA": f.materialOf(rsaKey()), "P-256": f.materialOf(p256), "P-384": f.materialOf(p384), "P-521": f.materialOf(p521)} {
		f.mustDeploy(m)
		f.holds(m)
		at := current(f.vault)
		if got := at.Policy.Key.Type + at.Policy.Key.Curve; strings.TrimPrefix(got, "EC") != want {
			t.Errorf("%s: the policy says %s", want, got)
		}
		imported := s.Imported()
		value, password := imported[len(imported)-2], imported[len(imported)-1]
		data, err := base64.StdEncoding.DecodeString(value)
		must(t, err)
		cmd := exec.Command(openssl, "pkcs12", "-legacy", "-nodes", "-passin", "env:PFX_PASSWORD")
		cmd.Env, cmd.Stdin = append(os.Environ(), "PFX_PASSWORD="+password), strings.NewReader(string(data))
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: openssl: %v", want, err)
		}
		key, err := pemutil.ParseKey(out)
		must(t, err)
		ours, err := pemutil.ParseKey(m.KeyPEM)
		must(t, err)
		if !pemutil.SamePrivateKey(key, ours) {
			t.Errorf("%s: openssl finds another key", want)
		}
		if n := strings.Count(string(out), "BEGIN CERTIFICATE"); n != 1+len(m.Chain) {
			t.Errorf("%s: openssl finds %d certificates, want %d", want, n, 1+len(m.Chain))
		}
		if bag := string(out); !strings.Contains(bag, string(conformance.PEM(m.Leaf))) || !strings.Contains(bag, string(conformance.PEM(m.Chain[0]))) {
			t.Errorf("%s: openssl finds other certificates", want)
		}
	}
}

func TestChallengeForms(t *testing.T) {
	for header, want := range map[string]*challenge{
		`Bearer authorization="https://login.microsoftonline.com/t1", resource="https://vault.azure.net"`:                              {"https://vault.azure.net", "t1", ""},
		`bearer resource="https://vault.azure.net/",authorization_uri="https://login.windows.net/t1/"`:                                 {"https://vault.azure.net", "t1", ""},
		`Bearer authorization="https://login.microsoftonline.com/t1", scope="https://vault.azure.net/.default", error="invalid_token"`: {"https://vault.azure.net", "t1", "invalid_token"},
		``: nil, `Basic realm="x"`: nil, `Bearer`: nil, `Bearer authorization="https://login.microsoftonline.com/t1"`: nil, "Bearer authorization=\"\x00\", resource=\"x\"": nil,
	} {
		got, err := parseChallenge(header)
		if (err == nil) != (want != nil) || want != nil && *got != *want {
			t.Errorf("%q: got %+v, %v, want %+v", header, got, err, want)
		}
	}
}

func FuzzAnswers(f *testing.F) {
	f.Add([]byte(`{"id":"https://kv.vault.azure.net/certificates/www/0123","cer":"AAAA","attributes":{"enabled":true}}`), `Bearer authorization="https://a/b", resource="https://vault.azure.net"`)
	f.Add([]byte(`{"error":{"code":"Conflict","message":"x","innererror":{"code":"y"}}}`), "Bearer x=")
	f.Fuzz(func(t *testing.T, body []byte, header string) {
		v := &vault{address: address{clouds()[0], "kv"}, name: "www"}
		if b, err := v.parseBundle(body); err == nil && !nameForm().MatchString(b.version()) {
			t.Errorf("the version %q is taken", b.version())
		}
		_ = parseProblem(body)
		_, _ = parseChallenge(header)
	})
}
