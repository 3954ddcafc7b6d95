package windows

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha1"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/printable"
)

// thumbprint returns Windows' name of a certificate: the SHA-1 of its DER.
func thumbprint(c *x509.Certificate) string { return fmt.Sprintf("%X", sha1.Sum(c.Raw)) }

// change imports a certificate into a store of a Windows host and, for IIS, sets it in a binding.
type change struct {
	*remote
	place    request // common part of every request
	legacy   bool
	export   bool
	sni      bool // the binding must have SNI
	material *connector.Material

	seen *state // found by Read; nil if it was not called
}

// newPlace adds the certificate's values to place.
func newPlace(place request, m *connector.Material) request {
	place.Thumbprint = thumbprint(m.Leaf)
	place.Chain = [][]byte{}
	for _, c := range m.Chain {
		if !bytes.Equal(c.RawSubject, c.RawIssuer) { // a deployment must not change which roots the host trusts
			place.Chain = append(place.Chain, c.Raw)
		}
	}
	return place
}

func (c *change) ID() string {
	if c.place.Site != "" {
		return fmt.Sprintf("binding %s of site %q on %s", c.place.Binding, c.place.Site, c.at.Address())
	}
	return fmt.Sprintf("certificate store %s\\%s on %s", c.place.Location, c.place.Store, c.at.Address())
}

func (c *change) ask(ctx context.Context, operation string, with func(*request)) (*state, error) {
	q := c.place
	q.Operation = operation
	if with != nil {
		with(&q)
	}
	a, err := c.call(ctx, &q)
	if err != nil {
		return nil, err
	}
	if a.State == nil {
		return nil, errors.New("the script's answer has no state")
	}
	return a.State, a.State.check()
}

var thumbprintForm = lazyregexp.New(`^[0-9A-F]{40}$`)

// check refuses names that are not thumbprints, since they become part of errors.
func (s *state) check() error {
	for _, name := range slices.Concat(s.Ours, s.ChainMissing, []string{s.Bound}) {
		if name != "" && !thumbprintForm().MatchString(name) {
			return fmt.Errorf("the script's answer has an invalid thumbprint %s", printable.Quote(name))
		}
	}
	return nil
}

// Read implements connector.Change.
func (c *change) Read(ctx context.Context) (was []byte, same bool, err error) {
	s, err := c.ask(ctx, opRead, nil)
	if err != nil {
		return nil, false, err
	}
	if same = c.missing(s) == nil; !same {
		err = c.mayChange(s)
	}
	if err != nil {
		return nil, false, err
	}
	c.seen = s
	if !s.Present && s.Binding == "" && len(s.Ours) == 0 {
		return nil, same, nil
	}
	was, err = json.Marshal(s)
	return was, same, err
}

// missing returns an error that says what is missing, or nil if the host is as wanted.
func (c *change) missing(s *state) error {
	switch {
	case !s.Present || !s.HasKey:
		return errors.New("the certificate or its key is not in the store")
	case !strings.EqualFold(s.SHA256, pemutil.Fingerprint(c.material.Leaf)):
		return errors.New("the store has another certificate with the same SHA-1")
	case len(s.ChainMissing) > 0:
		return errors.New("its intermediate certificates are not in the store CA")
	case c.place.FriendlyName != "" && s.FriendlyName != c.place.FriendlyName:
		return errors.New("it has another friendly name")
	case len(s.Unread) > 0:
		return fmt.Errorf("%s cannot read the key", printable.Line(strings.Join(s.Unread, ", "), maxMessage))
	case c.place.Site != "" && (s.Bound != c.place.Thumbprint || !strings.EqualFold(s.BoundStore, c.place.Store)):
		return fmt.Errorf("the binding has the certificate %s", orNone(s.Bound))
	}
	return nil
}

// mayChange refuses a change that would affect more than this target.
func (c *change) mayChange(s *state) error {
	switch {
	case s.BoundFlags&flagCentral != 0:
		return errCentral
	case s.Binding != "" && c.sni && s.BoundFlags&flagSNI == 0:
		return fmt.Errorf("the binding %s has no SNI, but the target has sni: the agent only changes certificates, so set SNI in IIS, or remove sni", c.place.Binding)
	case len(s.Sharing) > 0:
		return sharedError(c.place.Binding, strings.Join(s.Sharing, ", "))
	}
	return nil
}

// Flags of a binding, see
// https://learn.microsoft.com/en-us/iis/configuration/system.applicationhost/sites/site/bindings/binding.
const (
	flagSNI     = 1
	flagCentral = 2
)

// Write implements connector.Change. The request has the certificate that Read found in the
// binding, so the script notices if someone else has changed it since.
func (c *change) Write(ctx context.Context) error {
	if c.seen == nil {
		if _, _, err := c.Read(ctx); err != nil {
			return err
		}
	}
	pfx, password, err := newPFX(c.material, cmp.Or(c.place.FriendlyName, "certctl-agent "+c.place.Target), c.legacy)
	if err != nil {
		return err
	}
	defer clear(pfx)
	s, err := c.ask(ctx, opWrite, func(q *request) {
		q.PFX, q.Password, q.Exportable, q.Expected = pfx, password, c.export, c.seen.Bound
	})
	if err != nil {
		return err
	}
	if err := c.missing(s); err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	return nil
}

// nothing is the state of a host without certificates of this target and without the binding, as
// far as the script uses it.
const nothing = `{"thumbprint": "", "present": false, "friendly_name": "", "unread": [], "ours": [], "binding": "", "bound": "", "bound_store": ""}`

// Restore implements connector.Change.
func (c *change) Restore(ctx context.Context, saved []byte) error {
	if saved == nil {
		saved = []byte(nothing)
	}
	var was state
	if err := json.Unmarshal(saved, &was); err != nil {
		return fmt.Errorf("its backup cannot be read: %w", err)
	}
	s, err := c.ask(ctx, opRestore, func(q *request) { q.Was = saved })
	if err != nil {
		return err
	}
	if s.Bound != was.Bound || s.Binding != was.Binding {
		return fmt.Errorf("read back: the binding has the certificate %s, but had %s before", orNone(s.Bound), orNone(was.Bound))
	}
	return nil
}

// Finish implements connector.Change.
func (c *change) Finish(ctx context.Context) error {
	_, err := c.ask(ctx, opFinish, nil)
	return err
}
