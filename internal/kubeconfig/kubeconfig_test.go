package kubeconfig

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/testing/needs"
)

// written is a file in the form that kubectl writes, with two contexts.
const written = `apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: Q0E=
    server: https://api.example.org:6443
    tls-server-name: kubernetes
  name: prod
- cluster:
    certificate-authority: pki/ca.crt
    proxy-url: http://proxy.example.org:3128
    server: https://rancher.example.org/k8s/clusters/c-1/
  name: lab
contexts:
- context:
    cluster: prod
    namespace: web
    user: agent
  name: prod
- context:
    cluster: lab
    user: plugin
  name: lab
- context:
    cluster: lab
    user: old
  name: old
current-context: prod
kind: Config
preferences: {}
users:
- name: agent
  user:
    client-certificate-data: Q0VSVA==
    client-key-data: S0VZ
    token: hunter2
- name: plugin
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1
      args:
      - get-token
      - --cluster=lab
      command: bin/plugin
      env:
      - name: PROFILE
        value: lab
      interactiveMode: IfAvailable
      provideClusterInfo: true
- name: old
  user:
    username: kate
    password: hunter2
`

func TestParse(t *testing.T) {
	c, err := Parse([]byte(written), "/etc/kube", "")
	if err != nil {
		t.Fatal(err)
	}
	if c.Name != "prod" || c.Cluster.Server.String() != "https://api.example.org:6443" || string(c.Cluster.CA) != "CA" || c.Cluster.ServerName != "kubernetes" ||
		string(c.User.Certificate) != "CERT" || c.User.Key.Reveal() != "KEY" || c.User.Token.Reveal() != "hunter2" || c.User.Exec != nil {
		t.Errorf("got %+v", c)
	}
	c, err = Parse([]byte(written), "/etc/kube", "lab")
	if err != nil {
		t.Fatal(err)
	}
	want := &Exec{APIVersion: "client.authentication.k8s.io/v1", Command: "/etc/kube/bin/plugin", Args: []string{"get-token", "--cluster=lab"},
		Env: []string{"PROFILE=lab"}, ProvideClusterInfo: true}
	if !reflect.DeepEqual(c.User.Exec, want) {
		t.Errorf("got %+v, want %+v", c.User.Exec, want)
	}
	if c.Cluster.CAFile != "/etc/kube/pki/ca.crt" || c.Cluster.Server.Path != "/k8s/clusters/c-1" || c.Cluster.Proxy.Host != "proxy.example.org:3128" {
		t.Errorf("got %+v", c.Cluster)
	}
}

// Each error has the right line, and no error shows a secret.
func TestParseRefused(t *testing.T) {
	for _, test := range []struct {
		context, old, with string
		line               int
		says               string
	}{
		{"", "current-context: prod", "", 1, "current-context"},
		{"nowhere", "", "", 13, "nowhere"},
		{"old", "", "", 51, "username"},
		{"", "  name: prod\n- context", "  name: production\n- context", 13, "context called"},
		{"", "    user: agent", "    user: nobody", 30, "user called"},
		{"", "    cluster: prod", "    cluster: elsewhere", 2, "cluster called"},
		{"", "https://api.", "http://api.", 5, "https"},
		{"", "https://api.", "https://u:hunter2@api.", 5, "URL"},
		{"", "    server: https://api.example.org:6443\n", "", 4, "no server"},
		{"", "    tls-server-name: kubernetes", "    insecure-skip-tls-verify: true", 6, "certificate authority"},
		{"", "    tls-server-name: kubernetes", "    insecure-skip-tls-verify: perhaps", 6, "neither"},
		{"", "    tls-server-name: kubernetes", "    pin: sha256", 6, `"pin"`},
		{"", "Q0E=", "hunter2", 4, "base64"},
		{"", "    client-key-data: S0VZ\n", "", 33, "client certificate"},
		{"", "    token: hunter2", "    as: kate", 35, "as"},
		{"", "    token: hunter2", "    auth-provider:\n      name: oidc", 35, "auth-provider"},
		{"", "    token: hunter2", "    token:\n    - hunter2", 36, "not a single value"},
		{"", "    token: hunter2", "    token: hunter2 hunter2", 35, "white space"},
		{"", "kind: Config", "kind: Secret", 28, "Config"},
		{"", "apiVersion: v1\n", "apiVersion: v2\n", 1, "v1"},
		{"lab", "authentication.k8s.io/v1", "authentication.k8s.io/v1alpha1", 39, "v1alpha1"},
		{"lab", "IfAvailable", "Always", 47, "terminal"},
		{"lab", "      command: bin/plugin\n", "", 39, "no command"},
		{"lab", "      args:\n      - get-token\n      - --cluster=lab\n", "      args: get-token\n", 40, "not a list"},
		{"lab", "http://proxy", "https://proxy", 10, "proxy-url"},
		{"lab", "      env:\n", "      stdin: hunter2\n      env:\n", 44, "stdin"},
	} {
		if !strings.Contains(written, test.old) {
			t.Fatalf("%q not found", test.old)
		}
		_, err := Parse([]byte(strings.Replace(written, test.old, test.with, 1)), "/etc/kube", test.context)
		syntax, ok := errors.AsType[*SyntaxError](err)
		if !ok || syntax.Line != test.line || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%q for %q in context %q: got %v, want line %d and %q", test.with, test.old, test.context, err, test.line, test.says)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error shows a secret: %v", err)
		}
	}
	for _, text := range []string{"", "- a", "clusters: 5\ncontexts: 5\ncurrent-context: a", "{}", "{\"clusters\": [", "current-context: a\ncontexts:\n- 5"} {
		if c, err := Parse([]byte(text), "/", ""); err == nil {
			t.Errorf("%q: got %+v, want an error", text, c)
		}
	}
}

// TestKubectl compares what Parse and kubectl read from files that kubectl wrote with all of
// its flags.
func TestKubectl(t *testing.T) {
	kubectl := needs.Need(t, "kubectl")
	dir := t.TempDir()
	pem := filepath.Join(dir, "some.pem")
	must(t, os.WriteFile(pem, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 0o600))
	run := func(t *testing.T, file string, args ...string) []byte {
		t.Helper()
		command := exec.CommandContext(t.Context(), kubectl, append([]string{"--kubeconfig=" + file, "config"}, args...)...)
		command.Env = []string{"HOME=" + dir, "PATH=/usr/bin:/bin"}
		out, err := command.Output()
		if err != nil {
			var exit *exec.ExitError
			errors.As(err, &exit)
			t.Fatalf("kubectl %q: %v: %s", args, err, exit.Stderr)
		}
		return out
	}
	csv := func(value string) string { return `"` + strings.ReplaceAll(value, `"`, `""`) + `"` } // as the flags require
	long := strings.Repeat("words and more: words # and 'quotes' \"too\" ", 8)
	for name, test := range map[string]struct {
		cluster, user []string
		check         func(c *Context) bool
	}{
		"files": {
			[]string{"--certificate-authority=" + pem}, []string{"--client-certificate=" + pem, "--client-key=" + pem},
			func(c *Context) bool {
				return c.Cluster.CAFile == pem && c.User.CertificateFile == pem && c.User.KeyFile == pem
			},
		},
		"inline": {
			[]string{"--certificate-authority=" + pem, "--embed-certs=true", "--tls-server-name=kubernetes"},
			[]string{"--client-certificate=" + pem, "--client-key=" + pem, "--embed-certs=true"},
			func(c *Context) bool {
				return bytes.HasPrefix(c.Cluster.CA, []byte("-----BEGIN")) && bytes.Equal(c.User.Certificate, c.Cluster.CA) && c.User.Key.Reveal() == string(c.Cluster.CA) &&
					c.Cluster.ServerName == "kubernetes"
			},
		},
		"token": {
			[]string{"--insecure-skip-tls-verify=true"}, []string{"--token=hunter2"},
			func(c *Context) bool { return c.Cluster.Insecure && c.User.Token.Reveal() == "hunter2" },
		},
		"a token like a number": {
			nil, []string{"--token=0x12"}, func(c *Context) bool { return c.User.Token.Reveal() == "0x12" },
		},
		"exec": {
			nil, []string{"--exec-command=/usr/bin/aws", "--exec-api-version=client.authentication.k8s.io/v1beta1", "--exec-arg=eks", "--exec-arg=--a: b", "--exec-arg=" + csv(long),
				"--exec-arg=true", "--exec-arg= x ", "--exec-arg=" + csv("one\n\ttwo\n"), "--exec-env=AWS_PROFILE=prod", "--exec-env=EMPTY="},
			func(c *Context) bool {
				want := []string{"eks", "--a: b", long, "true", " x ", "one\n\ttwo\n"}
				return c.User.Exec.Command == "/usr/bin/aws" && slices.Equal(c.User.Exec.Args, want) &&
					slices.Equal(slices.Sorted(slices.Values(c.User.Exec.Env)), []string{"AWS_PROFILE=prod", "EMPTY="})
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "config")
			run(t, file, append([]string{"set-cluster", "our cluster: #1", "--server=https://api.example.org:6443"}, test.cluster...)...)
			run(t, file, append([]string{"set-credentials", "'kate'"}, test.user...)...)
			run(t, file, "set-context", "kate@cluster", "--cluster=our cluster: #1", "--user='kate'", "--namespace=web")
			run(t, file, "use-context", "kate@cluster")
			run(t, file, "set-cluster", "other", "--server=https://elsewhere:6443")
			data, err := os.ReadFile(file)
			must(t, err)
			c, err := Parse(data, filepath.Dir(file), "")
			if err != nil || !test.check(c) {
				t.Errorf("got %+v, %v of\n%s", c, err, data)
			}
			yaml, err := parse(data)
			must(t, err)
			json, err := parseJSON(run(t, file, "view", "--raw", "-o", "json"))
			must(t, err)
			got, want := plain(yaml).(map[string]any), plain(json).(map[string]any)
			for _, key := range []string{"clusters", "contexts", "users", "current-context"} {
				if !reflect.DeepEqual(got[key], want[key]) {
					t.Errorf("%s: we read %q, kubectl %q", key, got[key], want[key])
				}
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(written), "")
	f.Add([]byte(written), "lab")
	f.Add([]byte(`{"current-context":"a","contexts":[{"name":"a","context":{"cluster":"b","user":"c"}}]}`), "")
	f.Add([]byte("a: \"b\\\n  c\"\nd: |2+\n   e\nf:\n- - g\n  - 'h\n    i'\n"), "")
	f.Fuzz(func(t *testing.T, data []byte, context string) {
		c, err := Parse(data, "/etc", context)
		if err == nil {
			if c.Cluster.Server == nil || c.Cluster.Server.Scheme != "https" {
				t.Errorf("no https server: %+v", c)
			}
			return
		}
		syntax, ok := errors.AsType[*SyntaxError](err)
		if lines := bytes.Count(data, []byte("\n")) + 1; !ok || syntax.Line < 1 || syntax.Line > lines {
			t.Errorf("%v has a line outside of 1 to %d", err, lines)
		}
	})
}

// Printing a context does not reveal secrets.
func TestContextIsRedacted(t *testing.T) {
	c, err := Parse([]byte(strings.Replace(written, "S0VZ", base64.StdEncoding.EncodeToString([]byte("hunter2")), 1)), "/", "")
	must(t, err)
	var log strings.Builder
	for _, format := range []string{"%v", "%+v", "%#v"} {
		fmt.Fprintf(&log, format, c.User)
	}
	if strings.Contains(log.String(), "hunter2") {
		t.Errorf("got %s", log.String())
	}
}
