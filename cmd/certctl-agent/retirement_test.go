package main

import (
	"bytes"
	"net/http"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

// stayDown checks that a retired agent ends at each later start after exactly one heartbeat and
// changes nothing.
func (h *host) stayDown() {
	h.t.Helper()
	ran := h.read("ran")
	for range 2 {
		before, beats := len(h.plane.Requests()), h.requested(devplane.CallHeartbeat)
		h.start().wantExit(exitOK)
		all, more := len(h.plane.Requests())-before, h.requested(devplane.CallHeartbeat)-beats
		if all != 1 || more != 1 {
			h.t.Errorf("a later start made %d requests, %d of them heartbeats; want one heartbeat", all, more)
		}
	}
	if h.read("ran") != ran {
		h.t.Error("a later start ran commands")
	}
}

func retiredLine(c *child, call string) {
	c.h.t.Helper()
	c.waitLog(`"ERROR"`, "the control plane has retired this agent", `"call":"`+call+`"`, `"status":410`,
		`"agent_id":"`+c.h.agentID+`"`)
}

func TestRetiredBeforeTheStart(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	h.write("ran", "", 0o644)
	certificate := h.certificate()
	enrolment := h.plane.StartIssuance(certificate)
	deployment := h.plane.AddJob(devplane.WireJob{Type: api.TypeDeployment, Status: devplane.StatusPending,
		CertificateID: certificate, TargetID: h.target("x")})
	h.plane.Retire(h.agentID)

	agent := h.start()
	agent.wantExit(exitOK)
	retiredLine(agent, "heartbeat")
	agent.waitLog("Agent has been retired")
	if n := h.plane.Count(""); n != 1 {
		t.Errorf("%d requests, want the one heartbeat", n)
	}
	for _, id := range []string{enrolment, deployment} {
		if job, _ := h.plane.Job(id); job.Handed != 0 || len(job.History) != 1 {
			t.Errorf("job %s was touched: %+v", id, job.History)
		}
	}
	h.stayDown()

	// An agent works again after its record was corrected.
	h.plane.Unretire(h.agentID)
	agent = h.start()
	h.waitJob(enrolment, api.StatusCompleted)
	agent.stop()
}

func TestRetiredAtTheFirstPoll(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	h.write("ran", "", 0o644)
	h.plane.Inject(devplane.Fault{Call: devplane.CallWork, Status: http.StatusGone})
	agent := h.start()
	agent.wantExit(exitOK)
	retiredLine(agent, "poll")
	if n := h.plane.Count(devplane.CallWork); n != 1 {
		t.Errorf("%d polls, want 1", n)
	}
	h.plane.Retire(h.agentID)
	h.stayDown()
}

// TestRetiredDuringDeployment: the transaction ends within the grace or is rolled back. In both
// cases certificate and key match.
func TestRetiredDuringDeployment(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, command string
		grace         string
		rolledBack    bool
	}{
		{"validate ends", "validate", "60s", false},
		{"reload ends", "reload", "60s", false},
		{"validate hangs", "validate", "200ms", true},
		{"reload hangs", "reload", "200ms", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, devplane.Options{})
			certificate := h.deployed()
			before := h.pair(certificate)
			h.env["CERTCTL_SHUTDOWN_GRACE"] = test.grace
			release := h.hold(test.command)
			agent := h.start()
			h.plane.StartRenewal(certificate)
			h.waitHeld(test.command)
			h.plane.Retire(h.agentID)
			retiredLine(agent, "heartbeat")
			polls := h.requested(devplane.CallWork)
			if !test.rolledBack {
				release()
			} else if test.command == "reload" {
				// The reload of the old files must end, or it is killed too.
				agent.waitLog("the shutdown grace is over")
				release()
			}
			agent.wantExit(exitOK)
			release()
			want := h.latest(certificate)
			if test.rolledBack {
				want = before
			}
			if got := h.pair(certificate); got != want {
				t.Errorf("%s is deployed, want %s (before %s)", got, want, before)
			}
			// One may have been on its way.
			if n := h.requested(devplane.CallWork) - polls; n > 1 {
				t.Errorf("%d polls after the retirement", n)
			}
			h.stayDown()
			if got := h.pair(certificate); got != want {
				t.Errorf("a later start touched the target")
			}
		})
	}
}

// TestGoneOnAReport: after a 410 on a report the agent sends a heartbeat, whose answer decides.
func TestGoneOnAReport(t *testing.T) {
	t.Parallel()
	verdict := func(_ *http.Request, body []byte) bool { return bytes.Contains(body, []byte(api.StatusCompleted)) }
	t.Run("confirmed", func(t *testing.T) {
		t.Parallel()
		h := newHost(t, devplane.Options{})
		certificate := h.certificate()
		h.env["CERTCTL_HEARTBEAT_INTERVAL"] = "1h"
		h.plane.Inject(devplane.Fault{Call: devplane.CallStatus, Match: verdict, Status: http.StatusGone})
		h.plane.Inject(devplane.Fault{Call: devplane.CallHeartbeat, Skip: 1, Status: http.StatusGone})
		h.plane.StartIssuance(certificate)
		agent := h.start()
		agent.wantExit(exitOK)
		retiredLine(agent, "heartbeat")
		if n := h.plane.Count(devplane.CallHeartbeat); n != 2 {
			t.Errorf("%d heartbeats, want 2", n)
		}
		if got := h.pair(certificate); got != h.latest(certificate) {
			t.Errorf("%s is deployed, want the latest version", got)
		}
		h.stayDown()
	})
	t.Run("not confirmed", func(t *testing.T) {
		t.Parallel()
		h := newHost(t, devplane.Options{})
		certificate := h.certificate()
		h.env["CERTCTL_HEARTBEAT_INTERVAL"] = "1h"
		h.plane.Inject(devplane.Fault{Call: devplane.CallStatus, Match: verdict, Status: http.StatusGone, Times: 2})
		h.plane.StartIssuance(certificate)
		agent := h.start()
		h.waitDeployment(certificate, 1, api.StatusCompleted)
		h.wait("the heartbeats that ask", func() bool { return h.plane.Count(devplane.CallHeartbeat) == 3 })
		agent.waitLog("a report was not delivered: it is kept and will be retried", "410")
		agent.stop()
		if got := h.ran("reload"); got != 1 {
			t.Errorf("%d reloads, want 1", got)
		}
	})
}

// TestRetiredWithUnfinishedWork: a retired agent does not resume the unfinished work of an earlier
// run.
func TestRetiredWithUnfinishedWork(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.certificate()
	agent := h.start()
	lost := h.plane.Inject(devplane.Fault{Call: devplane.CallCertificate, Delay: time.Hour})
	h.plane.StartIssuance(certificate)
	h.wait("the certificate's request", func() bool { return h.requested(devplane.CallCertificate) > 0 })
	agent.kill()
	lost()
	h.write("ran", "", 0o644)
	h.plane.Retire(h.agentID)
	h.stayDown()
}

// requested counts the requests of a call, answered or not.
func (h *host) requested(call string) int {
	n := 0
	for _, request := range h.plane.Requests() {
		if request.Call == call {
			n++
		}
	}
	return n
}
