package app

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/big"
	"path/filepath"
	"strings"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/command"
	"certctl-agent/internal/config"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/all"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/tlsprobe"
	"certctl-agent/internal/transaction"
)

// Target is what a Preview is of.
type Target struct {
	Type   string
	ID     string
	Config json.RawMessage // as a job has it

	// Cert is the certificate with its chain, as PEM. Empty: one that is made
	// for the purpose stands in.
	Cert []byte

	// CertificateID says whose key in the key directory is the one from before.
	// "": nobody's.
	CertificateID string
}

// Preview is what a deployment would do on this host, and why it would be
// refused, if it would.
type Preview struct {
	Target   string               `json:"target"`
	Type     string               `json:"type"`
	Settings []targetconf.Setting `json:"settings"`
	Unknown  []string             `json:"unknown_keys"` // which are ignored
	Commands []PreviewCommand     `json:"commands"`

	transaction.Preview

	// Verified is where the certificate must be served before the deployment
	// counts, Reported where the control plane is told that it is. "": nowhere.
	Verified string `json:"verified_at"`
	Reported string `json:"reported_of"`

	Refused bool `json:"refused"`
}

// PreviewCommand is one command line of the configuration.
type PreviewCommand struct {
	Key     string `json:"key"`
	Line    string `json:"line"`
	Allowed bool   `json:"allowed"`
	Problem string `json:"problem,omitempty"`
}

// NewPreview looks at what a deployment to target would do. It asks servers for
// their configuration, as a deployment does, and changes nothing. The error says
// that there is nothing to look at.
func NewPreview(ctx context.Context, cfg *config.Config, target Target) (*Preview, error) {
	typ, err := connector.Find(all.Types(), target.Type)
	if err != nil {
		return nil, err
	}
	if target.CertificateID != "" && !api.ValidID(target.CertificateID) {
		return nil, fmt.Errorf("the certificate id %.200q is not valid: expected 1 to 128 of A-Z a-z 0-9 . _ -", target.CertificateID)
	}
	rules := newPolicy(cfg)
	p := &Preview{Target: target.ID, Type: target.Type}
	merged, err := targetconf.Merge(target.Config, typ.Name, typ.Aliases, target.ID, Overlays(cfg))
	if err == nil {
		err = p.plan(ctx, typ, merged, cfg, target, rules)
	}
	if problems, ok := err.(targetconf.Problems); ok {
		for _, problem := range problems {
			p.Problems = append(p.Problems, problem.Error())
		}
	} else if err != nil {
		p.Problems = append(p.Problems, err.Error())
	}
	if merged != nil {
		p.Settings, p.Unknown = merged.Settings(), merged.Unknown()
		p.commands(rules)
	}
	p.Refused = len(p.Problems) > 0
	return p, nil
}

func (p *Preview) plan(ctx context.Context, typ connector.Type, merged *targetconf.Config, cfg *config.Config, target Target, rules *policy.Policy) error {
	made, err := typ.New(merged, connector.Host{
		Policy: rules,
		Log:    slog.New(slog.DiscardHandler),
		Query: func(ctx context.Context, c policy.Command) ([]byte, error) {
			return command.Query(ctx, c.Argv, c.Timeout)
		},
	})
	if err != nil {
		return err
	}
	m, err := target.material(cfg, merged.Common.DropRoot)
	if err != nil {
		return err
	}
	plan, err := made.Plan(ctx, m)
	if err != nil {
		return err
	}
	p.Preview = *transaction.NewPreview(ctx, transaction.Deployment{
		Target: target.ID, Material: m, ReplaceAny: merged.Common.ReplaceAny,
	}, plan, rules)
	if does := plan.Reload.Does; does != "" {
		p.Changes = append(p.Changes, transaction.ChangePreview{Name: does, Changes: true})
	}
	p.Verified, p.Reported = addressOf(merged.Common.VerifiedAt()), ""
	if cfg.VerifyDeployment {
		p.Reported = addressOf(plan.Serves)
	}
	return nil
}

func addressOf(e *tlsprobe.Endpoint) string {
	if e == nil {
		return ""
	}
	return e.Address
}

// commands says of each command line whether it may run.
func (p *Preview) commands(rules *policy.Policy) {
	for _, setting := range p.Settings {
		var line string
		if !strings.HasSuffix(setting.Key, "_command") || json.Unmarshal([]byte(setting.Value), &line) != nil {
			continue
		}
		c := PreviewCommand{Key: setting.Key, Line: line, Allowed: true}
		if _, err := rules.Command(line, 0); err != nil {
			c.Allowed, c.Problem = false, err.Error()
		}
		p.Commands = append(p.Commands, c)
	}
}

// material is what the deployment would install. Its key is a new one: the key
// itself does not matter here, but that there is one.
func (t Target) material(cfg *config.Config, dropRoot bool) (*connector.Material, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	m := &connector.Material{CertificateID: t.CertificateID}
	if m.KeyPEM, err = pemutil.EncodeKey(key); err != nil {
		return nil, err
	}
	if t.CertificateID != "" {
		m.KeyPath = filepath.Join(cfg.KeyDir, t.CertificateID+".key")
	}
	if len(t.Cert) == 0 {
		m.Leaf, err = standIn(key)
		return m, err
	}
	certs, err := pemutil.ParseCertificates(t.Cert)
	if err != nil {
		return nil, fmt.Errorf("the certificate: %w", err)
	}
	m.Leaf = certs[0]
	if m.Chain, _, err = pemutil.OrderChain(m.Leaf, certs[1:]); err != nil {
		return nil, fmt.Errorf("the chain of the certificate: %w", err)
	}
	if last := len(m.Chain) - 1; dropRoot && last >= 0 && pemutil.IsSelfSigned(m.Chain[last]) {
		m.Chain = m.Chain[:last]
	}
	return m, nil
}

// standIn is a certificate that nobody would accept.
func standIn(key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "a certificate that stands in for the one to come"},
		NotBefore:    time.Now(),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
