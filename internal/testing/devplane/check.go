package devplane

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"certctl-agent/internal/api"
)

// maxReport bounds the size of discovery reports, in bytes.
const maxReport = 512 << 10

var userAgent = regexp.MustCompile(`^certctl-agent/\S+ \([a-z0-9]+/[a-z0-9]+\)$`)

// check records how a request violates the protocol, even if the request is accepted. Plane.mu must
// be held.
func (p *Plane) check(call *request) {
	for _, err := range p.violations(call) {
		p.state.problems = append(p.state.problems, fmt.Sprintf("%s %s %s: %v", call.logID, call.http.Method,
			call.http.URL.EscapedPath(), err))
	}
}

func (p *Plane) violations(call *request) (problems []error) {
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if got := call.http.Header.Get("User-Agent"); !userAgent.MatchString(got) {
		problem("User-Agent is %q", got)
	}
	if got := call.http.Header.Get("Content-Type"); got != "application/json" {
		problem("Content-Type is %q", got)
	}
	if call.call == CallHealth && call.http.Header.Get("Authorization") != "" {
		problem("the key was sent although it is not needed")
	}
	if bytes.Contains(call.body, []byte("PRIVATE KEY")) {
		problem("the body contains a private key")
	}
	if call.http.Method == http.MethodGet && len(call.body) > 0 {
		problem("a GET has a body")
	}
	switch call.call {
	case CallUnknown:
		problem("no such call")
	case CallHeartbeat:
		strict(call.body, new(api.Heartbeat), problem)
	case CallCSR:
		strict(call.body, new(api.CSR), problem)
	case CallRegister:
		strict(call.body, new(api.Registration), problem)
	case CallVerify:
		strict(call.body, new(api.Verification), problem)
	case CallStatus:
		var status api.JobStatus
		strict(call.body, &status, problem)
		p.checkStatus(call, status, problem)
	case CallDiscoveries:
		var report api.DiscoveryReport
		strict(call.body, &report, problem)
		checkReport(call, report, problem)
	}
	return problems
}

type problemFunc func(format string, args ...any)

// strict decodes a body, which must not have fields unknown to v.
func strict(body []byte, v any, problem problemFunc) {
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(v); err != nil {
		problem("body: %w", err)
	}
}

// checkStatus checks that an agent reports Running and then one final status, each time that it
// gets a job. It may repeat the final status, since the answer may have been lost.
func (p *Plane) checkStatus(call *request, status api.JobStatus, problem problemFunc) {
	switch status.Status {
	case api.StatusRunning, api.StatusCompleted:
		if status.Error != "" {
			problem("%s with an error", status.Status)
		}
	case api.StatusFailed:
		if status.Error == "" {
			problem("Failed without an error")
		}
	default:
		problem("status %q", status.Status)
	}
	job := p.job(call.http.PathValue("job"))
	if job == nil {
		problem("a report for a job that does not exist")
		return
	}
	if job.Handed == 0 || !p.isFor(job, call.agent) {
		problem("a report for a job that the agent was not handed")
	}
	if last := job.History[len(job.History)-1]; last.Agent != "" &&
		(last.Status == api.StatusCompleted || last.Status == api.StatusFailed) && last.Status != status.Status {
		problem("%s after %s", status.Status, last.Status)
	}
}

func checkReport(call *request, report api.DiscoveryReport, problem problemFunc) {
	if len(call.body) >= maxReport {
		problem("a report of %d bytes", len(call.body))
	}
	if report.AgentID != call.agent {
		problem("agent_id %q", report.AgentID)
	}
	if report.Certificates == nil {
		problem("certificates is null")
	}
	for _, found := range report.Certificates {
		if err := checkFound(found); err != nil {
			problem("%s: %w", found.SourcePath, err)
		}
	}
}

func checkFound(found api.DiscoveredCertificate) error {
	certificate, err := parseLeaf([]byte(found.PEMData))
	if err != nil {
		return fmt.Errorf("pem_data: %w", err)
	}
	sum := sha256.Sum256(certificate.Raw)
	switch {
	case found.FingerprintSHA256 != hex.EncodeToString(sum[:]):
		return errors.New("fingerprint_sha256 is not that of pem_data")
	case found.SANs == nil:
		return errors.New("sans is null")
	case found.SerialNumber != certificate.SerialNumber.Text(16):
		return errors.New("serial_number is not that of pem_data")
	case hasNUL(found):
		return errors.New("a NUL in a name")
	case !strings.HasPrefix(found.SourcePath, "/"):
		return errors.New("source_path is not absolute")
	case !slices.Contains([]string{"PEM", "DER", "PKCS12", "JKS", "PKCS7"}, found.SourceFormat):
		return fmt.Errorf("source_format %q", found.SourceFormat)
	}
	return nil
}
