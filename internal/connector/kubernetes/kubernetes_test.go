package kubernetes

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/netfault"
	"certctl-agent/internal/testing/testca"
)

// writeKubeconfig writes a kubeconfig for a server that need not exist.
func writeKubeconfig(t *testing.T, path, server string) {
	t.Helper()
	must(t, os.WriteFile(path, fmt.Appendf(nil, `current-context: a
clusters:
- name: b
  cluster:
    server: %s
contexts:
- name: a
  context:
    cluster: b
    user: c
users:
- name: c
  user:
    token: hunter2
`, server), 0o600))
}

func TestNew(t *testing.T) {
	host := conformance.NewHost(t, nil)
	dir := t.TempDir()
	path := filepath.Join(dir, "kubeconfig")
	writeKubeconfig(t, path, "https://203.0.113.1:6443")
	open := filepath.Join(dir, "open")
	writeKubeconfig(t, open, "https://203.0.113.1:6443")
	must(t, os.Chmod(open, 0o666))
	bad := filepath.Join(dir, "bad")
	writeKubeconfig(t, bad, "{}")
	for _, test := range []struct {
		key   string
		value any
		says  string // "": no error
	}{
		{"", nil, ""},
		{"labels", "", ""},
		{"labels", "{}", ""},
		{"labels", `{"example.org/team": "Web_1"}`, ""},
		{"labels", `{"team": 1}`, "labels"},
		{"labels", "team=web", "labels"},
		{"labels", map[string]any{"te am": "web"}, "te am"},
		{"labels", map[string]any{"team": "wéb"}, "not a valid label"},
		{"labels", map[string]any{"team": strings.Repeat("x", 64)}, "not a valid label"},
		{"namespace", "../secrets", "namespace"},
		{"namespace", "Web", "namespace"},
		{"namespace", strings.Repeat("x", 64), "namespace"},
		{"secret_name", "a/b", "secret_name"},
		{"secret_name", "www.example.org", ""},
		{"secret_name", "www?x=y", "secret_name"},
		{"secret_name", "a..b", "secret_name"},
		{"secret_name", "********", "overlay"},
		{"create", false, ""},
		{"create", "", ""},
		{"create", "no", "create"},
		{"ca_crt", "yes", ""},
		{"context", "elsewhere", "elsewhere"},
		{"kubeconfig_path", nil, "KUBERNETES_SERVICE_HOST"},
		{"kubeconfig_path", "relative", "absolute"},
		{"kubeconfig_path", dir + "/none", "no such file"},
		{"kubeconfig_path", open, "can be written by others"},
		{"kubeconfig_path", bad, bad + ", line 5:"},
		{"post_deploy_verify", map[string]any{"enabled": true}, "post_deploy_verify.endpoint"},
	} {
		err := host.Try(t, Type(), map[string]any{"namespace": "web", "secret_name": "www", "kubeconfig_path": path}, test.key, test.value, test.says)
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error shows a token: %v", err)
		}
	}
	_, err := host.Connector(Type(), map[string]any{"namespace": "web", "secret_name": "www", "context": "a"})
	conformance.WantError(t, err, "context", "kubeconfig_path")
}

// The policy is checked before anything is sent.
func TestAllowedHosts(t *testing.T) {
	host := conformance.NewHost(t, nil)
	host.Policy.Hosts = []policy.HostRule{}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	writeKubeconfig(t, path, "https://203.0.113.1:6443")
	config := map[string]any{"namespace": "web", "secret_name": "www", "kubeconfig_path": path}
	_, err := host.Connector(Type(), config)
	conformance.WantError(t, err, "CERTCTL_ALLOWED_HOSTS", "203.0.113.1:6443", path)
	writeKubeconfig(t, path, "https://127.0.0.1:6443")
	if _, err := host.Connector(Type(), config); err != nil {
		t.Errorf("loopback: %v", err)
	}
	for _, port := range []string{"0", "65536", "99999999999999999999"} {
		writeKubeconfig(t, path, "https://127.0.0.1:"+port)
		_, err = host.Connector(Type(), config)
		conformance.WantError(t, err, path, "expected a port from 1 to 65535")
	}
	block, err := policy.ParseHostRule("203.0.113.0/31")
	must(t, err)
	host.Policy.Hosts = []policy.HostRule{block}
	for _, test := range [][3]string{
		{"https://203.0.113.1:6443", "http://203.0.113.2:3128", "203.0.113.2:3128"},
		{"https://api.example.org:6443", "http://203.0.113.1:3128", "api.example.org, port 6443, which a proxy connects to"},
		{"https://localhost:6443", "socks5://203.0.113.1:1080", "localhost, port 6443, which a proxy connects to"},
	} {
		writeKubeconfig(t, path, test[0]+"\n    proxy-url: "+test[1])
		_, err = host.Connector(Type(), config)
		conformance.WantError(t, err, "CERTCTL_ALLOWED_HOSTS", test[2])
	}
	host.Policy.Hosts = []policy.HostRule{}
	host.Getenv = func(name string) string {
		return map[string]string{"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}[name]
	}
	_, err = host.Connector(Type(), map[string]any{"namespace": "web", "secret_name": "www"})
	conformance.WantError(t, err, "CERTCTL_ALLOWED_HOSTS", "[fd00::1]:443", "service account")

	writeKubeconfig(t, path, "https://203.0.113.1:6443")
	must(t, os.WriteFile(filepath.Join(host.Overlays, "default.json"), fmt.Appendf(nil, `{"kubeconfig_path": %q}`, path), 0o600))
	if _, err := host.Connector(Type(), config); err != nil {
		t.Errorf("one that an overlay names: %v", err)
	}
	config["context"] = "a" // the file may have other contexts, which the overlay does not name
	_, err = host.Connector(Type(), config)
	conformance.WantError(t, err, "CERTCTL_ALLOWED_HOSTS", "203.0.113.1:6443")
	must(t, os.WriteFile(filepath.Join(host.Overlays, "default.json"), fmt.Appendf(nil, `{"kubeconfig_path": %q, "context": "a"}`, path), 0o600))
	if _, err := host.Connector(Type(), config); err != nil {
		t.Errorf("a context that an overlay names: %v", err)
	}
}

// The error does not contain the key, even if an admission webhook quotes the request.
func TestMessagesShowNoKey(t *testing.T) {
	host := conformance.NewHost(t, nil)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"kind":"Status","reason":"NotFound"}`)
			return
		}
		body, _ := io.ReadAll(r.Body)
		var sent struct{ Data map[string]string }
		if err := json.Unmarshal(body, &sent); err != nil {
			t.Error(err)
		}
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "message": "denied: " + sent.Data["tls.key"] + " is not wanted"})
	}))
	defer server.Close()
	writeKubeconfig(t, path, server.URL+"\n    insecure-skip-tls-verify: true")
	must(t, os.WriteFile(filepath.Join(host.Overlays, "default.json"), fmt.Appendf(nil, `{"kubeconfig_path": %q}`, path), 0o600))
	c, err := host.Connector(Type(), map[string]any{"namespace": "web", "secret_name": "www"})
	must(t, err)
	m := host.Material(t, testca.Must(t))
	plan, err := c.Plan(t.Context(), m)
	must(t, err)
	if _, _, err := plan.Changes[0].Read(t.Context()); err != nil {
		t.Fatal(err)
	}
	err = plan.Changes[0].Write(t.Context())
	conformance.WantError(t, err, "denied: [redacted] is not wanted")
}

// The answer of a proxy is shown in one line of bounded length.
func TestProxyRefuses(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	proxy := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 403 \x1b[31mno %s\r\n\r\n", strings.Repeat("x", 10_000))
	})}
	go func() { _ = proxy.Serve(listener) }()
	defer proxy.Close()
	host := conformance.NewHost(t, nil)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	writeKubeconfig(t, path, "https://127.0.0.1:6443\n    proxy-url: http://user:hunter2@"+listener.Addr().String())
	config := map[string]any{"namespace": "web", "secret_name": "www", "kubeconfig_path": path}
	_, err = host.Deploy(t.Context(), Type(), config, host.Material(t, testca.Must(t)))
	conformance.WantError(t, err, "the proxy "+listener.Addr().String()+" answers 403")
	if err != nil && (len(err.Error()) > 1000 || strings.Contains(err.Error(), "\x1b") || strings.Contains(err.Error(), "hunter2")) {
		t.Errorf("got %d bytes: %.300q", len(err.Error()), err)
	}
}

// A change fails unless the answer has the secret as it was sent.
func TestAnswers(t *testing.T) {
	host := conformance.NewHost(t, nil)
	var say string
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"kind":"Status","reason":"NotFound"}`)
			return
		}
		fmt.Fprint(w, say)
	}))
	defer server.Close()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	writeKubeconfig(t, path, server.URL+"\n    insecure-skip-tls-verify: true")
	must(t, os.WriteFile(filepath.Join(host.Overlays, "default.json"), fmt.Appendf(nil, `{"kubeconfig_path": %q}`, path), 0o600))
	m := host.Material(t, testca.Must(t))
	for answer, want := range map[string]string{
		"<html>please log in</html>": "not a secret",
		"":                           "not a secret",
		`{"kind":"Secret","metadata":{},"data":{"tls.crt":"AA==","tls.key":"AA=="}}`: "admission webhook",
	} {
		say = answer
		_, err := host.Deploy(t.Context(), Type(), map[string]any{"namespace": "web", "secret_name": "www"}, m)
		conformance.WantError(t, err, want)
	}
}

func TestReadCredential(t *testing.T) {
	const version = "client.authentication.k8s.io/v1"
	const head = `{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential"`
	got, err := readCredential([]byte(head+`,"status":{"token":"hunter2","expirationTimestamp":"2030-01-02T03:04:05Z"}}`), version)
	if err != nil || got.token != "hunter2" || got.expires.Year() != 2030 {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, out := range []string{"", "hunter2", "{}", head + "}", head + `,"status":{}}`, head + `,"status":{"token":"hunter2\n"}}`, head + `,"status":{"clientCertificateData":"hunter2","clientKeyData":"x"}}`,
		`{"apiVersion":"client.authentication.k8s.io/v1beta1","kind":"ExecCredential","status":{"token":"hunter2"}}`} {
		if got, err := readCredential([]byte(out), version); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: got %+v, %v", out, got, err)
		}
	}
}

// An object is sent back unchanged except for the agent's parts.
func TestObject(t *testing.T) {
	const sent = `{"kind":"Secret","apiVersion":"v1","future":{"n":1.0000000000000000001,"s":"<&>\u2028"},"metadata":{"name":"www","generation":12345678901234567890,"labels":{"a":"b"}},` +
		`"data":{"x":"AA=="},"type":"kubernetes.io/tls"}`
	o, err := parseObject([]byte(sent))
	must(t, err)
	o.annotations["k"] = quoted("v")
	data, err := o.encode()
	must(t, err)
	const want = `{"apiVersion":"v1","data":{"x":"AA=="},"future":{"n":1.0000000000000000001,"s":"<&>\u2028"},"kind":"Secret",` +
		`"metadata":{"annotations":{"k":"v"},"generation":12345678901234567890,"labels":{"a":"b"},"name":"www"},"type":"kubernetes.io/tls"}`
	if string(data) != want {
		t.Errorf("got  %s\nwant %s", data, want)
	}
}

// connectProxy starts a proxy that connects to any address.
func connectProxy(t *testing.T) string {
	server := httptest.NewServer(netfault.Tunnel(func(address string) string { return address }))
	t.Cleanup(server.Close)
	return server.URL
}
