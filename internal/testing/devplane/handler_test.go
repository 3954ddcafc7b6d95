package devplane_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/testca"
)

const testAgent = "certctl-agent/1.0.0 (linux/amd64)"

// newPlane returns a control plane without a socket.
func newPlane(t *testing.T, opts devplane.Options) *devplane.Plane {
	t.Helper()
	p, err := devplane.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// ask sends a request with the key. The body is JSON text or is marshalled.
func ask(t *testing.T, p *devplane.Plane, method, path string, body any) *httptest.ResponseRecorder {
	t.Helper()
	text, ok := body.(string)
	if !ok && body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		text = string(data)
	}
	r := httptest.NewRequest(method, path, strings.NewReader(text))
	r.Header.Set("Authorization", "Bearer "+p.APIKey)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", testAgent)
	w := httptest.NewRecorder()
	p.Handler().ServeHTTP(w, r)
	return w
}

// answers checks the status of an answer and decodes it into v unless nil.
func answers(t *testing.T, w *httptest.ResponseRecorder, status int, v any) {
	t.Helper()
	if w.Code != status {
		t.Errorf("status %d, want %d: %s", w.Code, status, w.Body)
		return
	}
	if v == nil {
		return
	}
	if err := json.Unmarshal(w.Body.Bytes(), v); err != nil {
		t.Error(err)
	}
}

func poll(t *testing.T, p *devplane.Plane, agent string) []devplane.WireJob {
	t.Helper()
	var work struct {
		Jobs  []devplane.WireJob
		Count int
	}
	answers(t, ask(t, p, "GET", api.WorkPath(agent), nil), 200, &work)
	if work.Count != len(work.Jobs) {
		t.Errorf("count %d for %d jobs", work.Count, len(work.Jobs))
	}
	return work.Jobs
}

func newCSR(t *testing.T, key crypto.Signer, commonName string) string {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: commonName}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestClaims checks all rules of the protocol about claiming, with a certificate that has targets
// on two agents.
func TestClaims(t *testing.T) {
	p := newPlane(t, devplane.Options{})
	one, two, three := p.RegisterAgent("one"), p.RegisterAgent("two"), p.RegisterAgent("three")
	targetOne := p.AddTarget(devplane.Target{Agent: one, Type: "NGINX", Config: map[string]any{"cert_path": "/a"}})
	targetTwo := p.AddTarget(devplane.Target{Agent: two, Type: "HAProxy"})
	cert := p.AddCertificate(devplane.Certificate{CommonName: "web.example", Targets: []string{targetOne, targetTwo}})
	issuance := p.StartIssuance(cert)

	for range 3 {
		for _, agent := range []string{one, two} {
			jobs := poll(t, p, agent)
			if len(jobs) != 1 || jobs[0].ID != issuance || jobs[0].Status != api.StatusAwaitingCSR ||
				jobs[0].Type != api.TypeIssuance || jobs[0].CommonName != "web.example" || jobs[0].SANs != nil {
				t.Fatalf("agent %s is handed %+v, want the job that awaits a CSR", agent, jobs)
			}
		}
	}
	if jobs := poll(t, p, three); len(jobs) != 0 {
		t.Errorf("an agent without a target is handed %+v", jobs)
	}

	first, second := newKey(t), newKey(t)
	answers(t, ask(t, p, "POST", api.CSRPath(one), api.CSR{PEM: newCSR(t, first, "anything"), CertificateID: cert}), 202, nil)
	answers(t, ask(t, p, "POST", api.CSRPath(two), api.CSR{PEM: newCSR(t, second, "anything"), CertificateID: cert}), 202, nil)
	versions := p.Versions(cert)
	if len(versions) != 2 || !first.PublicKey.Equal(versions[0].PublicKey()) || !second.PublicKey.Equal(versions[1].PublicKey()) ||
		versions[0].Agent != one || versions[1].Agent != two {
		t.Fatalf("versions are %+v, want one for each CSR", versions)
	}
	if job, _ := p.Job(issuance); job.Status != api.StatusCompleted || job.Handed != 6 {
		t.Errorf("issuance is %+v, want it completed and handed out 6 times", job)
	}
	if got := len(p.Deployments(cert)); got != 2 {
		t.Fatalf("%d deployment jobs, want one for each target and none for the second CSR", got)
	}

	jobs := poll(t, p, one)
	if len(jobs) != 1 || jobs[0].Type != api.TypeDeployment || jobs[0].Status != api.StatusRunning || jobs[0].TargetID != targetOne ||
		jobs[0].TargetType != "NGINX" || string(jobs[0].TargetConfig) != `{"cert_path":"/a"}` || jobs[0].CommonName != "" {
		t.Fatalf("agent one is handed %+v, want its deployment, Running", jobs)
	}
	if again := poll(t, p, one); len(again) != 0 {
		t.Errorf("the deployment is handed out again: %+v", again)
	}
	if jobs := poll(t, p, two); len(jobs) != 1 || jobs[0].TargetID != targetTwo || jobs[0].TargetConfig != nil {
		t.Errorf("agent two is handed %+v", jobs)
	}

	var latest api.Certificate
	answers(t, ask(t, p, "GET", api.CertificatePath(one, cert), nil), 200, &latest)
	if latest.PEM != versions[1].PEM {
		t.Error("the certificate is not the latest version")
	}
	if blocks := strings.Split(latest.PEM, "-----END CERTIFICATE-----\n\n-----BEGIN"); len(blocks) != 2 || strings.HasSuffix(latest.PEM, "\n\n") {
		t.Errorf("leaf, blank line, root and one newline expected, got\n%s", latest.PEM)
	}

	id := jobs[0].ID
	for _, status := range []api.JobStatus{{Status: "Running"}, {Status: "Failed", Error: "why"}} {
		answers(t, ask(t, p, "POST", api.JobStatusPath(one, id), status), 200, nil)
	}
	job, err := p.WaitJob(t.Context(), id, api.StatusFailed)
	if err != nil || job.Error != "why" || len(job.History) != 4 || job.History[3].Agent != one || job.History[1].Agent != "" {
		t.Errorf("job is %+v, %v", job, err)
	}
	p.Requeue(id)
	if jobs := poll(t, p, one); len(jobs) != 1 || jobs[0].ID != id {
		t.Errorf("requeued job: %+v, want it under the same id", jobs)
	}
	if ids := p.Redeploy(cert); len(ids) != 2 || slices.Contains(ids, id) {
		t.Errorf("Redeploy made %v", ids)
	}
	if got := p.StartRenewal(cert); poll(t, p, two)[1].ID != got {
		t.Errorf("renewal %s is not handed out", got)
	}
	for _, problem := range p.Problems() {
		t.Error(problem)
	}
}

// TestTodaysControlPlanes follows the list of that name in docs/protocol.md.
func TestTodaysControlPlanes(t *testing.T) {
	beat := api.Heartbeat{Version: "1", Hostname: "h", OS: "linux", Architecture: "amd64", IPAddress: "192.0.2.2"}

	t.Run("retirement", func(t *testing.T) {
		for _, gonePolls := range []bool{false, true} {
			p := newPlane(t, devplane.Options{GonePolls: gonePolls})
			agent := p.RegisterAgent("web1")
			cert := p.AddCertificate(devplane.Certificate{Targets: []string{p.AddTarget(devplane.Target{Agent: agent})}})
			p.AddVersion(cert, "pem")
			p.Redeploy(cert)
			p.Retire(agent)
			var gone struct{ Error, Message, RequestID string }
			answers(t, ask(t, p, "POST", api.HeartbeatPath(agent), beat), 410, &gone)
			if gone.Error != "Gone" || gone.Message != "Agent has been retired" {
				t.Errorf("body is %+v", gone)
			}
			if gonePolls {
				answers(t, ask(t, p, "GET", api.WorkPath(agent), nil), 410, nil)
			} else if jobs := poll(t, p, agent); len(jobs) != 1 {
				t.Errorf("a retired agent is handed %+v, want its deployment", jobs)
			}
			answers(t, ask(t, p, "POST", api.CSRPath(agent), api.CSR{PEM: newCSR(t, newKey(t), "x"), CertificateID: cert}), 202, nil)
			p.Unretire(agent)
			answers(t, ask(t, p, "POST", api.HeartbeatPath(agent), beat), 200, nil)
		}
	})

	p := newPlane(t, devplane.Options{})
	agent := p.RegisterAgent("web1")
	t.Run("unknown ids", func(t *testing.T) {
		answers(t, ask(t, p, "POST", api.HeartbeatPath("nobody"), beat), 500, nil)
		answers(t, ask(t, p, "GET", api.WorkPath("nobody"), nil), 500, nil)
		answers(t, ask(t, p, "POST", api.CSRPath("nobody"), api.CSR{}), 500, nil)
		answers(t, ask(t, p, "POST", api.DiscoveriesPath("nobody"), api.DiscoveryReport{}), 500, nil)
		answers(t, ask(t, p, "POST", api.JobStatusPath(agent, "nothing"), api.JobStatus{Status: "Running"}), 500, nil)
		answers(t, ask(t, p, "GET", api.CertificatePath(agent, "nothing"), nil), 404, nil)
		answers(t, ask(t, p, "GET", "/api/v2", nil), 404, nil)
	})
	t.Run("statuses", func(t *testing.T) {
		job := p.AddJob(devplane.WireJob{Type: "Other", Status: "Odd"})
		answers(t, ask(t, p, "POST", api.JobStatusPath("nobody", job), `{"status":"`+strings.Repeat("x", 50)+`"}`), 200, nil)
		answers(t, ask(t, p, "POST", api.JobStatusPath(agent, job), `{"status":"`+strings.Repeat("x", 51)+`"}`), 400, nil)
		answers(t, ask(t, p, "POST", api.JobStatusPath(agent, job), `{"status":"Completed"}`), 200, nil)
		answers(t, ask(t, p, "POST", api.JobStatusPath(agent, job), `{"status":"Running"}`), 200, nil)
	})
	t.Run("verification", func(t *testing.T) {
		job := p.AddJob(devplane.WireJob{Type: api.TypeDeployment, Status: devplane.StatusPending})
		full := api.Verification{TargetID: "t", ExpectedFingerprint: "a", ActualFingerprint: "b"}
		answers(t, ask(t, p, "POST", api.VerifyPath(job), full), 200, nil)
		for _, change := range []func(*api.Verification){
			func(v *api.Verification) { v.TargetID = "" },
			func(v *api.Verification) { v.ExpectedFingerprint = "" },
			func(v *api.Verification) { v.ActualFingerprint = "" },
		} {
			empty := full
			change(&empty)
			answers(t, ask(t, p, "POST", api.VerifyPath(job), empty), 400, nil)
		}
		var answer struct{ Verified bool }
		answers(t, ask(t, p, "POST", api.VerifyPath(job), api.Verification{TargetID: "t", ExpectedFingerprint: "a",
			ActualFingerprint: "a", Verified: true, Error: "why"}), 200, &answer)
		if answer.Verified || len(p.Verifications()) != 2 {
			t.Error("an error does not mark a verification failed, or a refused one was kept")
		}
	})
	t.Run("discoveries", func(t *testing.T) {
		entry := func(path string) map[string]any {
			return map[string]any{"fingerprint_sha256": "ab", "common_name": "x", "sans": []string{}, "source_path": path}
		}
		report := func(certificates any, failures any) map[string]any {
			return map[string]any{"agent_id": agent, "directories": []string{"/"}, "certificates": certificates, "errors": failures,
				"scan_duration_ms": 1}
		}
		path := api.DiscoveriesPath(agent)
		answers(t, ask(t, p, "POST", path, report([]any{}, nil)), 500, nil)
		answers(t, ask(t, p, "POST", path, report([]any{}, []string{"/x: no access"})), 202, nil)
		wrong := entry("/a")
		wrong["key_size"] = "256"
		answers(t, ask(t, p, "POST", path, report([]any{entry("/b"), wrong}, nil)), 400, nil)
		if len(p.Discoveries()) != 0 {
			t.Error("a part of a report with a wrong type was kept")
		}
		nul := entry("/c")
		nul["common_name"] = "x\x00y"
		var summary struct {
			Found int `json:"certificates_found"`
			New   int `json:"certificates_new"`
		}
		answers(t, ask(t, p, "POST", path, report([]any{entry("/b"), nul, entry("/a")}, nil)), 202, &summary)
		if got := p.Discoveries(); len(got) != 2 || got[0].SourcePath != "/a" || summary.Found != 2 || summary.New != 2 {
			t.Errorf("kept %+v, answered %+v, want all but the entry with the NUL", got, summary)
		}
		answers(t, ask(t, p, "POST", path, report([]any{entry("/b"), entry("/d")}, nil)), 202, &summary)
		if len(p.Discoveries()) != 3 || summary.Found != 2 || summary.New != 1 || len(p.Reports()) != 3 {
			t.Errorf("%d discoveries in %d reports, answered %+v", len(p.Discoveries()), len(p.Reports()), summary)
		}
	})
	t.Run("weak key", func(t *testing.T) {
		t.Setenv("GODEBUG", "rsa1024min=0")
		key, err := rsa.GenerateKey(rand.Reader, 1024)
		if err != nil {
			t.Fatal(err)
		}
		cert := p.AddCertificate(devplane.Certificate{ID: "../../evil"})
		answers(t, ask(t, p, "POST", api.CSRPath(agent), api.CSR{PEM: newCSR(t, key, "x"), CertificateID: cert}), 202, nil)
	})
	t.Run("refusal by profile", func(t *testing.T) {
		cert := p.AddCertificate(devplane.Certificate{Agents: []string{agent},
			Profile: func(*x509.CertificateRequest) error { return errors.New("only RSA") }})
		job := p.StartIssuance(cert)
		answers(t, ask(t, p, "POST", api.CSRPath(agent), api.CSR{PEM: newCSR(t, newKey(t), "x"), CertificateID: cert}), 500, nil)
		if got, _ := p.Job(job); got.Status != api.StatusFailed || got.Error != "only RSA" || len(p.Versions(cert)) != 0 {
			t.Errorf("job is %+v, want it failed", got)
		}
	})
	t.Run("no CSR", func(t *testing.T) {
		cert := p.AddCertificate(devplane.Certificate{})
		for _, text := range []string{"", "text", newCSR(t, newKey(t), "x")[:200]} {
			answers(t, ask(t, p, "POST", api.CSRPath(agent), api.CSR{PEM: text, CertificateID: cert}), 400, nil)
		}
	})
}

func TestKeyAndRegistration(t *testing.T) {
	p := newPlane(t, devplane.Options{})
	for _, test := range []struct {
		method, path string
		want         int
	}{
		{"POST", "/api/v1/agents/a/heartbeat", 401}, {"GET", "/api/v1/agents/a/work", 401}, {"POST", "/api/v1/agents", 401},
		{"POST", "/api/v1/jobs/j/verify", 401}, {"GET", "/health", 200},
	} {
		w := httptest.NewRecorder()
		p.Handler().ServeHTTP(w, httptest.NewRequest(test.method, test.path, nil))
		answers(t, w, test.want, nil)
	}
	var agent api.Agent
	answers(t, ask(t, p, "POST", api.RegisterPath, api.Registration{Name: "web1"}), 201, &agent)
	if agents := p.Agents(); len(agents) != 1 || agents[0].ID != agent.ID || agent.ID == "" {
		t.Errorf("agents are %+v, answered %+v", agents, agent)
	}
	answers(t, ask(t, p, "POST", api.RegisterPath, api.Registration{Name: "web1"}), 409, nil)
	answers(t, ask(t, p, "POST", api.RegisterPath, api.Registration{Name: ""}), 400, nil)
	answers(t, ask(t, p, "POST", api.RegisterPath, api.Registration{Name: strings.Repeat("ä", 128)}), 201, nil)
	answers(t, ask(t, p, "POST", api.RegisterPath, api.Registration{Name: strings.Repeat("ä", 129)}), 400, nil)

	p.SetAPIKey("next")
	answers(t, ask(t, p, "GET", api.WorkPath(agent.ID), nil), 401, nil)
}

func TestBodyLimit(t *testing.T) {
	p := newPlane(t, devplane.Options{})
	agent := p.RegisterAgent("web1")
	for size, want := range map[int]int{1 << 20: 200, 1<<20 + 1: 400, 2 << 20: 400} {
		frame := `{"hostname":""}`
		body := `{"hostname":"` + strings.Repeat("a", size-len(frame)) + `"}`
		answers(t, ask(t, p, "POST", api.HeartbeatPath(agent), body), want, nil)
	}
}

// TestRateLimit uses up the bucket that all agents share.
func TestRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t, devplane.Options{RateLimit: true})
		agents := []string{p.RegisterAgent("one"), p.RegisterAgent("two")}
		round := func() (allowed int) {
			for i := range 150 {
				w := ask(t, p, "GET", api.WorkPath(agents[i%2]), nil)
				if w.Code == 200 {
					allowed++
				} else if w.Code != 429 || w.Header().Get("Retry-After") != "1" ||
					!strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain") {
					t.Fatalf("got %d with %v", w.Code, w.Header())
				}
			}
			return allowed
		}
		if got := round(); got != 100 {
			t.Errorf("%d requests at once, want a burst of 100", got)
		}
		time.Sleep(time.Second)
		if got := round(); got != 50 {
			t.Errorf("%d requests a second later, want 50", got)
		}
		time.Sleep(time.Minute)
		if got := round(); got != 100 {
			t.Errorf("%d requests a minute later, want 100", got)
		}
	})
}

func TestMasking(t *testing.T) {
	config := map[string]any{
		"key_path": "/etc/key.pem", "cert_path": "/etc/cert.pem", "KEY_FILE": "k", "password": "p", "apiToken": "t", "hmac": "h",
		"private": "x", "credentials": "c", "client_secret": "s", "key_file_mode": 384, "nested": map[string]any{"password": "kept"},
	}
	for _, mask := range []bool{false, true} {
		p := newPlane(t, devplane.Options{Mask: mask})
		agent := p.RegisterAgent("web1")
		cert := p.AddCertificate(devplane.Certificate{Targets: []string{p.AddTarget(devplane.Target{Agent: agent, Config: config})}})
		p.Redeploy(cert)
		var got map[string]any
		if err := json.Unmarshal(poll(t, p, agent)[0].TargetConfig, &got); err != nil {
			t.Fatal(err)
		}
		var hidden []string
		for key, value := range got {
			if value == "********" {
				hidden = append(hidden, key)
			}
		}
		slices.Sort(hidden)
		want := []string{"KEY_FILE", "apiToken", "client_secret", "credentials", "hmac", "key_path", "password", "private"}
		if !mask {
			want = nil
		}
		if !slices.Equal(hidden, want) || len(got) != len(config) {
			t.Errorf("mask %v: hidden are %v, want %v", mask, hidden, want)
		}
	}
}

// TestRecordedAnswers compares the fields of answers with those recorded from a running control
// plane.
func TestRecordedAnswers(t *testing.T) {
	p := newPlane(t, devplane.Options{})
	agent := p.RegisterAgent("web1")
	target := p.AddTarget(devplane.Target{Agent: agent, Type: "NGINX", Config: map[string]any{}})
	cert := p.AddCertificate(devplane.Certificate{CommonName: "web.example.org", SANs: []string{"web.example.org"}, Targets: []string{target}})
	p.StartIssuance(cert)
	recorded := func(name string) map[string]any {
		data, err := os.ReadFile(filepath.Join("..", "..", "api", "testdata", "wire", name+".json"))
		if err != nil {
			t.Fatal(err)
		}
		var v map[string]any
		if err := json.Unmarshal(data, &v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	check := func(name string, w *httptest.ResponseRecorder) {
		t.Helper()
		var got map[string]any
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		want := recorded(name + ".response")
		if !reflect.DeepEqual(shape(got), shape(want)) {
			t.Errorf("%s: %v, recorded %v", name, shape(got), shape(want))
		}
		if w.Header().Get("Date") == "" || w.Header().Get("Content-Type") != "application/json" || w.Header().Get("X-Request-Id") == "" {
			t.Errorf("%s: header is %v", name, w.Header())
		}
	}
	check("heartbeat", ask(t, p, "POST", api.HeartbeatPath(agent), recorded("heartbeat.request")))
	check("work-csr", ask(t, p, "GET", api.WorkPath(agent), nil))
	check("csr", ask(t, p, "POST", api.CSRPath(agent), api.CSR{PEM: newCSR(t, newKey(t), "x"), CertificateID: cert}))
	check("discoveries", ask(t, p, "POST", api.DiscoveriesPath(agent), recorded("discoveries.request")))
	deployment := ask(t, p, "GET", api.WorkPath(agent), nil)
	var work api.Work
	answers(t, deployment, 200, &work)
	check("work-deployment", deployment)
	check("work-empty", ask(t, p, "GET", api.WorkPath(agent), nil))
	check("certificate", ask(t, p, "GET", api.CertificatePath(agent, cert), nil))
	for _, status := range []string{"status-running", "status-failed", "status-completed"} {
		check(status, ask(t, p, "POST", api.JobStatusPath(agent, string(work.Jobs[0].ID)), recorded(status+".request")))
	}
	check("verify", ask(t, p, "POST", api.VerifyPath(string(work.Jobs[0].ID)), recorded("verify.request")))
	p.Retire(agent)
	check("heartbeat-gone", ask(t, p, "POST", api.HeartbeatPath(agent), recorded("heartbeat.request")))
}

// shape returns the fields of an answer, or of a list's entries, with their types. It ignores the
// fields of a target's configuration, which are the operator's.
func shape(v any) any {
	switch v := v.(type) {
	case map[string]any:
		fields := map[string]any{}
		for key, value := range maps.All(v) {
			if key != "target_config" {
				fields[key] = shape(value)
			}
		}
		return fields
	case []any:
		if len(v) == 0 {
			return "empty list"
		}
		return []any{shape(v[0])}
	}
	return fmt.Sprintf("%T", v)
}

func TestSigning(t *testing.T) {
	p := newPlane(t, devplane.Options{})
	agent := p.RegisterAgent("web1")
	later := time.Now().Add(time.Minute).Truncate(time.Second)
	cert := p.AddCertificate(devplane.Certificate{Signing: testca.CSROptions{NotBefore: later, Intermediates: 2}})
	answers(t, ask(t, p, "POST", api.CSRPath(agent), api.CSR{PEM: newCSR(t, newKey(t), "x"), CertificateID: cert}), 202, nil)
	version := p.Versions(cert)[0]
	if !version.Leaf.NotBefore.Equal(later) || strings.Count(version.PEM, "BEGIN CERTIFICATE") != 4 {
		t.Errorf("not before %v, want %v; chain is\n%s", version.Leaf.NotBefore, later, version.PEM)
	}
	foreign, err := testca.Must(t).Issue(testca.Template{})
	if err != nil {
		t.Fatal(err)
	}
	cert = p.AddCertificate(devplane.Certificate{Sign: func([]byte) ([]*x509.Certificate, error) { return foreign.Chain, nil }})
	answers(t, ask(t, p, "POST", api.CSRPath(agent), api.CSR{PEM: newCSR(t, newKey(t), "x"), CertificateID: cert}), 202, nil)
	if got := p.Versions(cert)[0].Leaf; !got.Equal(foreign.Leaf) {
		t.Error("the certificate is not what Sign returned")
	}
}

func TestRequestsLog(t *testing.T) {
	p := newPlane(t, devplane.Options{})
	agent := p.RegisterAgent("web1")
	ask(t, p, "POST", api.HeartbeatPath(agent), `{"hostname":"`+strings.Repeat("h", 100_000)+`"}`)
	ask(t, p, "GET", api.WorkPath("a/b"), nil)
	requests := p.Requests()
	if len(requests) != 2 || p.Count("") != 2 || p.Count(devplane.CallWork) != 1 {
		t.Fatalf("%d requests, %d counted", len(requests), p.Count(""))
	}
	if beat := requests[0]; beat.Call != devplane.CallHeartbeat || beat.Agent != agent || beat.Status != http.StatusOK ||
		beat.Size != 100_015 || len(beat.Body) != 64<<10 || beat.Header.Get("User-Agent") != testAgent {
		t.Errorf("logged %s %s, status %d, size %d, %d bytes, %v", beat.Call, beat.Agent, beat.Status, beat.Size, len(beat.Body), beat.Header)
	}
	if requests[1].Path != "/api/v1/agents/a%2Fb/work" || requests[1].Agent != "a/b" || requests[1].Status != 500 {
		t.Errorf("logged %+v", requests[1])
	}
	if strings.Contains(fmt.Sprint(requests), p.APIKey) {
		t.Error("the key is in the log")
	}
	for range 10_000 {
		ask(t, p, "GET", "/health", nil)
	}
	if requests = p.Requests(); len(requests) != 10_000 || requests[9_999].Status != 200 || p.Count("") != 10_002 {
		t.Errorf("%d logged, %d counted, want 10000 and 10002", len(requests), p.Count(""))
	}
}
