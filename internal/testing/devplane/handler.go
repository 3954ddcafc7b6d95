package devplane

import (
	"bytes"
	"cmp"
	"crypto/subtle"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"certctl-agent/internal/api"
)

const (
	// maxDrain is how much of a body is read, even beyond the limit, so that a client that sends
	// everything before it reads gets the answer.
	maxDrain = 32 << 20
	// maxLoggedBody bounds a body in the log of requests.
	maxLoggedBody = 64 << 10
	// maxStatus is the length of a job status.
	maxStatus = 50
	// maxName is the length of an agent's name, in characters.
	maxName = 128
	// maskedValue replaces values that may be secret.
	maskedValue = "********"
)

// Request is a logged request.
type Request struct {
	Time   time.Time
	Call   string
	Agent  string // from the path; may be empty
	Method string
	Path   string // escaped
	Proto  string
	Header http.Header // without the key
	Size   int         // of the body
	Body   []byte      // its first 64 KiB
	Status int         // 0 while under way, and if the connection was cut
}

// request is a request under way.
type request struct {
	call  string
	agent string
	http  *http.Request
	body  []byte
	logID string
}

type answer struct {
	status int
	body   any // JSON
}

func refuse(status int, format string, args ...any) answer {
	return answer{status: status, body: fmt.Sprintf(format, args...)}
}

func (p *Plane) routes() http.Handler {
	mux := http.NewServeMux()
	for pattern, route := range map[string]struct {
		call   string
		handle func(*request) answer
	}{
		"POST /api/v1/agents/{agent}/heartbeat":          {CallHeartbeat, p.heartbeat},
		"GET /api/v1/agents/{agent}/work":                {CallWork, p.work},
		"POST /api/v1/agents/{agent}/csr":                {CallCSR, p.csr},
		"GET /api/v1/agents/{agent}/certificates/{cert}": {CallCertificate, p.certificate},
		"POST /api/v1/agents/{agent}/jobs/{job}/status":  {CallStatus, p.status},
		"POST /api/v1/jobs/{job}/verify":                 {CallVerify, p.verify},
		"POST /api/v1/agents/{agent}/discoveries":        {CallDiscoveries, p.discovery},
		"POST /api/v1/agents":                            {CallRegister, p.register},
		"GET /health":                                    {CallHealth, p.health},
		"/":                                              {CallUnknown, p.unknown},
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			p.answer(w, &request{call: route.call, agent: r.PathValue("agent"), http: r}, route.handle)
		})
	}
	return mux
}

// ServeHTTP answers a request.
func (p *Plane) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Date", time.Now().Add(p.opts.Skew).UTC().Format(http.TimeFormat))
	p.handler.ServeHTTP(w, r)
}

// answer handles a request and applies injected faults.
func (p *Plane) answer(w http.ResponseWriter, call *request, handle func(*request) answer) {
	var err error
	if call.body, err = io.ReadAll(io.LimitReader(call.http.Body, maxDrain)); err != nil {
		panic(http.ErrAbortHandler) // the request is incomplete
	}
	call.http.Body = io.NopCloser(bytes.NewReader(call.body))
	recorder := &statusRecorder{ResponseWriter: w}
	logged := p.log(call)
	defer func() { p.logStatus(logged, call, recorder.status) }()

	fault := cmp.Or(p.fault(call), &Fault{})
	if !fault.LoseAnswer && !p.pause(call.http, fault.Delay) {
		panic(http.ErrAbortHandler) // the client is gone
	}
	switch {
	case fault.Handler != nil:
		fault.Handler.ServeHTTP(recorder, call.http)
	case fault.Drop:
		cut(call.http)
	case fault.LoseAnswer:
		p.carryOut(lostAnswer{}, call, handle)
		p.pause(call.http, fault.Delay)
		cut(call.http)
	case fault.Status != 0:
		maps.Copy(recorder.Header(), fault.Header)
		if fault.RetryAfter != "" {
			recorder.Header().Set("Retry-After", fault.RetryAfter)
		}
		if fault.Body == "" {
			p.write(recorder, call, refuse(fault.Status, "injected by the test"))
			return
		}
		recorder.WriteHeader(fault.Status)
		_, _ = io.WriteString(recorder, fault.Body)
	default:
		p.carryOut(recorder, call, handle)
	}
}

// carryOut checks the API key and the limits, then handles the request.
func (p *Plane) carryOut(w http.ResponseWriter, call *request, handle func(*request) answer) {
	if call.call != CallHealth {
		if !p.authorized(call.http) {
			p.write(w, call, refuse(http.StatusUnauthorized, "Invalid or missing API key"))
			return
		}
		if !p.takeToken() {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
			_, _ = io.WriteString(w, "rate limit exceeded\n")
			return
		}
	}
	if len(call.body) > p.opts.BodyLimit {
		p.write(w, call, refuse(http.StatusBadRequest, "request body too large"))
		return
	}
	var result answer
	p.update(func() { result = handle(call) })
	p.write(w, call, result)
}

func (p *Plane) write(w http.ResponseWriter, call *request, result answer) {
	if text, ok := result.body.(string); ok {
		result.body = map[string]string{"error": http.StatusText(result.status), "message": text, "request_id": call.logID}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Request-Id", call.logID)
	w.WriteHeader(result.status)
	_ = json.NewEncoder(w).Encode(result.body)
}

func (p *Plane) authorized(r *http.Request) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), []byte("Bearer "+p.key)) == 1
}

func (p *Plane) takeToken() bool {
	if !p.opts.RateLimit {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	passed := time.Since(p.refilled)
	p.refilled = p.refilled.Add(passed)
	p.tokens = min(p.tokens+passed.Seconds()*p.opts.Rate, float64(p.opts.Burst))
	if p.tokens < 1 {
		return false
	}
	p.tokens--
	return true
}

// log logs a request and returns its number.
func (p *Plane) log(call *request) int {
	header := call.http.Header.Clone()
	header.Del("Authorization")
	var number int
	p.update(func() {
		p.state.logged++
		number = p.state.logged
		call.logID = fmt.Sprintf("req-%d", number)
		p.state.requests = append(p.state.requests, Request{
			Time: time.Now(), Call: call.call, Agent: call.agent, Method: call.http.Method,
			Path: call.http.URL.EscapedPath(), Proto: call.http.Proto, Header: header,
			Size: len(call.body), Body: bytes.Clone(call.body[:min(len(call.body), maxLoggedBody)]),
		})
		if extra := len(p.state.requests) - maxRequests; extra > 0 {
			p.state.requests = append(p.state.requests[:0:0], p.state.requests[extra:]...)
		}
		p.check(call)
	})
	return number
}

// logStatus sets the status of a logged request and counts it.
func (p *Plane) logStatus(number int, call *request, status int) {
	p.update(func() {
		p.state.counts[call.call]++
		if i := number - 1 - (p.state.logged - len(p.state.requests)); i >= 0 {
			p.state.requests[i].Status = status
		}
	})
}

// statusRecorder records the status of the answer.
type statusRecorder struct {
	http.ResponseWriter
	status int
}

// WriteHeader records the first final status.
func (r *statusRecorder) WriteHeader(status int) {
	if r.status == 0 && status >= 200 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write is an implicit 200.
func (r *statusRecorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(b)
}

// Unwrap lets a Fault's handler use http.ResponseController.
func (r *statusRecorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// lostAnswer discards the answer.
type lostAnswer struct{}

func (lostAnswer) Header() http.Header         { return http.Header{} }
func (lostAnswer) Write(b []byte) (int, error) { return len(b), nil }
func (lostAnswer) WriteHeader(int)             {}

// The handlers of the calls. Plane.mu must be held.

func (p *Plane) heartbeat(call *request) answer {
	agent := p.state.agents[call.agent]
	if agent == nil {
		return unknownAgent()
	}
	if agent.Retired {
		return refuse(http.StatusGone, "Agent has been retired")
	}
	var beat api.Heartbeat
	if err := json.Unmarshal(call.body, &beat); err != nil {
		return refuse(http.StatusBadRequest, "Invalid request body")
	}
	agent.LastSeen, agent.Hostname = time.Now(), beat.Hostname
	p.state.heartbeats = append(p.state.heartbeats, Heartbeat{Agent: agent.ID, Time: agent.LastSeen, Heartbeat: beat})
	return answer{http.StatusOK, map[string]string{"status": "heartbeat_recorded"}}
}

// unknownAgent answers as real control planes do, which do not send a 404.
func unknownAgent() answer { return refuse(http.StatusInternalServerError, "Internal server error") }

// work hands out jobs: jobs that await a CSR with every poll, deployments once, with the status set
// to Running. A retired agent gets jobs too.
func (p *Plane) work(call *request) answer {
	agent := p.state.agents[call.agent]
	if agent == nil {
		return unknownAgent()
	}
	if agent.Retired && p.opts.GonePolls {
		return refuse(http.StatusGone, "Agent has been retired")
	}
	jobs := []WireJob{}
	for _, job := range p.state.jobs {
		if !p.isFor(job, agent.ID) {
			continue
		}
		switch {
		case job.Status == api.StatusAwaitingCSR:
		case job.Status == StatusPending:
			job.record(api.StatusRunning, "", "")
		default:
			continue
		}
		job.Handed++
		handed := job.WireJob
		if target := p.state.targets[job.TargetID]; target != nil {
			handed.TargetType = cmp.Or(handed.TargetType, target.Type)
			if handed.TargetConfig == nil {
				handed.TargetConfig = targetConfig(target.Config, p.opts.Mask)
			}
		}
		jobs = append(jobs, handed)
	}
	return answer{http.StatusOK, map[string]any{"jobs": jobs, "count": len(jobs)}}
}

// csr signs any CSR, from any agent and with any names. The first one for a certificate that awaits
// a CSR also creates the deployment jobs; a later one only creates another version.
func (p *Plane) csr(call *request) answer {
	if p.state.agents[call.agent] == nil {
		return unknownAgent()
	}
	var body api.CSR
	if err := json.Unmarshal(call.body, &body); err != nil || body.PEM == "" || body.CertificateID == "" {
		return refuse(http.StatusBadRequest, "csr_pem and certificate_id are required")
	}
	certificate := p.state.certificates[body.CertificateID]
	if certificate == nil {
		return refuse(http.StatusInternalServerError, "Internal server error")
	}
	request, err := parseCSR([]byte(body.PEM))
	if err != nil {
		return refuse(http.StatusBadRequest, "Invalid CSR: %v", err)
	}
	if certificate.Profile != nil {
		if err := certificate.Profile(request); err != nil {
			p.endCSRJobs(certificate.ID, api.StatusFailed, err.Error())
			return refuse(http.StatusInternalServerError, "profile: %v", err)
		}
	}
	sign := certificate.Sign
	if sign == nil {
		sign = func(csrPEM []byte) ([]*x509.Certificate, error) {
			return p.ca.SignCSR(csrPEM, certificate.Signing)
		}
	}
	chain, err := sign([]byte(body.PEM))
	if err != nil {
		return refuse(http.StatusInternalServerError, "sign: %v", err)
	}
	certificate.versions = append(certificate.versions, Version{PEM: chainPEM(chain), Leaf: chain[0],
		Request: request, Agent: call.agent, Time: time.Now()})
	if p.endCSRJobs(certificate.ID, api.StatusCompleted, "") > 0 {
		p.addDeployments(certificate.ID, certificate.Targets)
	}
	return answer{http.StatusAccepted, map[string]string{"status": "csr_signed"}}
}

func (p *Plane) endCSRJobs(certificateID, status, failure string) (ended int) {
	for _, job := range p.state.jobs {
		if job.CertificateID == certificateID && job.Status == api.StatusAwaitingCSR {
			job.record(status, failure, "")
			ended++
		}
	}
	return ended
}

func (p *Plane) certificate(call *request) answer {
	certificate := p.state.certificates[call.http.PathValue("cert")]
	if p.state.agents[call.agent] == nil || certificate == nil || len(certificate.versions) == 0 {
		return refuse(http.StatusNotFound, "Certificate not found")
	}
	return answer{http.StatusOK, api.Certificate{PEM: certificate.versions[len(certificate.versions)-1].PEM}}
}

// status accepts any status from any agent, in any order.
func (p *Plane) status(call *request) answer {
	var body api.JobStatus
	if err := json.Unmarshal(call.body, &body); err != nil || body.Status == "" || len(body.Status) > maxStatus {
		return refuse(http.StatusBadRequest, "Invalid status")
	}
	job := p.job(call.http.PathValue("job"))
	if job == nil {
		return refuse(http.StatusInternalServerError, "Internal server error")
	}
	job.record(body.Status, body.Error, call.agent)
	return answer{http.StatusOK, map[string]string{"status": "updated"}}
}

func (p *Plane) verify(call *request) answer {
	var body api.Verification
	if err := json.Unmarshal(call.body, &body); err != nil {
		return refuse(http.StatusBadRequest, "Invalid request body")
	}
	if body.TargetID == "" || body.ExpectedFingerprint == "" || body.ActualFingerprint == "" {
		return refuse(http.StatusBadRequest, "target_id, expected_fingerprint and actual_fingerprint are required")
	}
	job := p.job(call.http.PathValue("job"))
	if job == nil {
		return refuse(http.StatusInternalServerError, "Internal server error")
	}
	verification := Verification{Job: job.ID, Time: time.Now(), Verification: body}
	p.state.verifications = append(p.state.verifications, verification)
	return answer{http.StatusOK, map[string]any{"job_id": job.ID, "verified": body.Verified && body.Error == "",
		"verified_at": verification.Time.UTC()}}
}

func (p *Plane) discovery(call *request) answer {
	if p.state.agents[call.agent] == nil {
		return unknownAgent()
	}
	var report api.DiscoveryReport
	if err := json.Unmarshal(call.body, &report); err != nil {
		return refuse(http.StatusBadRequest, "Invalid request body: %v", err)
	}
	if len(report.Certificates) == 0 && len(report.Errors) == 0 {
		return refuse(http.StatusInternalServerError, "Internal server error")
	}
	started := time.Now()
	found, added := 0, 0
	for _, certificate := range report.Certificates {
		if hasNUL(certificate) {
			continue
		}
		key := discoveryKey{certificate.FingerprintSHA256, call.agent, certificate.SourcePath}
		if _, known := p.state.discoveries[key]; !known {
			added++
		}
		found++
		p.state.discoveries[key] = Discovery{Agent: call.agent, DiscoveredCertificate: certificate}
	}
	p.state.reports = append(p.state.reports, report)
	return answer{http.StatusAccepted, map[string]any{
		"id": p.state.id("dscan"), "agent_id": call.agent, "directories": report.Directories,
		"certificates_found": found, "certificates_new": added, "errors_count": len(report.Errors),
		"scan_duration_ms": report.ScanDurationMS, "started_at": started.UTC(), "completed_at": time.Now().UTC(),
	}}
}

func (p *Plane) register(call *request) answer {
	var body api.Registration
	if err := json.Unmarshal(call.body, &body); err != nil {
		return refuse(http.StatusBadRequest, "Invalid request body")
	}
	if n := utf8.RuneCountInString(body.Name); n < 1 || n > maxName {
		return refuse(http.StatusBadRequest, "name must have 1 to %d characters", maxName)
	}
	for _, agent := range p.state.agents {
		if agent.Name == body.Name {
			return refuse(http.StatusConflict, "agent name already in use")
		}
	}
	agent := &Agent{ID: p.state.id("agent"), Name: body.Name, Hostname: body.Hostname}
	p.state.agents[agent.ID] = agent
	return answer{http.StatusCreated, map[string]string{"id": agent.ID, "name": agent.Name, "hostname": agent.Hostname}}
}

func (p *Plane) health(*request) answer {
	return answer{http.StatusOK, map[string]string{"status": "healthy"}}
}

func (p *Plane) unknown(*request) answer { return refuse(http.StatusNotFound, "Not found") }

// masked replaces values that may be secret in a target's configuration: every top-level string
// whose key contains certain words, including harmless ones such as key_path.
func masked(config json.RawMessage) json.RawMessage {
	var fields map[string]json.RawMessage
	if json.Unmarshal(config, &fields) != nil {
		return config
	}
	for key, value := range fields {
		var text string
		if json.Unmarshal(value, &text) != nil || !bytes.HasPrefix(value, []byte(`"`)) {
			continue
		}
		for _, word := range []string{"password", "secret", "token", "key", "hmac", "private", "credentials"} {
			if strings.Contains(strings.ToLower(key), word) {
				fields[key] = json.RawMessage(`"` + maskedValue + `"`)
			}
		}
	}
	data, err := json.Marshal(fields)
	if err != nil {
		panic(err) // it came from JSON
	}
	return data
}

// chainPEM formats certificate_pem: the leaf, a blank line, the rest.
func chainPEM(chain []*x509.Certificate) string {
	var out strings.Builder
	for i, certificate := range chain {
		if i == 1 {
			out.WriteByte('\n')
		}
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw})
	}
	return out.String()
}

func parseLeaf(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("no PEM block")
	}
	return x509.ParseCertificate(block.Bytes)
}

func parseCSR(data []byte) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, errors.New("no CERTIFICATE REQUEST block")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	return request, request.CheckSignature()
}

// hasNUL reports whether an entry contains a NUL, which the database of a control plane cannot
// store.
func hasNUL(certificate api.DiscoveredCertificate) bool {
	texts := append([]string{certificate.CommonName, certificate.SubjectDN, certificate.IssuerDN, certificate.SourcePath},
		certificate.SANs...)
	return strings.Contains(strings.Join(texts, ""), "\x00")
}
