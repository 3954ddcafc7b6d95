// Package status reports the state of a running agent: snapshots of its loop, served over a unix
// socket and as metrics, and its readiness.
package status

import (
	"fmt"
	"time"

	"certctl-agent/internal/api"
)

// Snapshot is the state of the agent at one moment, as its loop sees it. Times of events that have
// not happened are zero. It contains no secrets.
type Snapshot struct {
	Version string    `json:"version"`
	Commit  string    `json:"commit,omitempty"`
	AgentID string    `json:"agent_id"`
	Server  string    `json:"server"`
	Started time.Time `json:"started"`
	Taken   time.Time `json:"taken"` // when the loop answered

	// Activities by name; the first three are the loop's own.
	Activities map[string]Activity `json:"activities"`

	Jobs Jobs `json:"jobs"`

	// Certificates are the installed certificates, one per target.
	Certificates []Certificate `json:"certificates"`

	LastScan Scan     `json:"last_scan,omitzero"`
	Counters Counters `json:"counters"`

	// ClockSkewSeconds is how far the control plane's clock is ahead of this
	// host's.
	ClockSkewSeconds float64 `json:"clock_skew_seconds"`

	// Warnings are current warnings for the operator, in sentences.
	Warnings []string `json:"warnings,omitempty"`
}

// Names of activities.
const (
	Heartbeat = "heartbeat"
	Poll      = "poll"
	Discovery = "discovery"
	Delivery  = "delivery" // of reports to the control plane
)

type Activity struct {
	Running         bool      `json:"running,omitempty"`
	LastAttempt     time.Time `json:"last_attempt,omitzero"`
	LastSuccess     time.Time `json:"last_success,omitzero"`
	LastError       string    `json:"last_error,omitempty"`      // "" after a success
	LastErrorKind   string    `json:"last_error_kind,omitempty"` // in one word
	Failures        int       `json:"consecutive_failures"`
	NextDue         time.Time `json:"next_due,omitzero"`
	IntervalSeconds float64   `json:"interval_seconds,omitempty"` // as configured
}

// Jobs counts the agent's unfinished jobs.
type Jobs struct {
	Running     int `json:"running"`     // deployments under way
	Waiting     int `json:"waiting"`     // deployments claimed, not started
	CSRs        int `json:"csrs"`        // certificate requests under way
	Undelivered int `json:"undelivered"` // jobs whose outcome the control plane does not know yet
}

// Certificate is what the last successful deployment installed on a target.
type Certificate struct {
	TargetID      api.ID    `json:"target_id"`
	TargetType    string    `json:"target_type"`
	CertificateID api.ID    `json:"certificate_id"`
	CommonName    string    `json:"common_name"`
	Fingerprint   string    `json:"fingerprint_sha256"` // lower-case hex
	NotAfter      time.Time `json:"not_after"`
	DeployedAt    time.Time `json:"deployed_at"`
}

// Scan is the last discovery scan of this host's disks.
type Scan struct {
	Ended           time.Time `json:"ended"`
	DurationSeconds float64   `json:"duration_seconds"`
	Files           int       `json:"files"`
	Certificates    int       `json:"certificates"` // found; the same one at two paths counts twice
	Reported        int       `json:"reported"`     // of these, accepted by the control plane
	Refused         int       `json:"refused"`      // of these, refused permanently
	Errors          int       `json:"errors"`       // files that could not be read or parsed
	Error           string    `json:"error,omitempty"`
}

// contact returns when the control plane last accepted a heartbeat or a poll.
func (s Snapshot) contact() time.Time {
	contact := s.Activities[Heartbeat].LastSuccess
	if poll := s.Activities[Poll].LastSuccess; poll.After(contact) {
		return poll
	}
	return contact
}

// missedIntervals is how many heartbeats may fail before an agent is not ready.
const missedIntervals = 5

// Ready decides a readiness probe: it returns nil, or the reason why the agent is not ready. A
// liveness probe only needs an answer from Get: an outage of the control plane must not restart the
// fleet.
func Ready(s Snapshot) error {
	contact, beat := s.contact(), s.Activities[Heartbeat]
	since := "since the start"
	if !contact.IsZero() {
		age := s.Taken.Sub(contact)
		if age <= missedIntervals*time.Duration(beat.IntervalSeconds*float64(time.Second)) {
			return nil
		}
		since = "for " + age.Round(time.Second).String()
	}
	if beat.LastError != "" {
		since += ": " + beat.LastError
	}
	return fmt.Errorf("not ready: no contact with %s %s", s.Server, since)
}
