// Package enroll takes one AwaitingCSR job from key to accepted CSR.
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

// maxRSA bounds the RSA keys that are made at once: each is up to seconds of a
// core. CSRs whose keys are there do not wait for them.
const maxRSA = 2

// maxReason bounds the reason that is reported to the control plane, in bytes.
const maxReason = 2 << 10

// ErrKey means that the key store could not make or keep a key: the control
// plane was not asked.
var ErrKey = errors.New("no key for the CSR")

// Keys is the key store as enrolment uses it.
type Keys interface {
	Pending(certID, jobID api.ID, generate func() (crypto.Signer, error)) (keystore.Key, error)
	Discard(certID, jobID api.ID) error
}

// Plane has CSRs signed. Errors mean what package api says of them.
type Plane interface {
	SubmitCSR(ctx context.Context, certID api.ID, csrPEM []byte) error
}

// RefusedError is the end of a job: trying again cannot help.
type RefusedError struct {
	Reason string // for the control plane: printable, bounded
	Err    error
}

func (e *RefusedError) Error() string { return e.Reason }

// Unwrap gives the cause.
func (e *RefusedError) Unwrap() error { return e.Err }

func refused(err error) *RefusedError {
	return &RefusedError{Reason: printable.Line(err.Error(), maxReason), Err: err}
}

// Options is what an Enroller needs.
type Options struct {
	Keys      Keys
	Plane     Plane
	Algorithm string // of new keys, one of csr.Algorithms
	Log       *slog.Logger
}

// Enroller handles AwaitingCSR jobs. It is safe for concurrent use, for jobs
// that differ in certificate: the first CSR wins, so those of one certificate
// must not race.
type Enroller struct {
	opts Options
	make func(algorithm string) (crypto.Signer, error)
	rsa  chan struct{} // one element for each RSA key that is being made
}

// New returns an Enroller.
func New(opts Options) *Enroller {
	return &Enroller{opts: opts, make: csr.GenerateKey, rsa: make(chan struct{}, maxRSA)}
}

// Enroll submits the CSR of one job. Nil means that it was accepted, a
// RefusedError that it never will be. Any other error is temporary: the job
// stays as it is, the control plane shows it again, and the same key is used.
// Calls ends when the agent stops: nothing new is begun then. Work bounds a
// request that is under way.
func (e *Enroller) Enroll(calls, work context.Context, job api.Job) (err error) {
	defer func() {
		if p := recover(); p != nil {
			e.opts.Log.Error("panic contained; please report it", "job", job.ID, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = refused(fmt.Errorf("internal error of the agent: %v", p))
		}
	}()
	// Before any key is made.
	if err := csr.Check(job.CommonName, job.SANs); err != nil {
		return refused(err)
	}
	key, err := e.opts.Keys.Pending(job.CertificateID, job.ID, func() (crypto.Signer, error) { return e.generate(calls) })
	if err != nil {
		return fmt.Errorf("%w: %w", ErrKey, err)
	}
	key.Clear() // the signer is all that is needed
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

// generate makes a key.
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

// refuse ends a job whose CSR was not signed.
func (e *Enroller) refuse(job api.Job, key keystore.Key, cause error) error {
	// The key of an earlier try may have been signed: its answer may have been
	// lost. Only one that this very request was the first to use was not.
	if key.Fresh {
		if err := e.opts.Keys.Discard(job.CertificateID, job.ID); err != nil {
			e.opts.Log.Warn("the key of a refused CSR could not be removed", "job", job.ID, "certificate", job.CertificateID, "error", err)
		}
	}
	return refused(cause)
}
