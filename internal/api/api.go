// Package api holds what the agent and its control plane say to each other:
// the JSON bodies, the paths, and what each refusal means. It has no network
// code; internal/controlplane speaks it and internal/testing/devplane answers it.
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

// Job types and statuses the agent acts on. Others exist and are ignored.
const (
	TypeIssuance   = "Issuance"
	TypeRenewal    = "Renewal"
	TypeDeployment = "Deployment"

	StatusAwaitingCSR = "AwaitingCSR"
	StatusRunning     = "Running"
	StatusCompleted   = "Completed"
	StatusFailed      = "Failed"
)

// Paths of the control plane. Every identifier is escaped as one path segment.
const (
	HealthPath   = "/health"
	RegisterPath = "/api/v1/agents"
)

// HeartbeatPath is where an agent says that it is alive.
func HeartbeatPath(agent string) string { return agentPath(agent) + "/heartbeat" }

// WorkPath is where an agent claims work.
func WorkPath(agent string) string { return agentPath(agent) + "/work" }

// CSRPath is where an agent submits certificate signing requests.
func CSRPath(agent string) string { return agentPath(agent) + "/csr" }

// DiscoveriesPath is where an agent reports certificates found on disk.
func DiscoveriesPath(agent string) string { return agentPath(agent) + "/discoveries" }

// CertificatePath is the latest version of a certificate.
func CertificatePath(agent, certificate string) string {
	return agentPath(agent) + "/certificates/" + url.PathEscape(certificate)
}

// JobStatusPath takes a job's progress.
func JobStatusPath(agent, job string) string {
	return agentPath(agent) + "/jobs/" + url.PathEscape(job) + "/status"
}

// VerifyPath takes the outcome of a live check. It is not below the agent.
func VerifyPath(job string) string { return "/api/v1/jobs/" + url.PathEscape(job) + "/verify" }

func agentPath(agent string) string { return "/api/v1/agents/" + url.PathEscape(agent) }

// Heartbeat says that the agent is alive, and on what. OS and Architecture are
// Go's GOOS and GOARCH.
type Heartbeat struct {
	Version      string `json:"version"`
	Hostname     string `json:"hostname"`
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	IPAddress    string `json:"ip_address"`
}

// Work is the answer to a poll. A nil Jobs means the same as an empty one.
type Work struct {
	Jobs  []Job `json:"jobs"`
	Count int   `json:"count"`

	// Malformed are the jobs that cannot be carried out as they came. Each was
	// claimed all the same, so it is kept apart and does not take the others with
	// it.
	Malformed []MalformedJob `json:"-"`

	// Excess is how many jobs were left out because the answer held more than
	// MaxJobs.
	Excess int `json:"-"`
}

// MaxJobs is how many jobs of one poll are looked at. No host has as many
// targets; a control plane that sends more is broken or hostile, and must not
// fill this host's memory.
const MaxJobs = 10_000

// Bounds of a job, in bytes unless said otherwise. What is kept of a job is
// kept until it ends, so a job over one of them is refused.
const (
	// maxJob is for the whole job as it came: it bounds what decoding it takes.
	maxJob = 256 << 10

	// maxNames is how many names a certificate can have. Public CAs stop at 100.
	maxNames = 1000

	// maxNameBytes is for a job's names together.
	maxNameBytes = 64 << 10

	// maxTargetConfig holds what an operator writes in a form field, with some
	// certificates pasted into it.
	maxTargetConfig = 64 << 10

	// maxField is for each other field.
	maxField = 1 << 10
)

// MalformedJob is a job whose fields have other types than they should, are too
// large, or are ids that are not valid.
type MalformedJob struct {
	ID   ID     // "": the job has none that is valid, so nothing can be reported
	Name string // its id as it came, for the log
	Type string
	Err  error // says for the control plane, too, why the job is refused
}

// UnmarshalJSON decodes job by job: the control plane counts every job of the
// answer as handed out, so one that is damaged must not cost the others. Nor
// does a count of another type, which nothing depends on.
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
		return errors.New("it holds neither jobs nor their count")
	}
	*w = raw.Jobs.work
	_ = json.Unmarshal(raw.Count, &w.Count) // 0 where it is no number
	return nil
}

// jobList is decoded where it stands in the answer, which may be large: a copy
// of it would be, too.
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
	var one json.RawMessage // its memory serves again
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

// Job is a piece of work as the control plane hands it out.
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

// UnmarshalJSON decodes what the agent needs of a job, which has every id that
// it needs.
func (j *Job) UnmarshalJSON(data []byte) (err error) {
	var raw rawJob
	if err = json.Unmarshal(data, &raw); err == nil {
		*j, err = raw.parse()
	}
	return err
}

// rawJob is a job with its ids as they came: one that is not valid must not
// keep the others, nor the job's type, from being decoded.
type rawJob struct {
	jobFields
	ID            string `json:"id"`
	CertificateID string `json:"certificate_id"`
	TargetID      string `json:"target_id"`
}

type jobFields Job

// decodeJob decodes one job and checks its ids and bounds. Its id, its name,
// which is the id as it came, and its type are there beside an error too, where
// they can be told.
func decodeJob(data []byte) (job Job, name string, err error) {
	var raw rawJob
	if len(data) > maxJob {
		var named struct{ ID, Type string }
		_ = json.Unmarshal(data, &named) // goes on past a field of the wrong type
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

// parse makes types of the ids. One that is not valid, or missing, is an error
// only where the agent needs it.
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

// needed is the job without what nothing is done with: a deployment's names are
// in its certificate, and a CSR is for no target.
func (j Job) needed() Job {
	if j.AwaitsCSR() {
		j.TargetConfig, j.SANs = nil, slices.Clone(j.SANs) // decoding leaves room for as many again
	} else {
		j.CommonName, j.SANs = "", nil
	}
	return j
}

// clip bounds a field of a job that is refused.
func clip(field string) string {
	return strings.Clone(field[:min(len(field), maxField)])
}

// AwaitsCSR reports whether the agent has to make a key and submit a CSR.
func (j Job) AwaitsCSR() bool { return j.Status == StatusAwaitingCSR }

// IsDeployment reports whether the agent has to install a certificate. A job
// that awaits a CSR is none, whatever its type.
func (j Job) IsDeployment() bool { return !j.AwaitsCSR() && j.Type == TypeDeployment }

// CSR asks for a certificate.
type CSR struct {
	PEM           string `json:"csr_pem"`
	CertificateID string `json:"certificate_id"`
}

// Certificate is the latest version of a certificate: the leaf, then its
// chain, concatenated PEM. It never holds a private key.
type Certificate struct {
	PEM string `json:"certificate_pem"`
}

// JobStatus reports a job's progress. Error is absent unless Status is Failed.
type JobStatus struct {
	Status string `json:"status"`
	Error  string `json:"error,omitempty"`
}

// Verification reports what a live endpoint serves. The control plane refuses
// it with 400 when the target or a fingerprint is empty; a non-empty Error
// marks the verification failed.
type Verification struct {
	TargetID            ID     `json:"target_id"`
	ExpectedFingerprint string `json:"expected_fingerprint"`
	ActualFingerprint   string `json:"actual_fingerprint"`
	Verified            bool   `json:"verified"`
	Error               string `json:"error"`
}

// Unreachable stands for the fingerprint of an endpoint that did not answer.
const Unreachable = "unreachable"

// DiscoveryReport lists certificates found on this host. Certificates is never
// nil: one field of a wrong type, null included, has the whole report refused.
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

// Agent is what registration answers; ID is the agent id.
type Agent struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
}
