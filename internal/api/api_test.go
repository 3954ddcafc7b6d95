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

// TestRecordedExamples decodes recorded messages and encodes them again: no field may be lost,
// added or renamed.
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
				t.Errorf("re-encoded:\n%s\nrecorded:\n%s", encoded, recorded)
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
	const good = `{"id":"j","type":"Deployment","status":"Running","certificate_id":"c"}`
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

// TestJobBounds: a job over a limit is refused with a reason, the other jobs are not, and only the
// needed fields are kept.
func TestJobBounds(t *testing.T) {
	const csr = `"id":"j","type":"Renewal","status":"AwaitingCSR","certificate_id":"c"`
	const deployment = `"id":"j","type":"Deployment","status":"Running","certificate_id":"c"`
	names := func(n int, name string) string {
		return `,"sans":[` + strings.TrimSuffix(strings.Repeat(`"`+name+`",`, n), ",") + `]`
	}
	text := func(n int) string { return `"` + strings.Repeat("x", n-2) + `"` }
	for _, test := range []struct{ name, job, want string }{
		{"names", csr + names(1000, "www.example.org"), ""},
		{"too many names", csr + names(1001, "x"), "it has 1001 names (sans); the limit is 1000"},
		{"too many empty names", csr + names(80_000, ""), "it has 80000 names (sans); the limit is 1000"},
		{"long names", csr + names(300, strings.Repeat("x", 253)), "its names (sans) take 75900 bytes; the limit is 65536"},
		{"megabytes of names", csr + names(2_000_000, ""), "bytes; the limit is 262144"},
		{"megabytes of blanks", csr + strings.Repeat(" ", 1<<20), "bytes; the limit is 262144"},
		{"names of a deployment", deployment + names(80_000, ""), ""},
		{"megabytes of names of a deployment", deployment + names(2_000_000, ""), "bytes; the limit is 262144"},
		{"configuration", deployment + `,"target_config":` + text(64<<10), ""},
		{"large configuration", deployment + `,"target_config":` + text(64<<10+1), "its target_config has 65537 bytes; the limit is 65536"},
		{"large configuration of a CSR", csr + `,"target_config":` + text(64<<10+1), "its target_config has 65537 bytes"},
		{"long certificate id", strings.Replace(csr, `"c"`, text(1027), 1), "its certificate_id has 1025 bytes; the limit is 1024"},
		{"long common name", csr + `,"common_name":` + text(1027), "its common_name has 1025 bytes"},
		{"long target id", deployment + `,"target_id":` + text(1027), "its target_id has 1025 bytes"},
		{"long target type", deployment + `,"target_type":` + text(1027), "its target_type has 1025 bytes"},
		{"unknown field", deployment + `,"later":` + text(100_000), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			var work api.Work
			if err := json.Unmarshal([]byte(`{"jobs":[{"id":"before"},{`+test.job+`},{"id":"after"}]}`), &work); err != nil {
				t.Fatal(err)
			}
			if test.want == "" {
				if len(work.Jobs) != 3 || len(work.Malformed) != 0 {
					t.Fatalf("%d jobs, refused %v, want three taken", len(work.Jobs), work.Malformed)
				}
				if job := work.Jobs[1]; job.AwaitsCSR() != (job.SANs != nil) || job.AwaitsCSR() && job.TargetConfig != nil {
					t.Errorf("kept: %d names, %d bytes of configuration", len(job.SANs), len(job.TargetConfig))
				}
				return
			}
			if len(work.Jobs) != 2 || len(work.Malformed) != 1 {
				t.Fatalf("%d jobs, refused %v, want one refused", len(work.Jobs), work.Malformed)
			}
			if m := work.Malformed[0]; m.ID != "j" || !strings.Contains(m.Err.Error(), test.want) {
				t.Errorf("job %q refused: %v, want job j and %q", m.ID, m.Err, test.want)
			}
		})
	}
	var work api.Work
	if err := json.Unmarshal([]byte(`{"jobs":[{"id":`+text(4<<20)+`}]}`), &work); err != nil || len(work.Malformed) != 1 || len(work.Malformed[0].ID) > 1<<10 {
		t.Errorf("a job with an id of megabytes: %v, %d jobs refused", err, len(work.Malformed))
	}
}

func TestTooManyJobs(t *testing.T) {
	for job, n := range map[string]int{`{}`: 200_000, `{"id":"j"}`: 20_000} {
		body := `{"jobs":[` + strings.Repeat(job+`,`, n) + job + `]}`
		var work api.Work
		if err := json.Unmarshal([]byte(body), &work); err != nil {
			t.Fatal(err)
		}
		if len(work.Jobs)+len(work.Malformed) != api.MaxJobs || work.Excess != n+1-api.MaxJobs {
			t.Errorf("%s: got %d jobs, %d malformed and %d in excess", job, len(work.Jobs), len(work.Malformed), work.Excess)
		}
	}
}

// TestJobIDs: if the job's own id is valid, its other invalid ids can be reported. Otherwise the
// job cannot be reported, and its name is kept for the log.
func TestJobIDs(t *testing.T) {
	const expected = " is not valid: expected 1 to 128 of A-Z a-z 0-9 . _ -"
	const csr, deployment = `"type":"Renewal","status":"AwaitingCSR",`, `"type":"Deployment","status":"Running",`
	long := strings.Repeat("x", 129)
	for _, test := range []struct {
		name, job string
		id        api.ID
		want      string // error; "": none
	}{
		{"deployment", deployment + `"id":"j","certificate_id":"c","target_id":"t","target_type":"NGINX"`, "j", ""},
		{"deployment without a target", deployment + `"id":"j","certificate_id":"c"`, "j", ""},
		{"deployment without a type", deployment + `"id":"j","certificate_id":"c","target_id":"t"`, "j", ""},
		{"CSR", csr + `"id":"j","certificate_id":"c"`, "j", ""},
		{"CSR for a target", csr + `"id":"j","certificate_id":"c","target_id":"../t","target_type":"NGINX"`, "j", ""},
		{"not for agents", `"id":"j","type":"Revocation","status":"Running","certificate_id":"../c","target_id":"a/b"`, "j", ""},

		{"job", deployment + `"id":"../evil","certificate_id":"c"`, "", `the job id "../evil"` + expected},
		{"job of a CSR", csr + `"id":"a\u0000b","certificate_id":"c"`, "", `the job id "a\x00b"` + expected},
		{"job not for agents", `"id":"..","type":"Revocation"`, "", `the job id ".."` + expected},
		{"no job", deployment + `"certificate_id":"c"`, "", `the job id ""` + expected},
		{"every id", deployment + `"id":"a/b","certificate_id":"../c","target_id":"../t"`, "", `the job id "a/b"` + expected},

		{"certificate", deployment + `"id":"j","certificate_id":"../../evil"`, "j", `the certificate id "../../evil"` + expected},
		{"certificate of a CSR", csr + `"id":"j","certificate_id":"../../evil"`, "j", `the certificate id "../../evil"` + expected},
		{"long certificate", csr + `"id":"j","certificate_id":"` + long + `"`, "j", `the certificate id "` + long + `"` + expected},
		{"long certificate of control characters", csr + `"id":"j","certificate_id":"` + strings.Repeat(`é\u001b`, 300) + `"`, "j",
			`the certificate id "` + strings.Repeat(`é\x1b`, 100) + `"` + expected},
		{"no certificate", deployment + `"id":"j","target_id":"t"`, "j", `the certificate id ""` + expected},
		{"null certificate", csr + `"id":"j","certificate_id":null`, "j", `the certificate id ""` + expected},
		{"target", deployment + `"id":"j","certificate_id":"c","target_id":"a/b","target_type":"NGINX"`, "j", `the target id "a/b"` + expected},
		{"target without a type", deployment + `"id":"j","certificate_id":"c","target_id":"a/b"`, "j", `the target id "a/b"` + expected},
		{"no target", deployment + `"id":"j","certificate_id":"c","target_type":"NGINX"`, "j", `the target id ""` + expected},
		{"of another type", deployment + `"id":"j","certificate_id":7`, "j", "the job could not be decoded: json: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			var work api.Work
			if err := json.Unmarshal([]byte(`{"jobs":[{`+test.job+`}]}`), &work); err != nil {
				t.Fatal(err)
			}
			var job api.Job
			err := json.Unmarshal([]byte("{"+test.job+"}"), &job)
			if test.want == "" {
				if len(work.Jobs) != 1 || work.Jobs[0].ID != test.id || err != nil {
					t.Errorf("jobs %+v, refused %+v, a job alone: %v", work.Jobs, work.Malformed, err)
				}
				for _, id := range []api.ID{job.CertificateID, job.TargetID} {
					if _, err := api.ParseID(string(id)); id != "" && err != nil {
						t.Error(err)
					}
				}
				return
			}
			if len(work.Malformed) != 1 || len(work.Jobs) != 0 || err == nil {
				t.Fatalf("jobs %+v, refused %+v, a job alone: %v, want it refused", work.Jobs, work.Malformed, err)
			}
			m := work.Malformed[0]
			if m.ID != test.id || !strings.HasPrefix(m.Err.Error(), test.want) || m.ID != "" && m.Name != string(m.ID) {
				t.Errorf("refused %+v, want job %q and %q", m, test.id, test.want)
			}
		})
	}
	var work api.Work
	if err := json.Unmarshal([]byte(`{"jobs":[{"id":"../evil","type":"Deployment"}]}`), &work); err != nil || work.Malformed[0].Name != "../evil" ||
		work.Malformed[0].Type != api.TypeDeployment {
		t.Errorf("%+v, %v, want the name kept", work.Malformed, err)
	}
}

// TestIDIsAString: on the wire and on disk an id is a string.
func TestIDIsAString(t *testing.T) {
	type form struct {
		ID   api.ID            `json:"id"`
		More api.ID            `json:"more,omitempty"`
		Keys map[api.ID]string `json:"keys"`
	}
	for text, want := range map[string]string{
		`{"id":"a.b","keys":{"k":"v"}}`: "", `{"id":"","keys":{}}`: "",
		`{"id":"../x"}`: `id "../x" is not valid`, `{"more":"a b"}`: `id "a b" is not valid`, `{"id":7}`: "cannot unmarshal number",
	} {
		var f form
		err := json.Unmarshal([]byte(text), &f)
		if want != "" {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", text, err, want)
			}
			continue
		}
		if data, err2 := json.Marshal(f); err != nil || err2 != nil || string(data) != text {
			t.Errorf("%s became %s, %v, %v", text, data, err, err2)
		}
	}
}

func TestParseID(t *testing.T) {
	for id, want := range map[string]bool{
		"cert-1795462743938618358-11": true, "a": true, "a.b_c-D": true, "...": true, ".hidden": true,
		strings.Repeat("x", 128): true, strings.Repeat("x", 129): false,
		"": false, ".": false, "..": false, "../../evil": false, "a/b": false, `a\b`: false, "a\x00": false,
		"a b": false, "a\n": false, "ä": false, "a%2Fb": false,
	} {
		got, err := api.ParseID(id)
		if (err == nil) != want || want && string(got) != id || !want && got != "" {
			t.Errorf("ParseID(%q) = %q, %v, want valid: %v", id, got, err, want)
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

// FuzzWork decodes what a hostile control plane may send: decoding must end, within its limits, and
// lose no job that encoding/json understands.
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
			return // duplicate keys, of which the last one wins
		}
		if got, want := len(work.Jobs)+len(work.Malformed)+work.Excess, len(plain.Jobs); got != want {
			t.Errorf("%d jobs of %d", got, want)
		}
		for _, malformed := range work.Malformed {
			if malformed.Err == nil {
				t.Error("a malformed job without an error")
			}
		}
		for _, job := range work.Jobs {
			if _, err := api.ParseID(string(job.ID)); err != nil {
				t.Error(err)
			}
			for _, id := range []api.ID{job.CertificateID, job.TargetID} {
				if _, err := api.ParseID(string(id)); id != "" && err != nil {
					t.Error(err)
				}
			}
		}
	})
}
