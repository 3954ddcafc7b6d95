package main

import (
	"crypto/tls"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/testca"
)

// checked is the output of check -json.
type checked struct {
	Settings []struct{ Variable, Value, Origin string }
	Checks   []result
	Failed   bool
}

// check runs check -json and returns the result of one check, as "level: detail".
func (h *host) check(changes map[string]string, check string) (code int, found string) {
	h.t.Helper()
	code, output := h.runWith(changes, "check", "-json")
	var document checked
	if err := json.Unmarshal([]byte(output), &document); err != nil {
		h.t.Fatalf("%v in\n%s", err, output)
	}
	if document.Failed != (code == exitFailure) {
		h.t.Errorf("failed is %t, and the exit code %d", document.Failed, code)
	}
	for _, r := range document.Checks {
		if r.Check == check {
			found += r.Level + ": " + r.Detail + " → " + r.Remedy + "\n"
		}
	}
	return code, found
}

// TestCheckReadOnly: another owner does not make a read-only file system writable.
func TestCheckReadOnly(t *testing.T) {
	for err, want := range map[error][]string{
		syscall.EROFS:  {"/var/lib/certctl is on a read-only file system", "ReadWritePaths="},
		syscall.EACCES: {"this user cannot write in /var/lib/certctl", "make that user the owner"},
	} {
		var c checker
		c.notWritable("key directory", err, "make that user the owner", "", "/var/lib/certctl")
		if r := c.results[0]; r.Level != levelFailure || r.Detail != want[0] || !strings.Contains(r.Remedy, want[1]) {
			t.Errorf("%v: got %+v", err, r)
		}
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	id := h.plane.StartIssuance(h.certificate())
	other := testca.Must(t)
	foreign := h.write("foreign.pem", string(other.PEM()), 0o644)
	retired := h.plane.RegisterAgent("retired")
	h.plane.Retire(retired)
	old := httptest.NewUnstartedServer(http.NotFoundHandler())
	certificate, err := h.plane.CA().Issue(testca.Template{Names: []string{"127.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	old.TLS = &tls.Config{MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{certificate.TLS()}}
	old.Config.ErrorLog = log.New(io.Discard, "", 0)
	old.StartTLS()
	defer old.Close()

	expired := httptest.NewUnstartedServer(http.NotFoundHandler())
	certificate, err = h.plane.CA().Issue(testca.Template{CommonName: "old.example.org", Names: []string{"127.0.0.1"},
		NotBefore: time.Date(2020, 1, 2, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2021, 3, 4, 0, 0, 0, 0, time.UTC)})
	if err != nil {
		t.Fatal(err)
	}
	expired.TLS = &tls.Config{Certificates: []tls.Certificate{certificate.TLS()}}
	expired.Config.ErrorLog = log.New(io.Discard, "", 0)
	expired.StartTLS()
	defer expired.Close()

	tests := []struct {
		name  string
		env   map[string]string
		code  int
		check string
		want  []string
	}{
		{"ok", nil, exitOK, "agent", []string{"ok: ", h.agentID}},
		{"tls", nil, exitOK, "tls", []string{"ok: TLS 1.3, X25519"}},
		{"health", nil, exitOK, "health", []string{"ok: HTTP/2.0"}},
		{"clock", nil, exitOK, "clock", []string{"ok: "}},
		{"key directory to be made", nil, exitOK, "key directory", []string{"ok: ", "does not exist"}},
		{"wrong key", map[string]string{"CERTCTL_API_KEY": "wrong-key-0123"}, exitFailure, "agent", []string{"failure: ", "401", "the API key is wrong or expired", "check the API key"}},
		{"unknown id", map[string]string{"CERTCTL_AGENT_ID": "agent-404"}, exitFailure, "agent", []string{"failure: ", "the control plane may also answer like this if it does not know the agent id"}},
		{"retired", map[string]string{"CERTCTL_AGENT_ID": retired}, exitFailure, "agent", []string{"failure: ", retired + " has been retired", "certctl-agent register"}},
		{"bad CA", map[string]string{"CERTCTL_SERVER_CA_BUNDLE_PATH": foreign}, exitFailure, "tls", []string{"failure: ", "CERTCTL_SERVER_CA_BUNDLE_PATH"}},
		{"nobody there", map[string]string{"CERTCTL_SERVER_URL": "https://127.0.0.1:1"}, exitFailure, "tcp", []string{"failure: ", "connection refused", "check firewalls"}},
		{"TLS 1.2", map[string]string{"CERTCTL_SERVER_URL": old.URL}, exitFailure, "tls", []string{"failure: ", "TLS 1.3 is the minimum; see docs/upgrade-to-tls.md"}},
		{"expired", map[string]string{"CERTCTL_SERVER_URL": expired.URL}, exitFailure, "tls", []string{"failure: ", "the control plane's certificate CN=old.example.org is valid from 2020-01-02 to 2021-03-04", "the clock of this host"}},
		{"no such name", map[string]string{"CERTCTL_SERVER_URL": "https://no-such-host.invalid"}, exitFailure, "name", []string{"failure: ", "no-such-host.invalid", "check DNS"}},
		{"not verified", map[string]string{"CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY": "true", "CERTCTL_SERVER_CA_BUNDLE_PATH": foreign}, exitOK, "tls", []string{"warning: ", "not verified"}},
		{"discovery directory", map[string]string{"CERTCTL_DISCOVERY_DIRS": h.path("missing")}, exitOK, "discovery", []string{"warning: ", h.path("missing")}},
		{"program", map[string]string{"CERTCTL_ALLOWED_COMMANDS": "/no/such/program -s reload"}, exitOK, "programs", []string{"warning: ", "/no/such/program"}},
		{"configuration", map[string]string{"CERTCTL_AGENT_ID": "", "CERTCTL_POLL_INTERVAL": "30"}, exitFailure, "configuration",
			[]string{"failure: -agent-id (CERTCTL_AGENT_ID): is required", "failure: -poll-interval"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			code, found := h.check(test.env, test.check)
			if code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			for _, want := range test.want {
				if !strings.Contains(found, want) {
					t.Errorf("check %s does not say %q:\n%s", test.check, want, found)
				}
			}
		})
	}
	if n := h.plane.Count(devplane.CallWork); n != 0 {
		t.Errorf("check polled %d times", n)
	}
	if job, _ := h.plane.Job(id); job.Handed != 0 {
		t.Error("check claimed a job")
	}
	if _, err := os.Stat(h.path("keys")); err == nil {
		t.Error("check created the key directory")
	}
}

// TestCheckMissingOverlays: a missing directory is a failure if it was named.
func TestCheckMissingOverlays(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	h.env["CERTCTL_TARGETS_DIR"] = h.path("none")
	code, output := h.run("check")
	words := strings.Join(strings.Fields(output), " ")
	if want := " failure overlays overlay " + h.path("none", "default.json") + ": directory " + h.path("none") + " does not exist"; code != exitFailure || !strings.Contains(words, want) {
		t.Errorf("exit code %d, %q is missing in\n%s", code, want, output)
	}
	h.env["CERTCTL_TARGETS_DIR"] = ""
	_, output = h.run("check")
	if words := strings.Join(strings.Fields(output), " "); strings.Contains(words, " failure overlays") {
		t.Errorf("the default directory need not exist:\n%s", output)
	}
}

// TestCheckText runs check beside a running daemon, with its output as text.
func TestCheckText(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	agent := h.start()
	agent.waitLog("first heartbeat accepted")
	h.write("targets.d/web.json", `{"key_path": "/x"`, 0o600)
	h.write("targets.d/a b.json", `{}`, 0o600)
	code, output := h.run("check")
	agent.stop()
	if code != exitFailure {
		t.Errorf("exit code %d, want 1 for an overlay that cannot be parsed", code)
	}
	words := strings.Join(strings.Fields(output), " ")
	for _, want := range []string{
		"settings CERTCTL_CONFIG ", " checks ok configuration ",
		" CERTCTL_SERVER_URL " + h.plane.URL + " (environment) ",
		" CERTCTL_API_KEY [redacted] (environment) ",
		" CERTCTL_MAX_DEPLOYS 4 (default) ",
		" ok key directory " + h.path("keys") + ", mode 0700, writable ",
		" failure overlays overlay " + h.path("targets.d", "web.json") + ": ",
		` failure overlays overlay a b.json: the target id "a b" is not valid: expected 1 to 128 of A-Z a-z 0-9 . _ -`,
		" ok agent the control plane knows " + h.agentID,
	} {
		if !strings.Contains(words, want) {
			t.Errorf("%q is missing in\n%s", want, output)
		}
	}
}
