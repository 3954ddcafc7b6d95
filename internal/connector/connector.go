// Package connector is the contract between the kinds of target and the engine
// that deploys to them. A connector looks and proposes; it never writes. What
// it proposes is a Plan, which package transaction carries out as a whole or
// not at all.
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

// A Type is one kind of target. Nothing else in the program names it.
type Type struct {
	Name    string            // as the control plane spells it
	Aliases map[string]string // other spellings of configuration keys, to the main one

	// New checks the whole configuration and touches nothing.
	New func(*targetconf.Config, Host) (Connector, error)
}

// Find returns the type of types that is called name.
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

// Host is what this machine lends a connector.
type Host struct {
	Policy *policy.Policy // what may be written and run here
	Log    *slog.Logger

	// Query runs a command that changes nothing and returns what it printed.
	// Connectors ask the server itself with it which key it reads. Nil: nobody
	// can be asked.
	Query serverconf.Query

	// Getenv reads the environment of the agent's own process. Nil: there is none.
	Getenv func(name string) string

	// Proxy is the one that the owner of this host has named for an https URL, nil
	// for none (HTTPS_PROXY, NO_PROXY). A nil func: none.
	Proxy func(*url.URL) *url.URL

	// StateDir is a directory of the agent's own, where a connector may keep what
	// it has to know at the next deployment. "": nothing is kept.
	StateDir string

	// AcceptNewHostKeys says that a server whose key is not known is believed,
	// and the key kept in StateDir (CERTCTL_SSH_ACCEPT_NEW_HOST_KEYS).
	AcceptNewHostKeys bool
}

// Command splits and checks the command line that is configured under key. An
// empty one is none.
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

// Commands checks the command lines of validate_command and reload_command, as
// Command does.
func (h Host) Commands(config *targetconf.Config, validateLine, reloadLine string) (validate, reload *policy.Command, err error) {
	validate, validateErr := h.Command(config, "validate_command", validateLine)
	reload, reloadErr := h.Command(config, "reload_command", reloadLine)
	return validate, reload, targetconf.Join(validateErr, reloadErr)
}

// A Connector knows one product. It reads and proposes; it never writes. One is
// made for each deployment.
type Connector interface {
	// Plan says what installing m takes. It may be called again when something
	// changed before the plan was carried out.
	Plan(ctx context.Context, m *Material) (*Plan, error)
}

// Close ends what a connector holds open, if it is an io.Closer. The deployment
// that it was made for is over, however it ended.
func Close(c Connector, log *slog.Logger) {
	closer, ok := c.(io.Closer)
	if !ok {
		return
	}
	if err := closer.Close(); err != nil {
		log.Debug("closing a connection to the target failed", "error", err)
	}
}

// A Plan is everything that one deployment changes. The engine saves what is
// there, makes the changes in this order, after the promotion of the key, and
// undoes them in reverse order after a failure, a cancellation or a crash.
type Plan struct {
	Files    []File          // on this host, swapped together
	Changes  []Change        // elsewhere, after the files; those that cannot be undone last
	Validate *policy.Command // nil: none
	Reload   Reload

	// Serves is where the certificate can be seen once it is installed. Nil:
	// nowhere, or the configuration does not say.
	Serves *tlsprobe.Endpoint

	Warnings []string // for the log, one line each

	// Caveats are warnings of a deployment that has changed something, and of no
	// other.
	Caveats []string
}

// Reload makes a server use the files that are in place: the new ones or, after
// a rollback, the old ones again.
type Reload struct {
	Command *policy.Command // nil: none

	// Call does it where it takes more than a command. After a crash the next
	// deployment calls it, since nothing else can. Nil: nothing.
	Call func(ctx context.Context) error
	Does string // what Call does, for people

	// Wait is how long the server may go on reading its files after Command has
	// returned. They are not touched meanwhile, unless a verification has shown
	// that the server is done.
	Wait time.Duration
}

// A Change replaces one thing that is not a file of this host. After a crash, a
// new Connector of the same configuration is asked for it again, so its methods
// must converge: each may have been carried out before, in whole or in part.
type Change interface {
	// ID names what is replaced, and where ("client-ssl /Common/www of
	// bigip.example.org"): at most 512 bytes that print, unlike any other of the
	// plan. It is stable: the journal knows the Change by it, and hands what was
	// there before to nobody who has another ID.
	ID() string

	// Read returns what an undo needs, nil if there is nothing, and whether the
	// target is as Write would make it.
	Read(ctx context.Context) (was []byte, same bool, err error)

	// Write makes the change. The engine has saved what Read returned. After an
	// interrupted deployment that may have begun it, it is called again even if Read
	// says same: a change of several calls may have been killed between them.
	Write(ctx context.Context) error

	// Restore takes the change back. Was is what Read returned before the first
	// Write, perhaps in an earlier process. The error may be ErrIrrevocable.
	Restore(ctx context.Context, was []byte) error

	// Finish removes what only an undo needed. It is called after each
	// deployment that succeeded, one that had nothing to change included. A
	// failure is a warning: the next deployment tries again.
	Finish(ctx context.Context) error
}

// ErrIrrevocable is the answer of a Change that cannot be taken back.
var ErrIrrevocable = errors.New("it cannot be undone")

// Material is what a deployment installs.
type Material struct {
	CertificateID api.ID
	Leaf          *x509.Certificate
	Chain         []*x509.Certificate // in issuing order, without the leaf; may be empty
	KeyPEM        []byte              // the private key of Leaf, as the key store holds it

	// KeyPath is the file in the agent's own key store that holds the key once
	// the deployment is done. Servers may read it directly.
	KeyPath string
}

// Key is the private key as it is written: one newline at its end.
func (m *Material) Key() []byte {
	return append(bytes.TrimRight(m.KeyPEM, "\r\n"), '\n')
}

// FullChain is the leaf with its chain behind it, as PEM.
func (m *Material) FullChain() []byte {
	return append(pemutil.EncodeCertificates(m.Leaf), pemutil.EncodeCertificates(m.Chain...)...)
}

// InKeyStore reports whether path is, or leads to, the key store's own file of
// this key. Such a destination is none: the engine makes the key the current
// one there anyway.
func (m *Material) InKeyStore(path targetconf.Path) bool {
	return m.KeyPath != "" && hostfile.Real(string(path)) == hostfile.Real(m.KeyPath)
}

// A Kind says what a file holds.
type Kind int

// The kinds of File.
const (
	CertificateFile Kind = iota // public
	KeyFile                     // holds a private key, perhaps beside certificates
	ConfigFile                  // written for a server to read, such as Envoy's sds.json
)

// Secret reports whether a file of this kind holds a private key.
func (k Kind) Secret() bool { return k == KeyFile }

// File is one destination on this host. Mode, owner and group come from the
// configuration when set, else from the file that is there, else from
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

	// Keep puts a file that is there, and not Written, in place once more with
	// the bytes that it has, for a server that watches it.
	Keep bool

	// KeepOthers puts the PEM blocks of the file that is there which are neither
	// certificates nor keys, such as DH PARAMETERS, behind Data.
	KeepOthers bool

	// From is the content of the file that is there which Data was made from,
	// empty if there was none. If it has changed since, the plan is made again.
	// Nil: Data does not depend on it.
	From []byte

	// HadKey is the private key in From, as PEM, where that is a store from which
	// the engine cannot read it. Nil: none.
	HadKey []byte
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
