// Package connector is the contract between the target types and the engine that deploys to them.
// A connector reads the target and proposes a Plan; it never writes. Package transaction carries
// out the Plan completely or not at all.
package connector

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/serverconf"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/tlsprobe"
)

// A Type is one type of target. Nothing outside its package knows its name.
type Type struct {
	Name    string            // as the control plane spells it
	Aliases map[string]string // from other spellings of configuration keys to the main one

	// New checks the whole configuration and touches nothing.
	New func(*targetconf.Config, Host) (Connector, error)
}

// Find returns the type called name.
func Find(types []Type, name string) (Type, error) {
	var supported []string
	for _, typ := range types {
		if typ.Name == name {
			return typ, nil
		}
		supported = append(supported, typ.Name)
	}
	slices.Sort(supported)
	return Type{}, fmt.Errorf("target type %.100q is unknown (case matters); this agent version supports %s", name, strings.Join(supported, ", "))
}

// Host gives a connector access to this machine. Methods check what the configuration asks for with
// the policy: Command a command line, Peer and Route a host that gets a private key.
type Host struct {
	Policy *policy.Policy // what may be written, run and reached
	Log    *slog.Logger

	// Query runs a command that changes nothing and returns its output. Connectors use it to ask
	// a server which key it reads. If it is nil, servers cannot be asked.
	Query serverconf.Query

	// Getenv reads the agent's environment. If it is nil, the environment is empty.
	Getenv func(name string) string

	// Proxy returns the proxy for an https URL (HTTPS_PROXY, NO_PROXY), or nil to connect
	// directly. If Proxy itself is nil, all connections are direct.
	Proxy func(*url.URL) *url.URL

	// StateDir is the agent's state directory, where a connector may keep what it needs in the
	// next deployment. If it is empty, nothing is kept.
	StateDir string

	// AcceptNewHostKeys trusts an unknown server's key on first use and keeps it in StateDir
	// (CERTCTL_SSH_ACCEPT_NEW_HOST_KEYS).
	AcceptNewHostKeys bool

	// Patience bounds the retries of a call to a vendor's API. If it is 0, the connector decides.
	Patience time.Duration
}

// Command splits and checks the command line configured under key. It returns nil if line is
// empty.
func (h Host) Command(config *targetconf.Config, key, line string) (*policy.Command, error) {
	if line == "" {
		return nil, nil
	}
	c, err := h.Policy.Command(line, time.Duration(config.Common.CommandTimeout))
	if err != nil {
		return nil, targetconf.Invalid(key, "%v", err)
	}
	return &c, nil
}

// Commands is Command for validate_command and reload_command.
func (h Host) Commands(config *targetconf.Config, validateLine, reloadLine string) (validate, reload *policy.Command, err error) {
	validate, validateErr := h.Command(config, "validate_command", validateLine)
	reload, reloadErr := h.Command(config, "reload_command", reloadLine)
	return validate, reload, targetconf.Join(validateErr, reloadErr)
}

// A Connector knows one product. It reads and proposes; it never writes. Each deployment makes a
// new one.
type Connector interface {
	// Plan returns the changes that install m. It is called again if the target changed before
	// the plan was carried out.
	Plan(ctx context.Context, m *Material) (*Plan, error)
}

// Close closes c if it is an io.Closer. It is called at the end of every deployment, successful or
// not.
func Close(c Connector, log *slog.Logger) {
	closer, ok := c.(io.Closer)
	if !ok {
		return
	}
	if err := closer.Close(); err != nil {
		log.Debug("closing a connection to the target failed", "error", err)
	}
}

// A Plan is everything that one deployment changes. The engine saves the old state, promotes the
// key, makes the changes in this order, and undoes them in reverse order after a failure, a
// cancellation or a crash.
type Plan struct {
	Files    []File          // on this host, swapped in this order: one that a server watches comes last
	Changes  []Change        // elsewhere, after the files; irrevocable ones last
	Validate *policy.Command // nil: none
	Reload   Reload

	// Serves is the endpoint that serves the installed certificate. It is nil if the
	// configuration names none.
	Serves *tlsprobe.Endpoint

	Warnings []string // for the log, one line each

	// Caveats are warnings that are only logged if the deployment changed something.
	Caveats []string
}

// Reload makes a server use the files in place: the new ones or, after a rollback, the old ones.
type Reload struct {
	Command *policy.Command // nil: none

	// Call reloads a server that a command cannot. After a crash only the next deployment can call
	// it, since it needs the configuration. It may be nil.
	Call func(ctx context.Context) error
	Does string // describes Call to people

	// Wait is how long the server may read its files after Command returned. The engine does not
	// touch them meanwhile, unless a verification has shown that the server is done.
	Wait time.Duration
}

// A Change replaces one thing that is not a file on this host. After a crash, a new Connector with
// the same configuration makes the Change again, so its methods must converge: each may have run
// before, completely or in part.
type Change interface {
	// ID names the thing and its location ("client-ssl /Common/www of bigip.example.org") in at
	// most 512 printable bytes. It is unique in the plan and stable: the journal finds the Change
	// by it, and never passes saved state to a Change with another ID. It depends only on the
	// configuration, not on the certificate. Changes with the same ID take turns, whatever their
	// targets.
	ID() string

	// Read returns the state that Restore needs, nil if the thing does not exist, and whether it
	// is already as Write would make it. The state goes to disk, so an empty one that exists is
	// not nil, and 4 MiB are the limit.
	Read(ctx context.Context) (was []byte, same bool, err error)

	// Write makes the change. The engine has saved the state that Read returned. If an interrupted
	// deployment may have started the change, Write is called again even if Read reports same: a
	// change of several calls may have been killed between them.
	Write(ctx context.Context) error

	// Restore undoes the change. Was is the state that Read returned before the first Write,
	// possibly in an earlier process. The error may be ErrIrrevocable.
	Restore(ctx context.Context, was []byte) error

	// Finish removes what only Restore needed. It is called after every successful deployment,
	// even if nothing changed. A failure is a warning: the next deployment tries again.
	Finish(ctx context.Context) error
}

// ErrIrrevocable is returned by Restore if the change cannot be undone.
var ErrIrrevocable = errors.New("it cannot be undone")

// Material is the certificate and key that a deployment installs.
type Material struct {
	CertificateID api.ID
	Leaf          *x509.Certificate
	Chain         []*x509.Certificate // in issuing order, without the leaf; may be empty
	KeyPEM        []byte              // the private key of Leaf, as in the key store

	// KeyPath is the file in the agent's key store that holds the key after the deployment.
	// Servers may read it directly.
	KeyPath string
}

// Key returns the private key as PEM with exactly one newline at the end.
func (m *Material) Key() []byte {
	return append(bytes.TrimRight(m.KeyPEM, "\r\n"), '\n')
}

// FullChain returns the leaf followed by its chain, as PEM.
func (m *Material) FullChain() []byte {
	return append(pemutil.EncodeCertificates(m.Leaf), pemutil.EncodeCertificates(m.Chain...)...)
}

// InKeyStore reports whether path is KeyPath or a link to it. Such a file is not a destination: the
// engine promotes the key there anyway.
func (m *Material) InKeyStore(path targetconf.Path) bool {
	return m.KeyPath != "" && hostfile.Real(string(path)) == hostfile.Real(m.KeyPath)
}

// Kind is the kind of content of a File.
type Kind int

// The kinds of File.
const (
	CertificateFile Kind = iota // public
	KeyFile                     // a private key, possibly with certificates
	ConfigFile                  // configuration of a server, such as Envoy's sds.json
)

// Secret reports whether a file of this kind holds a private key.
func (k Kind) Secret() bool { return k == KeyFile }

// File is one destination on this host. Mode, owner and group come from the configuration if set,
// else from the existing file, else from DefaultMode and the agent's user.
type File struct {
	Path        string // absolute
	Kind        Kind
	Data        []byte
	Mode        *fs.FileMode // nil: not configured
	DefaultMode fs.FileMode
	Owner       string // user name or number; "": not configured
	Group       string

	// Written reports whether this connector wrote the existing ConfigFile, so it may be
	// replaced. If Written is nil, no existing file may be.
	Written func(old []byte) bool

	// Keep replaces an existing file that is not Written by a copy of itself, for a server that
	// watches it.
	Keep bool

	// KeepOthers appends those PEM blocks of the existing file to Data that are neither
	// certificates nor keys, such as DH PARAMETERS.
	KeepOthers bool

	// From is the old content that Data was made from, empty but not nil if there was no file. If
	// the file has changed since, the plan is made again. It is nil if Data does not depend on
	// the old content.
	From []byte

	// HadKey is the private key in From, as PEM, if From is a store that the engine cannot read.
	HadKey []byte
}

// NewFile returns the destination at path with its configured mode and owner. DefaultMode is 0600
// for a key and 0644 otherwise.
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
