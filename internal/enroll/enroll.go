// Package enroll takes one AwaitingCSR job from key to accepted CSR.
package enroll

import (
	"context"
	"errors"
	"log/slog"

	"certctl-agent/internal/api"
	"certctl-agent/internal/keystore"
)

// Keys is the key store as enrolment uses it.
type Keys interface {
	Pending(certID, jobID, algorithm string) (keystore.Key, error)
	Discard(certID, jobID string) error
}

// Plane signs CSRs. Errors mean what package api says of them.
type Plane interface {
	SubmitCSR(ctx context.Context, certID string, csrPEM []byte) error
}

// RefusedError is the end of a job: trying again cannot help.
type RefusedError struct {
	Reason string // for the control plane: printable, bounded
}

func (e *RefusedError) Error() string { return e.Reason }

// Options is what an Enroller needs.
type Options struct {
	Keys      Keys
	Plane     Plane
	Algorithm string // of new keys, one of csr.Algorithms
	Log       *slog.Logger
}

// Enroller handles AwaitingCSR jobs.
type Enroller struct{ o Options }

// New returns an Enroller.
func New(o Options) *Enroller { return &Enroller{o: o} }

// Enroll submits the CSR of one job. Nil means that it was accepted, a
// RefusedError that it never will be; any other error is temporary.
func (e *Enroller) Enroll(ctx context.Context, job api.Job) error {
	return errors.New("not there yet")
}
