package transaction

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
)

// TestMain lets a test run parts of itself in a child process.
func TestMain(m *testing.M) {
	if part := os.Getenv("TRANSACTION_CHILD"); part != "" {
		os.Exit(childMain(part))
	}
	os.Exit(m.Run())
}

// material is a certificate and its key, as PEM.
type material struct{ cert, chain, key []byte }

// pairs returns an old and a new certificate, which it makes only once.
var pairs = sync.OnceValues(func() (material, material) {
	ca, err := testca.New()
	if err != nil {
		panic(err)
	}
	make := func(name string) material {
		issued, err := ca.Issue(testca.Template{CommonName: name})
		if err != nil {
			panic(err)
		}
		return material{issued.LeafPEM(), ca.PEM(), issued.KeyPEM()}
	}
	return make("old"), make("new")
})

// world is a host in a directory: state and keys are the agent's, site and private the server's.
type world struct{ base string }

const (
	uidKeep = 4711 // of the existing key, when the test runs as root
	gidKeep = 4712
)

func root() bool { return os.Geteuid() == 0 }

func newWorld(t testing.TB, base string) world {
	t.Helper()
	w := world{base}
	for _, name := range []string{"state", "keys"} {
		check(t, os.MkdirAll(filepath.Join(base, name), 0o700))
	}
	for _, name := range []string{"site", "private"} {
		check(t, os.MkdirAll(filepath.Join(base, name), 0o755))
	}
	return w
}

func (w world) path(name string) string { return filepath.Join(w.base, name) }

func (w world) policy() *policy.Policy {
	return &policy.Policy{Paths: []string{w.path("site"), w.path("private")}}
}

// engine opens the world's Engine. Commands that begin with "fail" fail.
func (w world) engine(before func(Step) error) (*Engine, error) {
	state, err := os.OpenRoot(w.path("state"))
	if err != nil {
		return nil, err
	}
	s := &Engine{opts: Options{
		State: state, StatePath: w.path("state"), Policy: w.policy(), Log: slog.New(slog.DiscardHandler), Retention: DefaultRetention,
		Run: func(ctx context.Context, c policy.Command) error {
			if strings.HasPrefix(c.Argv[0], "fail") {
				return errors.New("exit status 1")
			}
			return ctx.Err()
		},
	}, disk: disk{before: before}}
	return s, s.openDirs()
}

func (w world) mustEngine(t testing.TB, before func(Step) error) *Engine {
	t.Helper()
	s, err := w.engine(before)
	check(t, err)
	t.Cleanup(func() { s.Close(); s.opts.State.Close() })
	return s
}

// old installs the old certificate, as an operator would have.
func (w world) old(t testing.TB) {
	t.Helper()
	before, _ := pairs()
	w.write(t, "site/cert.pem", before.cert, 0o640)
	w.write(t, "private/key.pem", before.key, 0o640)
	w.write(t, "keys/c1.key", before.key, 0o600)
	if root() {
		check(t, os.Chown(w.path("private/key.pem"), uidKeep, gidKeep))
	}
}

func (w world) write(t testing.TB, name string, data []byte, mode fs.FileMode) {
	t.Helper()
	check(t, os.WriteFile(w.path(name), data, 0o600))
	check(t, os.Chmod(w.path(name), mode))
}

// Transaction is a Deployment together with the plan of its connector.
type Transaction struct {
	Deployment
	proposal
}

type proposal = connector.Plan

// planned is a connector that proposes one plan.
type planned connector.Plan

// Plan implements connector.Connector.
func (p planned) Plan(context.Context, *connector.Material) (*connector.Plan, error) {
	plan := connector.Plan(p)
	return &plan, nil
}

func (e *Engine) deploy(ctx context.Context, tx Transaction) (Result, error) {
	tx.Deployment.Connector = planned(tx.proposal)
	return e.Deploy(ctx, tx.Deployment)
}

// renewal returns the deployment that replaces old by new and promotes the new key.
func (w world) renewal() Transaction {
	before, after := pairs()
	return Transaction{
		Deployment: Deployment{
			Target: "t1",
			Promotion: []keystore.Change{
				{Path: w.path("keys/c1.previous"), Data: before.key},
				{Path: w.path("keys/c1.key"), Data: after.key},
			},
		},
		proposal: proposal{
			Files: []connector.File{
				{Path: w.path("private/key.pem"), Kind: connector.KeyFile, Data: after.key, DefaultMode: 0o600},
				{Path: w.path("site/cert.pem"), Kind: connector.CertificateFile, Data: after.cert, DefaultMode: 0o644},
				{Path: w.path("site/chain.pem"), Kind: connector.CertificateFile, Data: after.chain, DefaultMode: 0o644},
			},
			Validate: &policy.Command{Argv: []string{"validate"}},
			Reload:   connector.Reload{Command: &policy.Command{Argv: []string{"reload"}}},
		},
	}
}

// condition returns "old" or "new", or describes what else is in place.
func (w world) condition(first bool) string {
	before, after := pairs()
	type file struct {
		name     string
		old, new []byte
		oldMode  fs.FileMode
		newMode  fs.FileMode
		kept     bool // the old file's owner must be kept
	}
	files := []file{
		{"keys/c1.previous", nil, before.key, 0, 0o600, false},
		{"keys/c1.key", before.key, after.key, 0o600, 0o600, false},
		{"private/key.pem", before.key, after.key, 0o640, 0o640, true},
		{"site/cert.pem", before.cert, after.cert, 0o640, 0o640, false},
		{"site/chain.pem", nil, after.chain, 0, 0o644, false},
	}
	if first {
		for i := range files {
			files[i].old, files[i].kept = nil, false
		}
		files[2].newMode, files[3].newMode = 0o600, 0o644
	}
	found := make(map[string]bool)
	var details []string
	for _, f := range files {
		data, err := os.ReadFile(w.path(f.name))
		kind := "stray"
		wantMode := f.newMode
		switch {
		case errors.Is(err, fs.ErrNotExist):
			data = nil
			if f.old == nil {
				kind = "old"
			}
		case err != nil:
			kind = err.Error()
		case f.old != nil && bytes.Equal(data, f.old):
			kind, wantMode = "old", f.oldMode
		case bytes.Equal(data, f.new):
			kind = "new"
		}
		if data != nil {
			info, err := os.Lstat(w.path(f.name))
			if err != nil {
				return err.Error()
			}
			uid, gid := hostfile.Owner(info)
			if wrong := f.kept && root() && (uid != uidKeep || gid != gidKeep); wrong || info.Mode().Perm() != wantMode {
				kind = fmt.Sprintf("%s with mode %v owner %d:%d", kind, info.Mode(), uid, gid)
			}
		}
		found[kind] = true
		details = append(details, f.name+" is "+kind)
	}
	if len(found) == 1 && (found["old"] || found["new"]) {
		if found["old"] {
			return "old"
		}
		return "new"
	}
	return strings.Join(details, ", ")
}

// matches returns an error unless the certificate and the key in place belong together.
func (w world) matches(first bool) error {
	if _, err := os.Stat(w.path("site/cert.pem")); first && err != nil {
		return nil
	}
	_, err := tls.LoadX509KeyPair(w.path("site/cert.pem"), w.path("private/key.pem"))
	return err
}

// leftovers lists files that should not exist: temporaries, and copies of a key outside the
// backups.
func (w world) leftovers() (stray []string) {
	allowed := map[string]bool{"private/key.pem": true, "keys/c1.key": true, "keys/c1.previous": true}
	err := filepath.WalkDir(w.base, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, _ := filepath.Rel(w.base, path)
		if strings.HasPrefix(e.Name(), ".certctl-") {
			stray = append(stray, name)
		}
		if strings.HasPrefix(name, "state/backups/") || allowed[name] || !e.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte("PRIVATE KEY")) {
			stray = append(stray, name+" (a key)")
		}
		return err
	})
	if err != nil {
		stray = append(stray, err.Error())
	}
	return stray
}

// backups lists the backup sets of target t1.
func (w world) backups(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir(w.path("state/backups/t1"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// journal lists the files in the journal.
func (w world) journal(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir(w.path("state/journal"))
	check(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mounted makes renames onto one file fail, as if it were a mount point.
func mounted(path string) func(Step) error {
	return func(s Step) error {
		if s.Op == "rename" && s.to == path {
			return &os.LinkError{Op: "rename", Old: s.Path, New: s.to, Err: syscall.EBUSY}
		}
		return nil
	}
}
