// Package api defines the control plane's API: paths, JSON bodies and the meaning of errors. It has
// no network code: internal/controlplane is the client, internal/testing/devplane the test server.
package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Job types and statuses that the agent acts on. It ignores all others.
const (
	TypeIssuance   = "Issuance"
	TypeRenewal    = "Renewal"
	TypeDeployment = "Deployment"

	StatusAwaitingCSR = "AwaitingCSR"
	StatusRunning     = "Running"
	StatusCompleted   = "Completed"
	StatusFailed      = "Failed"
)

// Paths of the control plane. Identifiers in paths are escaped.
const (
	HealthPath   = "/health"
	RegisterPath = "/api/v1/agents"
)

// HeartbeatPath returns the path for heartbeats.
func HeartbeatPath(agent string) string { return agentPath(agent) + "/heartbeat" }

// WorkPath returns the path for polls.
func WorkPath(agent string) string { return agentPath(agent) + "/work" }

// CSRPath returns the path for certificate signing requests.
func CSRPath(agent string) string { return agentPath(agent) + "/csr" }

// DiscoveriesPath returns the path for discovery reports.
func DiscoveriesPath(agent string) string { return agentPath(agent) + "/discoveries" }

// CertificatePath returns the path of the latest version of a certificate.
func CertificatePath(agent, certificate string) string {
	return agentPath(agent) + "/certificates/" + url.PathEscape(certificate)
}

// JobStatusPath returns the path for status reports of a job.
func JobStatusPath(agent, job string) string {
	return agentPath(agent) + "/jobs/" + url.PathEscape(job) + "/status"
}

// VerifyPath returns the path for verifications. It is not below the agent's path.
func VerifyPath(job string) string { return "/api/v1/jobs/" + url.PathEscape(job) + "/verify" }

func agentPath(agent string) string { return "/api/v1/agents/" + url.PathEscape(agent) }

// Heartbeat is the body of a heartbeat. OS and Architecture are Go's GOOS and GOARCH.
type Heartbeat struct {
	Version      string `json:"version"`
	Hostname     string `json:"hostname"`
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	IPAddress    string `json:"ip_address"`
}

// Work is the answer to a poll.
type Work struct {
	Jobs  []Job `json:"jobs"`
	Count int   `json:"count"`

	// Malformed are the jobs that the agent must refuse. They are claimed too, so they do not make
	// the whole answer invalid.
	Malformed []MalformedJob `json:"-"`

	// Excess is how many jobs beyond MaxJobs were ignored.
	Excess int `json:"-"`
}

// MaxJobs bounds the jobs of one poll. No host has so many targets: a control plane that sends more
// is broken or hostile and must not fill this host's memory.
const MaxJobs = 10_000

// Bounds of a job, in bytes unless noted. The agent keeps a job in memory until it ends, so it
// refuses larger ones.
const (
	// maxJob bounds a job's JSON, and so the memory that decoding takes.
	maxJob = 256 << 10

	// maxNames is how many names a certificate may have. Public CAs allow 100.
	maxNames = 1000

	// maxNameBytes bounds all names of a job together.
	maxNameBytes = 64 << 10

	// maxTargetConfig allows for some certificates pasted into the configuration.
	maxTargetConfig = 64 << 10

	// maxField bounds each other field.
	maxField = 1 << 10
)

// MalformedJob is a job with a field that is too large or has the wrong type, or with an invalid
// id.
type MalformedJob struct {
	ID   ID     // "": invalid, so nothing can be reported
	Name string // the id as received, for the log
	Type string
	Err  error // why the job is refused; also reported to the control plane
}

// UnmarshalJSON decodes each job separately: all jobs of the answer are claimed, so a malformed one
// must not affect the others. It ignores a Count of the wrong type.
func (w *Work) UnmarshalJSON(data []byte) error {
	var raw struct {
		Jobs  jobList         `json:"jobs"`
		Count json.RawMessage `json:"count"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return err
	}
	// An error with status 200 must not pass for "no work".
	if !raw.Jobs.there && raw.Count == nil {
		return errors.New("it has neither jobs nor their count")
	}
	*w = raw.Jobs.work
	_ = json.Unmarshal(raw.Count, &w.Count) // 0 if it is not a number
	return nil
}

// jobList decodes the jobs in place, without a copy of the list, which may be large.
type jobList struct {
	work  Work // without its count
	there bool
}

func (l *jobList) UnmarshalJSON(data []byte) error {
	*l = jobList{there: true}
	if string(data) == "null" {
		return nil
	}
	list := json.NewDecoder(bytes.NewReader(data))
	if start, err := list.Token(); err != nil || start != json.Delim('[') {
		return errors.New("jobs is not a list")
	}
	w := &l.work
	var one json.RawMessage // reused
	for list.More() {
		if err := list.Decode(&one); err != nil {
			return err
		}
		if len(w.Jobs)+len(w.Malformed) >= MaxJobs {
			w.Excess++
			continue
		}
		job, name, err := decodeJob(one)
		if err != nil {
			w.Malformed = append(w.Malformed, MalformedJob{ID: job.ID, Name: clip(name), Type: clip(job.Type), Err: err})
			continue
		}
		w.Jobs = append(w.Jobs, job)
	}
	return nil
}

// Job is a job from the control plane.
type Job struct {
	ID            ID              `json:"id"`
	Type          string          `json:"type"`
	Status        string          `json:"status"`
	CertificateID ID              `json:"certificate_id"`
	CommonName    string          `json:"common_name,omitempty"`
	SANs          []string        `json:"sans,omitempty"`
	TargetID      ID              `json:"target_id,omitempty"`
	TargetType    string          `json:"target_type,omitempty"`
	TargetConfig  json.RawMessage `json:"target_config,omitempty"`
}

// UnmarshalJSON decodes the fields that the agent needs. It fails if a required id is missing or
// invalid.
func (j *Job) UnmarshalJSON(data []byte) (err error) {
	var raw rawJob
	if err = json.Unmarshal(data, &raw); err == nil {
		*j, err = raw.parse()
	}
	return err
}

// rawJob is a job whose ids are not checked yet: an invalid id must not prevent the other fields
// from being decoded.
type rawJob struct {
	jobFields
	ID            string `json:"id"`
	CertificateID string `json:"certificate_id"`
	TargetID      string `json:"target_id"`
}

type jobFields Job

// decodeJob decodes one job and checks its ids and bounds. The name is the id as received. The
// job's id, name and type are set even on an error, if they are known.
func decodeJob(data []byte) (job Job, name string, err error) {
	var raw rawJob
	if len(data) > maxJob {
		var named struct{ ID, Type string }
		_ = json.Unmarshal(data, &named) // continues after a field of the wrong type
		raw.ID, raw.Type = named.ID, named.Type
		err = fmt.Errorf("it has %d bytes; the limit is %d", len(data), maxJob)
	} else if err = json.Unmarshal(data, &raw); err == nil {
		err = raw.checkBounds()
	}
	job, invalid := raw.parse()
	if err != nil {
		return job, raw.ID, fmt.Errorf("the job could not be decoded: %w", err)
	}
	return job, raw.ID, invalid
}

// parse parses the ids. A missing or invalid id is an error only if the agent needs it.
func (r rawJob) parse() (Job, error) {
	job := Job(r.jobFields).needed()
	var invalid, certificate, target error
	job.ID, invalid = ParseID(r.ID)
	job.CertificateID, certificate = ParseID(r.CertificateID)
	job.TargetID, target = ParseID(r.TargetID)
	switch {
	case invalid != nil:
		return job, fmt.Errorf("the job %w", invalid)
	case certificate != nil && (job.AwaitsCSR() || job.IsDeployment()):
		return job, fmt.Errorf("the certificate %w", certificate)
	case target != nil && job.IsDeployment() && (r.TargetID != "" || job.TargetType != ""):
		return job, fmt.Errorf("the target %w", target)
	}
	return job, nil
}

func (r rawJob) checkBounds() error {
	for _, field := range []struct{ name, value string }{
		{"id", r.ID}, {"type", r.Type}, {"status", r.Status}, {"certificate_id", r.CertificateID},
		{"common_name", r.CommonName}, {"target_id", r.TargetID}, {"target_type", r.TargetType},
	} {
		if len(field.value) > maxField {
			return fmt.Errorf("its %s has %d bytes; the limit is %d", field.name, len(field.value), maxField)
		}
	}
	if len(r.TargetConfig) > maxTargetConfig {
		return fmt.Errorf("its target_config has %d bytes; the limit is %d", len(r.TargetConfig), maxTargetConfig)
	}
	if !Job(r.jobFields).AwaitsCSR() {
		return nil
	}
	if len(r.SANs) > maxNames {
		return fmt.Errorf("it has %d names (sans); the limit is %d", len(r.SANs), maxNames)
	}
	size := 0
	for _, name := range r.SANs {
		size += len(name)
	}
	if size > maxNameBytes {
		return fmt.Errorf("its names (sans) take %d bytes; the limit is %d", size, maxNameBytes)
	}
	return nil
}

// needed removes the fields that the agent does not need: a deployment's names are in its
// certificate, and a CSR has no target.
func (j Job) needed() Job {
	if j.AwaitsCSR() {
		j.TargetConfig, j.SANs = nil, slices.Clone(j.SANs) // frees unused capacity
	} else {
		j.CommonName, j.SANs = "", nil
	}
	return j
}

// clip bounds a field of a malformed job.
func clip(field string) string {
	return strings.Clone(field[:min(len(field), maxField)])
}

// AwaitsCSR reports whether the agent must make a key and submit a CSR.
func (j Job) AwaitsCSR() bool { return j.Status == StatusAwaitingCSR }

// IsDeployment reports whether the agent must install a certificate. A job that awaits a CSR is not
// a deployment, whatever its type.
func (j Job) IsDeployment() bool { return !j.AwaitsCSR() && j.Type == TypeDeployment }

// CSR asks for a certificate.
type CSR struct {
	PEM           string `json:"csr_pem"`
	CertificateID string `json:"certificate_id"`
}

// Certificate is the latest version of a certificate: leaf and chain as concatenated PEM. It never
// contains a private key.
type Certificate struct {
	PEM string `json:"certificate_pem"`
}

// JobStatus reports a job's progress. Error is empty unless Status is Failed.
type JobStatus struct {
	Status string `json:"status"`
	Error  string `json:"error,omitempty"`
}

// Verification reports which certificate an endpoint serves. The control plane answers 400 if the
// target or a fingerprint is empty. A non-empty Error means that the verification failed.
type Verification struct {
	TargetID            ID     `json:"target_id"`
	ExpectedFingerprint string `json:"expected_fingerprint"`
	ActualFingerprint   string `json:"actual_fingerprint"`
	Verified            bool   `json:"verified"`
	Error               string `json:"error"`
}

// Unreachable is the ActualFingerprint of an endpoint that did not answer.
const Unreachable = "unreachable"

// DiscoveryReport lists certificates found on this host. Certificates must not be nil: the control
// plane refuses a report with a null, as with any field of the wrong type.
type DiscoveryReport struct {
	AgentID        string                  `json:"agent_id"`
	Directories    []string                `json:"directories"`
	Certificates   []DiscoveredCertificate `json:"certificates"`
	Errors         []string                `json:"errors"`
	ScanDurationMS int64                   `json:"scan_duration_ms"`
}

// DiscoveredCertificate is one certificate in one file.
type DiscoveredCertificate struct {
	FingerprintSHA256 string   `json:"fingerprint_sha256"` // lower-case hex of the DER's digest
	CommonName        string   `json:"common_name"`
	SANs              []string `json:"sans"`          // DNS names, e-mail addresses, IP addresses, URIs; never nil
	SerialNumber      string   `json:"serial_number"` // lower-case hex, no leading zeros
	IssuerDN          string   `json:"issuer_dn"`     // RFC 2253, as pkix.Name.String
	SubjectDN         string   `json:"subject_dn"`
	NotBefore         string   `json:"not_before"` // RFC 3339, UTC
	NotAfter          string   `json:"not_after"`
	KeyAlgorithm      string   `json:"key_algorithm"`
	KeySize           int      `json:"key_size"`
	IsCA              bool     `json:"is_ca"`
	PEMData           string   `json:"pem_data"`
	SourcePath        string   `json:"source_path"`
	SourceFormat      string   `json:"source_format"`
}

// Registration asks for an agent record.
type Registration struct {
	Name     string `json:"name"` // 1 to 128 characters
	Hostname string `json:"hostname"`
}

// Agent is the answer to a registration.
type Agent struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
}
