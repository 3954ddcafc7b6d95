package devplane

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/testca"
)

// StatusPending is the status of a deployment that no agent has claimed.
const StatusPending = "Pending"

// maxRequests bounds the log of requests. The oldest ones are dropped.
const maxRequests = 10_000

// state is the data of a control plane. Plane.mu guards it.
type state struct {
	serial        int
	agents        map[string]*Agent
	targets       map[string]*Target
	certificates  map[string]*Certificate
	jobs          []*Job // in order of creation
	heartbeats    []Heartbeat
	verifications []Verification
	reports       []api.DiscoveryReport
	discoveries   map[discoveryKey]Discovery
	requests      []Request
	logged        int            // number of requests, including dropped ones
	counts        map[string]int // answered or cut requests, by call
	faults        []*Fault
	problems      []string
}

type discoveryKey struct{ fingerprint, agent, path string }

func newState() state {
	return state{
		agents:       map[string]*Agent{},
		targets:      map[string]*Target{},
		certificates: map[string]*Certificate{},
		discoveries:  map[discoveryKey]Discovery{},
		counts:       map[string]int{},
	}
}

func (s *state) id(kind string) string {
	s.serial++
	return fmt.Sprintf("%s-%d", kind, s.serial)
}

// Agent is an agent's record.
type Agent struct {
	ID       string
	Name     string
	Hostname string
	Retired  bool
	LastSeen time.Time // last accepted heartbeat
}

// Target is a place for certificates. Config marshals to a JSON object.
type Target struct {
	ID     string // empty: generated
	Agent  string
	Type   string
	Config any
}

// Certificate is a managed certificate.
type Certificate struct {
	ID         string // empty: generated
	CommonName string
	SANs       []string
	Targets    []string // ids; their agents get the CSR job
	Agents     []string // get the CSR job without having a target

	// Profile may refuse a CSR: with a 500, after the job has failed. Like Sign, it must not call
	// methods of the Plane. May be nil.
	Profile func(*x509.CertificateRequest) error

	// Signing sets validity and length of the chain.
	Signing testca.CSROptions

	// Sign replaces the CA. It returns the chain, leaf first. May be nil.
	Sign func(csrPEM []byte) ([]*x509.Certificate, error)

	versions []Version
}

// Version is one version of a certificate.
type Version struct {
	PEM     string
	Leaf    *x509.Certificate        // nil if PEM is not a certificate
	Request *x509.CertificateRequest // nil unless created from a CSR
	Agent   string                   // sender of the CSR
	Time    time.Time
}

// PublicKey returns the version's key, or nil if PEM is not a certificate.
func (v Version) PublicKey() crypto.PublicKey {
	if v.Leaf == nil {
		return nil
	}
	return v.Leaf.PublicKey
}

// WireJob is a job as an agent gets it. Unlike in api.Job, ids are arbitrary strings, since control
// planes accept those.
type WireJob struct {
	ID            string          `json:"id"`
	Type          string          `json:"type"`
	Status        string          `json:"status"`
	CertificateID string          `json:"certificate_id"`
	CommonName    string          `json:"common_name,omitempty"`
	SANs          []string        `json:"sans,omitempty"`
	TargetID      string          `json:"target_id,omitempty"`
	TargetType    string          `json:"target_type,omitempty"`
	TargetConfig  json.RawMessage `json:"target_config,omitempty"`
}

// Job is a job with its history.
type Job struct {
	WireJob
	Error   string
	Handed  int // how many polls returned it
	History []Event
}

// Event is a change of a job.
type Event struct {
	Time   time.Time
	Status string
	Error  string
	Agent  string // reported it; empty: the control plane itself
}

// Heartbeat is an accepted heartbeat.
type Heartbeat struct {
	Agent string
	Time  time.Time
	api.Heartbeat
}

// Verification is an accepted verification.
type Verification struct {
	Job  string
	Time time.Time
	api.Verification
}

// Discovery is a certificate found on a host.
type Discovery struct {
	Agent string
	api.DiscoveredCertificate
}

// RegisterAgent creates an agent record and returns its id.
func (p *Plane) RegisterAgent(name string) string { return p.AddAgent("", name) }

// AddAgent creates an agent record with the given id; if that is empty, with a generated one.
func (p *Plane) AddAgent(id, name string) string {
	p.update(func() {
		if id == "" {
			id = p.state.id("agent")
		}
		p.state.agents[id] = &Agent{ID: id, Name: name}
	})
	return id
}

// AddTarget adds or replaces a target and returns its id.
func (p *Plane) AddTarget(target Target) string {
	p.update(func() {
		if target.ID == "" {
			target.ID = p.state.id("target")
		}
		p.state.targets[target.ID] = &target
	})
	return target.ID
}

// AddCertificate adds a certificate and returns its id. It replaces a certificate with the same id
// but keeps its versions.
func (p *Plane) AddCertificate(certificate Certificate) string {
	p.update(func() {
		if certificate.ID == "" {
			certificate.ID = p.state.id("cert")
		}
		if old := p.state.certificates[certificate.ID]; old != nil {
			certificate.versions = old.versions
		}
		p.state.certificates[certificate.ID] = &certificate
	})
	return certificate.ID
}

// AddVersion makes pem the latest version of a certificate. It need not be valid.
func (p *Plane) AddVersion(certificateID, pem string) {
	version := Version{PEM: pem, Time: time.Now()}
	version.Leaf, _ = parseLeaf([]byte(pem))
	p.update(func() {
		certificate := p.mustCertificate(certificateID)
		certificate.versions = append(certificate.versions, version)
	})
}

// StartIssuance creates an Issuance job that awaits a CSR, and returns its id.
func (p *Plane) StartIssuance(certificateID string) string {
	return p.startCSR(api.TypeIssuance, certificateID)
}

// StartRenewal creates a Renewal job that awaits a CSR, and returns its id.
func (p *Plane) StartRenewal(certificateID string) string {
	return p.startCSR(api.TypeRenewal, certificateID)
}

func (p *Plane) startCSR(kind, certificateID string) string {
	var id string
	p.update(func() {
		certificate := p.mustCertificate(certificateID)
		id = p.addJob(WireJob{Type: kind, Status: api.StatusAwaitingCSR, CertificateID: certificateID,
			CommonName: certificate.CommonName, SANs: slices.Clone(certificate.SANs)})
	})
	return id
}

// Redeploy creates Deployment jobs for all targets of a certificate, or for the given ones, and
// returns their ids.
func (p *Plane) Redeploy(certificateID string, targets ...string) []string {
	var ids []string
	p.update(func() {
		if len(targets) == 0 {
			targets = p.mustCertificate(certificateID).Targets
		}
		ids = p.addDeployments(certificateID, targets)
	})
	return ids
}

// AddJob adds any job, even one that no real control plane would create, and returns its id. The
// job goes to the agent of its target, or to those of its certificate. An empty id is generated.
func (p *Plane) AddJob(job WireJob) string {
	p.update(func() { job.ID = p.addJob(job) })
	return job.ID
}

func (p *Plane) addDeployments(certificateID string, targets []string) []string {
	var ids []string
	for _, target := range targets {
		ids = append(ids, p.addJob(WireJob{Type: api.TypeDeployment, Status: StatusPending,
			CertificateID: certificateID, TargetID: target}))
	}
	return ids
}

func (p *Plane) addJob(job WireJob) string {
	if job.ID == "" {
		job.ID = p.state.id("job")
	}
	added := &Job{WireJob: job}
	added.record(job.Status, "", "")
	p.state.jobs = append(p.state.jobs, added)
	return job.ID
}

func (j *Job) record(status, failure, agent string) {
	j.Status, j.Error = status, failure
	j.History = append(j.History, Event{Time: time.Now(), Status: status, Error: failure, Agent: agent})
}

// Requeue makes a job pending again, finished or not, under the same id.
func (p *Plane) Requeue(jobID string) {
	p.update(func() {
		job := p.job(jobID)
		if job == nil {
			panic("devplane: no job " + jobID)
		}
		job.record(StatusPending, "", "")
	})
}

// Forget drops what is only kept for tests to inspect: requests, heartbeats, verifications,
// reports, finished jobs, and old versions. It is for long tests that measure memory.
func (p *Plane) Forget() {
	p.update(func() {
		s := &p.state
		s.heartbeats, s.verifications, s.reports, s.requests = nil, nil, nil, nil
		clear(s.discoveries)
		s.jobs = slices.DeleteFunc(s.jobs, func(job *Job) bool {
			return job.Status == api.StatusCompleted || job.Status == api.StatusFailed
		})
		for _, certificate := range s.certificates {
			if n := len(certificate.versions); n > 1 {
				certificate.versions = slices.Clone(certificate.versions[n-1:])
			}
		}
	})
}

// Retire retires an agent.
func (p *Plane) Retire(agent string) { p.setRetired(agent, true) }

// Unretire undoes Retire.
func (p *Plane) Unretire(agent string) { p.setRetired(agent, false) }

func (p *Plane) setRetired(agent string, retired bool) {
	p.update(func() {
		record := p.state.agents[agent]
		if record == nil {
			panic("devplane: no agent " + agent)
		}
		record.Retired = retired
	})
}

// mustCertificate panics if the certificate does not exist.
func (p *Plane) mustCertificate(id string) *Certificate {
	certificate := p.state.certificates[id]
	if certificate == nil {
		panic("devplane: no certificate " + id)
	}
	return certificate
}

// job returns the latest job with the id, or nil.
func (p *Plane) job(id string) *Job {
	for _, job := range slices.Backward(p.state.jobs) {
		if job.ID == id {
			return job
		}
	}
	return nil
}

// isFor reports whether an agent gets a job.
func (p *Plane) isFor(job *Job, agent string) bool {
	if target := p.state.targets[job.TargetID]; target != nil {
		return target.Agent == agent
	}
	certificate := p.state.certificates[job.CertificateID]
	if certificate == nil {
		return true
	}
	return slices.Contains(certificate.Agents, agent) ||
		slices.ContainsFunc(certificate.Targets, func(id string) bool {
			target := p.state.targets[id]
			return target != nil && target.Agent == agent
		})
}

// snapshot returns a copy that the caller may keep.
func (j *Job) snapshot() Job {
	c := *j
	c.History = slices.Clone(j.History)
	return c
}

// Agents returns the agent records, ordered by id.
func (p *Plane) Agents() []Agent {
	return locked(p, func() []Agent {
		var agents []Agent
		for _, id := range slices.Sorted(maps.Keys(p.state.agents)) {
			agents = append(agents, *p.state.agents[id])
		}
		return agents
	})
}

// Jobs returns the jobs in the order of creation.
func (p *Plane) Jobs() []Job {
	return locked(p, func() []Job {
		jobs := make([]Job, len(p.state.jobs))
		for i, job := range p.state.jobs {
			jobs[i] = job.snapshot()
		}
		return jobs
	})
}

// Deployments returns the Deployment jobs of a certificate.
func (p *Plane) Deployments(certificateID string) []Job {
	return slices.DeleteFunc(p.Jobs(), func(job Job) bool {
		return job.Type != api.TypeDeployment || job.CertificateID != certificateID
	})
}

// Job returns a job by its id.
func (p *Plane) Job(id string) (Job, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	job := p.job(id)
	if job == nil {
		return Job{}, false
	}
	return job.snapshot(), true
}

// Versions returns the versions of a certificate, the latest last.
func (p *Plane) Versions(certificateID string) []Version {
	return locked(p, func() []Version { return slices.Clone(p.mustCertificate(certificateID).versions) })
}

// Heartbeats returns the accepted heartbeats.
func (p *Plane) Heartbeats() []Heartbeat {
	return locked(p, func() []Heartbeat { return slices.Clone(p.state.heartbeats) })
}

// Verifications returns the accepted verifications.
func (p *Plane) Verifications() []Verification {
	return locked(p, func() []Verification { return slices.Clone(p.state.verifications) })
}

// Reports returns the accepted discovery reports.
func (p *Plane) Reports() []api.DiscoveryReport {
	return locked(p, func() []api.DiscoveryReport { return slices.Clone(p.state.reports) })
}

// Discoveries returns the certificates of all reports, each combination of fingerprint, agent and
// path once, ordered by path.
func (p *Plane) Discoveries() []Discovery {
	return locked(p, func() []Discovery {
		return slices.SortedFunc(maps.Values(p.state.discoveries), func(a, b Discovery) int {
			return slices.Compare([]string{a.SourcePath, a.FingerprintSHA256, a.Agent},
				[]string{b.SourcePath, b.FingerprintSHA256, b.Agent})
		})
	})
}

// Requests returns the latest requests.
func (p *Plane) Requests() []Request {
	return locked(p, func() []Request { return slices.Clone(p.state.requests) })
}

// Count returns the number of requests of a call, or of all calls for "".
func (p *Plane) Count(call string) int {
	return locked(p, func() int {
		if call != "" {
			return p.state.counts[call]
		}
		total := 0
		for _, n := range p.state.counts {
			total += n
		}
		return total
	})
}

// Problems returns the violations of docs/protocol.md, even those that a control plane accepts.
func (p *Plane) Problems() []string {
	return locked(p, func() []string { return slices.Clone(p.state.problems) })
}

func locked[T any](p *Plane, read func() T) T {
	p.mu.Lock()
	defer p.mu.Unlock()
	return read()
}

// targetConfig returns the configuration as agents get it.
func targetConfig(config any, mask bool) json.RawMessage {
	if config == nil {
		return nil
	}
	data, err := json.Marshal(config)
	if err != nil {
		panic("devplane: target config: " + err.Error()) // a bug of the test
	}
	if mask {
		return masked(data)
	}
	return data
}
