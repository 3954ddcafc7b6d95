package main

import (
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/installed"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/previous"
	"certctl-agent/internal/testing/testca"
)

// TestPreviousRelease starts the agent on a host where the agent of the previous release was
// killed: see testdata/previous.md.
func TestPreviousRelease(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	// The jobs came from another control plane.
	h.excused = func(problem string) bool { return strings.Contains(problem, "a job that the agent was not handed") }
	h.env["CERTCTL_DISCOVERY_DIRS"] = h.path("tls")

	// The name of a state directory depends on the agent's id and control plane.
	sum := sha256.Sum256([]byte(h.agentID + "\x00" + h.plane.URL))
	state := "keys/.state/" + hex.EncodeToString(sum[:8]) + "/"
	before := make(previous.Files)
	for name, file := range previous.Read(t, "testdata/previous.txt").Before.Moved(t, h.dir) {
		before[strings.Replace(name, "keys/.state/6314a2b959ffb801/", state, 1)] = file
	}
	before.Write(t, h.dir)

	// What the control plane knows: the renewal of a is deployed, b was deployed again without a
	// report, and c is claimed.
	jobs := map[string]string{"a": "job-12", "b": "job-9", "c": "job-13"}
	keys := map[string]string{"a": "keys/mc-a.4f026f1566a827d5.pending", "b": "keys/mc-b.key", "c": "keys/mc-c.key"}
	for name, job := range jobs {
		h.plane.AddTarget(devplane.Target{ID: "t-" + name, Agent: h.agentID, Type: "NGINX", Config: h.nginx(name + "-")})
		h.plane.AddCertificate(devplane.Certificate{ID: "mc-" + name, CommonName: name + ".example.org", Targets: []string{"t-" + name}})
		issued, err := h.plane.CA().Issue(testca.Template{Key: previousKey(t, before[keys[name]].Data)})
		if err != nil {
			t.Fatal(err)
		}
		h.plane.AddVersion("mc-"+name, string(issued.PEM()))
		h.plane.AddJob(devplane.WireJob{ID: job, Type: api.TypeDeployment, Status: api.StatusRunning, CertificateID: "mc-" + name, TargetID: "t-" + name})
	}
	later := h.plane.Inject(devplane.Fault{Call: devplane.CallCertificate, Status: 503})

	agent := h.start()
	agent.waitLog("rolled back an interrupted deployment", `"t-a"`)
	h.waitJob(jobs["b"], api.StatusCompleted)
	h.wait("a scan", func() bool { return len(h.plane.Reports()) > 0 })
	backups := state + "backups/t-a/00000001-20261126T022300Z/"
	for name, backup := range map[string]string{"keys/mc-a.key": "1-mc-a.key", "tls/a-cert.pem": "2-a-cert.pem", "tls/a-key.pem": "3-a-key.pem"} {
		if h.read(name) != before[backups+backup].Data {
			t.Errorf("%s is not the old one", name)
		}
	}
	if _, err := os.Stat(h.path("keys/mc-a.previous")); err == nil {
		t.Error("the key store has a previous key that was never in use")
	}
	h.waitFor("the reload for the old files", func() bool { return h.ran("reload") > 0 })

	later()
	for _, name := range []string{"a", "c"} {
		h.waitJob(jobs[name], api.StatusCompleted)
		latest := h.plane.Versions("mc-" + name)[0].Leaf
		chain, err := pemutil.ParseCertificates([]byte(h.read("tls", name+"-cert.pem")))
		if err != nil || !chain[0].Equal(latest) {
			t.Errorf("%s: the latest certificate is not in place (%v)", name, err)
		}
		for _, key := range []string{h.read("tls", name+"-key.pem"), h.read("keys", "mc-"+name+".key")} {
			if !pemutil.SamePublicKey(previousKey(t, key).Public(), latest.PublicKey) {
				t.Errorf("%s: another certificate's key is in place", name)
			}
		}
	}
	agent.stop()
	now := previous.In(t, h.dir)
	for name, file := range now {
		// A final status that will be repeated is kept until then.
		unfinished := strings.HasPrefix(name, state+"jobs/") && !strings.Contains(file.Data, `"state":"finished"`)
		if unfinished || strings.HasPrefix(name, state+"journal/") {
			t.Errorf("%s is still there: %s", name, file.Data)
		}
	}
	if left := now.Temporaries(); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	// Nothing was deployed to b, so this must come from the previous version.
	if was, is := entries(t, before[state+"served.json"].Data), entries(t, now[state+"served.json"].Data); is["t-b"] != was["t-b"] || len(is) != 3 {
		t.Errorf("served: %+v, before it %+v", is, was)
	}
}

func previousKey(t *testing.T, text string) crypto.Signer {
	t.Helper()
	key, err := pemutil.ParseKey([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// entries returns the entries of served.json, by target.
func entries(t *testing.T, text string) map[string]installed.Entry {
	t.Helper()
	var list struct{ Served []installed.Entry }
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatal(err)
	}
	byTarget := make(map[string]installed.Entry)
	for _, entry := range list.Served {
		byTarget[string(entry.TargetID)] = entry
	}
	return byTarget
}
