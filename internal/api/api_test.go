package api_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"certctl-agent/internal/api"
)

// TestRecordedExamples decodes what was recorded on the wire and encodes it
// again: no field may get lost, added or renamed.
func TestRecordedExamples(t *testing.T) {
	for name, v := range map[string]any{
		"heartbeat.request":        new(api.Heartbeat),
		"heartbeat-gone.request":   new(api.Heartbeat),
		"work-csr.response":        new(api.Work),
		"work-deployment.response": new(api.Work),
		"csr.request":              new(api.CSR),
		"certificate.response":     new(api.Certificate),
		"status-running.request":   new(api.JobStatus),
		"status-completed.request": new(api.JobStatus),
		"status-failed.request":    new(api.JobStatus),
		"verify.request":           new(api.Verification),
		"discoveries.request":      new(api.DiscoveryReport),
	} {
		t.Run(name, func(t *testing.T) {
			recorded := readExample(t, name)
			if err := json.Unmarshal(recorded, v); err != nil {
				t.Fatal(err)
			}
			encoded, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := generic(t, encoded), generic(t, recorded); !reflect.DeepEqual(got, want) {
				t.Errorf("encoded again:\n%s\nrecorded:\n%s", encoded, recorded)
			}
		})
	}
}

func TestRecordedJobs(t *testing.T) {
	var csr, deployment, empty api.Work
	for name, work := range map[string]*api.Work{"work-csr": &csr, "work-deployment": &deployment, "work-empty": &empty} {
		if err := json.Unmarshal(readExample(t, name+".response"), work); err != nil {
			t.Fatal(err)
		}
	}
	if len(csr.Jobs) != 1 || !csr.Jobs[0].AwaitsCSR() || csr.Jobs[0].IsDeployment() || len(csr.Jobs[0].SANs) != 3 {
		t.Errorf("AwaitingCSR job is %+v", csr.Jobs)
	}
	if len(deployment.Jobs) != 1 || deployment.Jobs[0].AwaitsCSR() || !deployment.Jobs[0].IsDeployment() ||
		deployment.Jobs[0].TargetType != "NGINX" || !strings.Contains(string(deployment.Jobs[0].TargetConfig), "9443") {
		t.Errorf("Deployment job is %+v", deployment.Jobs)
	}
	if len(empty.Jobs) != 0 || empty.Count != 0 {
		t.Errorf("empty answer is %+v", empty)
	}
}

func readExample(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "wire", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func generic(t *testing.T, data []byte) (v any) {
	t.Helper()
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestWorkDecoding(t *testing.T) {
	const good = `{"id":"j","type":"Deployment","status":"Running"}`
	for _, test := range []struct {
		name, body             string
		jobs, malformed, count int
		wantErr                string
	}{
		{"null list", `{"jobs":null,"count":0}`, 0, 0, 0, ""},
		{"a count alone", `{"count":0}`, 0, 0, 0, ""},
		{"neither", `{}`, 0, 0, 0, "neither jobs nor their count"},
		{"null", `null`, 0, 0, 0, "neither jobs nor their count"},
		{"an error", `{"error":"try later","status":503}`, 0, 0, 0, "neither jobs nor their count"},
		{"unknown fields", `{"jobs":[{"id":"j","later":{"a":[1]}}],"next":"x"}`, 1, 0, 0, ""},
		{"one damaged", `{"jobs":[` + good + `,{"id":7},` + good + `],"count":3}`, 2, 1, 3, ""},
		{"entry of another kind", `{"jobs":["x",` + good + `]}`, 1, 1, 0, ""},
		{"count of another type", `{"jobs":[` + good + `],"count":"1"}`, 1, 0, 0, ""},
		{"null fields", `{"jobs":[{"id":"j","sans":null,"target_id":null,"target_config":null}]}`, 1, 0, 0, ""},
		{"jobs is an object", `{"jobs":{}}`, 0, 0, 0, "jobs is not a list"},
		{"a list", `[]`, 0, 0, 0, "cannot unmarshal array"},
		{"cut short", `{"jobs":[` + good, 0, 0, 0, "unexpected end"},
		{"something after", `{"jobs":[]} <html>`, 0, 0, 0, "after top-level value"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var work api.Work
			err := json.Unmarshal([]byte(test.body), &work)
			if test.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), test.wantErr) {
					t.Fatalf("got error %v, want one with %q", err, test.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(work.Jobs) != test.jobs || len(work.Malformed) != test.malformed || work.Count != test.count {
				t.Errorf("got %d jobs, %d malformed, count %d, want %d, %d, %d", len(work.Jobs), len(work.Malformed),
					work.Count, test.jobs, test.malformed, test.count)
			}
		})
	}
}

func TestMalformedJobKeepsItsName(t *testing.T) {
	var work api.Work
	body := `{"jobs":[{"id":"job-1","sans":"not a list","type":"Deployment","status":"Running"}]}`
	if err := json.Unmarshal([]byte(body), &work); err != nil {
		t.Fatal(err)
	}
	if len(work.Malformed) != 1 || work.Malformed[0].ID != "job-1" || work.Malformed[0].Type != api.TypeDeployment ||
		work.Malformed[0].Err == nil {
		t.Errorf("got %+v", work.Malformed)
	}
}

func TestTooManyJobs(t *testing.T) {
	body := `{"jobs":[` + strings.Repeat(`{},`, 200_000) + `{}]}`
	var work api.Work
	if err := json.Unmarshal([]byte(body), &work); err != nil {
		t.Fatal(err)
	}
	if len(work.Jobs) != api.MaxJobs || work.Excess != 200_001-api.MaxJobs {
		t.Errorf("got %d jobs and %d in excess", len(work.Jobs), work.Excess)
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"cert-1795462743938618358-11": true, "a": true, "a.b_c-D": true, "...": true, ".hidden": true,
		strings.Repeat("x", 128): true, strings.Repeat("x", 129): false,
		"": false, ".": false, "..": false, "../../evil": false, "a/b": false, `a\b`: false, "a\x00": false,
		"a b": false, "a\n": false, "ä": false, "a%2Fb": false,
	} {
		if got := api.ValidID(id); got != want {
			t.Errorf("ValidID(%q) = %v, want %v", id, got, want)
		}
	}
}

func TestPaths(t *testing.T) {
	for got, want := range map[string]string{
		api.HeartbeatPath("a-1"):            "/api/v1/agents/a-1/heartbeat",
		api.WorkPath("a-1"):                 "/api/v1/agents/a-1/work",
		api.CSRPath("a-1"):                  "/api/v1/agents/a-1/csr",
		api.DiscoveriesPath("a-1"):          "/api/v1/agents/a-1/discoveries",
		api.CertificatePath("a", "../evil"): "/api/v1/agents/a/certificates/..%2Fevil",
		api.JobStatusPath("a b", "j?#%"):    "/api/v1/agents/a%20b/jobs/j%3F%23%25/status",
		api.VerifyPath("j\x00"):             "/api/v1/jobs/j%00/verify",
	} {
		if got != want {
			t.Errorf("path is %q, want %q", got, want)
		}
	}
}

// FuzzWork feeds the decoder what a hostile control plane may send: it must
// end, within its bounds, and lose no job that encoding/json understands.
func FuzzWork(f *testing.F) {
	for _, seed := range []string{
		`{"jobs":[{"id":"j","type":"Deployment","status":"Running","target_config":{"a":1}}],"count":1}`,
		`{"jobs":[{"id":7},"x",null,[],{}],"count":"x"}`, `{"jobs":null}`, `{"jobs":{}}`, `null`, `[]`,
		`{"JOBS":[{"ID":"a"}],"jobs":[]}`, `{"jobs":[{"sans":[1]}]} x`, `{"jobs":[{"id":"\ud800"}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var work api.Work
		if json.Unmarshal(data, &work) != nil {
			return
		}
		if n := len(work.Jobs) + len(work.Malformed); n > api.MaxJobs {
			t.Errorf("%d jobs, more than %d", n, api.MaxJobs)
		}
		var plain struct {
			Jobs []json.RawMessage `json:"jobs"`
		}
		if err := json.Unmarshal(data, &plain); err != nil {
			return // two keys of one name, of which the last counts
		}
		if got, want := len(work.Jobs)+len(work.Malformed)+work.Excess, len(plain.Jobs); got != want {
			t.Errorf("%d jobs of %d", got, want)
		}
		for _, malformed := range work.Malformed {
			if malformed.Err == nil {
				t.Error("a malformed job without an error")
			}
		}
	})
}
