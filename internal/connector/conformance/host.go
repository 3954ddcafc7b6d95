// Package conformance has the test suite for all connectors, and a harness that rotates the
// certificates of a live server while clients connect.
package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// TargetID is the id of every target that a Host deploys to.
const TargetID = "target-1"

// Host is the part of the agent that a connector needs, in temporary directories. Run makes its own;
// a connector's other tests use one for what the suite cannot know about the product.
type Host struct {
	connector.Host // given to connectors; Log returns what it logs

	Dir      string // for the destinations
	KeyDir   string // the agent's key store
	Overlays string // directory of overlays; initially empty

	// Before is called before each step of the engine, which fails with its error. It may be nil.
	Before func(transaction.Step) error

	state  *os.Root
	run    func(ctx context.Context, c policy.Command) error
	engine *transaction.Engine
	log    *output
}

// NewHost returns a Host that runs commands with run.
func NewHost(t testing.TB, run func(ctx context.Context, c policy.Command) error) *Host {
	t.Helper()
	return newHost(t, t.TempDir(), run)
}

// NewMemoryHost is NewHost in a memory file system, for tests with many deployments. Such a
// directory is in /dev, which the policy would refuse.
func NewMemoryHost(t testing.TB, run func(ctx context.Context, c policy.Command) error) *Host {
	t.Helper()
	h := newHost(t, needs.MemoryDir(t), run)
	h.Policy.Paths = []string{h.Dir}
	return h
}

func newHost(t testing.TB, base string, run func(ctx context.Context, c policy.Command) error) *Host {
	t.Helper()
	base, err := filepath.EvalSymlinks(base)
	if err != nil {
		t.Fatal(err)
	}
	h := &Host{log: new(output), run: run}
	for path, name := range map[*string]string{&h.Dir: "target", &h.KeyDir: "keys", &h.StateDir: "state", &h.Overlays: "overlays"} {
		*path = filepath.Join(base, name)
		mode := os.FileMode(0o700)
		if path == &h.Dir {
			mode = 0o755 // servers that drop root read here
		}
		if err := os.Mkdir(*path, mode); err != nil {
			t.Fatal(err)
		}
	}
	// Those servers must also be able to enter the parents. A sticky directory is shared, like
	// /tmp, and stays as it is.
	for _, dir := range []string{base, filepath.Dir(base)} {
		if info, err := os.Stat(dir); err == nil && info.Mode()&os.ModeSticky == 0 {
			_ = os.Chmod(dir, 0o755)
		}
	}
	h.Host.Log, h.Query = h.Logger(), QueryCommand
	h.Policy = &policy.Policy{Protected: []string{h.KeyDir, h.StateDir, h.Overlays}}
	if h.state, err = os.OpenRoot(h.StateDir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.state.Close() })
	h.Restart(t)
	t.Cleanup(func() { h.engine.Close() })
	return h
}

// Restart opens the engine as the agent does when it starts, and recovers interrupted transactions.
func (h *Host) Restart(t testing.TB) {
	t.Helper()
	if h.engine != nil {
		h.engine.Close()
	}
	var err error
	h.engine, err = transaction.Open(transaction.Options{
		State: h.state, StatePath: h.StateDir, Policy: h.Policy, Run: h.run, Log: h.Logger(),
		Before: func(s transaction.Step) error {
			if h.Before == nil {
				return nil
			}
			return h.Before(s)
		},
	})
	if err == nil {
		_, err = h.engine.Recover(t.Context())
	}
	if err == nil {
		err = h.engine.Repair(t.Context(), t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Logger returns a logger whose output Log returns. It logs at all levels.
func (h *Host) Logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Log returns everything logged so far.
func (h *Host) Log() string { return h.log.String() }

// Connector makes a connector as a deployment does.
func (h *Host) Connector(typ connector.Type, config map[string]any) (connector.Connector, error) {
	_, c, err := h.connector(typ, config)
	return c, err
}

func (h *Host) connector(typ connector.Type, config map[string]any) (*targetconf.Config, connector.Connector, error) {
	job, err := json.Marshal(config)
	if err != nil {
		return nil, nil, err
	}
	merged, err := targetconf.Merge(job, typ.Name, typ.Aliases, TargetID, targetconf.Overlays{Dir: h.Overlays})
	if err != nil {
		return nil, nil, err
	}
	c, err := typ.New(merged, h.Host)
	return merged, c, err
}

// Deploy makes a connector and deploys m with it. The engine makes the promoted changes to the key
// store in the same transaction.
func (h *Host) Deploy(ctx context.Context, typ connector.Type, config map[string]any, m *connector.Material, promoted ...keystore.Change) (transaction.Result, error) {
	merged, c, err := h.connector(typ, config)
	if err != nil {
		return transaction.Result{}, err
	}
	defer connector.Close(c, h.Logger())
	return h.engine.Deploy(ctx, transaction.Deployment{
		Target: TargetID, Connector: c, Material: m, Promotion: promoted, Verify: merged.Common.Verifier(m.Leaf), ReplaceAny: merged.Common.ReplaceAny,
	})
}

// Promotion returns the change that makes m's key the current one.
func Promotion(m *connector.Material) keystore.Change {
	return keystore.Change{Path: m.KeyPath, Data: m.KeyPEM}
}

// Material returns a new certificate for localhost and 127.0.0.1, with an intermediate.
func (h *Host) Material(t testing.TB, ca *testca.CA) *connector.Material {
	t.Helper()
	issued, err := ca.Issue(testca.Template{Names: []string{"localhost", "127.0.0.1"}, Intermediates: 1, OmitRoot: true})
	if err != nil {
		t.Fatal(err)
	}
	return &connector.Material{
		CertificateID: "cert-1",
		Leaf:          issued.Leaf,
		Chain:         issued.Chain[1:],
		KeyPEM:        issued.KeyPEM(),
		KeyPath:       filepath.Join(h.KeyDir, "cert-1.key"),
	}
}

// Dir returns the Dir of the Host that made m, for files that name other files.
func Dir(m *connector.Material) string {
	return filepath.Join(filepath.Dir(filepath.Dir(m.KeyPath)), "target")
}

// output is a log for concurrent writers and readers.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
