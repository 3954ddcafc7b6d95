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

// StatusPending is a job that nobody was handed.
const StatusPending = "Pending"

// maxRequests bounds the log of requests; the oldest go first.
const maxRequests = 10_000

// state is what a control plane knows. Plane.mu guards it.
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
	logged        int            // requests, those that left the log included
	counts        map[string]int // answered or cut, by call
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
	LastSeen time.Time // of the last heartbeat that was accepted
}

// Target is where certificates are installed. Config is a JSON object or what
// marshals to one.
type Target struct {
	ID     string // empty: made up
	Agent  string
	Type   string
	Config any
}

// Certificate is what is kept valid.
type Certificate struct {
	ID         string // empty: made up
	CommonName string
	SANs       []string
	Targets    []string // ids; their agents are asked for the CSR
	Agents     []string // asked for the CSR without having a target

	// Profile, when set, can refuse a CSR: 500, with the job already failed.
	// Like Sign, it must not call a method of the Plane that locks.
	Profile func(*x509.CertificateRequest) error

	// Signing says how the CA signs: validity and length of the chain.
	Signing testca.CSROptions

	// Sign, when set, makes the chain in place of the CA, leaf first.
	Sign func(csrPEM []byte) ([]*x509.Certificate, error)

	versions []Version
}

// Version is a certificate as it was signed once.
type Version struct {
	PEM     string
	Leaf    *x509.Certificate        // nil where PEM is no certificate
	Request *x509.CertificateRequest // nil unless made from a CSR
	Agent   string                   // who sent it
	Time    time.Time
}

// PublicKey is the version's key; nil where PEM is no certificate.
func (v Version) PublicKey() crypto.PublicKey {
	if v.Leaf == nil {
		return nil
	}
	return v.Leaf.PublicKey
}

// WireJob is a job as it is handed out. Unlike those of api.Job, its ids are any
// strings: control planes accept them.
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

// Job is a job with what became of it.
type Job struct {
	WireJob
	Error   string
	Handed  int // times it was in a poll's answer
	History []Event
}

// Event is a change of a job.
type Event struct {
	Time   time.Time
	Status string
	Error  string
	Agent  string // who reported it; empty: the control plane itself
}

// Heartbeat is a heartbeat that was accepted.
type Heartbeat struct {
	Agent string
	Time  time.Time
	api.Heartbeat
}

// Verification is a report on what a live endpoint serves.
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

// RegisterAgent makes an agent record and returns its id.
func (p *Plane) RegisterAgent(name string) string { return p.AddAgent("", name) }

// AddAgent makes an agent record with a given id; empty means made up.
func (p *Plane) AddAgent(id, name string) string {
	p.update(func() {
		if id == "" {
			id = p.state.id("agent")
		}
		p.state.agents[id] = &Agent{ID: id, Name: name}
	})
	return id
}

// AddTarget adds a target and returns its id. One of the same id is replaced.
func (p *Plane) AddTarget(target Target) string {
	p.update(func() {
		if target.ID == "" {
			target.ID = p.state.id("target")
		}
		p.state.targets[target.ID] = &target
	})
	return target.ID
}

// AddCertificate adds a certificate and returns its id. One of the same id is
// replaced but keeps its versions.
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

// AddVersion makes pem the latest version of a certificate, whatever it is.
func (p *Plane) AddVersion(certificateID, pem string) {
	version := Version{PEM: pem, Time: time.Now()}
	version.Leaf, _ = parseLeaf([]byte(pem))
	p.update(func() {
		certificate := p.mustCertificate(certificateID)
		certificate.versions = append(certificate.versions, version)
	})
}

// StartIssuance makes a job that awaits a CSR, and returns its id.
func (p *Plane) StartIssuance(certificateID string) string {
	return p.startCSR(api.TypeIssuance, certificateID)
}

// StartRenewal is StartIssuance with a job of the other type.
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

// Redeploy makes a Deployment job of the latest version for each target of a
// certificate, or for the given ones, and returns their ids.
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

// AddJob adds a job as it is, for jobs that no control plane should hand out:
// it goes to the agent of its target, or to those of its certificate. An empty
// id is made up.
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

// Requeue has a job, finished or not, handed out again under the same id.
func (p *Plane) Requeue(jobID string) {
	p.update(func() {
		job := p.job(jobID)
		if job == nil {
			panic("devplane: no job " + jobID)
		}
		job.record(StatusPending, "", "")
	})
}

// Forget drops what is kept only for tests to look at: requests, heartbeats,
// verifications, reports, jobs that have ended, all versions but the latest.
// For tests that watch memory for long.
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

// Retire marks an agent retired.
func (p *Plane) Retire(agent string) { p.setRetired(agent, true) }

// Unretire takes Retire back.
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

// mustCertificate is for methods whose caller has made the certificate.
func (p *Plane) mustCertificate(id string) *Certificate {
	certificate := p.state.certificates[id]
	if certificate == nil {
		panic("devplane: no certificate " + id)
	}
	return certificate
}

// job returns the latest job of an id.
func (p *Plane) job(id string) *Job {
	for _, job := range slices.Backward(p.state.jobs) {
		if job.ID == id {
			return job
		}
	}
	return nil
}

// isFor reports whether an agent is handed a job.
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

// snapshot is a copy that the caller may keep.
func (j *Job) snapshot() Job {
	c := *j
	c.History = slices.Clone(j.History)
	return c
}

// Agents lists the agent records, in order of their ids.
func (p *Plane) Agents() []Agent {
	return locked(p, func() []Agent {
		var agents []Agent
		for _, id := range slices.Sorted(maps.Keys(p.state.agents)) {
			agents = append(agents, *p.state.agents[id])
		}
		return agents
	})
}

// Jobs lists the jobs in order of their creation.
func (p *Plane) Jobs() []Job {
	return locked(p, func() []Job {
		jobs := make([]Job, len(p.state.jobs))
		for i, job := range p.state.jobs {
			jobs[i] = job.snapshot()
		}
		return jobs
	})
}

// Deployments lists the Deployment jobs of a certificate.
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

// Versions lists the versions of a certificate, the latest last.
func (p *Plane) Versions(certificateID string) []Version {
	return locked(p, func() []Version { return slices.Clone(p.mustCertificate(certificateID).versions) })
}

// Heartbeats lists the heartbeats that were accepted.
func (p *Plane) Heartbeats() []Heartbeat {
	return locked(p, func() []Heartbeat { return slices.Clone(p.state.heartbeats) })
}

// Verifications lists the verifications that were accepted.
func (p *Plane) Verifications() []Verification {
	return locked(p, func() []Verification { return slices.Clone(p.state.verifications) })
}

// Reports lists the discovery reports that were accepted.
func (p *Plane) Reports() []api.DiscoveryReport {
	return locked(p, func() []api.DiscoveryReport { return slices.Clone(p.state.reports) })
}

// Discoveries lists the certificates of all reports, each (fingerprint, agent,
// path) once, in order of the path.
func (p *Plane) Discoveries() []Discovery {
	return locked(p, func() []Discovery {
		return slices.SortedFunc(maps.Values(p.state.discoveries), func(a, b Discovery) int {
			return slices.Compare([]string{a.SourcePath, a.FingerprintSHA256, a.Agent},
				[]string{b.SourcePath, b.FingerprintSHA256, b.Agent})
		})
	})
}

// Requests lists the latest requests.
func (p *Plane) Requests() []Request {
	return locked(p, func() []Request { return slices.Clone(p.state.requests) })
}

// Count is how many requests a call has had; "" means all calls.
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

// Problems lists what requests have done against docs/protocol.md, though a
// control plane may have accepted it.
func (p *Plane) Problems() []string {
	return locked(p, func() []string { return slices.Clone(p.state.problems) })
}

func locked[T any](p *Plane, read func() T) T {
	p.mu.Lock()
	defer p.mu.Unlock()
	return read()
}

// targetConfig is the configuration as it is handed out.
func targetConfig(config any, mask bool) json.RawMessage {
	if config == nil {
		return nil
	}
	data, err := json.Marshal(config)
	if err != nil {
		panic("devplane: target config: " + err.Error()) // made by the test
	}
	if mask {
		return masked(data)
	}
	return data
}
