// Package deploy carries out one Deployment job, from fetch to verdict: it
// decides in what order things happen. How a product takes its certificate is
// its connector's business, and how keys are kept the key store's.
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

// maxError bounds what the control plane is told of a failure, in bytes.
const maxError = 2 << 10

// Plane is the control plane as a deployment uses it. Errors mean what package
// api says of them.
type Plane interface {
	Certificate(ctx context.Context, certID api.ID) ([]byte, error)
	ReportStatus(ctx context.Context, jobID api.ID, status api.JobStatus) error
}

// Keys is the key store as a deployment uses it. Find fails with
// keystore.ErrNoKey where none of the keys belongs to the certificate.
type Keys interface {
	Path(certID api.ID) string
	Find(certID api.ID, public crypto.PublicKey) (keystore.Key, error)
	Promotion(certID api.ID, key keystore.Key) ([]keystore.Change, error)
	Promote(certID api.ID, key keystore.Key) error
	Prune(certID api.ID, deployed keystore.Key) error
}

// Engine carries out what connectors propose.
type Engine interface {
	// Settle makes sure that no interrupted deployment can undo, later, what one
	// to the target does with the key. An error holds the deployment back.
	Settle(ctx context.Context, targetID api.ID, keyPath string) error

	// Deploy is that of transaction.Engine.
	Deploy(ctx context.Context, d transaction.Deployment) (transaction.Result, error)
}

// Options is what a Deployer needs.
type Options struct {
	Plane    Plane
	Keys     Keys
	Engine   Engine
	Types    []connector.Type
	Overlays targetconf.Overlays
	Host     connector.Host // lent to connectors, but for the log, which each job has its own of
	Verify   bool           // report what the live endpoint serves

	// Probe asks an endpoint for its certificate. Nil: tlsprobe.Probe.
	Probe func(context.Context, tlsprobe.Endpoint) (tlsprobe.Result, error)
}

// Outcome is the verdict on a job.
type Outcome struct {
	Status       string            // api.StatusCompleted or api.StatusFailed
	Error        string            // what failed, printable and bounded
	Broken       bool              // failed, and the target may not be as it was: it needs a person
	Unchanged    bool              // everything was in place
	Verification *api.Verification // what the live endpoint serves; nil: no report

	// RunningUnanswered: it was, or may have been, reported that the job runs,
	// and no answer came, so the control plane may hear of it after the verdict.
	// Set beside an error, too.
	RunningUnanswered bool

	// Of the certificate; zero where the job ended before it was known.
	CommonName  string
	NotAfter    time.Time
	Fingerprint string // lower-case hex SHA-256 of the leaf

	Duration time.Duration
}

// Deployer carries out Deployment jobs. It is safe for concurrent use, for jobs
// that differ in target and certificate; see Turn.
type Deployer struct{ o Options }

// Turn is what the caller of Deploy holds for a job. The zero value is that of
// a caller who runs one job at a time.
type Turn struct {
	// Share is called when the job's certificate is no longer the job's alone:
	// its key is the current one. Until then no other job of the certificate
	// may begin, since a version fetched before a newer one was promoted would
	// take the promotion back. It may be called more than once.
	Share func()

	// Yield is called to wait for others; see transaction.Yield. Size is what the
	// job holds in memory meanwhile, in bytes.
	Yield func(size int, wait func(context.Context) error) error
}

// New returns a Deployer.
func New(o Options) *Deployer {
	if o.Probe == nil {
		o.Probe = tlsprobe.Probe
	}
	return &Deployer{o: o}
}

// temporaryError leaves a job as it was, to be tried again.
type temporaryError struct{ error }

func (e temporaryError) Unwrap() error { return e.error }

// panicError is a panic in this package or in a connector.
type panicError struct{ value any }

func (e *panicError) Error() string { return fmt.Sprintf("internal error of the agent: %v", e.value) }

// Deploy carries out one job. Calls ends when the agent stops: it bounds
// requests and waiting. Work bounds the transaction, which is rolled back when
// it ends. An error is temporary: nothing was touched, and the job is to be
// tried again.
func (d *Deployer) Deploy(calls, work context.Context, job api.Job, turn Turn) (Outcome, error) {
	began := time.Now()
	if turn.Share == nil {
		turn.Share = func() {}
	}
	if turn.Yield == nil {
		turn.Yield = func(_ int, wait func(context.Context) error) error { return wait(calls) }
	}
	log := d.o.Host.Log.With("job", job.ID, "certificate", job.CertificateID, "target", job.TargetID)
	a := &attempt{Deployer: d, job: job, turn: turn, log: log}
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
	turn      Turn
	log       *slog.Logger
	config    *targetconf.Config
	connector connector.Connector // nil: nothing to install
	serves    *tlsprobe.Endpoint  // where what was installed can be seen; nil: nowhere
	size      int                 // of the certificate in memory, in bytes, roughly
	outcome   Outcome
}

// ownSize is the memory that a deployment takes whatever its certificate:
// stacks, what it knows of the server, directories that it has open.
const ownSize = 64 << 10

// yield waits for others.
func (a *attempt) yield(wait func(context.Context) error) error {
	return a.turn.Yield(ownSize+a.size, wait)
}

// run is Deploy in its order. Nothing is touched before install.
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
		a.turn.Share()
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
	a.turn.Share()
	a.outcome.Verification = a.verify(work, m.Leaf)
	return nil
}

// settle ends what earlier transactions left, before the key is looked for: to
// undo one can make another key the current one.
func (a *attempt) settle(ctx context.Context) error {
	if a.job.TargetID == "" {
		return nil
	}
	if err := a.o.Engine.Settle(ctx, a.job.TargetID, a.o.Keys.Path(a.job.CertificateID)); err != nil {
		return temporaryError{err}
	}
	return nil
}

// reportRunning tells the control plane, once: it has set the job to Running
// itself, so nothing depends on it.
func (a *attempt) reportRunning(ctx context.Context) {
	err := a.o.Plane.ReportStatus(ctx, a.job.ID, api.JobStatus{Status: api.StatusRunning})
	if err == nil {
		return
	}
	a.log.Debug("the control plane was not told that the job runs", "error", err)
	status, answered := errors.AsType[*api.StatusError](err)
	a.outcome.RunningUnanswered = !answered || status.Status >= 500 // a gateway's answer says nothing of what is behind it
}

// install has the engine carry out what the connector proposes, of which the
// promotion of the key is a part.
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
