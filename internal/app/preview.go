package app

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/config"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/all"
	"certctl-agent/internal/deploy"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/tlsprobe"
	"certctl-agent/internal/transaction"
)

// previewPatience bounds the retries of a call to a vendor's API: a person waits for the preview.
const previewPatience = 3 * time.Second

// Target is the target of a preview.
type Target struct {
	Type   string
	ID     api.ID
	Config json.RawMessage // as in a job

	// Cert is the certificate with its chain, as PEM. If it is empty, a placeholder is used.
	Cert []byte

	// CertificateID selects the keys in the key directory. If it is empty, no key is looked up.
	CertificateID api.ID
}

// Preview is what a deployment would do on this host, or why it would be refused.
type Preview struct {
	Target   api.ID               `json:"target"`
	Type     string               `json:"type"`
	UID      int                  `json:"uid"` // of the user who read the files
	Settings []targetconf.Setting `json:"settings"`
	Unknown  []string             `json:"unknown_keys"` // ignored
	Commands []PreviewCommand     `json:"commands"`

	transaction.Preview

	// Verified is the endpoint that must serve the certificate for the deployment to succeed.
	// Reported is the endpoint whose certificate is reported to the control plane. "": none.
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

// NewPreview finds out what a deployment to target would do. It asks servers for their
// configuration, as a deployment does, and changes nothing. It fails if the type is unknown; other
// errors are part of the preview.
func NewPreview(ctx context.Context, cfg *config.Config, target Target) (*Preview, error) {
	typ, err := connector.Find(all.Types(), target.Type)
	if err != nil {
		return nil, err
	}
	p := &Preview{
		Target: target.ID, Type: target.Type, UID: os.Geteuid(), Settings: []targetconf.Setting{}, Unknown: []string{}, Commands: []PreviewCommand{},
		Preview: transaction.Preview{Files: []transaction.FilePreview{}, Changes: []transaction.ChangePreview{}, Warnings: []string{}, Problems: []string{}},
	}
	b := previewer{Preview: p, cfg: cfg, target: target, rules: newPolicy(cfg)}
	merged, err := targetconf.Merge(target.Config, typ.Name, typ.Aliases, target.ID, Overlays(cfg))
	b.problem(err)
	if merged != nil {
		b.all(ctx, typ, merged, err == nil)
	}
	if target.CertificateID == "" && slices.ContainsFunc(p.Problems, func(problem string) bool { return strings.Contains(problem, cfg.KeyDir) }) {
		p.Warnings = append(p.Warnings, "a problem concerns the key directory, where a server may read only the key of its own certificate: name the certificate")
	}
	p.Refused = len(p.Problems) > 0
	return p, nil
}

// previewer builds a Preview.
type previewer struct {
	*Preview
	cfg    *config.Config
	target Target
	rules  *policy.Policy
}

// problem adds an error, or each of several, unless it is already listed.
func (b *previewer) problem(err error) {
	problems := targetconf.Problems{err}
	if several, ok := err.(targetconf.Problems); ok {
		problems = several
	}
	for _, problem := range problems {
		if problem != nil && !slices.Contains(b.Problems, problem.Error()) {
			b.Problems = append(b.Problems, problem.Error())
		}
	}
}

// all checks as much as possible, so that the preview shows all problems at once. Valid says
// whether the settings that all types share are valid.
func (b *previewer) all(ctx context.Context, typ connector.Type, merged *targetconf.Config, valid bool) {
	m, err := b.material(merged.Common.DropRoot)
	b.problem(err)
	made, err := typ.New(merged, connector.Host{
		// Without Commands, so that a forbidden command does not keep the files from being checked.
		Policy: &policy.Policy{Paths: b.rules.Paths, Hosts: b.rules.Hosts, Protected: b.rules.Protected},
		Log:    slog.New(slog.DiscardHandler),
		Getenv: b.cfg.Getenv,
		Proxy:  b.cfg.Proxy.For,
		Query: func(ctx context.Context, c policy.Command) ([]byte, error) {
			if slices.ContainsFunc(b.Commands, func(c PreviewCommand) bool { return !c.Allowed }) {
				return nil, errors.New("not asked, because a command of the target is not allowed")
			}
			return query(ctx, c)
		},
		Patience: previewPatience,
		StateDir: b.cfg.InstanceStateDir(), // for reading; new host keys are not accepted
	})
	b.problem(err)
	if made != nil {
		defer connector.Close(made, slog.New(slog.DiscardHandler))
	}
	b.commands(merged) // after New, which decodes them
	if err == nil && valid && m != nil {
		b.problem(b.plan(ctx, made, m, &merged.Common))
	}
	b.Settings, b.Unknown = merged.Settings(), append(b.Unknown, merged.Unknown()...)
	// Defaults last.
	slices.SortStableFunc(b.Settings, func(a, b targetconf.Setting) int {
		return cmp.Compare(rank(a), rank(b))
	})
}

func rank(s targetconf.Setting) int {
	if s.Source == "default" {
		return 1
	}
	return 0
}

func (b *previewer) plan(ctx context.Context, made connector.Connector, m *connector.Material, common *targetconf.Common) error {
	plan, err := made.Plan(ctx, m)
	if err != nil {
		return err
	}
	look := transaction.NewPreview(ctx, transaction.Deployment{
		Target: b.target.ID, Material: m, ReplaceAny: common.ReplaceAny,
	}, plan, b.rules)
	b.Files, b.Changes = look.Files, look.Changes
	b.Warnings, b.Problems = append(b.Warnings, look.Warnings...), append(b.Problems, look.Problems...)
	if does := plan.Reload.Does; does != "" {
		b.Changes = append(b.Changes, transaction.ChangePreview{Name: does, Changes: true})
	}
	b.Verified = addressOf(common.VerifiedAt())
	if b.cfg.VerifyDeployment {
		b.Reported = addressOf(plan.Serves)
	}
	return nil
}

func addressOf(e *tlsprobe.Endpoint) string {
	if e == nil {
		return ""
	}
	return e.Address
}

// commands lists the configured command lines and whether they may run.
func (b *previewer) commands(merged *targetconf.Config) {
	for _, setting := range merged.Settings() {
		var line string
		if !strings.HasSuffix(setting.Key, "_command") || json.Unmarshal([]byte(setting.Value), &line) != nil {
			continue
		}
		c := PreviewCommand{Key: setting.Key, Line: line, Allowed: true}
		if _, err := b.rules.Command(line, 0); err != nil {
			c.Allowed, c.Problem = false, err.Error()
			b.problem(targetconf.Invalid(setting.Key, "%v", err))
		}
		b.Commands = append(b.Commands, c)
	}
}

// material returns what the deployment would install. If this host does not have the certificate's
// key, it uses a new one: a preview only needs some key.
func (b *previewer) material(dropRoot bool) (*connector.Material, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	m := &connector.Material{CertificateID: b.target.CertificateID}
	if m.KeyPEM, err = pemutil.EncodeKey(key); err != nil {
		return nil, err
	}
	if m.CertificateID != "" {
		m.KeyPath = keystore.CurrentPath(b.cfg.KeyDir, m.CertificateID)
	}
	if len(b.target.Cert) == 0 {
		m.Leaf, err = placeholder(key)
		return m, err
	}
	certs, err := pemutil.ParseCertificates(b.target.Cert)
	if err != nil {
		return nil, fmt.Errorf("the certificate: %w", err)
	}
	m.Leaf = certs[0]
	chain, warnings, err := deploy.Chain(m.Leaf, certs[1:], dropRoot)
	if err != nil {
		return nil, fmt.Errorf("the chain of the certificate: %w", err)
	}
	m.Chain, b.Warnings = chain, append(b.Warnings, warnings...)
	_, err = deploy.Wait(m.Leaf)
	return m, targetconf.Join(err, b.findKey(m))
}

// findKey takes the certificate's key from the key directory. It fails if the key is not there.
func (b *previewer) findKey(m *connector.Material) error {
	if m.CertificateID == "" {
		return nil
	}
	keys, err := keystore.Look(b.cfg.KeyDir)
	if err != nil {
		return err
	}
	defer keys.Close()
	key, err := keys.Find(m.CertificateID, m.Leaf.PublicKey)
	if err == nil {
		m.KeyPEM = key.PEM
	}
	return err
}

// placeholder returns a certificate that no client accepts, but that no target type refuses either.
// Its name is under .invalid (RFC 6761, section 6.4).
func placeholder(key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "placeholder for the future certificate"},
		DNSNames:     []string{"placeholder.invalid"},
		NotBefore:    time.Now(),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
