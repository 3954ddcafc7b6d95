package deploy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/transaction"
)

// engine records the deployment that it is asked for, and changes nothing.
type engine struct {
	asked transaction.Deployment
	yield error // of the turn, as the engine saw it
}

func (e *engine) Settle(context.Context, api.ID, string) error { return nil }

func (e *engine) Deploy(ctx context.Context, d transaction.Deployment) (transaction.Result, error) {
	e.asked = d
	if d.Yield != nil {
		e.yield = d.Yield(func(context.Context) error { return nil })
	}
	return transaction.Result{}, nil
}

// TestEngineIsAsked: all settings of the target reach the engine.
func TestEngineIsAsked(t *testing.T) {
	w := newWorld(t)
	issued := w.renew("cert-1", testca.Template{})
	e := new(engine)
	w.options.Engine = e
	overlay := filepath.Join(w.options.Overlays.Dir, "target-1.json")
	if err := os.WriteFile(overlay, []byte(`{"replace_any_file":true}`), 0o600); err != nil {
		t.Fatal(err)
	}
	noPlace := errors.New("the place could not be had again")
	var size int
	yield := func(n int, wait func(context.Context) error) error {
		size = n
		return errors.Join(wait(t.Context()), noPlace)
	}
	for config, plain := range map[string]bool{
		`{}`: true,
		`{"host":"127.0.0.1","port":1,"backup_retention":7,"post_deploy_verify":{"enabled":true}}`: false,
	} {
		if plain {
			w.options.Overlays = targetconf.Overlays{}
		} else {
			w.options.Overlays = targetconf.Overlays{Dir: filepath.Dir(overlay)}
		}
		if got, err := New(w.options).Deploy(t.Context(), t.Context(), job(config), Holds{Yield: yield}); err != nil || got.Status != api.StatusCompleted {
			t.Fatalf("%s: %+v, %v", config, got, err)
		}
		d := e.asked
		if d.Target != "target-1" || d.Connector == nil || d.Material == nil || !d.Material.Leaf.Equal(issued.Leaf) || len(d.Promotion) != 1 {
			t.Errorf("%s: asked for %+v", config, d)
		}
		if (d.Verify == nil) != plain || (d.Backups == 7) == plain || d.ReplaceAny == plain {
			t.Errorf("%s: verify %v, %d backups, replace any file %v", config, d.Verify != nil, d.Backups, d.ReplaceAny)
		}
		if !errors.Is(e.yield, noPlace) {
			t.Errorf("%s: yield returned %v, want %v", config, e.yield, noPlace)
		}
		if want := ownSize + 4*len(w.certs["cert-1"]); size != want {
			t.Errorf("%s: waits with %d bytes, want %d", config, size, want)
		}
	}
}

// stopping stops the agent while it fetches the certificate.
type stopping struct {
	*world
	stop context.CancelCauseFunc
	why  error
}

func (s stopping) Certificate(ctx context.Context, certID api.ID) ([]byte, error) {
	data, err := s.world.Certificate(ctx, certID)
	s.stop(s.why)
	return data, err
}

// TestStopBeforeTheTransaction: an agent that stops starts no transaction.
func TestStopBeforeTheTransaction(t *testing.T) {
	w := newWorld(t)
	w.renew("cert-1", testca.Template{})
	calls, stop := context.WithCancelCause(t.Context())
	why := errors.New("the agent stops")
	w.options.Plane = stopping{w, stop, why}
	if got, err := New(w.options).Deploy(calls, t.Context(), job(`{}`), Holds{}); !errors.Is(err, why) || got.Status != "" {
		t.Errorf("got %+v, %v, want the end of the agent", got, err)
	}
	if len(w.installed) > 0 {
		t.Errorf("installed on %v", w.installed)
	}
}
