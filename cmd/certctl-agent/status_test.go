package main

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/status"
	"certctl-agent/internal/testing/devplane"
)

// state returns arguments that only name the state directory.
func (h *host) state() []string { return []string{"-state-dir", h.path("keys", ".state")} }

// ask runs status without any configuration.
func (h *host) ask(flags ...string) (code int, output string) {
	h.t.Helper()
	nothing := map[string]string{}
	for name := range h.env {
		if strings.HasPrefix(name, "CERTCTL_") && name != "CERTCTL_CONFIG" {
			nothing[name] = ""
		}
	}
	return h.runWith(nothing, append(append([]string{"status"}, h.state()...), flags...)...)
}

func TestStatus(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	if code, output := h.ask(); code != exitFailure || !strings.Contains(output, "no agent is running with the state directory "+h.path("keys", ".state")) {
		t.Errorf("before the first start: exit code %d\n%s", code, output)
	}
	certificate := h.deployed()
	for _, flag := range []string{"-json", "-metrics", "-check", "-ready"} {
		if code, output := h.ask(flag); code != exitFailure || !strings.Contains(output, "no agent is running") {
			t.Errorf("%s after the end: exit code %d\n%s", flag, code, output)
		}
	}
	agent := h.start()
	agent.waitLog("first heartbeat accepted")
	h.waitMore(devplane.CallWork, 1)
	want := map[string][]string{
		"": {"certctl-agent ", ", up ", "agent ", h.agentID, h.plane.URL, "heartbeat", "poll", " ok",
			"www.example.org", "NGINX", "EXPIRES"},
		"-metrics": {"# HELP ", "# TYPE ", "certctl_agent_build_info{", `target_type="NGINX"`},
		"-check":   {""},
		"-ready":   {""},
	}
	for flag, wants := range want {
		args := []string{flag}
		if flag == "" {
			args = nil
		}
		code, output := h.ask(args...)
		if code != exitOK {
			t.Errorf("%s: exit code %d\n%s", flag, code, output)
		}
		for _, text := range wants {
			if !strings.Contains(output, text) {
				t.Errorf("status %s: %q is missing in\n%s", flag, text, output)
			}
		}
		if wants[0] == "" && output != "" {
			t.Errorf("%s prints %q", flag, output)
		}
	}
	code, output := h.ask("-json")
	var snapshot status.Snapshot
	if err := json.Unmarshal([]byte(output), &snapshot); err != nil || code != exitOK {
		t.Fatalf("exit code %d, %v", code, err)
	}
	if c := snapshot.Certificates; snapshot.AgentID != h.agentID || len(c) != 1 || string(c[0].CertificateID) != certificate || c[0].Fingerprint != h.latest(certificate) {
		t.Errorf("the snapshot is %s", output)
	}
	sockets, err := filepath.Glob(h.path("keys", ".state", "*", status.SocketName))
	if err != nil || len(sockets) != 1 {
		t.Fatalf("sockets: %q, %v", sockets, err)
	}
	if info, err := os.Stat(sockets[0]); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v; want 0600", info.Mode(), err)
	}
	// A copy of this machine would be told from it.
	if _, err := os.Stat(filepath.Join(filepath.Dir(sockets[0]), "machine")); err != nil && machineID() != "" {
		t.Errorf("the state does not say whose it is: %v", err)
	}
	agent.stop()
	if _, err := os.Stat(sockets[0]); err == nil {
		t.Error("the socket is left behind")
	}
}

// TestProbesInAnOutage: in an outage of the control plane agents are alive but not ready.
func TestProbesInAnOutage(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	agent := h.start()
	agent.waitLog("first heartbeat accepted")
	over := h.plane.Inject(devplane.Fault{Status: http.StatusBadGateway})
	var output string
	h.waitFor("the agent not to be ready", func() bool {
		code := exitOK
		code, output = h.ask("-ready")
		return code == exitFailure
	})
	if !strings.Contains(output, "not ready: no contact with "+h.plane.URL) || !strings.Contains(output, "502") {
		t.Errorf("-ready says %q", output)
	}
	if code, output := h.ask("-check"); code != exitOK || output != "" {
		t.Errorf("-check: exit code %d, %s", code, output)
	}
	over()
	h.waitFor("the agent to be ready again", func() bool {
		code, _ := h.ask("-ready")
		return code == exitOK
	})
	agent.stop()
}

// TestStuckDaemon stops the whole process, and so its loop.
func TestStuckDaemon(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	agent := h.start()
	agent.waitLog("first heartbeat accepted")
	agent.signal(syscall.SIGSTOP)
	code, output := h.ask("-check")
	agent.signal(syscall.SIGCONT)
	if code != exitFailure || !strings.Contains(output, "stuck") {
		t.Errorf("exit code %d\n%s", code, output)
	}
	if code, output := h.ask("-check"); code != exitOK {
		t.Errorf("after it goes on: exit code %d\n%s", code, output)
	}
	agent.stop()
}

// TestCrashedDaemon: the socket of a crashed daemon does not count as running, and does not keep
// the next one from starting.
func TestCrashedDaemon(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	agent := h.start()
	agent.waitLog("first heartbeat accepted")
	agent.kill()
	if code, output := h.ask("-check"); code != exitFailure || !strings.Contains(output, "no agent") {
		t.Errorf("exit code %d\n%s", code, output)
	}
	h.env["CERTCTL_METRICS_FILE"] = h.path("agent.prom")
	agent = h.start()
	agent.waitLog("first heartbeat accepted")
	if code, output := h.ask("-check"); code != exitOK {
		t.Errorf("exit code %d\n%s", code, output)
	}
	h.waitFor("the metrics file", func() bool {
		data, _ := os.ReadFile(h.path("agent.prom"))
		return strings.Contains(string(data), "certctl_agent_build_info{")
	})
	agent.stop()
}

// TestUndelivered: status shows undelivered reports.
func TestUndelivered(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.certificate()
	over := h.plane.Inject(devplane.Fault{Call: devplane.CallStatus, Status: http.StatusServiceUnavailable})
	h.plane.StartIssuance(certificate)
	agent := h.start()
	agent.waitLog("a report was not delivered")
	var snapshot status.Snapshot
	_, output := h.ask("-json")
	if err := json.Unmarshal([]byte(output), &snapshot); err != nil || snapshot.Jobs.Undelivered != 1 {
		t.Errorf("%v, %d jobs undelivered, want 1", err, snapshot.Jobs.Undelivered)
	}
	agent.stop()
	agent.waitLog("it is kept for the next start")
	over()
	agent = h.start()
	h.waitDeployment(certificate, 1, api.StatusCompleted)
	agent.stop()
	if n := h.ran("reload"); n != 1 {
		t.Errorf("%d reloads, want 1", n)
	}
}
