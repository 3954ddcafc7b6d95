package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/apiserver"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/transaction"
)

// TestLive runs all tests with a real API server. They share one, since it is slow to
// start.
func TestLive(t *testing.T) {
	c := startCluster(t)
	for _, test := range []struct {
		name string
		run  func(t *testing.T, c *cluster)
	}{
		{"installs and renews", installs},
		{"others' parts survive", othersSurvive},
		{"labels", withLabels},
		{"ca.crt", withCA},
		{"permissions", permissions},
		{"refused secrets", refusedSecrets},
		{"changed between read and write", changedBetween},
		{"conflicts", conflicts},
		{"undo", undoes},
		{"undo leaves newer changes alone", undoLeavesNewer},
		{"undo after two crashes", undoAfterCrashes},
		{"undo of a lost answer", undoOfLostAnswer},
		{"credentials", credentialForms},
		{"token rotates", tokenRotates},
		{"busy", busy},
		{"hangs", hangs},
		{"not an API server", notAnAPIServer},
		{"kubectl", byKubectl},
		{"conformance", conforms},
		{"restarts", restarts}, // last, since others would wait for it
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

func installs(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	for range 2 {
		m := f.material()
		if result := f.mustDeploy(m); result.Unchanged {
			t.Error("a new certificate changes nothing")
		}
		f.holds(m)
		s := f.secret()
		deployed, err := time.Parse(time.RFC3339, s.Metadata.Annotations["certctl.io/deployed-at"])
		if err != nil || time.Since(deployed) > time.Hour {
			t.Errorf("deployed at %v, %v", deployed, err)
		}
		if s.Type != "kubernetes.io/tls" || len(s.Data) != 2 || s.Metadata.Labels["app.kubernetes.io/managed-by"] != "certctl" ||
			s.Metadata.Annotations["certctl.io/certificate-id"] != "cert-1" || s.Metadata.Annotations["certctl.io/fingerprint"] != pemutil.Fingerprint(m.Leaf) {
			t.Errorf("got %+v", s.Metadata)
		}
		if len(s.Metadata.ManagedFields) != 1 || s.Metadata.ManagedFields[0].Manager != "certctl-agent" {
			t.Errorf("managed by %+v", s.Metadata.ManagedFields)
		}
		if result := f.mustDeploy(m); !result.Unchanged || f.secret().Metadata.ResourceVersion != s.Metadata.ResourceVersion {
			t.Errorf("the same once more: %+v", result)
		}
	}
	_, err := f.deploy(f.material(), "secret_name", "elsewhere", "create", "false", "kubeconfig_path", f.file("admin", c.Kubeconfig(apiserver.Admin)))
	conformance.WantError(t, err, "does not exist", `"create": false`)
}

// A pair that is already in the secret is not written again, whoever wrote it
// and however its PEM is wrapped.
func othersSurvive(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	m := f.material()
	theirs := &secret{Type: "kubernetes.io/tls", Data: map[string][]byte{
		"tls.crt": append([]byte("# ours\n"), m.FullChain()...), "tls.key": append(m.Key(), '\n'), "keystore.p12": {0, 1, 2}, "<&>": nil,
	}}
	delete(theirs.Data, "<&>")
	theirs.Metadata.Labels = map[string]string{"team": "web", "app.kubernetes.io/managed-by": "Helm"}
	theirs.Metadata.Annotations = map[string]string{"note": "a <b> & \u2028 c", "certctl.io/other": "x"}
	theirs.Metadata.OwnerReferences = []map[string]any{{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": "0a0b0c0d-0000-0000-0000-000000000000", "blockOwnerDeletion": false}}
	theirs.Metadata.Finalizers = []string{"example.org/keep"}
	f.make(theirs)
	t.Cleanup(func() { f.patch(map[string]any{"metadata": map[string]any{"finalizers": nil}}) })
	before := f.secret()
	if result := f.mustDeploy(m); !result.Unchanged || f.secret().Metadata.ResourceVersion != before.Metadata.ResourceVersion {
		t.Errorf("the pair was there: %+v", result)
	}
	check := func(when string) {
		t.Helper()
		got := f.secret()
		if string(got.Data["keystore.p12"]) != "\x00\x01\x02" || got.Metadata.Labels["team"] != "web" || got.Metadata.Labels["app.kubernetes.io/managed-by"] != "Helm" ||
			got.Metadata.Annotations["note"] != theirs.Metadata.Annotations["note"] || got.Metadata.Annotations["certctl.io/other"] != "x" ||
			fmt.Sprint(got.Metadata.OwnerReferences) != fmt.Sprint(before.Metadata.OwnerReferences) || !slices.Equal(got.Metadata.Finalizers, theirs.Metadata.Finalizers) {
			t.Errorf("%s: got %+v", when, got)
		}
	}
	renewed := f.material()
	f.mustDeploy(renewed)
	f.holds(renewed)
	check("renewed")
	if _, err := f.deploy(f.material(), unverified()...); err == nil || conformance.Broken(err) {
		t.Errorf("got %v", err)
	}
	f.holds(renewed)
	check("undone")
}

func withLabels(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	m := f.material()
	f.mustDeploy(m, "labels", map[string]any{"team": "web"})
	f.mustDeploy(m, "labels", `{"team": "ops", "example.org/tier": ""}`) // a string, as the control plane's forms send it
	if got, want := fmt.Sprint(f.secret().Metadata.Labels), "map[app.kubernetes.io/managed-by:certctl example.org/tier: team:ops]"; got != want {
		t.Errorf("labels %s, want %s", got, want)
	}
	if result := f.mustDeploy(m, "labels", map[string]any{"team": "ops"}); !result.Unchanged {
		t.Error("a label that is not configured any more makes a change")
	}
}

func withCA(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	m := f.material()
	f.mustDeploy(m)
	before := f.secret()
	_, err := f.deploy(m, append(unverified(), "ca_crt", true)...)
	if after := f.secret(); err == nil || conformance.Broken(err) || len(after.Data) != 2 || after.Metadata.Annotations["certctl.io/deployed-at"] != before.Metadata.Annotations["certctl.io/deployed-at"] {
		t.Errorf("got %v with %d keys", err, len(after.Data))
	}
	f.mustDeploy(m, "ca_crt", true)
	if got, want := string(f.secret().Data["ca.crt"]), string(conformance.PEM(m.Chain[len(m.Chain)-1])); got != want {
		t.Errorf("ca.crt is %q, want %q", got, want)
	}
	if result := f.mustDeploy(m, "ca_crt", "true"); !result.Unchanged {
		t.Error("written twice")
	}
	m = f.material()
	m.Chain = nil
	_, err = f.deploy(m, "ca_crt", true)
	conformance.WantError(t, err, "ca_crt", "without a chain")
}

// Errors name each missing verb, and leave the target intact.
func permissions(t *testing.T, c *cluster) {
	for _, test := range []struct {
		user   string
		exists bool
		verb   string // missing permission; "": none
	}{
		{"nobody", true, "get"},
		{"writer", true, "get"},
		{"reader", true, "update"},
		{"reader", false, "create"},
		{"creator", true, "update"},
		{"creator", false, ""},
		{"updater", true, ""},
		{"updater", false, "create"},
		{"agent", true, ""},
		{"agent", false, ""},
	} {
		t.Run(fmt.Sprintf("%s, exists %t", test.user, test.exists), func(t *testing.T) {
			f := c.fixture(t, test.user)
			if test.exists {
				f.make(&secret{Type: "kubernetes.io/tls", Data: map[string][]byte{"tls.crt": nil, "tls.key": nil}})
			}
			before := f.secret()
			m := f.material()
			_, err := f.deploy(m)
			if test.verb == "" {
				if err != nil {
					t.Error(err)
				}
				f.holds(m)
				return
			}
			conformance.WantError(t, err, "403 Forbidden", "verb "+test.verb, "www", f.in, `User "`+test.user+`" cannot `+test.verb)
			if conformance.Broken(err) {
				t.Errorf("the target needs attention: %v", err)
			}
			if after := f.secret(); (after == nil) != (before == nil) || after != nil && after.Metadata.ResourceVersion != before.Metadata.ResourceVersion {
				t.Errorf("the secret changed to %+v", after)
			}
		})
	}
	t.Run("first deployment is undone without delete", func(t *testing.T) {
		f := c.fixture(t, "agent")
		_, err := f.deploy(f.material(), unverified()...)
		conformance.WantError(t, err, "this target needs attention", "verb delete")
	})
	t.Run("no such namespace", func(t *testing.T) {
		f := c.fixture(t, apiserver.Admin)
		_, err := f.deploy(f.material(), "namespace", "nowhere")
		conformance.WantError(t, err, "the namespace nowhere does not exist")
		if conformance.Broken(err) {
			t.Errorf("the target needs attention: %v", err)
		}
	})
	t.Run("no such user", func(t *testing.T) {
		f := c.fixture(t, "stranger")
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, "401 Unauthorized", "credentials of "+f.config["kubeconfig_path"].(string))
	})
}

func refusedSecrets(t *testing.T, c *cluster) {
	empty := map[string][]byte{"tls.crt": nil, "tls.key": nil}
	for _, test := range []struct {
		name   string
		secret secret
		says   []string
	}{
		{"of another type", secret{Type: "Opaque", Data: empty}, []string{"Opaque", "kubernetes.io/tls", "secret_name"}},
		{"immutable", secret{Type: "kubernetes.io/tls", Data: empty, Immutable: true}, []string{"immutable", "delete it"}},
	} {
		f := c.fixture(t, "agent")
		f.make(&test.secret)
		before := f.secret()
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, append(test.says, "secret "+f.in+"/www of 127.0.0.1:")...)
		if after := f.secret(); conformance.Broken(err) || after.Metadata.ResourceVersion != before.Metadata.ResourceVersion {
			t.Errorf("%s: %v, changed to %+v", test.name, err, after)
		}
	}
	f := c.fixture(t, "agent")
	m := f.material()
	f.make(&secret{Type: "kubernetes.io/tls", Data: map[string][]byte{"tls.crt": m.FullChain(), "tls.key": m.Key()}, Immutable: true})
	if result := f.mustDeploy(m); !result.Unchanged {
		t.Error("an immutable secret that holds the pair already was changed")
	}

	f = c.fixture(t, "agent")
	s := &secret{Type: "kubernetes.io/tls", Data: empty}
	s.Metadata.Finalizers = []string{"example.org/keep"}
	f.make(s)
	_, err := f.Do(t.Context(), http.MethodDelete, "/api/v1/namespaces/"+f.in+"/secrets/www", nil)
	must(t, err)
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "is being deleted")
	f.patch(map[string]any{"metadata": map[string]any{"finalizers": nil}})
}

// at returns a hook that calls do before the first step of that kind.
func (f *fixture) at(op string, do func()) {
	var once sync.Once
	f.Before = func(s transaction.Step) error {
		if s.Op == op {
			once.Do(do)
		}
		return nil
	}
}

// Concurrent changes by someone else are not overwritten, neither by a deployment nor
// by its undo.
func changedBetween(t *testing.T, c *cluster) {
	theirs := map[string]any{"data": map[string]any{"tls.crt": "dGhlaXJz", "tls.key": "a2V5"}}
	t.Run("replaced", func(t *testing.T) {
		f := c.fixture(t, "agent")
		f.mustDeploy(f.material())
		f.at("change", func() { f.patch(theirs) })
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, "someone else changed")
		if s := f.secret(); conformance.Broken(err) || string(s.Data["tls.crt"]) != "theirs" {
			t.Errorf("got %v, and the secret has %q", err, s.Data["tls.crt"])
		}
		f.Before = nil
		m := f.material()
		f.mustDeploy(m) // the next one replaces it
		f.holds(m)
	})
	t.Run("created", func(t *testing.T) {
		f := c.fixture(t, "agent")
		f.at("change", func() {
			f.make(&secret{Type: "kubernetes.io/tls", Data: map[string][]byte{"tls.crt": []byte("theirs"), "tls.key": nil}})
		})
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, "someone else changed")
		if s := f.secret(); conformance.Broken(err) || string(s.Data["tls.crt"]) != "theirs" {
			t.Errorf("got %v, and the secret has %q", err, s.Data["tls.crt"])
		}
	})
	t.Run("labelled", func(t *testing.T) {
		f := c.fixture(t, "agent")
		f.mustDeploy(f.material())
		f.at("change", func() {
			f.patch(map[string]any{"metadata": map[string]any{"labels": map[string]any{"new": "label"}}})
		})
		m := f.material()
		f.mustDeploy(m)
		f.holds(m)
		if s := f.secret(); s.Metadata.Labels["new"] != "label" {
			t.Errorf("labels %v", s.Metadata.Labels)
		}
	})
}

// Someone else is faster between our GET and our PUT.
func conflicts(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	was := f.material()
	f.mustDeploy(was)
	p := f.front("agent")
	var puts atomic.Int32
	most := int32(2)
	p.onRequest(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut && puts.Add(1) <= most {
			f.patch(map[string]any{"metadata": map[string]any{"labels": map[string]any{"n": fmt.Sprint(puts.Load())}}})
		}
		return false
	})
	m := f.material()
	f.mustDeploy(m)
	f.holds(m)
	if s := f.secret(); puts.Load() != 3 || s.Metadata.Labels["n"] != "2" {
		t.Errorf("%d tries, labels %v", puts.Load(), s.Metadata.Labels)
	}
	puts.Store(0)
	most = 1000
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "409 Conflict", "tried 10 times", "keeps changing it")
	if conformance.Broken(err) || puts.Load() != maxTries {
		t.Errorf("%d tries: %v", puts.Load(), err)
	}
	f.holds(m)
}

func undoes(t *testing.T, c *cluster) {
	f := c.fixture(t, "remover")
	_, err := f.deploy(f.material(), unverified()...)
	conformance.WantError(t, err, "verify", "so the new one was removed")
	if f.secret() != nil || conformance.Broken(err) {
		t.Errorf("a secret that was not there is: %v", err)
	}
	m := f.material()
	f.mustDeploy(m, "labels", map[string]any{"team": "web"})
	before := f.secret()
	_, err = f.deploy(f.material(), append(unverified(), "labels", map[string]any{"team": "ops", "more": "x"})...)
	conformance.WantError(t, err, "verify", "the previous certificate is back in place")
	f.holds(m)
	if after := f.secret(); conformance.Broken(err) || fmt.Sprint(after.Metadata.Labels, after.Metadata.Annotations) != fmt.Sprint(before.Metadata.Labels, before.Metadata.Annotations) {
		t.Errorf("%v: from %+v to %+v", err, before.Metadata, after.Metadata)
	}
}

func undoLeavesNewer(t *testing.T, c *cluster) {
	theirs := map[string]any{"data": map[string]any{"tls.crt": "dGhlaXJz", "tls.key": "a2V5"}}
	for _, first := range []bool{true, false} {
		f := c.fixture(t, "remover")
		if !first {
			f.mustDeploy(f.material())
		}
		f.at("restore", func() { f.patch(theirs) })
		_, err := f.deploy(f.material(), unverified()...)
		conformance.WantError(t, err, "this target needs attention", "someone else has changed it since")
		if s := f.secret(); s == nil || string(s.Data["tls.crt"]) != "theirs" {
			t.Errorf("first %t: theirs is gone", first)
		}
	}
	f := c.fixture(t, "remover")
	f.at("restore", func() { f.patch(map[string]any{"data": map[string]any{"more": "eA=="}}) })
	_, err := f.deploy(f.material(), unverified()...)
	conformance.WantError(t, err, "this target needs attention", `someone else has added "more" since`)
	if f.secret() == nil {
		t.Error("a secret with someone else's data was removed")
	}

	// Between the undo's GET and its request.
	f = c.fixture(t, "remover")
	p := f.front("remover")
	var once sync.Once
	p.onRequest(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodDelete {
			once.Do(func() { f.patch(theirs) })
		}
		return false
	})
	_, err = f.deploy(f.material(), unverified()...)
	conformance.WantError(t, err, "this target needs attention", "someone else has changed it since")
	if f.secret() == nil {
		t.Error("a secret that someone else had just changed was removed")
	}

	// Other parts of the secret may change.
	f = c.fixture(t, "remover")
	m := f.material()
	f.mustDeploy(m)
	f.at("restore", func() { f.patch(map[string]any{"data": map[string]any{"more": "eA=="}}) })
	if _, err := f.deploy(f.material(), unverified()...); err == nil || conformance.Broken(err) {
		t.Errorf("got %v", err)
	}
	f.holds(m)
	if s := f.secret(); string(s.Data["more"]) != "x" {
		t.Errorf("data %v", s.Data)
	}
}

// kill kills the agent after the first step of that kind, and starts it again.
func (f *fixture) kill(op string, m *connector.Material) {
	f.t.Helper()
	seen := false
	f.Before = func(s transaction.Step) error {
		if seen && s.Op != op {
			return context.Canceled
		}
		seen = seen || s.Op == op
		return nil
	}
	_, err := f.deploy(m)
	if f.Before = nil; err == nil || !seen {
		f.t.Fatalf("not killed: %v", err)
	}
	f.Restart(f.t)
}

// Two deployments of different certificates are killed after their change, and
// the third fails: the state before the first is restored.
func undoAfterCrashes(t *testing.T, c *cluster) {
	for _, first := range []bool{true, false} {
		f := c.fixture(t, "remover")
		was := f.material()
		if !first {
			f.mustDeploy(was)
		}
		for range 2 {
			m := f.material()
			f.kill("change", m)
			f.holds(m)
		}
		_, err := f.deploy(f.material(), unverified()...)
		if err == nil || conformance.Broken(err) {
			t.Errorf("first %t: got %v", first, err)
		}
		if s := f.secret(); first && s != nil {
			t.Error("the secret that was not there is")
		} else if !first {
			f.holds(was)
		}
	}
}

// The API server makes the change, but its answer is lost.
func undoOfLostAnswer(t *testing.T, c *cluster) {
	f := c.fixture(t, "remover")
	p := f.front("remover")
	p.onAnswer(func(r *http.Request) {
		if r.Method == http.MethodPost || r.Method == http.MethodPut {
			panic(http.ErrAbortHandler)
		}
	})
	if _, err := f.deploy(f.material()); err == nil || conformance.Broken(err) || f.secret() != nil {
		t.Errorf("created: got %v, the secret is there: %t", err, f.secret() != nil)
	}
	m := f.material()
	p.onAnswer(nil)
	f.mustDeploy(m)
	lost := false
	p.onAnswer(func(r *http.Request) {
		if r.Method == http.MethodPut && !lost {
			lost = true
			panic(http.ErrAbortHandler)
		}
	})
	if _, err := f.deploy(f.material()); err == nil || conformance.Broken(err) || !lost {
		t.Errorf("updated: got %v", err)
	}
	f.holds(m)
}

func credentialForms(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	write := func(t *testing.T, user map[string]any, clusterToo map[string]any) string {
		t.Helper()
		where := map[string]any{"server": c.URL, "certificate-authority-data": c.CA.PEM()}
		maps.Copy(where, clusterToo)
		text, err := json.Marshal(map[string]any{"current-context": "a",
			"contexts": []any{map[string]any{"name": "a", "context": map[string]any{"cluster": "b", "user": "c"}}},
			"clusters": []any{map[string]any{"name": "b", "cluster": where}},
			"users":    []any{map[string]any{"name": "c", "user": user}}})
		must(t, err)
		return f.file(strings.ReplaceAll(t.Name(), "/", "_"), text)
	}
	certificate, key, err := c.ClientCertificate("agent")
	must(t, err)
	plugin := f.file("plugin", fmt.Appendf(nil, "#!/bin/sh\n"+
		`case "$KUBERNETES_EXEC_INFO" in *'"server":"%s"'*) ;; *) echo "no server in $KUBERNETES_EXEC_INFO" >&2; exit 1;; esac`+"\n"+
		`echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"'"$1$OF"'"}}'`, c.URL))
	must(t, os.Chmod(plugin, 0o700))
	execOf := func(args ...string) map[string]any {
		return map[string]any{"exec": map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "command": plugin, "args": args,
			"env": []any{map[string]any{"name": "OF", "value": "agent"}}, "provideClusterInfo": true, "interactiveMode": "Never"}}
	}
	for name, test := range map[string]struct{ user, cluster map[string]any }{
		"token file":         {map[string]any{"tokenFile": filepath.Base(f.file("token", []byte(apiserver.Token("agent")+"\n")))}, nil},
		"client certificate": {map[string]any{"client-certificate-data": certificate, "client-key-data": key}, nil},
		"client certificate in files": {map[string]any{"client-certificate": f.file("client.crt", certificate), "client-key": f.file("client.key", key)},
			map[string]any{"certificate-authority-data": nil, "certificate-authority": f.file("ca.crt", c.CA.PEM())}},
		"exec":            {execOf("token-of-"), nil},
		"server name":     {map[string]any{"token": apiserver.Token("agent")}, map[string]any{"tls-server-name": "kubernetes.default.svc"}},
		"through a proxy": {map[string]any{"token": apiserver.Token("agent")}, map[string]any{"proxy-url": connectProxy(t)}},
	} {
		t.Run(name, func(t *testing.T) {
			m := f.material()
			if _, err := f.deploy(m, "kubeconfig_path", write(t, test.user, test.cluster)); err != nil {
				t.Fatal(err)
			}
			f.holds(m)
		})
	}
	for name, test := range map[string]struct {
		user, cluster map[string]any
		says          []string
	}{
		"another name":             {map[string]any{"token": "x"}, map[string]any{"tls-server-name": "elsewhere"}, []string{"x509", "elsewhere"}},
		"another authority":        {map[string]any{"token": "x"}, map[string]any{"certificate-authority-data": f.cluster.ca.PEM()}, []string{"x509", "unknown authority"}},
		"system's roots":           {map[string]any{"token": "x"}, map[string]any{"certificate-authority-data": nil}, []string{"x509"}},
		"wrong token":              {execOf("wrong-"), nil, []string{"401 Unauthorized"}},
		"an argument with a space": {execOf("a b"), nil, []string{"exec of", "space"}},
		"a missing token file":     {map[string]any{"tokenFile": "none"}, nil, []string{"token of", "no such file"}},
		"insecure":                 {map[string]any{"token": apiserver.Token("agent")}, map[string]any{"certificate-authority-data": nil, "insecure-skip-tls-verify": true}, []string{"insecure-skip-tls-verify", "overlay"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := f.deploy(f.material(), "kubeconfig_path", write(t, test.user, test.cluster))
			conformance.WantError(t, err, test.says...)
			if err != nil && strings.Contains(err.Error(), "token-of") {
				t.Errorf("the error shows a token: %v", err)
			}
		})
	}
	t.Run("insecure in an overlay", func(t *testing.T) {
		path := write(t, map[string]any{"token": apiserver.Token("agent")}, map[string]any{"certificate-authority-data": nil, "insecure-skip-tls-verify": true})
		overlay := filepath.Join(f.Overlays, conformance.TargetID+".json")
		must(t, os.WriteFile(overlay, fmt.Appendf(nil, `{"kubeconfig_path": %q}`, path), 0o600))
		defer os.Remove(overlay)
		m := f.material()
		result := f.mustDeploy(m)
		f.holds(m)
		if !strings.Contains(fmt.Sprint(result.Warnings), "anyone on the network path") && !strings.Contains(f.Log(), "anyone on the network path") {
			t.Errorf("no warning: %q", result.Warnings)
		}
	})
	t.Run("exec that is not allowed", func(t *testing.T) {
		f.Policy.Commands = [][]string{{"/bin/true"}}
		defer func() { f.Policy.Commands = nil }()
		_, err := f.deploy(f.material(), "kubeconfig_path", write(t, execOf("token-of-"), nil))
		conformance.WantError(t, err, "CERTCTL_ALLOWED_COMMANDS", plugin)
		f.Policy.Commands = [][]string{{plugin, "*"}}
		f.mustDeploy(f.material(), "kubeconfig_path", write(t, execOf("token-of-"), nil))
	})
}

// A pod's token is read for each request: it changes between Read and
// Write, and again before the undo.
func tokenRotates(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	pod := t.TempDir()
	rotate := func(user string) {
		must(t, os.WriteFile(filepath.Join(pod, "new"), []byte(apiserver.Token(user)), 0o600))
		must(t, os.Rename(filepath.Join(pod, "new"), filepath.Join(pod, "token")))
	}
	must(t, os.WriteFile(filepath.Join(pod, "ca.crt"), c.CA.PEM(), 0o644))
	f.typ = typeOf(pod, patience)
	delete(f.config, "kubeconfig_path")
	host, port, _ := strings.Cut(strings.TrimPrefix(c.URL, "https://"), ":")
	f.Getenv = func(name string) string {
		return map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}[name]
	}
	rotate("reader")
	f.at("change", func() { rotate("agent") })
	was := f.material()
	f.mustDeploy(was)
	f.holds(was)

	rotate("reader")
	f.at("change", func() { rotate("updater") })
	step := f.Before
	f.Before = func(s transaction.Step) error {
		if s.Op == "restore" {
			rotate("agent")
		}
		return step(s)
	}
	_, err := f.deploy(f.material(), unverified()...)
	if err == nil || conformance.Broken(err) {
		t.Errorf("got %v", err)
	}
	f.holds(was)

	// A token as Kubernetes issues it to a pod.
	f.Before = nil
	_, err = c.Do(t.Context(), http.MethodPost, "/api/v1/namespaces/"+f.in+"/serviceaccounts", map[string]any{"metadata": map[string]any{"name": "certctl"}})
	must(t, err)
	must(t, c.Allow(t.Context(), f.in, "system:serviceaccount:"+f.in+":certctl", []string{"www"}, "get", "update"))
	answer, err := c.Do(t.Context(), http.MethodPost, "/api/v1/namespaces/"+f.in+"/serviceaccounts/certctl/token", map[string]any{"spec": map[string]any{"expirationSeconds": 600}})
	must(t, err)
	var issued struct{ Status struct{ Token string } }
	must(t, json.Unmarshal(answer, &issued))
	must(t, os.WriteFile(filepath.Join(pod, "token"), []byte(issued.Status.Token), 0o600))
	m := f.material()
	f.mustDeploy(m)
	f.holds(m)

	// The cluster's authority changes too.
	must(t, os.WriteFile(filepath.Join(pod, "ca.crt"), f.cluster.ca.PEM(), 0o644))
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "x509")
	must(t, os.WriteFile(filepath.Join(pod, "ca.crt"), append(f.cluster.ca.PEM(), c.CA.PEM()...), 0o644))
	f.mustDeploy(f.material())

	rotate("stranger")
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "401 Unauthorized", "the service account of this pod")
	f.Getenv = nil
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "kubeconfig_path", "KUBERNETES_SERVICE_HOST")
}

// Requests to a busy API server are retried when it says so.
func busy(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	p := f.front("agent")
	var asked atomic.Int32
	var first, second time.Time
	p.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		switch asked.Add(1) {
		case 1:
			first = time.Now()
			w.Header().Set("Retry-After", "2")
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		case 2:
			second = time.Now()
		case 3, 4:
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		return false
	})
	m := f.material()
	f.mustDeploy(m)
	f.holds(m)
	if waited := second.Sub(first); waited < 2*time.Second {
		t.Errorf("it was asked again after %v, and wanted 2 s", waited)
	}

	f.typ = typeOf("", time.Second)
	p.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Retry-After", "9999999999999")
		http.Error(w, "too many", http.StatusTooManyRequests)
		return true
	})
	_, err := f.deploy(f.material())
	conformance.WantError(t, err, "429 Too Many Requests", "given up after")
}

// The agent does not wait for an API server that does not answer.
func hangs(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	p := f.front("agent")
	was := f.material()
	f.mustDeploy(was)
	hung := func(w http.ResponseWriter, r *http.Request) bool {
		select {
		case <-r.Context().Done():
		case <-t.Context().Done():
		}
		return true
	}
	p.onRequest(hung)
	_, err := f.deploy(f.material(), "command_timeout", "1s")
	conformance.WantError(t, err, "no answer within 1s", "get:")
	if conformance.Broken(err) {
		t.Error(err)
	}
	p.onRequest(func(w http.ResponseWriter, r *http.Request) bool { return r.Method == http.MethodPut && hung(w, r) })
	_, err = f.deploy(f.material(), "command_timeout", "10s")
	conformance.WantError(t, err, "no answer within 10s", "update:")
	if conformance.Broken(err) {
		t.Error(err)
	}
	f.holds(was)

	// Reading stops at once when the deployment is cancelled.
	ctx, cancel := context.WithCancel(t.Context())
	p.onRequest(func(w http.ResponseWriter, r *http.Request) bool { cancel(); return hung(w, r) })
	begun := time.Now()
	if _, err := f.Deploy(ctx, f.typ, f.config, f.material()); err == nil || time.Since(begun) > 50*time.Second {
		t.Errorf("cancelled: got %v after %v", err, time.Since(begun))
	}
}

// Answers that are not from the API server are refused.
func notAnAPIServer(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	p := f.front("agent")
	for _, test := range []struct {
		answer func(w http.ResponseWriter)
		says   []string
	}{
		{func(w http.ResponseWriter) { http.Error(w, "<h1>not found</h1>", http.StatusNotFound) }, []string{"404", "not from a Kubernetes API server"}},
		{func(w http.ResponseWriter) { w.Header().Set("Location", "https://evil.example/"); w.WriteHeader(307) }, []string{"307", "https://evil.example/", "not followed"}},
		{func(w http.ResponseWriter) { fmt.Fprint(w, "<html>") }, []string{"not a secret"}},
		{func(w http.ResponseWriter) {
			fmt.Fprint(w, `{"kind":"Secret","metadata":{"name":"other","namespace":"x"}}`)
		}, []string{"a different object"}},
		{func(w http.ResponseWriter) { fmt.Fprint(w, `{"kind":"Secret","metadata":5}`) }, []string{"not a JSON object"}},
		{func(w http.ResponseWriter) { fmt.Fprint(w, strings.Repeat("x", maxAnswer+1)) }, []string{"longer than 4096 KiB"}},
		{func(w http.ResponseWriter) {
			http.Error(w, "\x1b[31m"+strings.Repeat("long ", 9999), http.StatusForbidden)
		}, []string{"403"}},
	} {
		requests := 0
		p.onRequest(func(w http.ResponseWriter, _ *http.Request) bool { requests++; test.answer(w); return true })
		_, err := f.deploy(f.material())
		conformance.WantError(t, err, test.says...)
		if err != nil && (len(err.Error()) > 2048 || strings.Contains(err.Error(), "\x1b") || requests != 1) {
			t.Errorf("after %d requests %d bytes: %.300q", requests, len(err.Error()), err)
		}
	}
}

// kubectl reads secrets written by the agent, and the agent replaces secrets written by kubectl.
func byKubectl(t *testing.T, c *cluster) {
	kubectl := needs.Need(t, "kubectl")
	f := c.fixture(t, "agent")
	config := f.file("admin", c.Kubeconfig(apiserver.Admin))
	run := func(args ...string) string {
		t.Helper()
		command := exec.CommandContext(t.Context(), kubectl, append([]string{"--kubeconfig=" + config, "--namespace=" + f.in}, args...)...)
		command.Env = []string{"HOME=" + f.directory, "PATH=/usr/bin:/bin"}
		out, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	theirs := f.material()
	run("create", "secret", "tls", "www", "--cert="+f.file("tls.crt", theirs.FullChain()), "--key="+f.file("tls.key", theirs.Key()))
	if result := f.mustDeploy(theirs); !result.Unchanged {
		t.Error("what kubectl installed was installed once more")
	}
	m := f.material()
	f.mustDeploy(m)
	if got, want := run("get", "secret", "www", "-o", `go-template={{index .data "tls.crt" | base64decode}}{{index .data "tls.key" | base64decode}}{{.type}}`), string(m.FullChain())+string(m.Key())+"kubernetes.io/tls"; got != want {
		t.Errorf("kubectl reads %q, want %q", got, want)
	}
	run("label", "secret", "www", "team=web")
	m = f.material()
	f.mustDeploy(m)
	if got := run("get", "secrets", "--selector=team=web,app.kubernetes.io/managed-by=certctl", "-o", "name"); got != "secret/www\n" {
		t.Errorf("with both labels kubectl finds %q", got)
	}
}

func conforms(t *testing.T, c *cluster) {
	namespace := c.namespace(t)
	directory := t.TempDir()
	config := filepath.Join(directory, "kubeconfig")
	must(t, os.WriteFile(config, c.Kubeconfig(apiserver.Admin), 0o600))
	var names sync.Map // of the secret, by directory
	var count atomic.Int32
	nameOf := func(dir string) string {
		name, _ := names.LoadOrStore(dir, fmt.Sprint("secret-", count.Add(1)))
		return name.(string)
	}
	conformance.Run(t, conformance.Harness{
		Type: typeOf("", patience), Required: []string{"namespace", "secret_name"},
		Secrets: []string{apiserver.Token(apiserver.Admin)},
		Config: func(dir string) map[string]any {
			return map[string]any{"namespace": namespace, "secret_name": nameOf(dir), "kubeconfig_path": config, "labels": map[string]any{"team": "web"}, "ca_crt": true}
		},
		State: func(dir string) map[string]string {
			s := c.get(t, namespace, nameOf(dir))
			if s == nil {
				return map[string]string{}
			}
			state := map[string]string{
				"type": s.Type, "labels": fmt.Sprint(s.Metadata.Labels),
				"version" + conformance.Written:  s.Metadata.ResourceVersion,
				"deployed" + conformance.Written: s.Metadata.Annotations[deployedAnnotation],
			}
			delete(s.Metadata.Annotations, deployedAnnotation)
			state["annotations"] = fmt.Sprint(s.Metadata.Annotations)
			for key, value := range s.Data {
				state[key] = string(value)
			}
			return state
		},
		Want: func(m *connector.Material) map[string][]byte {
			return map[string][]byte{
				"type": []byte("kubernetes.io/tls"), "labels": []byte("map[app.kubernetes.io/managed-by:certctl team:web]"),
				"annotations": fmt.Appendf(nil, "map[certctl.io/certificate-id:cert-1 certctl.io/fingerprint:%s certctl.io/target-id:%s]", pemutil.Fingerprint(m.Leaf), conformance.TargetID),
				"tls.crt":     m.FullChain(), "tls.key": m.Key(), "ca.crt": conformance.PEM(m.Chain[len(m.Chain)-1]),
			}
		},
	})
}

// The API server is down when the deployment starts, and comes back.
func restarts(t *testing.T, c *cluster) {
	f := c.fixture(t, "agent")
	f.mustDeploy(f.material())
	m := f.material()
	c.StopAPI()
	f.typ = typeOf("", time.Millisecond)
	_, err := f.deploy(m)
	conformance.WantError(t, err, "connection refused")
	f.typ = typeOf("", patience)
	deployed := make(chan error, 1)
	go func() {
		_, err := f.Deploy(t.Context(), f.typ, f.config, m)
		deployed <- err
	}()
	must(t, c.StartAPI(t.Context()))
	if err := <-deployed; err != nil {
		t.Errorf("deployed while it restarted: %v", err)
	}
	f.holds(m)
}
