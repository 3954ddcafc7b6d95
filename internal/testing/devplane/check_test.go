package devplane_test

import (
	"net/http/httptest"
	"strings"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

// TestProblems violates the protocol in ways that a control plane accepts.
func TestProblems(t *testing.T) {
	p := newPlane(t, devplane.Options{})
	agent := p.RegisterAgent("web1")
	cert := p.AddCertificate(devplane.Certificate{Targets: []string{p.AddTarget(devplane.Target{Agent: agent})}})
	job := p.Redeploy(cert)[0]
	early := p.AddJob(devplane.WireJob{Type: "Other", Status: "Odd"})
	status := api.JobStatusPath(agent, job)
	heartbeat := `{"version":"1","hostname":"h","os":"linux","architecture":"amd64","ip_address":""}`
	steps := []struct {
		name, method, path, body string
		want                     string // "": no problem
	}{
		{"a heartbeat", "POST", api.HeartbeatPath(agent), heartbeat, ""},
		{"an unknown field", "POST", api.HeartbeatPath(agent), `{"name":"x"}`, `unknown field "name"`},
		{"a report before the hand-out", "POST", api.JobStatusPath(agent, early), `{"status":"Running"}`, "not handed"},
		{"a poll", "GET", api.WorkPath(agent), "", ""},
		{"a poll with a body", "GET", api.WorkPath(agent), "{}", "a GET has a body"},
		{"running", "POST", status, `{"status":"Running"}`, ""},
		{"failed without an error", "POST", status, `{"status":"Failed"}`, "without an error"},
		{"failed again", "POST", status, `{"status":"Failed","error":"x"}`, ""},
		{"completed with an error", "POST", status, `{"status":"Completed","error":"x"}`, "with an error"},
		{"running after the verdict", "POST", status, `{"status":"Running"}`, "Running after Completed"},
		{"a made-up status", "POST", status, `{"status":"Pending"}`, `status "Pending"`},
		{"no such job", "POST", api.JobStatusPath(agent, "x"), `{"status":"Running"}`, "does not exist"},
		{"a private key", "POST", api.CSRPath(agent), `{"csr_pem":"-----BEGIN EC PRIVATE KEY-----","certificate_id":"c"}`, "private key"},
		{"a null list", "POST", api.DiscoveriesPath(agent), `{"agent_id":"` + agent + `","certificates":null}`, "certificates is null"},
		{"another agent", "POST", api.DiscoveriesPath(agent), `{"agent_id":"x","certificates":[]}`, `agent_id "x"`},
		{"a bad entry", "POST", api.DiscoveriesPath(agent), `{"agent_id":"` + agent + `","certificates":[{"source_path":"/a"}]}`, "/a: pem_data"},
		{"no such call", "GET", "/api/v1/jobs", "", "no such call"},
	}
	seen := 0
	for _, step := range steps {
		ask(t, p, step.method, step.path, step.body)
		problems := p.Problems()
		fresh := strings.Join(problems[seen:], "\n")
		seen = len(problems)
		if (step.want == "") != (fresh == "") || !strings.Contains(fresh, step.want) {
			t.Errorf("%s: problems are %q, want %q", step.name, fresh, step.want)
		}
	}
	p.Handler().ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/health", nil))
	if fresh := strings.Join(p.Problems()[seen:], "\n"); !strings.Contains(fresh, "User-Agent") || !strings.Contains(fresh, "Content-Type") {
		t.Errorf("bare request: problems are %q", fresh)
	}
}
