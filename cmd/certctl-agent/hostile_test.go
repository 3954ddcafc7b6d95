package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

// TestHostileIDs: ids that would lead out of a directory or a path have no effect on this host, and
// do not block valid jobs.
func TestHostileIDs(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.deployed()
	before := h.tree("tls", "targets.d")
	target := h.target("x-")
	names := []string{"../../evil", "..", ".", "evil/evil", "evil\x00", "/evil", `evil\evil`, "evil\n", "évil", strings.Repeat("e", 129)}
	var reported []string
	for i, name := range names {
		h.plane.AddCertificate(devplane.Certificate{ID: name, CommonName: "localhost", Agents: []string{h.agentID}})
		h.plane.AddTarget(devplane.Target{ID: name, Agent: h.agentID, Type: "NGINX", Config: h.nginx("y-")})
		h.plane.AddJob(devplane.WireJob{ID: name, Type: api.TypeDeployment, Status: devplane.StatusPending, CertificateID: certificate, TargetID: target})
		reported = append(reported,
			h.plane.AddJob(devplane.WireJob{ID: fmt.Sprintf("csr-%d", i), Type: api.TypeIssuance, Status: api.StatusAwaitingCSR, CertificateID: name, CommonName: "localhost"}),
			h.plane.AddJob(devplane.WireJob{ID: fmt.Sprintf("cert-%d", i), Type: api.TypeDeployment, Status: devplane.StatusPending, CertificateID: name, TargetID: target}),
			h.plane.AddJob(devplane.WireJob{ID: fmt.Sprintf("target-%d", i), Type: api.TypeDeployment, Status: devplane.StatusPending, CertificateID: certificate, TargetID: name}))
	}
	agent := h.start()
	for _, id := range reported {
		if job := h.waitJob(id, api.StatusFailed); !strings.Contains(job.Error, "id") || !strings.Contains(job.Error, "is not valid") {
			t.Errorf("job %s: the error is %q", id, job.Error)
		}
	}
	h.plane.StartRenewal(certificate)
	h.wait("the good deployment", func() bool {
		job := h.plane.Deployments(certificate)
		return job[len(job)-1].Status == api.StatusCompleted
	})
	agent.stop()
	for _, name := range names {
		if job, _ := h.plane.Job(name); len(job.History) != 2 { // created, claimed
			t.Errorf("the job %q was answered: %+v", name, job.History)
		}
		if agent.logged(`"ERROR"`, "its id is invalid", strings.Trim(strconv.QuoteToASCII(name), `"`)) == "" && !strings.ContainsAny(name, "\x00\n\\é") {
			t.Errorf("no log line about the job %.20q", name)
		}
	}
	after := h.tree("tls", "targets.d")
	for _, file := range []string{"tls/cert.pem", "tls/key.pem"} { // the good one
		before[file] = after[file]
	}
	if !maps.Equal(before, after) {
		t.Errorf("files of targets were changed: %d, want %d", len(after), len(before))
	}
	for path := range h.tree(".") {
		if strings.Contains(path, "evil") {
			t.Errorf("%s was made", path)
		}
	}
}

// TestHugeAnswers: every call gets an answer of ten megabytes once.
func TestHugeAnswers(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.certificate()
	for _, call := range []string{devplane.CallHeartbeat, devplane.CallWork, devplane.CallCSR, devplane.CallCertificate, devplane.CallStatus} {
		h.plane.Inject(devplane.Fault{Call: call, Times: 1, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"certificate_pem":"`+strings.Repeat("x", 10<<20)+`"}`)
		})})
	}
	h.plane.StartIssuance(certificate)
	agent := h.start()
	agent.waitLog(`"WARN"`, "try failed", "heartbeat", "larger than allowed")
	agent.waitLog(`"WARN"`, "try failed", "poll", "larger than allowed")
	agent.waitLog(`"WARN"`, "CSR not accepted yet", "larger than allowed")
	agent.waitLog(`"WARN"`, "deployment not started: it will be retried", "larger than allowed")
	h.waitDeployment(certificate, 1, api.StatusCompleted)
	agent.stop()
}

// TestGateway: gateways and proxies answer in many ways while the control plane is down. Nothing is
// lost.
func TestGateway(t *testing.T) {
	t.Parallel()
	tests := map[string]devplane.Fault{
		"default backend":      {Status: 404, Body: "default backend - 404"},
		"web page":             {Status: 404, Body: "<html><h1>404 Not Found</h1></html>", Header: http.Header{"Content-Type": {"text/html"}}},
		"JSON":                 {Status: 404, Body: `{"message":"no Route matched with those values","request_id":"5a0c"}`},
		"bad request":          {Status: 400, Body: "<html><h1>400 Bad Request</h1></html>"},
		"method":               {Status: 405, Body: "405 method not allowed"},
		"conflict":             {Status: 409},
		"too large":            {Status: 413, Body: "<html><h1>413 Request Entity Too Large</h1></html>"},
		"maintenance with 200": {Status: 200, Body: `{"error":"maintenance"}`},
		"text with 200":        {Status: 200, Body: "ok"},
		"gzip with 200": {Status: 200, Body: "\x1f\x8b\x08\x00\x00", Header: http.Header{"Content-Encoding": {"gzip"},
			"Content-Type": {"application/json"}}},
	}
	for name, fault := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, devplane.Options{})
			fault.Body = cmp.Or(fault.Body, " ")
			certificate := h.certificate()
			h.plane.StartIssuance(certificate)
			// Each call of the renewal fails once.
			fault.Times = 1
			for _, call := range []string{devplane.CallHeartbeat, devplane.CallWork, devplane.CallCSR, devplane.CallCertificate} {
				fault.Call = call
				h.plane.Inject(fault)
			}
			release := h.hold("reload")
			agent := h.start()
			agent.waitLog("try failed", "poll")
			agent.waitLog("CSR not accepted yet")
			agent.waitLog("deployment not started: it will be retried")
			h.waitHeld("reload")
			fault.Call, fault.Times = devplane.CallStatus, 2
			h.plane.Inject(fault)
			release()
			agent.waitLog("a report was not delivered: it is kept and will be retried")
			job := h.waitDeployment(certificate, 1, api.StatusCompleted)
			for _, event := range job.History {
				if event.Status == api.StatusFailed {
					t.Errorf("the job was reported Failed: %q", event.Error)
				}
			}
			if line := agent.logged("gave up on a report"); line != "" {
				t.Error(line)
			}
			agent.stop()
		})
	}
}

// TestRedirects: the agent follows none, since it would send the API key elsewhere.
func TestRedirects(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	var followed atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed.Add(1) }))
	defer elsewhere.Close()
	for _, call := range []string{devplane.CallHeartbeat, devplane.CallWork, devplane.CallCSR} {
		h.plane.Inject(devplane.Fault{Call: call, Times: 1, Handler: http.RedirectHandler(elsewhere.URL+"/?token=1234", http.StatusTemporaryRedirect)})
	}
	certificate := h.certificate()
	h.plane.StartIssuance(certificate)
	agent := h.start()
	for _, activity := range []string{"heartbeat", "poll", "CSR"} {
		line := agent.waitLog(`"WARN"`, activity, "307", "a redirect is never followed: check the server URL", elsewhere.URL)
		if strings.Contains(line, "1234") {
			t.Errorf("the line shows the query: %s", line)
		}
	}
	h.waitDeployment(certificate, 1, api.StatusCompleted)
	agent.stop()
	if n := followed.Load(); n != 0 {
		t.Errorf("%d redirects were followed", n)
	}
}

// TestManyJobs: memory and log stay bounded for as many jobs as an answer can contain.
func TestManyJobs(t *testing.T) {
	t.Parallel()
	binary, err := plainBinary()
	if err != nil {
		t.Fatal(err)
	}
	const (
		maxMemory = 150 << 20
		maxLog    = 4 << 20   // some hundred bytes for each of 10,000 jobs that can be reported
		maxBlind  = 256 << 10 // for jobs without a valid id, which return with every poll
	)
	tests := []struct {
		name string
		jobs int
		job  func(i int) string
		line []string
	}{
		{"empty", 1_000_000, func(int) string { return `{}` }, []string{`"ERROR"`, "left_out", "990000"}},
		{"numbers", 1_000_000, func(int) string { return `7` }, []string{`"ERROR"`, "left_out", "990000"}},
		{"deployments", 80_000, func(i int) string {
			return fmt.Sprintf(`{"id":"job-%d","type":"Deployment","status":"Running","certificate_id":"c","target_id":"t%d"}`, i, i)
		}, []string{`"ERROR"`, "left_out", "70000"}},
		{"CSRs", 70_000, func(i int) string {
			return fmt.Sprintf(`{"id":"job-%d","type":"Issuance","status":"AwaitingCSR","certificate_id":"c%d","common_name":"x.test"}`, i, i)
		}, []string{`"ERROR"`, "left_out", "60000"}},
		{"CSRs with names", 10_000, func(i int) string {
			return fmt.Sprintf(`{"id":"job-%d","type":"Issuance","status":"AwaitingCSR","certificate_id":"c%d","common_name":"x.test","sans":["a"%s]}`,
				i, i, strings.Repeat(`,"b"`, 170))
		}, []string{"CSR not accepted yet", "job-1\""}},
		{"deployments with names", 1000, func(i int) string {
			return fmt.Sprintf(`{"id":"job-%d","type":"Deployment","status":"Running","certificate_id":"c","target_id":"t%d","sans":[""%s]}`,
				i, i, strings.Repeat(`,""`, 2700))
		}, []string{"deployment claimed", "job-999\""}},
		{"one with millions of names", 1, func(int) string {
			return `{"id":"job-1","type":"Issuance","status":"AwaitingCSR","certificate_id":"c","common_name":"x.test","sans":[""` + strings.Repeat(`,""`, 2_700_000) + `]}`
		}, []string{`"ERROR"`, "job refused", "job-1", "the limit is 262144"}},
		{"one with a name of megabytes", 1, func(int) string {
			return `{"id":"` + strings.Repeat("x", 4<<20) + `"}`
		}, []string{`"ERROR"`, "its id is invalid", "xxx"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, devplane.Options{})
			h.binary = binary
			h.excused = func(problem string) bool { return strings.Contains(problem, "a report for a job that does not exist") }
			var work bytes.Buffer
			work.WriteString(`{"jobs":[`)
			for i := range test.jobs {
				if i > 0 {
					work.WriteByte(',')
				}
				work.WriteString(test.job(i))
			}
			work.WriteString(`]}`)
			if work.Len() > 8<<20 {
				t.Fatalf("the answer has %d bytes: it would be refused for its size", work.Len())
			}
			h.plane.Inject(devplane.Fault{Call: devplane.CallWork, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				w.Write(work.Bytes())
			})})
			agent := h.start()
			agent.waitLog(test.line...)
			h.waitMore(devplane.CallHeartbeat, 5)
			peak := peakMemory(t, agent.cmd.Process.Pid)
			agent.kill()
			printed := len(agent.output.String())
			t.Logf("peak memory %d MiB, %d KiB of log", peak>>20, printed>>10)
			if peak > maxMemory {
				t.Errorf("peak memory %d MiB, want at most %d", peak>>20, maxMemory>>20)
			}
			limit := maxLog
			if !strings.Contains(test.job(0), "job-") {
				limit = maxBlind
			}
			if printed > limit {
				t.Errorf("%d KiB of log, want at most %d", printed>>10, limit>>10)
			}
		})
	}
}

// peakMemory returns the peak memory of a process, in bytes.
func peakMemory(t *testing.T, pid int) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Skip("needs Linux's /proc: ", err)
	}
	_, after, _ := strings.Cut(string(data), "VmHWM:")
	kib, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// TestHostileConfig: the policy holds against hostile target configurations.
func TestHostileConfig(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		unset  string // an allow-list that is not set
		change func(h *host, config map[string]any)
		want   []string
	}{
		{"metacharacters", "", func(h *host, c map[string]any) { c["reload_command"] = "touch " + h.path("tls", "evil") + "; true" },
			[]string{"reload_command"}},
		{"metacharacters without a list", "CERTCTL_ALLOWED_COMMANDS", func(h *host, c map[string]any) { c["validate_command"] = "touch $(" + h.path("tls", "evil") + ")" },
			[]string{"validate_command"}},
		{"line end", "CERTCTL_ALLOWED_COMMANDS", func(h *host, c map[string]any) { c["reload_command"] = "true\ntouch " + h.path("tls", "evil") },
			[]string{"reload_command"}},
		{"command outside", "", func(h *host, c map[string]any) { c["reload_command"] = "touch " + h.path("tls", "evil") },
			[]string{"reload_command", "CERTCTL_ALLOWED_COMMANDS"}},
		{"argument more", "", func(h *host, c map[string]any) {
			c["reload_command"] = h.command("reload") + " " + h.path("tls", "evil")
		},
			[]string{"reload_command", "CERTCTL_ALLOWED_COMMANDS"}},
		{"path outside", "", func(h *host, c map[string]any) { c["cert_path"] = h.path("evil.pem") },
			[]string{"evil.pem", "CERTCTL_ALLOWED_PATHS"}},
		{"dots", "", func(h *host, c map[string]any) { c["cert_path"] = h.path("tls") + "/../evil.pem" },
			[]string{"evil.pem"}},
		{"link out of the list", "", func(h *host, c map[string]any) {
			os.Mkdir(h.path("outside"), 0o755)
			os.Symlink(h.path("outside"), h.path("tls", "link"))
			c["key_path"] = h.path("tls", "link", "evil.pem")
		}, []string{"evil.pem", "CERTCTL_ALLOWED_PATHS"}},
		{"link to the overlays", "CERTCTL_ALLOWED_PATHS", func(h *host, c map[string]any) {
			os.Symlink(h.path("targets.d"), h.path("tls", "link"))
			c["cert_path"] = h.path("tls", "link", "evil.json")
		}, []string{"targets.d/evil.json", "belongs to the agent"}},
		{"linked file", "CERTCTL_ALLOWED_PATHS", func(h *host, c map[string]any) {
			os.Symlink(h.path("agent.env"), h.path("tls", "evil.pem"))
			c["cert_path"] = h.path("tls", "evil.pem")
		}, []string{"agent.env", "belongs to the agent"}},
		{"key directory", "CERTCTL_ALLOWED_PATHS", func(h *host, c map[string]any) { c["cert_path"] = h.path("keys", "evil.key") },
			[]string{"keys/evil.key", "belongs to the agent"}},
		// Refused by the policy if the directory exists, otherwise because it does not.
		{"etc certctl", "CERTCTL_ALLOWED_PATHS", func(_ *host, c map[string]any) { c["cert_path"] = "/etc/certctl/evil.env" },
			[]string{"/etc/certctl"}},
		{"cron", "CERTCTL_ALLOWED_PATHS", func(_ *host, c map[string]any) { c["cert_path"] = "/etc/cron.d/certctl-evil" },
			[]string{"/etc/cron.d", "CERTCTL_ALLOWED_PATHS"}},
		{"key for everybody", "", func(_ *host, c map[string]any) { c["key_file_mode"] = "0644" },
			[]string{"key_file_mode", "every user of this host", "0770"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, devplane.Options{})
			if test.unset != "" {
				h.env[test.unset] = ""
			}
			config := h.nginx("")
			test.change(h, config)
			target := h.plane.AddTarget(devplane.Target{Agent: h.agentID, Type: "NGINX", Config: config})
			certificate := h.plane.AddCertificate(devplane.Certificate{CommonName: "x.test", Targets: []string{target}})
			before := h.tree("tls", "targets.d", "agent.env")
			h.plane.StartIssuance(certificate)
			agent := h.start()
			job := h.waitDeployment(certificate, 1, api.StatusFailed)
			agent.waitLog(`"ERROR"`, "deployment failed", job.ID)
			agent.stop()
			for _, want := range test.want {
				if !strings.Contains(job.Error, want) {
					t.Errorf("the error does not say %q: %s", want, job.Error)
				}
			}
			if !maps.Equal(h.tree("tls", "targets.d", "agent.env"), before) {
				t.Error("something was written")
			}
			for _, path := range []string{h.path("evil.pem"), h.path("keys", "evil.key"), "/etc/certctl/evil.env", "/etc/cron.d/certctl-evil"} {
				if _, err := os.Lstat(path); err == nil {
					t.Errorf("%s was made", path)
					os.Remove(path)
				}
			}
			if h.ran("validate")+h.ran("reload") != 0 {
				t.Error("a command was run")
			}
		})
	}
}

// TestTerminalEscapes: untrusted text can neither move the cursor of a terminal nor forge a line.
func TestTerminalEscapes(t *testing.T) {
	t.Parallel()
	const evil = "\x1b[2J\x1b]0;owned\x07\u202egnp.\r\n{\"level\":\"INFO\",\"msg\":\"forged\"}\xff\x00"
	for _, format := range []string{"json", "text"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, devplane.Options{})
			h.env["CERTCTL_LOG_FORMAT"] = format
			h.write("validate.sh", `printf '\033[2Jowned\007\r\n' >&2; exit 1`, 0o644)
			for _, call := range []string{devplane.CallHeartbeat, devplane.CallWork, devplane.CallCSR} {
				h.plane.Inject(devplane.Fault{Call: call, Times: 1, Status: http.StatusInternalServerError, Body: "failed " + evil + strings.Repeat("x", 4<<10)})
			}
			certificate := h.certificate()
			h.plane.StartIssuance(certificate)
			agent := h.start()
			for _, activity := range []string{"heartbeat", "poll", "CSR not accepted yet"} {
				line := agent.waitLog(activity, "failed ", "owned")
				if len(line) > 2<<10 {
					t.Errorf("a line of %d bytes", len(line))
				}
			}
			job := h.waitDeployment(certificate, 1, api.StatusFailed)
			agent.waitLog("deployment failed", "owned")
			code, shown := h.run("status")
			agent.stop()
			if code != exitOK {
				t.Errorf("status: exit code %d\n%s", code, shown)
			}
			for place, text := range map[string]string{"log": agent.output.String(), "report": job.Error, "status": shown} {
				if strings.ContainsAny(text, "\x1b\x07\r\x00\u202e") || strings.Contains(text, `\u001b`) || strings.Contains(text, `\x1b`) || strings.Contains(text, `\u202e`) {
					t.Errorf("the %s contains control characters: %q", place, text)
				}
			}
			for line := range strings.Lines(agent.output.String()) {
				if strings.HasPrefix(line, `{"level"`) {
					t.Errorf("a forged line: %s", line)
				}
			}
		})
	}
}

// TestCommandsShowNoKeys: if any command is allowed, its output is in the job's error and in the
// log, but without key material.
func TestCommandsShowNoKeys(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	delete(h.env, "CERTCTL_ALLOWED_COMMANDS")
	certificate := h.deployed()
	var body []string
	for line := range strings.Lines(h.read("keys", certificate+".key")) {
		if !strings.HasPrefix(line, "-----") {
			body = append(body, strings.TrimSpace(line))
		}
	}
	if len(body) < 2 {
		t.Fatalf("the key file has the lines %q", body)
	}
	config := h.nginx("other-")
	config["validate_command"] = "cat " + h.path("keys", certificate+".key") + " /nonexistent/file"
	target := h.plane.AddTarget(devplane.Target{Agent: h.agentID, Type: "NGINX", Config: config})
	agent := h.start()
	h.plane.AddJob(devplane.WireJob{ID: "steal", Type: api.TypeDeployment, Status: devplane.StatusPending, CertificateID: certificate, TargetID: target})
	job := h.waitJob("steal", api.StatusFailed)
	agent.waitLog("deployment failed", "/nonexistent/file")
	agent.stop()
	if !strings.Contains(job.Error, "[redacted]") || !strings.Contains(job.Error, "/nonexistent/file") {
		t.Errorf("the job's error is %q", job.Error)
	}
	for place, text := range map[string]string{"job": job.Error, "log": agent.output.String()} {
		for _, line := range body {
			if strings.Contains(text, line) {
				t.Errorf("the %s shows a part of the key: %s", place, line)
			}
		}
	}
}
