// Package deploy carries out one Deployment job, from fetching the certificate to the outcome. It
// decides the order of the steps. Connectors know how a product takes a certificate, the key store
// knows how keys are kept, and package transaction makes the changes.
package deploy

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/tlsprobe"
	"certctl-agent/internal/transaction"
)

// maxError bounds the error text that is reported to the control plane, in bytes.
const maxError = 2 << 10

// Plane is the control plane as a deployment uses it. Package api defines what its errors mean.
type Plane interface {
	Certificate(ctx context.Context, certID api.ID) ([]byte, error)
	ReportStatus(ctx context.Context, jobID api.ID, status api.JobStatus) error
}

// Keys is the key store as a deployment uses it. Find returns keystore.ErrNoKey if none of the keys
// belongs to the certificate.
type Keys interface {
	Path(certID api.ID) string
	Find(certID api.ID, public crypto.PublicKey) (keystore.Key, error)
	Promotion(certID api.ID, key keystore.Key) ([]keystore.Change, error)
	Promote(certID api.ID, key keystore.Key) error
	Prune(certID api.ID, deployed keystore.Key) error
}

// Engine carries out the plans of connectors; see transaction.Engine.
type Engine interface {
	// Settle recovers interrupted deployments whose rollback could later take back what this one
	// does to the target or the key. If it fails, the deployment must be retried later.
	Settle(ctx context.Context, targetID api.ID, keyPath string) error

	Deploy(ctx context.Context, d transaction.Deployment) (transaction.Result, error)
}

// Options configures a Deployer.
type Options struct {
	Plane    Plane
	Keys     Keys
	Engine   Engine
	Types    []connector.Type
	Overlays targetconf.Overlays
	Host     connector.Host // for the connectors; each job gets its own Log
	Verify   bool           // report what the live endpoint serves

	// Probe asks an endpoint for its certificate. The default is tlsprobe.Probe.
	Probe func(context.Context, tlsprobe.Endpoint) (tlsprobe.Result, error)
}

// Outcome is the result of a job.
type Outcome struct {
	Status       string            // api.StatusCompleted or api.StatusFailed
	Error        string            // what failed, printable and bounded
	Broken       bool              // the target may not be as it was before: it needs attention
	Unchanged    bool              // everything was up to date
	Verification *api.Verification // what the live endpoint serves; nil: no report

	// RunningUnanswered is set if the status Running was sent, but not answered. The control plane
	// may then process it after the final status. It is also set if Deploy returns an error.
	RunningUnanswered bool

	// Of the certificate; zero if the job ended before the certificate was fetched.
	CommonName  string
	NotAfter    time.Time
	Fingerprint string // lower-case hex SHA-256 of the leaf

	Duration time.Duration
}

// Deployer carries out Deployment jobs. It is safe for concurrent use by jobs that differ in target
// and certificate; see Holds.
type Deployer struct{ o Options }

// Holds is what the caller of Deploy holds for a job: its certificate and a slot. Its functions give
// them back early. The zero value is for a caller that runs one job at a time.
type Holds struct {
	// ReleaseCertificate is called once the key of the job's certificate is current, perhaps more
	// than once. Until then no other job of the certificate may begin: it could fetch an older
	// version of the certificate and then promote its key over the newer one.
	ReleaseCertificate func()

	// Yield is called to wait for other jobs, without the slot; see transaction.Yield. size is the
	// memory that the job needs during the wait, in bytes.
	Yield func(size int, wait func(context.Context) error) error
}

// New returns a Deployer.
func New(o Options) *Deployer {
	if o.Probe == nil {
		o.Probe = tlsprobe.Probe
	}
	return &Deployer{o: o}
}

// temporaryError means that nothing was touched and that the job should be retried.
type temporaryError struct{ error }

func (e temporaryError) Unwrap() error { return e.error }

// panicError is a panic in this package or in a connector.
type panicError struct{ value any }

func (e *panicError) Error() string { return fmt.Sprintf("internal error of the agent: %v", e.value) }

// Deploy carries out one job. calls ends when the agent stops, and bounds requests and waiting.
// work bounds the transaction, which is rolled back when work ends. If Deploy returns an error,
// nothing was touched and the job should be retried. Any other failure is in the Outcome.
func (d *Deployer) Deploy(calls, work context.Context, job api.Job, holds Holds) (Outcome, error) {
	began := time.Now()
	if holds.ReleaseCertificate == nil {
		holds.ReleaseCertificate = func() {}
	}
	if holds.Yield == nil {
		holds.Yield = func(_ int, wait func(context.Context) error) error { return wait(calls) }
	}
	log := d.o.Host.Log.With("job", job.ID, "certificate", job.CertificateID, "target", job.TargetID)
	a := &attempt{Deployer: d, job: job, holds: holds, log: log}
	err := a.run(calls, work)
	if temporary, ok := errors.AsType[temporaryError](err); ok {
		return Outcome{RunningUnanswered: a.outcome.RunningUnanswered}, temporary.error
	}
	a.outcome.Duration = time.Since(began)
	a.outcome.Status = api.StatusCompleted
	if err != nil {
		_, broken := errors.AsType[*transaction.BrokenError](err)
		_, panicked := errors.AsType[*panicError](err)
		a.outcome.Status = api.StatusFailed
		a.outcome.Broken = broken || panicked
		a.outcome.Error = printable.Line(err.Error(), maxError)
	}
	return a.outcome, nil
}

// attempt is one run of one job.
type attempt struct {
	*Deployer
	job       api.Job
	holds     Holds
	log       *slog.Logger
	config    *targetconf.Config
	connector connector.Connector // nil: nothing to install
	serves    *tlsprobe.Endpoint  // where the server can be probed; nil: nowhere
	size      int                 // of the certificate in memory, roughly, in bytes
	outcome   Outcome
}

// ownSize estimates the memory of a deployment apart from its certificate, in bytes: stacks, the
// server's configuration, open directories.
const ownSize = 64 << 10

// yield waits for other jobs.
func (a *attempt) yield(wait func(context.Context) error) error {
	return a.holds.Yield(ownSize+a.size, wait)
}

// run carries out the steps of Deploy in their order. Nothing is touched before install.
func (a *attempt) run(calls, work context.Context) (err error) {
	defer func() {
		if p := recover(); p != nil {
			a.log.Error("panic contained; please report it", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = &panicError{p}
		}
	}()
	if err := a.settle(calls); err != nil {
		return err
	}
	a.reportRunning(calls)
	if err := a.prepare(); err != nil {
		return err
	}
	m, err := a.fetch(calls)
	if err != nil {
		return err
	}
	key, err := a.findKey(m)
	if err != nil {
		return err
	}
	defer key.Clear()
	if key.Role == keystore.Current {
		a.holds.ReleaseCertificate()
	}
	if err := a.checkValidity(m.Leaf); err != nil {
		return err
	}
	if calls.Err() != nil {
		return temporaryError{context.Cause(calls)}
	}
	if err := a.install(work, m, key); err != nil {
		return err
	}
	if err := a.o.Keys.Prune(a.job.CertificateID, key); err != nil {
		a.log.Warn("keys that are no longer needed could not be removed", "error", err)
	}
	a.holds.ReleaseCertificate()
	a.outcome.Verification = a.verify(work, m.Leaf)
	return nil
}

// settle recovers interrupted deployments before the key is looked up, because a rollback can
// change which key is current.
func (a *attempt) settle(ctx context.Context) error {
	if a.job.TargetID == "" {
		return nil
	}
	if err := a.o.Engine.Settle(ctx, a.job.TargetID, a.o.Keys.Path(a.job.CertificateID)); err != nil {
		return temporaryError{err}
	}
	return nil
}

// reportRunning reports the job as Running, once. Nothing depends on this report, because the
// control plane has set that status itself.
func (a *attempt) reportRunning(ctx context.Context) {
	err := a.o.Plane.ReportStatus(ctx, a.job.ID, api.JobStatus{Status: api.StatusRunning})
	if err == nil {
		return
	}
	a.log.Debug("the status Running could not be reported", "error", err)
	status, answered := errors.AsType[*api.StatusError](err)
	a.outcome.RunningUnanswered = !answered || status.Status >= 500 // a gateway may answer while the request is still on its way
}

// install has the engine carry out the connector's plan, together with the promotion of the key.
func (a *attempt) install(ctx context.Context, m *connector.Material, key keystore.Key) error {
	if a.connector == nil {
		return a.o.Keys.Promote(a.job.CertificateID, key)
	}
	promotion, err := a.o.Keys.Promotion(a.job.CertificateID, key)
	if err != nil {
		return err
	}
	for _, change := range promotion {
		defer clear(change.Data)
	}
	defer connector.Close(a.connector, a.log)
	common := &a.config.Common
	result, err := a.o.Engine.Deploy(ctx, transaction.Deployment{
		Target:     a.job.TargetID,
		Connector:  a.connector,
		Material:   m,
		Promotion:  promotion,
		Verify:     common.Verifier(m.Leaf),
		Backups:    common.Retention,
		ReplaceAny: common.ReplaceAny,
		Yield:      a.yield,
	})
	for _, warning := range result.Warnings {
		a.warn(warning)
	}
	a.serves = result.Serves
	a.outcome.Unchanged = err == nil && result.Unchanged
	if _, busy := errors.AsType[*transaction.BusyError](err); busy {
		return temporaryError{err}
	}
	return err
}

func (a *attempt) warn(warning string) {
	a.log.Warn("the deployment has a warning", "warning", warning)
}
