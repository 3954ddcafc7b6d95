package app

import (
	"errors"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/config"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
)

// TestPolicyOfConfig: every list of the configuration limits deployments.
func TestPolicyOfConfig(t *testing.T) {
	rule, err := policy.ParseHostRule("web1.example.org:22")
	if err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{KeyDir: "/k", StateDir: "/s", TargetsDir: "/t", File: "/f", APIKeyFile: "/a", CABundle: "/c",
		AllowedPaths: []string{"/p"}, AllowedCommands: [][]string{{"x"}}, AllowedHosts: []policy.HostRule{rule}}
	got := newPolicy(cfg)
	want := &policy.Policy{Paths: cfg.AllowedPaths, Commands: cfg.AllowedCommands, Hosts: cfg.AllowedHosts,
		Protected: []string{"/k", "/s", "/t", "/f", "/a", "/c"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestCloseReportsAll: parts are closed in reverse order, also after one that fails.
func TestCloseReportsAll(t *testing.T) {
	var closed []int
	first, third := errors.New("first"), errors.New("third")
	a := new(App)
	for i, err := range []error{first, nil, third} {
		a.onClose(func() error { closed = append(closed, i); return err })
	}
	if err := a.Close(); !errors.Is(err, first) || !errors.Is(err, third) || !slices.Equal(closed, []int{2, 1, 0}) {
		t.Errorf("closed %v: %v", closed, err)
	}
}

// TestPreviewMaterial: a preview uses the certificate as a deployment would.
func TestPreviewMaterial(t *testing.T) {
	ca, other := testca.Must(t), testca.Must(t)
	issued, err := ca.Issue(testca.Template{Intermediates: 1})
	if err != nil {
		t.Fatal(err)
	}
	stray, err := other.Issue(testca.Template{CommonName: "stray.example.org"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{KeyDir: t.TempDir()}
	b := previewer{Preview: new(Preview), cfg: cfg, rules: newPolicy(cfg),
		target: Target{CertificateID: "cert-1", Cert: pemutil.EncodeCertificates(issued.Leaf, stray.Leaf, issued.Chain[1], issued.Chain[2])}}
	m, err := b.material(true)
	if err == nil || !strings.Contains(err.Error(), "none of this agent's private keys") {
		t.Errorf("the key is not there: %v", err)
	}
	if m == nil || !m.Leaf.Equal(issued.Leaf) || len(m.Chain) != 1 || !m.Chain[0].Equal(issued.Chain[1]) || m.KeyPath != filepath.Join(cfg.KeyDir, "cert-1.key") {
		t.Errorf("material %+v", m)
	}
	if len(b.Warnings) != 1 || !strings.Contains(b.Warnings[0], "stray.example.org") {
		t.Errorf("warnings %q, want one about the certificate that is left out", b.Warnings)
	}
}

// TestPreviewOfForbiddenCommand: the command is shown, and why it would not run.
func TestPreviewOfForbiddenCommand(t *testing.T) {
	dir := t.TempDir()
	cfg := &config.Config{KeyDir: filepath.Join(dir, "keys"), StateDir: filepath.Join(dir, "state"), AllowedCommands: [][]string{{"nginx", "-t"}}}
	p, err := NewPreview(t.Context(), cfg, Target{Type: "NGINX", ID: "t-1",
		Config: []byte(`{"cert_path":"` + dir + `/cert.pem","key_path":"` + dir + `/key.pem","validate_command":"nginx -t","reload_command":"nginx -s reload"}`)})
	if err != nil {
		t.Fatal(err)
	}
	allowed := make(map[string]bool)
	for _, c := range p.Commands {
		if allowed[c.Key] = c.Allowed; c.Allowed != (c.Problem == "") {
			t.Errorf("%s: allowed %v, problem %q", c.Key, c.Allowed, c.Problem)
		}
	}
	if !allowed["validate_command"] || allowed["reload_command"] || !p.Refused {
		t.Errorf("allowed %v, refused %v", allowed, p.Refused)
	}
}
