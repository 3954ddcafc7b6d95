package caddy

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

// start starts Caddy with this host's admin listener and certificates, but
// without files of the user who runs the test.
func start(t *testing.T, listen string, certificates map[string]any) *conformance.Live {
	program := needs.Need(t, "caddy")
	host := conformance.NewHost(t, conformance.RunCommand)
	listen = strings.ReplaceAll(listen, "DIR", host.Dir)
	endpoint := fmt.Sprintf("127.0.0.1:%d", needs.FreePort(t))
	l := &conformance.Live{
		Host: host, Type: Type(), CA: testca.Must(t),
		Endpoint: tlsprobe.Endpoint{Address: endpoint, ServerName: "localhost"},
		Watched:  filepath.Join(host.Dir, "tls"),
		Config:   conformance.Verified(endpoint),
	}
	m := l.NewMaterial(t)
	conf := filepath.Join(host.Dir, "caddy.json")
	data, err := json.Marshal(map[string]any{
		"admin": map[string]any{"listen": listen},
		"apps": map[string]any{
			"http": map[string]any{"servers": map[string]any{"test": map[string]any{
				"listen": []string{endpoint}, "tls_connection_policies": []any{map[string]any{}},
				"automatic_https": map[string]any{"disable": true},
			}}},
			"tls": map[string]any{"certificates": certificates},
		},
	})
	must(t, err)
	data = []byte(strings.ReplaceAll(string(data), "DIR", host.Dir))
	must(t, os.WriteFile(conf, data, 0o644))
	must(t, os.Mkdir(l.Watched, 0o755))
	must(t, os.WriteFile(filepath.Join(l.Watched, "cert.pem"), fullChain(m), 0o644))
	must(t, os.WriteFile(filepath.Join(l.Watched, "key.pem"), m.KeyPEM, 0o600))
	conformance.Serve(t, endpoint, "/usr/bin/env", "HOME="+host.Dir, "XDG_CONFIG_HOME="+host.Dir, "XDG_DATA_HOME="+host.Dir,
		program, "run", "--config", conf)
	l.Config["admin_api"] = "http://" + listen
	if strings.HasPrefix(listen, "unix/") {
		l.Config["admin_api"] = listen
	}
	return l
}

func loopback(t *testing.T) string {
	return net.JoinHostPort("127.0.0.1", fmt.Sprint(needs.FreePort(t)))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tags returns the tags of Caddy's pairs, in order.
func tags(t *testing.T, l *conformance.Live) string {
	t.Helper()
	a, err := newAdmin(l.Config["admin_api"].(string), time.Minute, false)
	must(t, err)
	reply, err := a.call(t.Context(), http.MethodGet, loadPEM, nil)
	must(t, err)
	var pairs []loadedPair
	must(t, json.Unmarshal(reply.body, &pairs))
	var all []string
	for _, pair := range pairs {
		all = append(all, strings.Join(pair.Tags, "+"))
	}
	return strings.Join(all, " ")
}

func startAPI(t *testing.T) *conformance.Live { return start(t, loopback(t), nil) }

// startFile starts Caddy with an existing pair, since it does not start
// without.
func startFile(t *testing.T) *conformance.Live {
	l := start(t, loopback(t), map[string]any{"load_files": []any{
		map[string]any{"certificate": "DIR/tls/cert.pem", "key": "DIR/tls/key.pem"},
	}})
	maps.Copy(l.Config, map[string]any{"mode": "file", "cert_dir": l.Watched})
	return l
}

func TestLiveAPI(t *testing.T) {
	l := startAPI(t)

	t.Run("first deployment is undone", func(t *testing.T) {
		m := l.NewMaterial(t)
		m.KeyPEM = l.NewMaterial(t).KeyPEM
		_, err := l.Deploy(t.Context(), m)
		if err == nil || !strings.Contains(err.Error(), "private key does not match public key") {
			t.Errorf("got %v, want Caddy's words", err)
		}
	})
	t.Run("first deployment", func(t *testing.T) {
		m := l.NewMaterial(t)
		l.MustDeploy(t, m)
		if result, err := l.Deploy(t.Context(), m); err != nil || !result.Unchanged {
			t.Errorf("deployed again: %+v, %v, want no change", result, err)
		}
	})
	t.Run("renewal beside others", func(t *testing.T) {
		a, err := newAdmin(l.Config["admin_api"].(string), time.Minute, false)
		must(t, err)
		issued, err := l.CA.Issue(testca.Template{Names: []string{"other.example.org"}})
		must(t, err)
		data, err := json.Marshal(loadedPair{string(issued.PEM()), string(issued.KeyPEM()), []string{"theirs"}})
		must(t, err)
		_, err = a.call(t.Context(), http.MethodPut, loadPEM+"/0", data)
		must(t, err)
		l.MustDeploy(t, l.NewMaterial(t))
		if got, want := tags(t, l), "theirs "+ourTag; got != want {
			t.Errorf("Caddy holds %q, want %q", got, want)
		}
		conformance.Serves(t, tlsprobe.Endpoint{Address: l.Endpoint.Address, ServerName: "other.example.org"}, pemutil.Fingerprint(issued.Leaf))
	})
	t.Run("wrong key", func(t *testing.T) {
		m := l.NewMaterial(t)
		m.KeyPEM = l.NewMaterial(t).KeyPEM
		l.Refuses(t, m, "private key does not match public key")
	})
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("undone after a crash", func(t *testing.T) {
		was := l.NewMaterial(t)
		l.MustDeploy(t, was)
		m := l.NewMaterial(t)
		killed(t, l.Host, func() error { _, err := l.Deploy(t.Context(), m); return err })
		conformance.Serves(t, l.Endpoint, pemutil.Fingerprint(m.Leaf))
		elsewhere := needs.FreePort(t)
		if _, err := l.Deploy(t.Context(), m, "post_deploy_verify", map[string]any{"enabled": true, "endpoint": fmt.Sprint("127.0.0.1:", elsewhere)}, "post_deploy_verify_attempts", 1); err == nil {
			t.Error("a failed verification passes")
		}
		conformance.Serves(t, l.Endpoint, pemutil.Fingerprint(was.Leaf))
	})
	t.Run("no admin API there", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "connection refused", "admin_api", "http://127.0.0.1:1")
	})
}

func TestLiveUnixSocket(t *testing.T) {
	l := start(t, "unix/DIR/admin.sock", nil)
	for range 3 {
		l.MustDeploy(t, l.NewMaterial(t))
	}
	l.VerificationFails(t)
	if got := tags(t, l); got != ourTag {
		t.Errorf("Caddy holds %q, want %q alone", got, ourTag)
	}
}

func TestLiveFile(t *testing.T) {
	l := startFile(t)
	byCommand := "caddy reload --force --config " + filepath.Join(l.Dir, "caddy.json") +
		" --address " + strings.TrimPrefix(l.Config["admin_api"].(string), "http://")

	t.Run("reload by the admin API", func(t *testing.T) { l.MustDeploy(t, l.NewMaterial(t)) })
	t.Run("reload by command", func(t *testing.T) { l.MustDeploy(t, l.NewMaterial(t), "reload_command", byCommand) })
	t.Run("reload fails", func(t *testing.T) {
		l.Config["reload_command"] = byCommand
		defer delete(l.Config, "reload_command")
		l.ReloadFails(t)
	})
	t.Run("wrong key", func(t *testing.T) {
		m := l.NewMaterial(t)
		m.KeyPEM = l.NewMaterial(t).KeyPEM
		l.Refuses(t, m, "private key does not match public key")
	})
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("mode and owner kept", func(t *testing.T) { l.KeepsMode(t, filepath.Join(l.Watched, "key.pem")) })
}
