package keyvault

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/azure"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

const (
	client       = "0f4e1f4a-0000-4000-8000-000000000001"
	clientSecret = "hunter2~client.secret"
)

// brief are waits for tests: long enough on any machine for events that happen,
// and short if nothing happens.
var brief = waits{patience: time.Minute, settle: 50 * time.Millisecond}

// site is a fake Azure with the environment of a host.
type site struct {
	*azure.Server
	ca     *testca.CA
	bundle string // CA file of the fake
	count  atomic.Int32
}

func newSite(t *testing.T) *site {
	t.Helper()
	ca := testca.Must(t)
	server, err := azure.Start(ca)
	must(t, err)
	t.Cleanup(server.Close)
	s := &site{Server: server, ca: ca, bundle: filepath.Join(t.TempDir(), "ca.pem")}
	must(t, os.WriteFile(s.bundle, ca.PEM(), 0o600))
	server.Register(client, azure.App{Secret: clientSecret})
	return s
}

// environment returns the environment of a host with the secret of an application.
func environment() map[string]string {
	return map[string]string{"AZURE_TENANT_ID": azure.Tenant, "AZURE_CLIENT_ID": client, "AZURE_CLIENT_SECRET": clientSecret}
}

// proxy sends everything except loopback to the fake.
func (s *site) proxy(u *url.URL) *url.URL {
	at, err := url.Parse(s.ProxyURL)
	if err != nil {
		panic(err)
	}
	return at
}

// typ returns the type on a host with that environment, behind the proxy.
func (s *site) typ(env map[string]string, w waits) connector.Type {
	typ := typeOf(w)
	made := typ.New
	typ.New = func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		host.Getenv = func(name string) string { return env[name] }
		host.Proxy = s.proxy
		return made(c, host)
	}
	return typ
}

// vault creates a vault for one test.
func (s *site) vault() *azure.Vault {
	return s.vaultIn(azure.Public())
}

func (s *site) vaultIn(c azure.Cloud) *azure.Vault {
	n := s.count.Add(1)
	return s.Vault(c, "kv-"+string('a'+rune(n/676%26))+string('a'+rune(n/26%26))+string('a'+rune(n%26)))
}

// fixture is a host and the vault that it deploys to.
type fixture struct {
	*conformance.Host
	*site
	t      *testing.T
	vault  *azure.Vault
	typ    connector.Type
	config map[string]any
}

func (s *site) fixture(t *testing.T, env map[string]string) *fixture {
	t.Helper()
	f := &fixture{Host: conformance.NewHost(t, nil), site: s, t: t, vault: s.vault(), typ: s.typ(env, brief)}
	f.config = map[string]any{"vault_url": f.vault.URL(), "certificate_name": "www"}
	f.overlay(nil)
	return f
}

// overlay writes an overlay that trusts the fake's CA.
func (f *fixture) overlay(more map[string]any) {
	f.t.Helper()
	overlay := map[string]any{"ca_bundle": f.bundle}
	maps.Copy(overlay, more)
	data, err := json.Marshal(overlay)
	must(f.t, err)
	must(f.t, os.WriteFile(filepath.Join(f.Overlays, "default.json"), data, 0o600))
}

func (f *fixture) deploy(m *connector.Material, more ...any) (transaction.Result, error) {
	f.t.Helper()
	return f.Deploy(f.t.Context(), f.typ, conformance.With(f.config, more...), m)
}

func (f *fixture) mustDeploy(m *connector.Material, more ...any) transaction.Result {
	f.t.Helper()
	result, err := f.deploy(m, more...)
	if err != nil {
		f.t.Fatalf("deploy: %v", err)
	}
	return result
}

func (f *fixture) material() *connector.Material {
	f.t.Helper()
	return f.Material(f.t, f.ca)
}

// materialOf returns a certificate with that key.
func (f *fixture) materialOf(key crypto.Signer) *connector.Material {
	f.t.Helper()
	issued, err := f.ca.Issue(testca.Template{Names: []string{"localhost"}, Key: key, Intermediates: 1, OmitRoot: true})
	must(f.t, err)
	m := f.material()
	m.Leaf, m.Chain, m.KeyPEM = issued.Leaf, issued.Chain[1:], issued.KeyPEM()
	return m
}

// theirs returns a version that someone else imported.
func (f *fixture) theirs(change func(*azure.Version)) {
	f.t.Helper()
	m := f.material()
	at := azure.Version{Certificate: m.Leaf, Chain: m.Chain, Key: pkcs8Of(f.t, m), Enabled: true, Tags: map[string]string{"owner": "them"}}
	at.Policy.Secret.ContentType = azure.PFX
	at.Policy.Key.Exportable, at.Policy.Key.Type = new(true), "EC"
	if change != nil {
		change(&at)
	}
	f.vault.Put("www", at)
}

func pkcs8Of(t *testing.T, m *connector.Material) []byte {
	t.Helper()
	key, err := pemutil.ParseKey(m.KeyPEM)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return der
}

// current returns the current version, or nil if there is none.
func current(v *azure.Vault) *azure.Version {
	all := v.Versions("www")
	if len(all) == 0 {
		return nil
	}
	return &all[len(all)-1]
}

// holds fails the test unless the current version is m, with its key and chain, and
// no other version has m.
func (f *fixture) holds(m *connector.Material) {
	f.t.Helper()
	at := current(f.vault)
	if at == nil || !at.Enabled || !at.Certificate.Equal(m.Leaf) || string(at.Key) != string(pkcs8Of(f.t, m)) || !slices.EqualFunc(at.Chain, m.Chain, (*x509.Certificate).Equal) {
		f.t.Errorf("the vault does not hold the pair: %v", at != nil)
	}
	if n := f.count(m); n != 1 {
		f.t.Errorf("there are %d versions of the certificate, want one", n)
	}
}

// count returns the number of versions of m.
func (f *fixture) count(m *connector.Material) (n int) {
	for _, at := range f.vault.Versions("www") {
		if at.Certificate.Equal(m.Leaf) {
			n++
		}
	}
	return n
}

// made returns how often a call was made.
func (s *site) made(call string) (n int) {
	for _, c := range s.Calls() {
		if c == call {
			n++
		}
	}
	return n
}

// unverified returns a configuration whose verification fails.
func unverified() []any {
	return []any{"post_deploy_verify", map[string]any{"enabled": true, "endpoint": "127.0.0.1:1"}, "post_deploy_verify_attempts", 1}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rsaKey generates the key only once, since that is slow.
var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func fingerprint(m *connector.Material) string { return pemutil.Fingerprint(m.Leaf) }

var errKilled = errors.New("killed")
