// Package conformance is the suite that every connector passes, and the
// harness that rotates certificates on a live server while clients connect.
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
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// New is the constructor of a connector, as internal/connector/all knows it.
type New func(connector.Params, *transaction.Store) (connector.Connector, error)

// Constructor makes a New of a connector's own.
func Constructor[C connector.Connector](build func(connector.Params, *transaction.Store) (C, error)) New {
	return func(p connector.Params, files *transaction.Store) (connector.Connector, error) {
		c, err := build(p, files)
		if err != nil {
			return nil, err
		}
		return c, nil
	}
}

// TargetID is the id of the target that a Host deploys to.
const TargetID = "target-1"

// Host is what a connector needs of the agent, in temporary directories.
type Host struct {
	Dir      string // for the destinations
	KeyDir   string // the agent's key store
	StateDir string
	Overlays string // directory of overlays; empty at first
	Policy   *policy.Policy
	Files    *transaction.Store
	Query    func(ctx context.Context, c policy.Command) (stdout []byte, err error)

	log *output
}

// NewHost makes a Host whose commands are run by run.
func NewHost(t testing.TB, run func(ctx context.Context, c policy.Command) error) *Host {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := &Host{log: new(output), Query: QueryCommand}
	for path, name := range map[*string]string{&h.Dir: "target", &h.KeyDir: "keys", &h.StateDir: "state", &h.Overlays: "overlays"} {
		*path = filepath.Join(base, name)
		mode := os.FileMode(0o700)
		if path == &h.Dir {
			mode = 0o755 // servers that change their user read here
		}
		if err := os.Mkdir(*path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for dir := base; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		_ = os.Chmod(dir, 0o755) // the same servers must get here
	}
	h.Policy = &policy.Policy{Protected: []string{h.KeyDir, h.StateDir, h.Overlays}}
	state, err := os.OpenRoot(h.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { state.Close() })
	h.Files, err = transaction.Open(transaction.Options{State: state, StatePath: h.StateDir, Policy: h.Policy, Run: run, Log: h.Logger()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Files.Close() })
	return h
}

// Logger logs to where Log reads, from debug on.
func (h *Host) Logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Log is everything logged so far.
func (h *Host) Log() string { return h.log.String() }

// Connector makes a connector the way that a deployment does.
func (h *Host) Connector(typ string, build New, config map[string]any) (connector.Connector, error) {
	job, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	merged, err := targetconf.Merge(job, typ, TargetID, targetconf.OpenOverlays(h.Overlays))
	if err != nil {
		return nil, err
	}
	common, err := targetconf.DecodeCommon(merged)
	if err != nil {
		return nil, err
	}
	return build(connector.Params{
		TargetID: TargetID, Config: merged, Common: common, Policy: h.Policy, Log: h.Logger(), Query: h.Query,
	}, h.Files)
}

// Deploy makes a connector and lets it deploy m.
func (h *Host) Deploy(ctx context.Context, typ string, build New, config map[string]any, m *connector.Material) (connector.Result, error) {
	c, err := h.Connector(typ, build, config)
	if err != nil {
		return connector.Result{}, err
	}
	return c.Deploy(ctx, m)
}

// Material is a new certificate for localhost and 127.0.0.1, with an
// intermediate, whose key is in h's key store already.
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

// Dir is the Dir of the Host that made m, for files that name others.
func Dir(m *connector.Material) string {
	return filepath.Join(filepath.Dir(filepath.Dir(m.KeyPath)), "target")
}

// output is a log that may be written and read at once.
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
