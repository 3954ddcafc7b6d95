package windows

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/testing/windowshost"
	"certctl-agent/internal/transaction"
	"certctl-agent/internal/winrm"
)

// password logs on to every host of the tests.
const password = "Pa55-\"wörd"

// network holds the hosts of a test, by the name that targets use.
type network struct {
	mu      sync.Mutex
	hosts   map[string]*windowshost.Host
	options []winrm.Options // of each client
}

func newNetwork() *network { return &network{hosts: make(map[string]*windowshost.Host)} }

// host returns the host called name. It creates the host on the first call.
func (n *network) host(name string) *windowshost.Host {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.hosts[name] == nil {
		n.hosts[name] = windowshost.New()
	}
	return n.hosts[name]
}

func (n *network) connect(o winrm.Options) (runner, error) {
	if _, err := winrm.New(o); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.options = append(n.options, o)
	return &direct{host: func() *windowshost.Host { return n.host(o.Host) }}, nil
}

// direct is a runner without WinRM.
type direct struct {
	host func() *windowshost.Host
}

func (d *direct) Run(ctx context.Context, command []string, stdin []byte) (*winrm.Result, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	stdout, stderr, exit, err := d.host().Run(command, stdin)
	if err != nil {
		return nil, err
	}
	return &winrm.Result{Stdout: stdout, Stderr: stderr, ExitCode: exit}, nil
}

func (d *direct) Close() error { return nil }

// fixture is an agent and a Windows host that it deploys to.
type fixture struct {
	*conformance.Host
	t       *testing.T
	ca      *testca.CA
	network *network
	windows *windowshost.Host
	typ     connector.Type
	config  map[string]any
}

// newFixture returns a fixture with an overlay that has the host and the password.
func newFixture(t *testing.T, kind string) *fixture {
	t.Helper()
	f := &fixture{Host: conformance.NewHost(t, nil), t: t, ca: testca.Must(t), network: newNetwork()}
	f.windows = f.network.host("win1.example.org")
	logon := map[string]any{"winrm_host": "win1.example.org", "winrm_username": `WIN1\certctl`, "winrm_password": password}
	switch kind {
	case "IIS":
		f.typ = iis(f.network.connect)
		f.config = map[string]any{"site_name": "Default Web Site", "cert_store": "My", "hostname": "www.example.org", "sni": true, "mode": "winrm"}
		f.overlay(map[string]any{"winrm": logon})
	default:
		f.typ = certStore(f.network.connect)
		f.config = map[string]any{"mode": "winrm"}
		f.overlay(logon)
	}
	return f
}

func (f *fixture) overlay(values map[string]any) {
	f.t.Helper()
	data, err := json.Marshal(values)
	must(f.t, err)
	must(f.t, os.WriteFile(filepath.Join(f.Overlays, conformance.TargetID+".json"), data, 0o600))
}

func (f *fixture) material() *connector.Material { f.t.Helper(); return f.Material(f.t, f.ca) }

func (f *fixture) deploy(m *connector.Material, more ...any) (transaction.Result, error) {
	f.t.Helper()
	result, err := f.Deploy(f.t.Context(), f.typ, conformance.With(f.config, more...), m)
	if err != nil && strings.Contains(err.Error(), password) {
		f.t.Errorf("the error shows the password: %v", err)
	}
	return result, err
}

func (f *fixture) mustDeploy(m *connector.Material, more ...any) transaction.Result {
	f.t.Helper()
	result, err := f.deploy(m, more...)
	if err != nil {
		f.t.Fatalf("deploy: %v", err)
	}
	return result
}

// refuses fails the test unless a deployment fails with all of words and
// changes nothing.
func (f *fixture) refuses(m *connector.Material, words []string, more ...any) error {
	f.t.Helper()
	before := f.windows.State()
	_, err := f.deploy(m, more...)
	conformance.WantError(f.t, err, words...)
	if after := f.windows.State(); !maps.Equal(before, after) {
		f.t.Errorf("%v: the host changed from %v to %v", err, before, after)
	}
	return err
}

// unverified returns a configuration whose verification fails.
func unverified() []any {
	return []any{"post_deploy_verify", map[string]any{"enabled": true, "endpoint": "127.0.0.1:1"}, "post_deploy_verify_attempts", 1}
}

// certificate returns someone else's certificate with its key.
func (f *fixture) certificate() *windowshost.Certificate {
	f.t.Helper()
	m := f.material()
	return &windowshost.Certificate{Certificate: m.Leaf, Key: pkcs8(f.t, m)}
}

func pkcs8(t testing.TB, m *connector.Material) []byte {
	t.Helper()
	key, err := pemutil.ParseKey(m.KeyPEM)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return der
}

// bound returns the thumbprint of a site's binding.
func (f *fixture) bound(site, information string) (thumbprint string) {
	f.windows.Change(func(c *windowshost.Console) {
		for _, b := range c.Bindings(site) {
			if b.Information == information {
				thumbprint = b.Thumbprint
			}
		}
	})
	return thumbprint
}

// holds reports whether a store has a certificate.
func (f *fixture) holds(store, thumbprint string) (holds bool) {
	f.windows.Change(func(c *windowshost.Console) { holds = c.Certificates(store)[thumbprint] != nil })
	return holds
}

// installed returns the State of m and its chain in a store of a host.
func installed(t testing.TB, m *connector.Material, store, friendly string, readers ...string) map[string][]byte {
	want := map[string][]byte{
		store + `\` + thumbprint(m.Leaf): fmt.Appendf(nil, "%s|%x|false|%s|%v|%s", m.Leaf.Subject, sha256.Sum256(pkcs8(t, m)), friendly, readers, conformance.TargetID),
		"Default Web Site/http/*:80:":    []byte("||0"),
	}
	for _, c := range m.Chain {
		want[`LocalMachine\CA\`+thumbprint(c)] = fmt.Appendf(nil, "%s|%x|false||[]|chain", c.Subject, sha256.Sum256(nil))
	}
	return want
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
