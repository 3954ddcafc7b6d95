package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

// lock locks a directory, like another program of the agent's user.
func (h *host) lock(path string) (unlock func()) {
	h.t.Helper()
	dir, err := os.Open(path)
	if err == nil {
		err = syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return func() { dir.Close() }
}

// interrupted deploys a certificate and kills the agent during its renewal: the new files are in
// place, but the reload has not ended.
func (h *host) interrupted() (certificate, old string) {
	h.t.Helper()
	certificate = h.deployed()
	old = h.pair(certificate)
	agent := h.start()
	release := h.hold("reload")
	h.plane.StartRenewal(certificate)
	h.waitHeld("reload")
	agent.kill()
	release()
	return certificate, old
}

// TestRecoveredLater: a transaction that could not be rolled back at the start is rolled back
// later, and then the waiting job runs.
func TestRecoveredLater(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate, old := h.interrupted()
	unlock := h.lock(h.path("tls"))
	agent := h.start()
	agent.waitLog("ready")
	agent.waitLog("could not be rolled back", fmt.Sprintf("process %d", os.Getpid()))
	agent.waitLog("deployment not started", "interrupted")
	if got := h.plane.Deployments(certificate); got[len(got)-1].Status == api.StatusFailed {
		t.Errorf("the job has failed permanently: %s", got[len(got)-1].Error)
	}
	reloads := h.ran("reload")
	unlock()
	agent.waitLog("rolled back an interrupted deployment")
	h.waitDeployment(certificate, 2, api.StatusCompleted)
	if h.pair(certificate) == old {
		t.Error("the old certificate is in place")
	}
	if h.ran("reload") == reloads {
		t.Error("nothing was reloaded")
	}
	agent.stop()
}

// TestHeadOfLine: a reload hangs, and its certificate has as many targets as there are slots.
// Another certificate is deployed meanwhile.
func TestHeadOfLine(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	release := h.hold("reload")
	defer release()
	var targets []string
	for i := range 4 {
		targets = append(targets, h.target(fmt.Sprintf("x%d-", i)))
	}
	a := h.plane.AddCertificate(devplane.Certificate{CommonName: "a.example", SANs: []string{"a.example"}, Targets: targets})
	if err := os.Mkdir(h.path("b"), 0o755); err != nil {
		t.Fatal(err)
	}
	h.env["CERTCTL_ALLOWED_PATHS"] += "," + h.path("b")
	config := h.nginx("")
	config["cert_path"], config["key_path"], config["reload_command"] = h.path("b", "cert.pem"), h.path("b", "key.pem"), h.command("validate")
	b := h.plane.AddCertificate(devplane.Certificate{CommonName: "b.example", SANs: []string{"b.example"},
		Targets: []string{h.plane.AddTarget(devplane.Target{Agent: h.agentID, Type: "NGINX", Config: config})}})
	agent := h.start()
	h.plane.StartIssuance(a)
	h.waitHeld("reload")
	h.wait("four claimed", func() bool { return strings.Count(agent.output.String(), `"deployment claimed"`) == 4 })
	h.plane.StartIssuance(b)
	h.waitDeployment(b, 1, api.StatusCompleted)
	for _, job := range h.plane.Deployments(a) {
		if job.Status == api.StatusCompleted {
			t.Errorf("job %s was completed, so its reload did not hang", job.ID)
		}
	}
	release()
	h.wait("the others", func() bool {
		for _, job := range h.plane.Deployments(a) {
			if job.Status != api.StatusCompleted {
				return false
			}
		}
		return true
	})
	agent.stop()
}

// TestEarlierState: the agent warns about a deployment interrupted under another agent id.
func TestEarlierState(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	h.interrupted()
	changes := map[string]string{"CERTCTL_AGENT_ID": h.plane.RegisterAgent("new")}
	agent := h.startWith(changes)
	agent.waitLog("earlier state", "interrupted under another agent id", h.path("keys", ".state"))
	agent.stop()
	if _, found := h.check(changes, "earlier state"); !strings.HasPrefix(found, "warning: ") {
		t.Errorf("check says %q", found)
	}
	agent = h.start()
	agent.waitLog("rolled back an interrupted deployment")
	agent.waitLog("ready")
	agent.stop()
	if _, found := h.check(changes, "earlier state"); found != "" {
		t.Errorf("afterwards check says %q", found)
	}
}
