package haproxy

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLive(t *testing.T) {
	l := conformance.Start(t, liveserver.StartHAProxy, Type())
	pem := l.Config["pem_path"].(string)

	t.Run("first deployment", func(t *testing.T) { l.MustDeploy(t, l.NewMaterial(t)) })
	t.Run("by the other name", func(t *testing.T) {
		l.MustDeploy(t, l.NewMaterial(t), "combined_pem_path", pem, "pem_path", "")
	})
	t.Run("validation fails", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "validate", "validate_command", l.Config["validate_command"].(string)+".missing")
	})
	t.Run("wrong key", func(t *testing.T) { l.WrongKey(t) })
	t.Run("reload fails", func(t *testing.T) { l.ReloadFails(t) })
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("mode and owner kept", func(t *testing.T) { l.KeepsMode(t, pem) })
	t.Run("started in the middle of a transaction", func(t *testing.T) {
		// A half-written temporary file like those of a transaction.
		temporary := filepath.Join(l.Watched, ".site.pem.1a2b3c.tmp")
		must(t, os.WriteFile(temporary, []byte("-----BEGIN CERTIFICATE-----\n"), 0o600))
		defer os.Remove(temporary)
		l.MustDeploy(t, l.NewMaterial(t))
	})
	t.Run("rotation under load", func(t *testing.T) {
		stop := make(chan struct{})
		var watching sync.WaitGroup
		watching.Go(func() { onlyHidden(t, l.Watched, "site.pem", stop) })
		defer watching.Wait()
		defer close(stop)
		l.Rotate(t, 3*time.Second)
	})
	t.Run("symlinked destination", func(t *testing.T) { l.KeepsSymlink(t, pem) })
}

// onRSA returns material with an RSA key.
func onRSA(t *testing.T, host *conformance.Host, ca *testca.CA) *connector.Material {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	issued, err := ca.Issue(testca.Template{Key: key})
	must(t, err)
	m := host.Material(t, ca)
	m.Leaf, m.Chain, m.KeyPEM = issued.Leaf, nil, issued.KeyPEM()
	return m
}

// HAProxy still uses the parameters after the key after a renewal.
func TestLiveParameters(t *testing.T) {
	openssl := needs.Need(t, "openssl")
	l := conformance.Start(t, liveserver.StartHAProxy, Type())
	parameters, err := exec.Command(openssl, "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:ffdhe3072").Output()
	must(t, err)
	must(t, os.WriteFile(l.Config["pem_path"].(string), parameters, 0o600))
	l.MustDeploy(t, onRSA(t, l.Host, l.CA))
	client := exec.Command(openssl, "s_client", "-connect", l.Endpoint.Address, "-tls1_2", "-cipher", "DHE-RSA-AES256-GCM-SHA384")
	said, err := client.CombinedOutput()
	if err != nil || !strings.Contains(string(said), "Temp Key: DH, 3072 bits") {
		t.Errorf("a client does not meet the parameters (%v):\n%s", err, said)
	}
}

// A listener with two certificates that expects the PROXY protocol: each
// renewal is verified, whichever certificate HAProxy prefers.
func TestLiveTwoKeysBehindProxy(t *testing.T) {
	l := conformance.Start(t, liveserver.StartHAProxy, Type())
	conf := filepath.Join(l.Dir, "haproxy.cfg")
	text, err := os.ReadFile(conf)
	must(t, err)
	must(t, os.WriteFile(conf, bytes.Replace(text, []byte(" ssl crt "), []byte(" accept-proxy ssl crt "), 1), 0o644))
	l.Config["post_deploy_verify"].(map[string]any)["proxy_protocol"] = true
	for range 2 {
		for name, m := range map[string]*connector.Material{"site.rsa": onRSA(t, l.Host, l.CA), "site.ecdsa": l.NewMaterial(t)} {
			if _, err := l.Deploy(t.Context(), m, "pem_path", filepath.Join(l.Watched, name)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// onlyHidden fails the test if dir ever has another file that HAProxy would
// load.
func onlyHidden(t *testing.T, dir, name string, stop <-chan struct{}) {
	looks := 0
	for {
		select {
		case <-stop:
			t.Logf("looked %d times into the directory", looks)
			return
		case <-time.After(200 * time.Microsecond):
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Error(err)
			return
		}
		looks++
		for _, entry := range entries {
			if entry.Name() != name && !strings.HasPrefix(entry.Name(), ".") {
				t.Errorf("%s is in the directory: HAProxy would load it", entry.Name())
				return
			}
		}
	}
}
