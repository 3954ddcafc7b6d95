package main

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/testca"
)

// csrKeys returns the public keys of the CSRs for a certificate, in order, as DER.
func (h *host) csrKeys(certificate string) (keys []string) {
	h.t.Helper()
	for _, request := range h.plane.Requests() {
		var body api.CSR
		if request.Call != devplane.CallCSR || json.Unmarshal(request.Body, &body) != nil || body.CertificateID != certificate {
			continue
		}
		block, _ := pem.Decode([]byte(body.PEM))
		parsed, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			h.t.Fatal(err)
		}
		keys = append(keys, string(parsed.RawSubjectPublicKeyInfo))
	}
	return keys
}

// TestDropIn starts the agent on a key directory that another agent has written: it uses keys in
// all three formats.
func TestDropIn(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	if err := os.Mkdir(h.path("keys"), 0o755); err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(ecKey)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		id, form string
		der      []byte
		template testca.Template
	}{
		{"mc-sec1", "EC PRIVATE KEY", sec1, testca.Template{Key: ecKey}},
		{"mc.pkcs8", "PRIVATE KEY", pkcs8, testca.Template{Key: rsaKey}},
		{"mc_pkcs1", "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey), testca.Template{Key: rsaKey}},
	}
	files := make(map[string]string)
	jobs := make(map[string]string)
	for _, test := range tests {
		files[test.id] = string(pem.EncodeToMemory(&pem.Block{Type: test.form, Bytes: test.der}))
		h.write("keys/"+test.id+".key", files[test.id], 0o600)
		issued, err := h.plane.CA().Issue(test.template)
		if err != nil {
			t.Fatal(err)
		}
		h.plane.AddCertificate(devplane.Certificate{ID: test.id, CommonName: "localhost", Targets: []string{h.target(test.id + "-")}})
		h.plane.AddVersion(test.id, string(issued.PEM()))
		jobs[test.id] = h.plane.Redeploy(test.id)[0]
	}
	agent := h.start()
	for _, test := range tests {
		h.waitJob(jobs[test.id], api.StatusCompleted)
		if got := h.read("keys", test.id+".key"); got != files[test.id] {
			t.Errorf("%s: the key file was changed", test.id)
		}
		key, err := pemutil.ParseKey([]byte(h.read("tls", test.id+"-key.pem")))
		if err != nil || !pemutil.SamePublicKey(key.Public(), test.template.Key.Public()) {
			t.Errorf("%s: another key was deployed (%v)", test.id, err)
		}
	}
	// The other agent had left the directory readable for everyone.
	agent.waitLog("the key directory was open to others and has been closed")
	agent.stop()
	if info, err := os.Stat(h.path("keys")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the key directory has mode %v, %v; want 0700", info.Mode(), err)
	}
}

// TestAnotherAgentsCertificate: a certificate whose key is not on this host changes nothing.
func TestAnotherAgentsCertificate(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.deployed()
	before := h.tree("tls", "keys/"+certificate+".key")
	ran := h.read("ran")
	issued, err := h.plane.CA().Issue(testca.Template{})
	if err != nil {
		t.Fatal(err)
	}
	h.plane.AddVersion(certificate, string(issued.PEM()))
	id := h.plane.Redeploy(certificate)[0]
	agent := h.start()
	job := h.waitJob(id, api.StatusFailed)
	agent.waitLog(`"ERROR"`, "deployment failed", id, "none of this agent's private keys belongs to the certificate")
	agent.stop()
	for _, want := range []string{certificate, "nothing was touched", "none of this agent's private keys", "another agent"} {
		if !strings.Contains(job.Error, want) {
			t.Errorf("the error does not say %q: %s", want, job.Error)
		}
	}
	if !maps.Equal(h.tree("tls", "keys/"+certificate+".key"), before) || h.read("ran") != ran {
		t.Error("something was touched")
	}
}

// tree returns the content of all files in and below paths, by path.
func (h *host) tree(names ...string) map[string]string {
	h.t.Helper()
	files := make(map[string]string)
	for _, name := range names {
		info, err := os.Stat(h.path(name))
		if err != nil {
			h.t.Fatal(err)
		}
		if !info.IsDir() {
			files[name] = h.read(name)
			continue
		}
		entries, err := os.ReadDir(h.path(name))
		if err != nil {
			h.t.Fatal(err)
		}
		files[name] = info.Mode().String()
		for _, entry := range entries {
			maps.Copy(files, h.tree(name+"/"+entry.Name()))
		}
	}
	return files
}

// TestRefusedRenewal: a permanent refusal is reported with the server's text, and the key in use
// stays.
func TestRefusedRenewal(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.deployed()
	before := h.tree("tls", "keys/"+certificate+".key")
	h.plane.Inject(devplane.Fault{Call: devplane.CallCSR, Status: http.StatusUnprocessableEntity, Times: 1,
		Body: `{"error":"Unprocessable","message":"the profile forbids this name","request_id":"r-1"}`})
	agent := h.start()
	job := h.waitJob(h.plane.StartRenewal(certificate), api.StatusFailed)
	if !strings.Contains(job.Error, "the profile forbids this name") {
		t.Errorf("the error is %q", job.Error)
	}
	if !maps.Equal(h.tree("tls", "keys/"+certificate+".key"), before) {
		t.Error("a refused renewal touched the target or its key")
	}
	// The next attempt uses a new key.
	h.plane.StartRenewal(certificate)
	h.waitDeployment(certificate, 2, api.StatusCompleted)
	agent.stop()
	h.pair(certificate)
	if keys := h.csrKeys(certificate); len(keys) != 3 || keys[1] == keys[2] {
		t.Errorf("%d CSRs; a key whose CSR was refused was used again", len(keys))
	}
}

// TestDelayedRenewal: while the control plane does not sign, the agent retries with the same CSR
// key, and the key in use stays.
func TestDelayedRenewal(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.deployed()
	before := h.tree("tls", "keys/"+certificate+".key")
	h.plane.Inject(devplane.Fault{Call: devplane.CallCSR, Status: http.StatusServiceUnavailable, Times: 2})
	h.plane.Inject(devplane.Fault{Call: devplane.CallCSR, Drop: true, Times: 1})
	agent := h.start()
	id := h.plane.StartRenewal(certificate)
	agent.waitLog(`"WARN"`, "CSR not accepted yet: it will be retried", id, "503")
	if job, _ := h.plane.Job(id); job.Status == api.StatusFailed {
		t.Error("a temporary failure was reported")
	}
	if !maps.Equal(h.tree("tls", "keys/"+certificate+".key"), before) {
		t.Error("a delayed renewal touched the target or its key")
	}
	h.waitDeployment(certificate, 2, api.StatusCompleted)
	agent.stop()
	h.pair(certificate)
	keys := h.csrKeys(certificate)
	if len(keys) < 5 || len(slices.Compact(keys[1:])) != 1 {
		t.Errorf("%d CSRs, not all with one key", len(keys))
	}
}

// TestLostAnswer: the control plane has signed, but the agent did not get the answer.
func TestLostAnswer(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.deployed()
	before := h.pair(certificate)
	h.plane.Inject(devplane.Fault{Call: devplane.CallCSR, LoseAnswer: true, Times: 1})
	agent := h.start()
	h.plane.StartRenewal(certificate)
	h.waitDeployment(certificate, 2, api.StatusCompleted)
	agent.stop()
	if got := h.pair(certificate); got == before || got != h.latest(certificate) {
		t.Errorf("%s is deployed, want the latest version", got)
	}
}

// TestKilled kills the agent at every step of a renewal. The deployed certificate and key match
// before and after the next start, which finishes the renewal with the same key.
func TestKilled(t *testing.T) {
	t.Parallel()
	completed := func(_ *http.Request, body []byte) bool { return bytes.Contains(body, []byte(api.StatusCompleted)) }
	tests := []struct {
		name  string
		fault devplane.Fault // delays a request
		hold  string         // or delays a command
		poll  string         // interval; "": the default
		until func(h *host, certificate string) bool
		torn  bool // the files may be the new ones, not yet kept
	}{
		{name: "CSR on its way", fault: devplane.Fault{Call: devplane.CallCSR, Delay: time.Hour},
			until: func(h *host, id string) bool { return len(h.csrKeys(id)) == 2 }},
		{name: "CSR signed", fault: devplane.Fault{Call: devplane.CallCSR, Delay: time.Hour, LoseAnswer: true},
			// If the agent is killed at the moment when it claims a deployment, that is lost. No
			// agent can prevent that.
			poll:  "1h",
			until: func(h *host, id string) bool { return len(h.plane.Versions(id)) == 2 }},
		{name: "certificate fetched", fault: devplane.Fault{Call: devplane.CallCertificate, Delay: time.Hour},
			until: func(h *host, id string) bool { return h.requested(devplane.CallCertificate) == 2 }},
		{name: "validating", hold: "validate", torn: true},
		{name: "reloading", hold: "reload", torn: true},
		{name: "reporting", fault: devplane.Fault{Call: devplane.CallStatus, Match: completed, Delay: time.Hour}, torn: true,
			until: func(h *host, _ string) bool { return h.requested(devplane.CallStatus) == 4 }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, devplane.Options{})
			certificate := h.deployed()
			before := h.pair(certificate)
			var again func()
			if test.hold != "" {
				again = h.hold(test.hold)
			} else {
				again = h.plane.Inject(test.fault)
			}
			h.plane.StartRenewal(certificate)
			agent := h.startWith(map[string]string{"CERTCTL_POLL_INTERVAL": cmp.Or(test.poll, h.env["CERTCTL_POLL_INTERVAL"])})
			if test.hold != "" {
				h.waitHeld(test.hold)
			} else {
				h.wait("the step", func() bool { return test.until(h, certificate) })
			}
			agent.kill()
			if got := h.pair(certificate); got != before && !test.torn {
				t.Errorf("%s is deployed too early", got)
			}
			again()

			agent = h.start()
			h.waitDeployment(certificate, 2, api.StatusCompleted)
			agent.stop()
			if got := h.pair(certificate); got != h.latest(certificate) {
				t.Errorf("%s is deployed, want the latest version", got)
			}
			keys := h.csrKeys(certificate)
			if len(slices.Compact(keys[1:])) != 1 {
				t.Errorf("the renewal was tried with %d keys, want one", len(slices.Compact(keys[1:])))
			}
			current, err := pemutil.ParseKey([]byte(h.read("keys", certificate+".key")))
			if err != nil || !pemutil.SamePublicKey(current.Public(), h.plane.Versions(certificate)[1].PublicKey()) {
				t.Errorf("the current key is not that of the latest version (%v)", err)
			}
			if test.name == "reporting" && h.ran("reload") != 2 {
				t.Errorf("%d reloads: a finished deployment ran again", h.ran("reload"))
			}
		})
	}
}
