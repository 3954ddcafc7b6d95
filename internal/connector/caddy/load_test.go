package caddy

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
)

func listConfig(elements ...string) string {
	return `{"apps":{"tls":{"certificates":{"load_pem":[` + strings.Join(elements, ",") + `]}}}}`
}

// Somebody else changes the list between our look and our change: the index
// means another pair then.
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
		if !strings.Contains(err.Error(), "the previous certificate is back in place") && !strings.Contains(err.Error(), "so the new one was removed") {
			t.Errorf("got %v, which does not say what is in place", err)
		}
		if got := f.api.get(""); got != before || len(f.api.made()) != 2 {
			t.Errorf("got %s after %q\nwant %s", got, f.api.made(), before)
		}
	}
}

// Caddy makes the change, and its answer is lost: whether it did is found out.
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

// A deployment that is cancelled while Caddy is at it waits for the outcome,
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

func TestStrangeLists(t *testing.T) {
	for config, says := range map[string]string{
		`{"apps":{"tls":{"certificates":{"load_pem":{}}}}}`:   "no list",
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

// An API without entity tags cannot keep changes apart.
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
