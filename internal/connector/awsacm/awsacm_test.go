package awsacm

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"maps"
	"math/big"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/awsfake"
	"certctl-agent/internal/testing/testca"
)

func TestNew(t *testing.T) {
	host := conformance.NewHost(t, nil)
	const arn = "arn:aws:acm:eu-central-1:123456789012:certificate/0ab1-2"
	many := make(map[string]any)
	for i := range 49 {
		many[strings.Repeat("k", i+1)] = "v"
	}
	for _, test := range []struct {
		key   string
		value any
		says  string // "": no error
	}{
		{"", nil, ""},
		{"region", "us-gov-west-1", ""},
		{"region", "cn-northwest-1", ""},
		{"region", "ap-southeast-7", ""},
		{"region", "eu-central-1.example.org/", "region"},
		{"region", "eu-central-1.", "region"},
		{"region", "EU-central-1", "region"},
		{"region", "us-iso-east-1", "partition"},
		{"certificate_arn", arn, ""},
		{"certificate_arn", "arn:aws:acm:eu-west-1:123456789012:certificate/0ab1-2", "eu-west-1"},
		{"certificate_arn", "arn:aws-cn:acm:eu-central-1:123456789012:certificate/0ab1-2", "aws-cn"},
		{"certificate_arn", "arn:aws:iam::123456789012:server-certificate/www", "certificate_arn"},
		{"certificate_arn", arn + "\n", "certificate_arn"},
		{"tags", "", ""},
		{"tags", `{"team": "web müller"}`, ""},
		{"tags", map[string]any{"a": ""}, ""},
		{"tags", "team=web", "tags"},
		{"tags", map[string]any{"a": 1}, "tags"},
		{"tags", map[string]any{"a": "b;c"}, "not a valid tag"},
		{"tags", map[string]any{strings.Repeat("x", 129): ""}, "not a valid tag"},
		{"tags", map[string]any{"AWS:cost": "x"}, "reserved"},
		{"tags", map[string]any{"certctl-certificate-id": "x"}, "sets the tag"},
		{"tags", many, "49 tags"},
		{"endpoint", "https://acm-fips.us-east-1.amazonaws.com", ""},
		{"endpoint", "https://vpce-1.acm.eu-central-1.vpce.amazonaws.com:8443/", ""},
		{"endpoint", "http://127.0.0.1:1", "endpoint"},
		{"endpoint", "https://u:p@127.0.0.1", "endpoint"},
		{"endpoint", "https://127.0.0.1/x", "endpoint"},
		{"endpoint", "https://127.0.0.1?x", "endpoint"},
		{"endpoint", "https://127.0.0.1:99999", "port"},
		{"endpoint", "127.0.0.1", "endpoint"},
		{"role_arn", "arn:aws:iam::210987654321:role/theirs", "overlay"},
		{"external_id", "x", "overlay"},
		{"ca_bundle", "/etc/ssl/theirs.pem", "overlay"},
		{"post_deploy_verify", map[string]any{"enabled": true}, "post_deploy_verify.endpoint"},
	} {
		_ = host.Try(t, Type(), map[string]any{"region": "eu-central-1"}, test.key, test.value, test.says)
	}
}

// TestAllowedHosts: a job cannot send keys or credentials to a host that is not allowed.
func TestAllowedHosts(t *testing.T) {
	f := newFixture(t)
	f.Policy.Hosts = []policy.HostRule{}
	job := map[string]any{"region": "eu-central-1"}
	try := func(more map[string]any) error {
		config := maps.Clone(job)
		maps.Copy(config, more)
		_, err := f.Connector(f.typ, config)
		return err
	}
	conformance.WantError(t, try(nil), "CERTCTL_ALLOWED_HOSTS", "acm.eu-central-1.amazonaws.com, port 443")
	conformance.WantError(t, try(map[string]any{"region": "cn-north-1"}), "acm.cn-north-1.amazonaws.com.cn, port 443")
	conformance.WantError(t, try(map[string]any{"endpoint": "https://203.0.113.9:8443"}), "203.0.113.9:8443")
	rule, err := policy.ParseHostRule("acm.eu-central-1.amazonaws.com:443")
	must(t, err)
	f.Policy.Hosts = []policy.HostRule{rule}
	must(t, try(nil))
	conformance.WantError(t, try(map[string]any{"region": "us-gov-west-1"}), "acm.us-gov-west-1.amazonaws.com")
	f.overlay(`{"endpoint": "https://vpce.example.org", "role_arn": "arn:aws:iam::123456789012:role/acm", "external_id": "x"}`)
	must(t, try(map[string]any{"endpoint": "https://203.0.113.9", "role_arn": "arn:aws:iam::210987654321:role/theirs"}))
	f.overlay(`{"role_arn": "acm"}`)
	conformance.WantError(t, try(nil), "role_arn")
	f.overlay(`{"external_id": "x"}`)
	conformance.WantError(t, try(nil), "needs role_arn")
}

// Keys that ACM does not accept are refused before any call.
func TestRefusedBefore(t *testing.T) {
	f := newFixture(t)
	rsaKey := func(bits int) *rsa.PublicKey {
		n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
		return &rsa.PublicKey{N: n.Add(n, big.NewInt(1)), E: 65537}
	}
	curve := func(c elliptic.Curve) *ecdsa.PublicKey {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		must(t, err)
		return &key.PublicKey
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	good := f.material()
	for _, test := range []struct {
		public any
		says   string
	}{
		{rsaKey(1024), ""}, {rsaKey(2048), ""}, {rsaKey(3072), ""}, {rsaKey(4096), ""},
		{rsaKey(2047), "an RSA key of 2047 bits"}, {rsaKey(8192), "an RSA key of 8192 bits"}, {rsaKey(512), "an RSA key of 512 bits"},
		{curve(elliptic.P256()), ""}, {curve(elliptic.P384()), ""}, {curve(elliptic.P521()), ""},
		{curve(elliptic.P224()), "an ECDSA key on P-224"},
		{ed, "Ed25519"},
	} {
		m := *good
		leaf := *good.Leaf
		leaf.PublicKey = test.public
		if _, ok := test.public.(ed25519.PublicKey); ok {
			leaf.PublicKeyAlgorithm = x509.Ed25519
		}
		m.Leaf = &leaf
		err := checkImport(&m)
		if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%T: got %v, want %q", test.public, err, test.says)
		}
	}
	_, ed25519Key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	var names []string
	for i := range 1500 {
		names = append(names, strings.Repeat("x", i%40+1)+".example.org")
	}
	for name, m := range map[string]*connector.Material{
		"issue it with another key": f.issue(testca.Template{Key: ed25519Key}),
		"neither":                   f.issue(testca.Template{CommonName: "www", Names: []string{}}),
		"too many names":            f.issue(testca.Template{Names: names}),
		"at most 5120 bytes": func() *connector.Material {
			m := f.material()
			m.KeyPEM = append([]byte(strings.Repeat("# a comment\n", 500)), m.KeyPEM...)
			return m
		}(),
		"at most 2097152 bytes": func() *connector.Material {
			m := f.material()
			for len(chainPEM(m.Chain)) <= maxChain {
				m.Chain = append(m.Chain, m.Chain...)
			}
			return m
		}(),
	} {
		_, err := f.deploy(m)
		conformance.WantError(t, err, name)
	}
	if calls := f.Calls(); len(calls) > 0 {
		t.Errorf("called %q", calls)
	}
}

// The key type of an ARN cannot change, and only imported certificates can be replaced.
func TestMayNotReplace(t *testing.T) {
	f := newFixture(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	old := f.material()
	arn := f.put(old)
	_, err = f.deploy(f.issue(testca.Template{Key: p384}), "certificate_arn", arn)
	conformance.WantError(t, err, "has an ECDSA key on P-256", "has an ECDSA key on P-384", "set certificate_arn to another")
	f.SetKind(arn, "AMAZON_ISSUED")
	_, err = f.deploy(f.material(), "certificate_arn", arn)
	conformance.WantError(t, err, "issued by Amazon", arn)
	_, err = f.deploy(f.material(), "certificate_arn", arn[:len(arn)-1]+"x")
	conformance.WantError(t, err, "does not exist in this account", "remove certificate_arn")
	if f.SetKind(arn, "IMPORTED"); strings.Contains(strings.Join(f.Calls(), " "), "ImportCertificate") {
		t.Errorf("called %q", f.Calls())
	}
	f.holds(old)
}

// TestARN: a certificate with a configured ARN is replaced in place, keeps the tags of others,
// and gets ours.
func TestARN(t *testing.T) {
	f := newFixture(t)
	theirs := awsfake.Tag{Key: "cost", Value: "42"}
	arn := f.put(f.material(), theirs, awsfake.Tag{Key: "team", Value: "db"})
	m := f.material()
	config := []any{"certificate_arn", arn, "tags", `{"team": "web"}`}
	f.mustDeploy(m, config...)
	f.holds(m)
	want := map[string]string{"cost": "42", "team": "web", managedByTag: managedBy, certificateTag: "cert-1"}
	if got := tagged(f.only().Tags); !maps.Equal(got, want) {
		t.Errorf("tags %v", got)
	}
	f.OnCall(nil)
	if result := f.mustDeploy(m, config...); !result.Unchanged || strings.Contains(strings.Join(f.Calls(), " "), "Add") {
		t.Errorf("again: %+v, called %q", result, f.Calls())
	}
	config[3] = `{"team": "ops"}`
	if result := f.mustDeploy(m, config...); result.Unchanged || tagged(f.only().Tags)["team"] != "ops" {
		t.Errorf("other tags: %+v, %v", result, f.only().Tags)
	}
	if strings.Contains(strings.Join(f.Calls(), " "), "Import") || f.Imports() != 0 {
		t.Errorf("called %q, %d imports", f.Calls(), f.Imports())
	}
	f.Deny("AddTagsToCertificate")
	config[3] = `{"team": "dev"}`
	m = f.material()
	result := f.mustDeploy(m, config...)
	if f.holds(m); !strings.Contains(strings.Join(result.Warnings, " "), "acm:AddTagsToCertificate on "+arn) {
		t.Errorf("without the permission for tags: %q", result.Warnings)
	}
}

// TestPreview: plan works before the agent's first start and before the first import.
func TestPreview(t *testing.T) {
	f := newFixture(t)
	f.put(f.material(), awsfake.Tag{Key: managedByTag, Value: managedBy})
	f.StateDir += "-of-no-agent"
	m := f.material()
	m.CertificateID, m.KeyPath = "", ""
	c := f.change(m, "endpoint", f.URL+"/", "post_deploy_verify", map[string]any{"enabled": true, "endpoint": "www.example.org:443"})
	if was, same, err := c.Read(t.Context()); was != nil || same || err != nil {
		t.Errorf("read: %s, %v, %v", was, same, err)
	}
	if want := "ACM certificate in eu-central-1 at " + f.URL; c.ID() != want {
		t.Errorf("id %q, want %q", c.ID(), want)
	}
	if calls := f.Calls(); len(calls) != 1 || calls[0] != "ListCertificates" {
		t.Errorf("called %q", calls)
	}
	f.Deny("ListCertificates")
	_, _, err := c.Read(t.Context())
	conformance.WantError(t, err, "acm:ListCertificates")
}

// TestPolicies: the policies on the page allow exactly the calls that the agent makes.
func TestPolicies(t *testing.T) {
	page, err := os.ReadFile("../../../docs/targets/awsacm.md")
	must(t, err)
	_, text, _ := strings.Cut(string(page), "## Permissions")
	text, _, _ = strings.Cut(text, "\n## ")
	var policies [][]string
	for block := range strings.SplitSeq(text, "```json") {
		block, _, isCode := strings.Cut(block, "```")
		if !isCode {
			continue
		}
		var allowed []string
		for _, action := range regexp.MustCompile(`"acm:(\w+)"`).FindAllStringSubmatch(block, -1) {
			allowed = append(allowed, action[1])
		}
		policies = append(policies, allowed)
	}
	if len(policies) != 2 {
		t.Fatalf("the page has %d policies", len(policies))
	}
	tags := []any{"tags", map[string]any{"team": "web"}}
	for i, use := range []func(f *fixture){
		func(f *fixture) {
			arn := []any{"certificate_arn", f.put(f.material())}
			f.mustDeploy(f.material(), append(arn, tags...)...)
			_, err := f.deploy(f.material(), append(arn, unverified()...)...)
			conformance.WantError(t, err, "the previous certificate is back in place")
		},
		func(f *fixture) {
			m := f.material()
			f.Before = killAfter("change")
			_, _ = f.deploy(m)
			f.Before = nil
			f.Restart(t)
			_, err := f.deploy(m, unverified()...)
			conformance.WantError(t, err, "the new one was removed")
			f.mustDeploy(m)
			f.mustDeploy(f.material(), tags...)
		},
	} {
		f := newFixture(t)
		all := []string{"AddTagsToCertificate", "DeleteCertificate", "DescribeCertificate", "GetCertificate", "ImportCertificate", "ListCertificates", "ListTagsForCertificate"}
		f.Deny(slices.DeleteFunc(all, func(operation string) bool { return slices.Contains(policies[i], operation) })...)
		use(f)
		called := f.Calls()
		slices.Sort(called)
		slices.Sort(policies[i])
		if called = slices.Compact(called); !slices.Equal(called, policies[i]) {
			t.Errorf("called %q, and the policy allows %q", called, policies[i])
		}
	}
}
