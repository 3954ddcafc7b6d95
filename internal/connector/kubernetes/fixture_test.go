package kubernetes

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/apiserver"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// patience is how long tests retry a call, even on a slow machine.
const patience = 5 * time.Minute

// Users of the API server, by their permissions for the secret www.
var users = map[string][]string{
	"nobody":   nil,
	"reader":   {"get"},
	"creator":  {"create", "get"},
	"updater":  {"get", "update"},
	"agent":    {"create", "get", "update"},
	"remover":  {"create", "delete", "get", "update"},
	"writer":   {"create", "update"},
	"rotating": {"create", "delete", "get", "update"},
}

// cluster is an API server with a namespace for each test.
type cluster struct {
	*apiserver.Server
	ca    *testca.CA
	count atomic.Int32
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	etcd, api := needs.Need(t, apiserver.Etcd), needs.Need(t, apiserver.APIServer)
	var names []string
	for name := range users {
		names = append(names, name)
	}
	server, err := apiserver.Start(t.Context(), needs.MemoryDir(t), etcd, api, names...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Stop)
	return &cluster{Server: server, ca: testca.Must(t)}
}

// namespace creates a namespace and grants the users their permissions there.
func (c *cluster) namespace(t *testing.T) string {
	t.Helper()
	name := "test-" + string('a'+rune(c.count.Load()/26)) + string('a'+rune(c.count.Add(1)%26))
	must(t, c.Namespace(t.Context(), name))
	for user, verbs := range users {
		if verbs != nil {
			must(t, c.Allow(t.Context(), name, user, []string{"www"}, verbs...))
		}
	}
	return name
}

// fixture is a host and the secret that it deploys to.
type fixture struct {
	*conformance.Host
	*cluster
	t         *testing.T
	typ       connector.Type
	in        string // the namespace
	config    map[string]any
	directory string // for kubeconfigs
}

func (c *cluster) fixture(t *testing.T, user string) *fixture {
	t.Helper()
	f := &fixture{Host: conformance.NewHost(t, conformance.RunCommand), cluster: c, t: t, typ: typeOf("/nowhere", patience), in: c.namespace(t), directory: t.TempDir()}
	f.config = map[string]any{"namespace": f.in, "secret_name": "www", "kubeconfig_path": f.file("kubeconfig", c.Kubeconfig(user))}
	return f
}

// file writes a file that only root can write.
func (f *fixture) file(name string, data []byte) string {
	f.t.Helper()
	path := filepath.Join(f.directory, name)
	must(f.t, os.WriteFile(path, data, 0o600))
	return path
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

// unverified returns a configuration whose verification fails.
func unverified() []any {
	return []any{"post_deploy_verify", map[string]any{"enabled": true, "endpoint": "127.0.0.1:1"}, "post_deploy_verify_attempts", 1}
}

// secret is the part of a Secret that tests check.
type secret struct {
	Type     string            `json:"type,omitempty"`
	Data     map[string][]byte `json:"data,omitempty"`
	Metadata struct {
		Name            string            `json:"name,omitempty"`
		ResourceVersion string            `json:"resourceVersion,omitempty"`
		Labels          map[string]string `json:"labels,omitempty"`
		Annotations     map[string]string `json:"annotations,omitempty"`
		OwnerReferences []map[string]any  `json:"ownerReferences,omitempty"`
		Finalizers      []string          `json:"finalizers,omitempty"`
		ManagedFields   []struct {
			Manager string `json:"manager"`
		} `json:"managedFields,omitempty"`
	} `json:"metadata"`
	Immutable bool `json:"immutable,omitempty"`
}

// get returns a secret, or nil if it does not exist.
func (c *cluster) get(t *testing.T, namespace, name string) *secret {
	t.Helper()
	answer, err := c.Do(context.Background(), http.MethodGet, "/api/v1/namespaces/"+namespace+"/secrets/"+name, nil)
	if status, ok := errors.AsType[*apiserver.StatusError](err); ok && status.Code == http.StatusNotFound {
		return nil
	}
	must(t, err)
	var s secret
	must(t, json.Unmarshal(answer, &s))
	return &s
}

func (f *fixture) secret() *secret { f.t.Helper(); return f.get(f.t, f.in, "www") }

// make creates the secret.
func (f *fixture) make(s *secret) {
	f.t.Helper()
	s.Metadata.Name = "www"
	_, err := f.Do(f.t.Context(), http.MethodPost, "/api/v1/namespaces/"+f.in+"/secrets", s)
	must(f.t, err)
}

// patch changes the secret, as someone else.
func (f *fixture) patch(merge map[string]any) {
	f.t.Helper()
	_, err := f.Do(context.Background(), http.MethodPatch, "/api/v1/namespaces/"+f.in+"/secrets/www", merge)
	must(f.t, err)
}

// holds fails the test unless the secret holds m.
func (f *fixture) holds(m *connector.Material) {
	f.t.Helper()
	s := f.secret()
	if s == nil || string(s.Data["tls.crt"]) != string(m.FullChain()) || string(s.Data["tls.key"]) != string(m.Key()) {
		f.t.Errorf("the secret does not hold the pair: %v", s != nil)
	}
}

// front is a proxy before the API server.
type front struct {
	*httptest.Server

	mu     sync.Mutex                                        // guards the fields below
	before func(w http.ResponseWriter, r *http.Request) bool // called for each request; it returns true if it answered
	after  func(r *http.Request)                             // called after the API server's answer
}

func (p *front) onRequest(do func(w http.ResponseWriter, r *http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.before = do
}

func (p *front) onAnswer(do func(r *http.Request)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.after = do
}

// front sends the fixture's requests through a front.
func (f *fixture) front(user string) *front {
	f.t.Helper()
	back, err := url.Parse(f.URL)
	must(f.t, err)
	pass := httputil.NewSingleHostReverseProxy(back)
	pass.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: f.CA.Pool()}, DisableKeepAlives: true}
	pass.ErrorLog = log.New(io.Discard, "", 0) // errors of clients that disconnected
	p := new(front)
	p.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		before, after := p.before, p.after
		p.mu.Unlock()
		if before != nil && before(w, r) {
			return
		}
		pass.ServeHTTP(w, r)
		if after != nil {
			after(r)
		}
	}))
	certificate, err := f.CA.TLSCertificate("127.0.0.1")
	must(f.t, err)
	p.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	p.StartTLS()
	f.t.Cleanup(p.Close)
	f.config["kubeconfig_path"] = f.file("front", f.KubeconfigAt(p.URL, user))
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
