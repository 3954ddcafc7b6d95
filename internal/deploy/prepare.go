package deploy

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
)

// maxSkew bounds how far in the future a certificate's NotBefore may be. A CA sets it to its
// present time, and this host's clock may be slow by that much.
const maxSkew = 5 * time.Minute

// maxCommonName bounds a certificate's name in logs and on disk, in bytes. RFC 5280, appendix A,
// allows 64 characters, but a CA may not keep to that.
const maxCommonName = 256

// prepare checks the job and creates its connector. It touches nothing.
func (a *attempt) prepare() error {
	if a.job.TargetID == "" {
		return nil
	}
	typ, err := a.targetType()
	if err != nil {
		return err
	}
	// Merge even if the type is empty: an overlay may require another type.
	a.config, err = targetconf.Merge(a.job.TargetConfig, typ.Name, typ.Aliases, a.job.TargetID, a.o.Overlays)
	if err != nil || typ.New == nil {
		return err
	}
	host := a.o.Host
	host.Log = a.log
	if a.connector, err = typ.New(a.config, host); err != nil {
		return err
	}
	if unknown := a.config.Unknown(); len(unknown) > 0 {
		a.log.Debug("keys of the target configuration are unknown to this type and ignored", "keys", unknown)
	}
	return nil
}

// targetType returns the Type of the job's target, or the zero Type if the job has none.
func (a *attempt) targetType() (connector.Type, error) {
	if a.job.TargetType == "" {
		return connector.Type{}, nil
	}
	return connector.Find(a.o.Types, a.job.TargetType)
}

// fetch fetches the certificate and puts its chain in order.
func (a *attempt) fetch(ctx context.Context) (*connector.Material, error) {
	id := a.job.CertificateID
	data, err := a.o.Plane.Certificate(ctx, id)
	if err != nil {
		err = fmt.Errorf("fetch certificate %s: %w", id, err)
		if api.Temporary(err) {
			return nil, temporaryError{err}
		}
		return nil, err
	}
	a.size = 4 * len(data) // as text, parsed, and in the plan's files
	certs, err := pemutil.ParseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("certificate %s as the control plane sent it: %w", id, err)
	}
	leaf := certs[0]
	chain, warnings, err := Chain(leaf, certs[1:], a.config != nil && a.config.Common.DropRoot)
	if err != nil {
		return nil, fmt.Errorf("the chain of certificate %s: %w", id, err)
	}
	for _, warning := range warnings {
		a.warn(warning)
	}
	a.outcome.CommonName = printable.Line(leaf.Subject.CommonName, maxCommonName)
	a.outcome.NotAfter = leaf.NotAfter
	a.outcome.Fingerprint = pemutil.Fingerprint(leaf)
	return &connector.Material{CertificateID: id, Leaf: leaf, Chain: chain, KeyPath: a.o.Keys.Path(id)}, nil
}

// Chain returns the chain to install after leaf: the certificates of rest in issuing order, with or
// without the root.
func Chain(leaf *x509.Certificate, rest []*x509.Certificate, dropRoot bool) (chain []*x509.Certificate, warnings []string, err error) {
	chain, stray, err := pemutil.OrderChain(leaf, rest)
	for _, cert := range stray {
		warnings = append(warnings, fmt.Sprintf("the certificate %q issued neither the leaf nor any other certificate of the chain, and is left out",
			printable.Line(cert.Subject.String(), maxCommonName)))
	}
	if last := len(chain) - 1; dropRoot && last >= 0 && pemutil.IsSelfSigned(chain[last]) {
		chain = chain[:last]
	}
	return chain, warnings, err
}

// findKey finds the private key of the certificate and adds it to m.
func (a *attempt) findKey(m *connector.Material) (keystore.Key, error) {
	key, err := a.o.Keys.Find(m.CertificateID, m.Leaf.PublicKey)
	if errors.Is(err, keystore.ErrNoKey) {
		return key, fmt.Errorf("certificate %s cannot be deployed here, and nothing was touched: %w; it was probably requested by another agent",
			m.CertificateID, err)
	}
	if err != nil {
		return key, fmt.Errorf("nothing was touched: %w", err)
	}
	m.KeyPEM = key.PEM
	return key, nil
}

// Wait returns how long to wait until a certificate becomes valid: 0 or less if it is valid
// already. It returns an error if the certificate has expired or will not be valid soon.
func Wait(leaf *x509.Certificate) (time.Duration, error) {
	now := time.Now()
	if now.After(leaf.NotAfter) {
		return 0, fmt.Errorf("the certificate expired at %s; nothing was touched", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	wait := leaf.NotBefore.Sub(now)
	if wait > maxSkew {
		return 0, fmt.Errorf("the certificate is not valid before %s, in %s: check this host's clock and the control plane's; nothing was touched",
			leaf.NotBefore.UTC().Format(time.RFC3339), wait.Round(time.Second))
	}
	return wait, nil
}

// checkValidity checks that the certificate is valid, and waits if it is about to be.
func (a *attempt) checkValidity(leaf *x509.Certificate) error {
	wait, err := Wait(leaf)
	if err != nil || wait <= 0 {
		return err
	}
	err = a.yield(func(ctx context.Context) error {
		select {
		case <-time.After(wait):
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		return temporaryError{err}
	}
	return nil
}
