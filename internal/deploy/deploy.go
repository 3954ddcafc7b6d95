// Package deploy carries out one Deployment job, from fetch to verdict.
package deploy

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/target"
)

// Plane is the control plane as a deployment uses it. Errors mean what package
// api says of them.
type Plane interface {
	Certificate(ctx context.Context, certID string) ([]byte, error)
	ReportStatus(ctx context.Context, jobID string, status api.JobStatus) error
}

// Keys is the key store as a deployment uses it.
type Keys interface {
	Path(certID string) string
	Find(certID string, public crypto.PublicKey) (keystore.Key, error)
	Promotion(certID string, key keystore.Key) ([]keystore.Change, error)
	Promote(certID string, key keystore.Key) error
	Prune(certID string, deployed keystore.Key) error
}

// Options is what a Deployer needs.
type Options struct {
	Plane      Plane
	Keys       Keys
	Connectors map[string]target.Factory // by target type
	Overlays   *target.Overlays
	Policy     *target.Policy
	Verify     bool // report what the live endpoint serves
	Log        *slog.Logger

	// Heard is told each error of a report that Deploy itself does not act on,
	// so that a 410 is not lost. Nil: nobody listens.
	Heard func(call string, err error)
}

// Outcome is the verdict on a job.
type Outcome struct {
	Status       string            // api.StatusCompleted or api.StatusFailed
	Error        string            // what failed, printable and bounded
	Broken       bool              // failed and not rolled back: the target needs a person
	Unchanged    bool              // everything was in place
	Verification *api.Verification // what the live endpoint serves; nil: no report

	CommonName  string // of the certificate, as far as it got
	NotAfter    time.Time
	Fingerprint string
	Duration    time.Duration
}

// Deployer carries out Deployment jobs.
type Deployer struct{ o Options }

// New returns a Deployer.
func New(o Options) *Deployer { return &Deployer{o: o} }

// Deploy carries out one job. Calls ends when the agent stops: it bounds
// requests and waiting. Work bounds the transaction, which is rolled back when
// it ends. An error is temporary: nothing was begun, and the job is to be tried
// again.
func (d *Deployer) Deploy(calls, work context.Context, job api.Job) (Outcome, error) {
	return Outcome{}, errors.New("not there yet")
}
