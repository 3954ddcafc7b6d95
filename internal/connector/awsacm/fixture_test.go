package awsacm

import (
	"crypto/tls"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/awsfake"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// short are waits for tests that do not test waiting. The limit of a call is unchanged, since the
// machine may be busy.
var short = waits{call: 5 * time.Second, list: 50 * time.Millisecond}

// fixture is a host and the ACM that it deploys to.
type fixture struct {
	*conformance.Host
	*awsfake.Cloud
	t      *testing.T
	typ    connector.Type
	dir    string // for files named in the environment
	env    map[string]string
	config map[string]any
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{Host: conformance.NewHost(t, conformance.RunCommand), Cloud: awsfake.Start(t), t: t, typ: typeOf(short), dir: t.TempDir()}
	f.env = environment(t, f.Cloud, f.dir)
	f.Getenv = func(name string) string { return f.env[name] }
	f.config = map[string]any{"region": f.Region, "endpoint": f.URL}
	return f
}

// environment returns the environment of an agent with an access key.
func environment(t *testing.T, c *awsfake.Cloud, dir string) map[string]string {
	t.Helper()
	id, key := c.AddUser("agent")
	bundle := filepath.Join(dir, "aws-ca.pem")
	must(t, os.WriteFile(bundle, c.CA.PEM(), 0o600))
	return map[string]string{"HOME": dir, "AWS_CA_BUNDLE": bundle, "AWS_ACCESS_KEY_ID": id, "AWS_SECRET_ACCESS_KEY": key,
		"AWS_ENDPOINT_URL_STS": c.URL, "AWS_EC2_METADATA_DISABLED": "true"}
}

func (f *fixture) file(name, text string) string {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	must(f.t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func (f *fixture) overlay(text string) {
	f.t.Helper()
	must(f.t, os.WriteFile(filepath.Join(f.Overlays, "default.json"), []byte(text), 0o600))
}

// deploy deploys m and promotes its key.
func (f *fixture) deploy(m *connector.Material, more ...any) (transaction.Result, error) {
	f.t.Helper()
	return f.Deploy(f.t.Context(), f.typ, conformance.With(f.config, more...), m, conformance.Promotion(m))
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
	return f.Material(f.t, f.CA)
}

// change returns the change of a new connector, as after a crash.
func (f *fixture) change(m *connector.Material, more ...any) *change {
	f.t.Helper()
	c, err := f.Connector(f.typ, conformance.With(f.config, more...))
	must(f.t, err)
	plan, err := c.Plan(f.t.Context(), m)
	must(f.t, err)
	return plan.Changes[0].(*change)
}

// only returns the only certificate in ACM.
func (f *fixture) only() awsfake.Certificate {
	f.t.Helper()
	all := f.Certificates()
	if len(all) != 1 {
		f.t.Fatalf("there are %d certificates, want one", len(all))
	}
	return all[0]
}

// holds fails the test unless the only certificate is m.
func (f *fixture) holds(m *connector.Material) {
	f.t.Helper()
	if got := f.only(); got.Body != string(leafPEM(m.Leaf)) || got.Chain != string(chainPEM(m.Chain)) || got.Key != string(m.Key()) {
		f.t.Errorf("ACM does not hold the pair")
	}
}

// put imports a certificate as someone else.
func (f *fixture) put(m *connector.Material, tags ...awsfake.Tag) string {
	f.t.Helper()
	arn, err := f.Put(leafPEM(m.Leaf), m.Key(), chainPEM(m.Chain), tags...)
	must(f.t, err)
	return arn
}

// ours returns the tags that the agent sets.
func ours() []awsfake.Tag {
	return []awsfake.Tag{{Key: certificateTag, Value: "cert-1"}, {Key: managedByTag, Value: managedBy}}
}

// unverified returns a configuration whose verification fails.
func unverified() []any {
	return []any{"post_deploy_verify", map[string]any{"enabled": true, "endpoint": "127.0.0.1:1", "timeout": "1s"}, "post_deploy_verify_attempts", 1}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func tagged(tags []awsfake.Tag) map[string]string {
	all := make(map[string]string)
	for _, tag := range tags {
		all[tag.Key] = tag.Value
	}
	return all
}

// issue returns a certificate for the given key.
func (f *fixture) issue(template testca.Template) *connector.Material {
	f.t.Helper()
	template.Intermediates, template.OmitRoot = 1, true
	issued, err := f.CA.Issue(template)
	must(f.t, err)
	m := f.material()
	m.Leaf, m.Chain = issued.Leaf, issued.Chain[1:]
	if issued.Key != nil {
		m.KeyPEM = issued.KeyPEM()
	}
	return m
}

// server starts a server that is not ACM and returns its URL.
func (f *fixture) server(handler http.HandlerFunc) string {
	f.t.Helper()
	certificate, err := f.CA.TLSCertificate("127.0.0.1")
	must(f.t, err)
	server := httptest.NewUnstartedServer(handler)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	server.StartTLS()
	f.t.Cleanup(server.Close)
	return server.URL
}

// killAfter kills the agent after a step of the engine.
func killAfter(op string) func(transaction.Step) error {
	passed := false
	return func(step transaction.Step) error {
		if passed {
			return errors.New("killed")
		}
		passed = step.Op == op
		return nil
	}
}
