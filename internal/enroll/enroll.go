// Package enroll carries out AwaitingCSR jobs: it makes a key for the job, or finds the one made
// before, and submits a CSR for it until the control plane accepts or refuses the CSR.
package enroll

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"

	"certctl-agent/internal/api"
	"certctl-agent/internal/csr"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/printable"
)

// maxRSA bounds the number of RSA keys that are generated at the same time, because each may keep a
// core busy for seconds. CSRs that have a key already do not wait.
const maxRSA = 2

// maxReason bounds the error text that is reported to the control plane, in bytes.
const maxReason = 2 << 10

// ErrKey means that the key store could not make or store a key. Nothing was sent to the control
// plane.
var ErrKey = errors.New("no key for the CSR")

// Keys is the key store as an Enroller uses it.
type Keys interface {
	Pending(certID, jobID api.ID, generate func() (crypto.Signer, error)) (keystore.Key, error)
	Discard(certID, jobID api.ID) error
}

// Plane is the control plane as an Enroller uses it. Package api defines what its errors mean.
type Plane interface {
	SubmitCSR(ctx context.Context, certID api.ID, csrPEM []byte) error
}

// RefusedError means that a job has failed permanently: a retry cannot help.
type RefusedError struct {
	Reason string // for the control plane: printable, bounded
	Err    error
}

func (e *RefusedError) Error() string { return e.Reason }

// Unwrap returns the cause.
func (e *RefusedError) Unwrap() error { return e.Err }

func refused(err error) *RefusedError {
	return &RefusedError{Reason: printable.Line(err.Error(), maxReason), Err: err}
}

// Options configures an Enroller.
type Options struct {
	Keys      Keys
	Plane     Plane
	Algorithm string // of new keys, one of csr.Algorithms
	Log       *slog.Logger
}

// Enroller carries out AwaitingCSR jobs. It is safe for concurrent use by jobs of different
// certificates. Jobs of the same certificate must not race, because the control plane signs the
// first CSR that it gets.
type Enroller struct {
	opts Options
	make func(algorithm string) (crypto.Signer, error)
	rsa  chan struct{} // one element for each RSA key that is being generated
}

// New returns an Enroller.
func New(opts Options) *Enroller {
	return &Enroller{opts: opts, make: csr.GenerateKey, rsa: make(chan struct{}, maxRSA)}
}

// Enroll submits the CSR of one job. It returns nil if the CSR was accepted, and a RefusedError if
// it never will be. Any other error is temporary: the control plane lists the job again, and the
// next try uses the same key. calls ends when the agent stops, and nothing new is begun then. work
// bounds a request in progress.
func (e *Enroller) Enroll(calls, work context.Context, job api.Job) (err error) {
	defer func() {
		if p := recover(); p != nil {
			e.opts.Log.Error("panic contained; please report it", "job", job.ID, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = refused(fmt.Errorf("internal error of the agent: %v", p))
		}
	}()
	if err := csr.Check(job.CommonName, job.SANs); err != nil {
		return refused(err)
	}
	key, err := e.opts.Keys.Pending(job.CertificateID, job.ID, func() (crypto.Signer, error) { return e.generate(calls) })
	if err != nil {
		return fmt.Errorf("%w: %w", ErrKey, err)
	}
	key.Clear() // only the signer is needed
	request, err := csr.New(key.Signer, job.CommonName, job.SANs)
	if err != nil {
		return e.refuse(job, key, err)
	}
	if calls.Err() != nil {
		return context.Cause(calls)
	}
	err = e.opts.Plane.SubmitCSR(work, job.CertificateID, request)
	if err != nil && !api.Temporary(err) {
		return e.refuse(job, key, err)
	}
	return err
}

// generate generates a key. At most maxRSA calls generate RSA keys at the same time.
func (e *Enroller) generate(ctx context.Context) (crypto.Signer, error) {
	if strings.HasPrefix(e.opts.Algorithm, "rsa-") {
		select {
		case e.rsa <- struct{}{}:
			defer func() { <-e.rsa }()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return e.make(e.opts.Algorithm)
}

// refuse ends a job whose CSR was not accepted, and returns a RefusedError.
func (e *Enroller) refuse(job api.Job, key keystore.Key, cause error) error {
	// A CSR for the key of an earlier try may have been signed and the answer lost. So only a key
	// that was made for this request can be discarded.
	if key.Fresh {
		if err := e.opts.Keys.Discard(job.CertificateID, job.ID); err != nil {
			e.opts.Log.Warn("the key of a refused CSR could not be removed", "job", job.ID, "certificate", job.CertificateID, "error", err)
		}
	}
	return refused(cause)
}
