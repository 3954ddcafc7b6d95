package conformance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
	"certctl-agent/internal/transaction"
)

// Live is a real server with a Host that deploys to it.
type Live struct {
	*Host
	Type     connector.Type
	CA       *testca.CA
	Endpoint tlsprobe.Endpoint
	Others   []tlsprobe.Endpoint // other endpoints with the same certificate
	Settle   time.Duration       // time between two reloads that the server needs to notice both
	Config   map[string]any      // complete, including Verified
	Watched  string              // the directory of the destinations
}

// Start starts a real server and then removes its certificate files, as if nothing had been
// deployed yet.
func Start(t *testing.T, start liveserver.Starter, typ connector.Type) *Live {
	t.Helper()
	l := &Live{Host: NewHost(t, RunCommand), Type: typ, CA: testca.Must(t)}
	first := l.NewMaterial(t)
	server, err := start(t.Context(), l.Dir, liveserver.Pair{
		Certificate: append(PEM(first.Leaf), PEM(first.Chain...)...), Key: first.KeyPEM,
	})
	if errors.Is(err, liveserver.ErrMissing) {
		needs.Missing(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Stop()
		if t.Failed() {
			t.Logf("output of %s:\n%s", server.Name, server.Log())
		}
	})
	l.Config, l.Watched = server.Config, filepath.Dir(server.CertPath)
	l.Endpoint, l.Others = server.Endpoint, server.Others
	l.Endpoint.ServerName = "localhost"
	maps.Copy(l.Config, Verified(l.Endpoint.Address))
	l.Config["post_deploy_verify"].(map[string]any)["starttls"] = l.Endpoint.StartTLS
	for name := range l.files(t) {
		if err := os.Remove(filepath.Join(l.Watched, name)); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// Deploy deploys m with changes to Config, given as alternate keys and values.
func (l *Live) Deploy(ctx context.Context, m *connector.Material, changes ...any) (transaction.Result, error) {
	config := maps.Clone(l.Config)
	for i := 0; i < len(changes); i += 2 {
		config[changes[i].(string)] = changes[i+1]
	}
	return l.Host.Deploy(ctx, l.Type, config, m)
}

// NewMaterial returns a new certificate of l's CA.
func (l *Live) NewMaterial(t testing.TB) *connector.Material {
	t.Helper()
	return l.Material(t, l.CA)
}

// MustDeploy deploys m and waits until the server serves it.
func (l *Live) MustDeploy(t testing.TB, m *connector.Material, changes ...any) {
	t.Helper()
	time.Sleep(l.Settle)
	if _, err := l.Deploy(t.Context(), m, changes...); err != nil {
		t.Fatal(err)
	}
	Serves(t, l.Endpoint, pemutil.Fingerprint(m.Leaf))
}

// Refuses fails the test unless the deployment of m fails with an error that contains says and
// changes nothing.
func (l *Live) Refuses(t testing.TB, m *connector.Material, says string, changes ...any) {
	t.Helper()
	before := l.files(t)
	served, err := tlsprobe.Probe(t.Context(), l.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	_, err = l.Deploy(t.Context(), m, changes...)
	if err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("got %v, want an error with %q", err, says)
	}
	if broken, ok := errors.AsType[*transaction.BrokenError](err); ok {
		t.Errorf("the rollback failed: %v", broken)
	}
	if after := l.files(t); !maps.Equal(before, after) {
		t.Errorf("the files changed: from %v to %v", before, after)
	}
	Serves(t, l.Endpoint, served.Fingerprint)
}

// files returns the types and contents of the files in Watched.
func (l *Live) files(t testing.TB) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(l.Watched)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(l.Watched, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[entry.Name()] = entry.Type().String() + string(data)
	}
	return files
}

// KeyPathFromOverlay deploys with a masked key_path that an overlay supplies.
func (l *Live) KeyPathFromOverlay(t *testing.T, key string) {
	overlay := filepath.Join(l.Overlays, TargetID+".json")
	if err := os.WriteFile(overlay, fmt.Appendf(nil, `{"key_path": %q}`, key), 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(overlay)
	l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
}

// NoKeyPath deploys with a masked key_path and a certificate file that the server does not use.
func (l *Live) NoKeyPath(t *testing.T) {
	other := filepath.Join(l.Watched, "other.pem")
	l.Refuses(t, l.NewMaterial(t), "names no key for "+other, "key_path", "********", "cert_path", other)
}

// ReloadFails deploys with a reload that fails once and then succeeds with the old files.
func (l *Live) ReloadFails(t *testing.T) {
	script, marker := filepath.Join(l.Dir, "reload"), filepath.Join(l.Dir, "fail")
	text := fmt.Sprintf("#!/bin/sh\nrm %s 2>/dev/null && { echo no reload today; exit 3; }\nexec %s\n", marker, l.Config["reload_command"])
	if err := errors.Join(os.WriteFile(script, []byte(text), 0o755), os.WriteFile(marker, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	l.Refuses(t, l.NewMaterial(t), "no reload today", "reload_command", script)
}

// VerificationFails verifies on a port where nothing listens.
func (l *Live) VerificationFails(t *testing.T) {
	l.Refuses(t, l.NewMaterial(t), "verify",
		"post_deploy_verify", map[string]any{"enabled": true, "endpoint": "127.0.0.1:1"}, "post_deploy_verify_attempts", 1)
}

// WrongKey deploys a key that does not match the certificate. The server's validate_command must
// notice.
func (l *Live) WrongKey(t *testing.T) {
	m := l.NewMaterial(t)
	m.KeyPEM = l.NewMaterial(t).KeyPEM
	l.Refuses(t, m, "validate")
}

// KeepsMode changes the mode and owner of path, which a renewal must keep.
func (l *Live) KeepsMode(t *testing.T, path string) {
	if err := os.Chmod(path, 0o440); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		t.Log("not root: the owner is not tested")
	} else if err := os.Chown(path, 0, 4202); err != nil {
		t.Fatal(err)
	}
	was, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	l.MustDeploy(t, l.NewMaterial(t))
	is, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if is.Mode() != was.Mode() || owner(is) != owner(was) {
		t.Errorf("got %v of %s, was %v of %s", is.Mode(), owner(is), was.Mode(), owner(was))
	}
}

// KeepsSymlink replaces path by a symlink, which a renewal must follow.
func (l *Live) KeepsSymlink(t *testing.T, path string) {
	real := filepath.Join(l.Dir, "archive")
	link := filepath.Join("..", "archive", filepath.Base(path))
	err := errors.Join(os.Mkdir(real, 0o755), os.Rename(path, filepath.Join(real, filepath.Base(path))), os.Symlink(link, path))
	if err != nil {
		t.Fatal(err)
	}
	l.MustDeploy(t, l.NewMaterial(t))
	if got, err := os.Readlink(path); err != nil || got != link {
		t.Errorf("the link is %q, %v, want %q", got, err, link)
	}
}

// Rotate rotates certificates under load. Drain is how long old workers usually answer after a
// verification.
func (l *Live) Rotate(t *testing.T, drain time.Duration) {
	Rotate(t, Rotation{
		Endpoint: l.Endpoint,
		Others:   l.Others,
		Material: func() *connector.Material { return l.NewMaterial(t) },
		Deploy: func(ctx context.Context, m *connector.Material) error {
			_, err := l.Deploy(ctx, m)
			return err
		},
		Drain: drain,
	})
}
