package deploy

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/nginx"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// crashDir makes this binary the child of TestKilled.
var crashDir = flag.String("crash-dir", "", "internal to TestKilled")

// host is a directory with everything that an agent has on disk: keys, state, and a server's
// certificate and key. Its commands are fakes.
type host struct {
	t     *testing.T
	dir   string
	keys  *keystore.Store
	files *transaction.Engine
	run   func(ctx context.Context, c policy.Command) error
	d     *Deployer
}

func openHost(t *testing.T, dir string) *host {
	t.Helper()
	h := &host{t: t, dir: dir, run: func(context.Context, policy.Command) error { return nil }}
	log := slog.New(slog.DiscardHandler)
	for _, name := range []string{"state", "www"} {
		if err := os.MkdirAll(h.path(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	state, err := os.OpenRoot(h.path("state"))
	if err != nil {
		t.Fatal(err)
	}
	if h.keys, err = keystore.Open(keystore.Owner{}, h.path("keys"), log); err != nil {
		t.Fatal(err)
	}
	rules := &policy.Policy{Protected: []string{h.path("state"), h.path("keys")}}
	h.files, err = transaction.Open(transaction.Options{State: state, StatePath: h.path("state"), Policy: rules, Log: log,
		Run: func(ctx context.Context, c policy.Command) error { return h.run(ctx, c) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.files.Close(); h.keys.Close(); state.Close() })
	if _, err := h.files.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.d = New(Options{Plane: h, Keys: h.keys, Engine: h.files, Types: []connector.Type{nginx.Type()}, Host: connector.Host{Policy: rules, Log: log}})
	return h
}

func (h *host) path(elements ...string) string {
	return filepath.Join(append([]string{h.dir}, elements...)...)
}

// Certificate implements Plane.
func (h *host) Certificate(context.Context, api.ID) ([]byte, error) {
	return os.ReadFile(h.path("latest.pem"))
}

// ReportStatus implements Plane.
func (h *host) ReportStatus(context.Context, api.ID, api.JobStatus) error { return nil }

// renew issues a new certificate.
func (h *host) renew(ca *testca.CA, jobID api.ID) *x509.Certificate {
	h.t.Helper()
	key, err := h.keys.Pending("cert-1", jobID, newKey)
	if err != nil {
		h.t.Fatal(err)
	}
	issued, err := ca.Issue(testca.Template{PublicKey: key.Signer.Public()})
	if err == nil {
		err = os.WriteFile(h.path("latest.pem"), issued.PEM(), 0o600)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return issued.Leaf
}

// deploy deploys the latest certificate. With ownKey, the server reads the key from the key
// directory.
func (h *host) deploy(ownKey bool) Outcome {
	h.t.Helper()
	config, err := json.Marshal(map[string]any{"cert_path": h.path("www", "cert.pem"), "key_path": h.keyPath(ownKey),
		"validate_command": "validate", "reload_command": "reload"})
	if err != nil {
		h.t.Fatal(err)
	}
	outcome, err := h.d.Deploy(h.t.Context(), h.t.Context(), job(string(config)), Holds{})
	if err != nil {
		h.t.Fatal(err)
	}
	return outcome
}

func (h *host) keyPath(ownKey bool) string {
	if ownKey {
		return h.keys.Path("cert-1")
	}
	return h.path("www", "key.pem")
}

// served loads the pair as a server would, and checks the key directory too.
func (h *host) served(ownKey bool) *x509.Certificate {
	h.t.Helper()
	pair, err := tls.LoadX509KeyPair(h.path("www", "cert.pem"), h.keyPath(ownKey))
	if err != nil {
		h.t.Fatalf("the server cannot load its pair: %v", err)
	}
	if key, err := h.keys.Find("cert-1", pair.Leaf.PublicKey); err != nil || key.Role != keystore.Current {
		h.t.Errorf("the served key is %q in the key directory (%v), want current", key.Role, err)
	}
	return pair.Leaf
}

func TestTransaction(t *testing.T) {
	for _, ownKey := range []bool{false, true} {
		t.Run(fmt.Sprintf("own key %v", ownKey), func(t *testing.T) {
			ca := testca.Must(t)
			h := openHost(t, t.TempDir())
			first := h.renew(ca, "csr-1")
			if got := h.deploy(ownKey); got.Status != api.StatusCompleted || got.Unchanged {
				t.Fatalf("first deployment: %+v", got)
			}
			if !h.served(ownKey).Equal(first) {
				t.Error("another certificate is served")
			}
			h.run = func(context.Context, policy.Command) error { return errors.New("a command ran") }
			if got := h.deploy(ownKey); got.Status != api.StatusCompleted || !got.Unchanged {
				t.Errorf("the same once more: %+v", got)
			}

			second := h.renew(ca, "csr-2")
			reloads := 0
			h.run = func(_ context.Context, c policy.Command) error {
				if c.Argv[0] == "reload" {
					if reloads++; reloads == 1 {
						return errors.New("exit status 1")
					}
				}
				return nil
			}
			got := h.deploy(ownKey)
			if got.Status != api.StatusFailed || got.Broken || !strings.Contains(got.Error, "exit status 1") {
				t.Errorf("a reload that fails: %+v", got)
			}
			if reloads != 2 || !h.served(ownKey).Equal(first) {
				t.Errorf("after the rollback and %d reloads another certificate is served", reloads)
			}
			if got := h.deploy(ownKey); got.Status != api.StatusCompleted {
				t.Errorf("after that: %+v", got)
			}
			if !h.served(ownKey).Equal(second) {
				t.Error("another certificate is served")
			}
			if key, err := h.keys.Find("cert-1", first.PublicKey); err != nil || key.Role != keystore.Previous {
				t.Errorf("the replaced key is %q (%v), want previous", key.Role, err)
			}
		})
	}
}

// TestKilled kills the agent during deployments. After recovery the server has a matching pair, and
// the key directory agrees.
func TestKilled(t *testing.T) {
	if *crashDir != "" {
		h := openHost(t, *crashDir)
		h.run = func(_ context.Context, c policy.Command) error {
			fmt.Println(c.Argv[0])
			time.Sleep(rand.N(5 * time.Millisecond))
			return nil
		}
		fmt.Println("begin")
		h.deploy(false)
		fmt.Println("end")
		select {}
	}
	dir := t.TempDir()
	ca := testca.Must(t)
	h := openHost(t, dir)
	before := h.renew(ca, "csr-0")
	if got := h.deploy(false); got.Status != api.StatusCompleted {
		t.Fatalf("first deployment: %+v", got)
	}
	for round, at := range []string{"begin", "begin", "validate", "reload", "end"} {
		after := h.renew(ca, api.ID(fmt.Sprint("csr-", round+1)))
		if err := h.keys.Close(); err != nil { // the child locks them
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$", "-crash-dir="+dir)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if lines.Text() == at {
				time.Sleep(rand.N(12 * time.Millisecond))
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		cmd.Wait()

		h = openHost(t, dir)
		served := h.served(false)
		if !served.Equal(before) && !served.Equal(after) {
			t.Errorf("killed at %s: an unknown certificate is served", at)
		}
		if got := h.deploy(false); got.Status != api.StatusCompleted {
			t.Errorf("killed at %s, then: %+v", at, got)
		}
		if before = h.served(false); !before.Equal(after) {
			t.Errorf("killed at %s: the new certificate is not served after a second try", at)
		}
		entries, err := os.ReadDir(h.path("keys"))
		if err != nil || len(entries) != 5 {
			t.Errorf("killed at %s: files in the key directory: %v, %v, want the lock, current, previous and a copy of each", at, entries, err)
		}
	}
}
