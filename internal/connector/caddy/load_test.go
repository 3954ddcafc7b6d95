package caddy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/transaction"
)

func listConfig(elements ...string) string {
	return `{"apps":{"tls":{"certificates":{"load_pem":[` + strings.Join(elements, ",") + `]}}}}`
}

// Someone else changes the list between Read and Write, so the index
// belongs to another pair.
func TestConcurrentChange(t *testing.T) {
	other := `{"certificate":"C","key":"K"}`
	ours := `{"certificate":"C","key":"K","tags":["` + ourTag + `"]}`
	f := newFixture(t, listConfig(ours, other))
	inserted := []string{listConfig(other, ours, other), listConfig(other, other, ours, other)}
	f.api.before = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet && len(inserted) > 0 {
			f.api.set(inserted[0])
			inserted = inserted[1:]
		}
		return false
	}
	m := f.Material(t, f.ca)
	if _, err := f.deploy(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if got, want := f.api.get(""), listConfig(other, other, element(m, ourTag), other); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestEndlessConflict(t *testing.T) {
	f := newFixture(t, running)
	tries := 0
	f.api.before = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			return false
		}
		tries++
		w.WriteHeader(http.StatusPreconditionFailed)
		return true
	}
	if _, err := f.deploy(t.Context(), f.Material(t, f.ca)); err == nil || !strings.Contains(err.Error(), "412") {
		t.Errorf("got %v, want the refusal", err)
	}
	if tries != maxTries {
		t.Errorf("%d tries, want %d", tries, maxTries)
	}
}

// failing deploys with a check that fails once Caddy has the new pair.
func failing(t *testing.T, f *fixture, m *connector.Material) error {
	t.Helper()
	f.config["post_deploy_verify"] = map[string]any{"enabled": true, "endpoint": "127.0.0.1:1"}
	f.config["post_deploy_verify_attempts"] = 1
	_, err := f.deploy(t.Context(), m)
	if err == nil {
		t.Error("a failed verification passes")
	}
	return err
}

func TestUndo(t *testing.T) {
	other := `{"certificate":"C","key":"K"}`
	ours := `{"certificate":"C","key":"K","tags":["` + ourTag + `"]}`
	for _, elements := range [][]string{{other}, {ours}, {other, ours}} {
		before := listConfig(elements...)
		f := newFixture(t, before)
		err := failing(t, f, f.Material(t, f.ca))
		left := "so the new one was removed"
		if slices.Contains(elements, ours) {
			left = "the previous certificate is back in place"
		}
		if !strings.Contains(err.Error(), left) {
			t.Errorf("got %v, want an error with %q", err, left)
		}
		if got := f.api.get(""); got != before || len(f.api.made()) != 2 {
			t.Errorf("got %s after %q\nwant %s", got, f.api.made(), before)
		}
	}
}

// Caddy makes the change but its answer is lost: the agent finds out.
func TestUndoOfLostAnswer(t *testing.T) {
	for _, before := range []string{listConfig(), listConfig(`{"certificate":"C","key":"K","tags":["` + ourTag + `"]}`)} {
		f := newFixture(t, before)
		lost := false
		f.api.after = func(r *http.Request) {
			if r.Method != http.MethodGet && !lost {
				lost = true
				panic(http.ErrAbortHandler)
			}
		}
		if _, err := f.deploy(t.Context(), f.Material(t, f.ca)); err == nil {
			t.Error("a lost answer passes for success")
		}
		if got := f.api.get(""); got != before || len(f.api.made()) != 2 {
			t.Errorf("got %s after %q\nwant %s", got, f.api.made(), before)
		}
	}
}

// A deployment that is cancelled during a change waits for the outcome,
// and undoes it.
func TestUndoOfCancelled(t *testing.T) {
	f := newFixture(t, listConfig())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	f.api.before = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet {
			cancel()
		}
		return false
	}
	if _, err := f.deploy(ctx, f.Material(t, f.ca)); err == nil || !strings.Contains(err.Error(), "cancel") {
		t.Errorf("got %v, want a cancelled deployment", err)
	}
	if got, want := f.api.get(""), listConfig(); got != want || len(f.api.made()) != 2 {
		t.Errorf("got %s after %q\nwant %s", got, f.api.made(), want)
	}
}

// killed kills the agent once Caddy has the new pair, and starts it again.
func killed(t *testing.T, h *conformance.Host, deploy func() error) {
	t.Helper()
	made := false
	h.Before = func(s transaction.Step) error {
		if made && s.Op != "change" {
			return errors.New("killed")
		}
		made = made || s.Op == "change"
		return nil
	}
	err := deploy()
	h.Before = nil
	if err == nil || !made {
		t.Fatalf("not killed: %v", err)
	}
	h.Restart(t)
}

// The agent is killed after Caddy has the new pair but before the commit, and the next try
// fails: the agent restores Caddy's old pair from the backup.
func TestUndoAfterCrash(t *testing.T) {
	other := `{"certificate":"C","key":"K"}`
	ours := `{"certificate":"C","key":"K","tags":["` + ourTag + `"]}`
	for _, before := range []string{listConfig(other), listConfig(ours, other)} {
		f := newFixture(t, before)
		m := f.Material(t, f.ca)
		killed(t, f.Host, func() error { _, err := f.deploy(t.Context(), m); return err })
		if got := f.api.get(""); !strings.Contains(got, element(m, ourTag)) {
			t.Fatalf("after the crash Caddy has %s", got)
		}
		for range 2 { // the same certificate, twice
			err := failing(t, f, m)
			if got := f.api.get(""); got != before || strings.Contains(err.Error(), "person") {
				t.Errorf("got %s, %v\nwant %s", got, err, before)
			}
		}
	}
}

// Between the crash and the next try the control plane sets another admin API,
// or files: the other Caddy must not get the state of the first, which has its key.
func TestUndoAfterCrashElsewhere(t *testing.T) {
	ours := `{"certificate":"C","key":"K","tags":["` + ourTag + `"]}`
	for _, mode := range []string{"api", "file"} {
		f := newFixture(t, listConfig(ours))
		m := f.Material(t, f.ca)
		killed(t, f.Host, func() error { _, err := f.deploy(t.Context(), m); return err })
		first, second := f.config, newFake(t, running)
		f.config = map[string]any{"admin_api": second.URL, "mode": mode, "cert_dir": f.Dir}
		err := failing(t, f, m)
		if _, broken := errors.AsType[*transaction.BrokenError](err); !broken || !strings.Contains(err.Error(), f.api.URL) {
			t.Errorf("mode %s: got %v, want an error that names the first Caddy", mode, err)
		}
		if got := second.get(""); strings.Contains(got, `"C"`) || strings.Contains(got, ourTag) {
			t.Errorf("mode %s: the second Caddy has %s", mode, got)
		}
		f.config = first
		_ = failing(t, f, m)
		if got, want := f.api.get(""), listConfig(ours); got != want {
			t.Errorf("mode %s: the first Caddy has %s, want %s", mode, got, want)
		}
	}
}

func TestStrangeLists(t *testing.T) {
	for config, says := range map[string]string{
		`{"apps":{"tls":{"certificates":{"load_pem":{}}}}}`:   "is not a list",
		`{"apps":{"tls":{"certificates":{"load_pem":[[]]}}}}`: "element 0",
	} {
		f := newFixture(t, config)
		if _, err := f.deploy(t.Context(), f.Material(t, f.ca)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, want an error with %q", config, err, says)
		}
		if changes := f.api.made(); len(changes) > 0 {
			t.Errorf("%s: changes %q", config, changes)
		}
	}
}

// An API without entity tags is refused, since it cannot detect conflicts.
func TestNoETag(t *testing.T) {
	f := newFixture(t, listConfig())
	f.api.before = func(w http.ResponseWriter, _ *http.Request) bool {
		fmt.Fprintln(w, "[]")
		return true
	}
	if _, err := f.deploy(t.Context(), f.Material(t, f.ca)); err == nil || !strings.Contains(err.Error(), "2.6") {
		t.Errorf("got %v, want an error that names the version that is needed", err)
	}
}
