// Package connector is the contract between a Deployment job and the connector
// that carries it out.
package connector

import (
	"context"
	"crypto/x509"
	"io/fs"
	"log/slog"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// A Connector installs certificates on one target. One is made for each job
// and used once.
type Connector interface {
	// Deploy installs m as one transaction. When it returns an error, the
	// target is as it was before, unless the error says that it needs a person
	// (BrokenError). A cancelled context rolls back.
	Deploy(ctx context.Context, m *Material) (Result, error)
}

// A Factory makes the connector of one target type. It checks the whole
// configuration and touches nothing.
type Factory func(Params) (Connector, error)

// Params is what every connector is made from.
type Params struct {
	TargetID string
	Config   *targetconf.Config // the job's configuration under the host's overlays
	Common   targetconf.Common  // the part of it that all types share
	Policy   *policy.Policy     // what may be written and run here
	Log      *slog.Logger

	// Query runs a command that changes nothing and returns what it printed.
	// Connectors ask the server itself with it which key it reads. Nil: nobody
	// can be asked.
	Query func(ctx context.Context, c policy.Command) (stdout []byte, err error)

	Yield Yield // nil: this deployment holds nothing that others need
}

// A Yield calls wait, which waits for other deployments, and gives others this
// deployment's place meanwhile. The context that wait gets ends when the agent
// stops: a deployment that only waits has nothing to finish. The error is
// wait's, or says that the place could not be had again.
type Yield func(wait func(context.Context) error) error

// Result says what a successful deployment did.
type Result struct {
	Unchanged bool     // everything was in place: nothing written, nothing reloaded
	Warnings  []string // for the log, one line each
}

// Material is what a deployment installs.
type Material struct {
	CertificateID string
	Leaf          *x509.Certificate
	Chain         []*x509.Certificate // in issuing order, without the leaf; may be empty
	KeyPEM        []byte              // the private key of Leaf, as the key store holds it

	// KeyPath is the file in the agent's own key store that holds the key once
	// this transaction is done. Servers may read it directly.
	KeyPath string

	// KeyFiles make a pending key the current one. They are part of the
	// transaction that installs its certificate and are undone with it. Empty
	// when the key is current already.
	KeyFiles []File
}

// A Kind says what a file holds.
type Kind int

// The kinds of File.
const (
	CertificateFile Kind = iota // public
	KeyFile                     // holds a private key, perhaps beside certificates
	ConfigFile                  // written for a server to read, such as Envoy's sds.json
	StoreFile                   // a file of the agent's own key store, exempt from policy.Policy
)

// Secret reports whether a file of this kind holds a private key.
func (k Kind) Secret() bool { return k == KeyFile || k == StoreFile }

// File is one destination of a transaction. Mode, owner and group come from
// the configuration when set, else from the file that is there, else from
// DefaultMode and the agent's own user.
type File struct {
	Path        string // absolute
	Kind        Kind
	Data        []byte
	Mode        *fs.FileMode // nil: not configured
	DefaultMode fs.FileMode
	Owner       string // user name or number; "": not configured
	Group       string

	// Written reports whether a ConfigFile that is there is an earlier one of
	// the same connector, which may be replaced. Nil: none is.
	Written func(old []byte) bool

	// Keep puts a file that is there in place once more with the bytes that it
	// has, for a server that watches it. Data is not used.
	Keep bool

	// KeepOthers puts the PEM blocks of the file that is there which are neither
	// certificates nor keys, such as DH PARAMETERS, behind Data.
	KeepOthers bool
}

// NewFile is the destination at path with the mode and owner that are configured
// for it.
func NewFile(path targetconf.Path, kind Kind, data []byte, o targetconf.FileOptions) File {
	f := File{Path: string(path), Kind: kind, Data: data, DefaultMode: 0o644, Owner: string(o.Owner), Group: string(o.Group)}
	if kind.Secret() {
		f.DefaultMode = 0o600
	}
	if o.Mode != 0 {
		f.Mode = new(fs.FileMode(o.Mode))
	}
	return f
}

// BusyError means that a deployment did not begin because others have not
// ended. Nothing was touched, and another try may succeed.
type BusyError struct{ Err error }

func (e *BusyError) Error() string { return e.Err.Error() }

func (e *BusyError) Unwrap() error { return e.Err }

// BrokenError is a failed rollback: the target needs a person.
type BrokenError struct {
	Cause    error  // what failed first
	Rollback error  // what failed while undoing it
	Backups  string // directory that holds the old files
}

func (e *BrokenError) Error() string {
	return e.Cause.Error() + "; putting the old files back failed as well, so this target needs a person: " +
		e.Rollback.Error() + "; the old files are in " + e.Backups
}

// Unwrap gives both failures.
func (e *BrokenError) Unwrap() []error { return []error{e.Cause, e.Rollback} }
