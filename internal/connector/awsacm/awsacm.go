// Package awsacm installs certificates in AWS Certificate Manager (ACM), which provides them to
// load balancers, CloudFront and API Gateway.
package awsacm

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/vendorapi"
)

// Type returns the target type AWSACM.
func Type() connector.Type { return typeOf(waits{}) }

// waits are times that tests shorten.
type waits struct {
	call time.Duration // how long a call is retried; 0: a minute
	list time.Duration // how long to look for a certificate that may exist; 0: listFor
	try  time.Duration // limit of one try of a call; 0: 30 s
}

func typeOf(w waits) connector.Type {
	return connector.Type{Name: "AWSACM", New: func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		return newConnector(c, host, w)
	}}
}

// config is the target's configuration.
type config struct {
	Region         string          `json:"region" config:"required"`
	CertificateARN string          `json:"certificate_arn"` // "": found by its tags, or a new one
	Tags           tags            `json:"tags"`
	Endpoint       string          `json:"endpoint"`    // "": the region's
	CABundle       targetconf.Path `json:"ca_bundle"`   // "": AWS_CA_BUNDLE, or the system's
	RoleARN        string          `json:"role_arn"`    // role to assume; "": none
	ExternalID     string          `json:"external_id"` // for the role, if its trust policy requires one
}

type acm struct {
	target *targetconf.Config
	config config
	host   connector.Host
	client *client
	list   time.Duration
}

func newConnector(c *targetconf.Config, host connector.Host, w waits) (*acm, error) {
	w.call = cmp.Or(w.call, host.Patience)
	a := &acm{target: c, host: host, list: w.list}
	if a.list == 0 {
		a.list = listFor
	}
	if err := targetconf.Join(c.Decode(&a.config), c.Common.MarkRemote()); err != nil {
		return nil, err
	}
	if err := a.check(); err != nil {
		return nil, err
	}
	endpoint, err := a.endpoint()
	if err != nil {
		return nil, err
	}
	getenv := host.Getenv
	if getenv == nil {
		getenv = func(string) string { return "" }
	}
	trust := vendorapi.Trust{CAFile: string(a.config.CABundle)}
	if trust.CAFile == "" {
		trust.CAFile = getenv("AWS_CA_BUNDLE")
	}
	options := vendorapi.Options{Dial: endpoint.dial, Proxy: endpoint.proxy, TLS: trust.Config, Timeout: w.try, Patience: w.call, Message: message}
	credentials, err := newSource(&a.config, host, getenv, c, trust, w)
	if err != nil {
		return nil, err
	}
	a.client = newClient(endpoint.url, a.config.Region, credentials, options)
	return a, nil
}

var (
	// The region becomes part of a host name, which a job must not control.
	regionForm = lazyregexp.New(`^[a-z]{2}(-[a-z]{1,12}){1,2}-[0-9]{1,2}$`)

	arnForm  = lazyregexp.New(`^arn:(aws|aws-cn|aws-us-gov):acm:([a-z0-9-]+):[0-9]{12}:certificate/[A-Za-z0-9-]{1,64}$`)
	roleForm = lazyregexp.New(`^arn:(aws|aws-cn|aws-us-gov):iam::[0-9]{12}:role/[\w+=/,.@-]{1,512}$`)
)

// partition returns the AWS partition of a region and the domain of its endpoints
// (https://docs.aws.amazon.com/whitepapers/latest/aws-fault-isolation-boundaries/partitions.html).
func partition(region string) (name, domain string) {
	switch {
	case strings.HasPrefix(region, "cn-"):
		return "aws-cn", "amazonaws.com.cn"
	case strings.HasPrefix(region, "us-gov-"):
		return "aws-us-gov", "amazonaws.com"
	}
	return "aws", "amazonaws.com"
}

func (a *acm) check() error {
	c := &a.config
	var errs []error
	add := func(key, format string, args ...any) { errs = append(errs, targetconf.Invalid(key, format, args...)) }
	if !regionForm().MatchString(c.Region) {
		add("region", "%s is not a region such as eu-central-1", printable.Quote(c.Region))
	} else if strings.Contains(c.Region, "-iso") {
		add("region", "the partition of %s is not supported: only aws, aws-cn and aws-us-gov are", c.Region)
	}
	name, _ := partition(c.Region)
	if c.CertificateARN != "" {
		parts := arnForm().FindStringSubmatch(c.CertificateARN)
		switch {
		case parts == nil:
			add("certificate_arn", "%s is not the ARN of a certificate in ACM", printable.Quote(c.CertificateARN))
		case parts[1] != name || parts[2] != c.Region:
			add("certificate_arn", "it is in %s (%s), but the target's region is %s", parts[2], parts[1], c.Region)
		}
	}
	// These decide which account gets the key, and which server is trusted as AWS.
	for key, value := range map[string]string{"role_arn": c.RoleARN, "external_id": c.ExternalID, "ca_bundle": string(c.CABundle)} {
		if value != "" && !a.target.Local(key) {
			add(key, "is accepted only from an overlay on this host, since it decides who gets the key")
		}
	}
	if c.RoleARN != "" && !roleForm().MatchString(c.RoleARN) {
		add("role_arn", "%s is not the ARN of a role", printable.Quote(c.RoleARN))
	}
	if c.ExternalID != "" && c.RoleARN == "" {
		add("external_id", "needs role_arn: set that too")
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return targetconf.Join(errs...)
}

// endpoint is the address of ACM, and the way to it.
type endpoint struct {
	url   string
	proxy *url.URL
	dial  func(context.Context, string) (net.Conn, error)
}

// endpoint returns the endpoint of ACM if the policy allows sending keys there.
func (a *acm) endpoint() (*endpoint, error) {
	_, domain := partition(a.config.Region)
	u := &url.URL{Scheme: "https", Host: "acm." + a.config.Region + "." + domain}
	if a.config.Endpoint != "" {
		var err error
		u, err = url.Parse(a.config.Endpoint)
		if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.Opaque != "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			return nil, targetconf.Invalid("endpoint", "expected an https URL without a path, such as https://acm-fips.us-east-1.amazonaws.com")
		}
		u.Path = ""
	}
	at := &endpoint{url: u.String() + "/"}
	var err error
	if at.dial, at.proxy, err = a.host.Route(u, a.target.Local("endpoint")); err != nil {
		return nil, fmt.Errorf("endpoint of ACM: %w", err)
	}
	return at, nil
}

// Tags by which the agent finds a certificate.
const (
	managedByTag   = "certctl-managed-by"
	certificateTag = "certctl-certificate-id"
	managedBy      = "certctl-agent"
)

// tags is a JSON object, or a string that contains one.
type tags map[string]string

// maxTags is how many tags can be configured: ACM's limit minus the agent's tags.
const maxTags = 48

// tagForm matches keys and values
// (https://docs.aws.amazon.com/acm/latest/APIReference/API_Tag.html).
var tagForm = lazyregexp.New(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`)

func (t *tags) UnmarshalJSON(raw []byte) error {
	read, err := targetconf.ParseStrings(raw)
	if err != nil {
		return err
	}
	if len(read) > maxTags {
		return fmt.Errorf("%d tags, but only %d are allowed", len(read), maxTags)
	}
	for key, value := range read {
		switch {
		case key == "" || utf8.RuneCountInString(key) > 128 || utf8.RuneCountInString(value) > 256, !tagForm().MatchString(key), !tagForm().MatchString(value):
			return fmt.Errorf("%s: %s is not a valid tag", printable.Quote(key), printable.Quote(value))
		case key == managedByTag, key == certificateTag:
			return fmt.Errorf("the agent sets the tag %s itself", key)
		case strings.HasPrefix(strings.ToLower(key), "aws:"):
			return fmt.Errorf("%s: keys that start with aws: are reserved", printable.Quote(key))
		}
	}
	*t = read
	return nil
}

// Plan implements connector.Connector.
func (a *acm) Plan(_ context.Context, m *connector.Material) (*connector.Plan, error) {
	if err := checkImport(m); err != nil {
		return nil, err
	}
	return &connector.Plan{
		Changes: []connector.Change{&change{acm: a, material: m}},
		Serves:  a.target.Common.Endpoint(),
	}, nil
}

// Limits of ACM, in bytes
// (https://docs.aws.amazon.com/acm/latest/APIReference/API_ImportCertificate.html).
const (
	maxLeaf  = 32768
	maxKey   = 5120
	maxChain = 2097152
)

// checkImport refuses a certificate that ACM would refuse, before anything is changed
// (https://docs.aws.amazon.com/acm/latest/userguide/import-certificate-prerequisites.html).
func checkImport(m *connector.Material) error {
	leaf, chain := leafPEM(m.Leaf), chainPEM(m.Chain)
	switch {
	case keyAlgorithm(m.Leaf) == "":
		return fmt.Errorf("ACM accepts RSA keys of 1024, 2048, 3072 or 4096 bits and ECDSA keys on P-256, P-384 or P-521, but this certificate has %s: issue it with another key", describeKey(m.Leaf))
	case len(m.Leaf.DNSNames)+len(m.Leaf.IPAddresses) == 0:
		return errors.New("ACM accepts only certificates for domain names or IP addresses, but this one has neither as subject alternative name")
	case len(leaf) > maxLeaf:
		return fmt.Errorf("ACM accepts a certificate of at most %d bytes as PEM, but this one has %d: it has too many names", maxLeaf, len(leaf))
	case len(m.Key()) > maxKey:
		return fmt.Errorf("ACM accepts a private key of at most %d bytes as PEM, but this one has %d", maxKey, len(m.Key()))
	case len(chain) > maxChain:
		return fmt.Errorf("ACM accepts a chain of at most %d bytes as PEM, but this one has %d", maxChain, len(chain))
	}
	return nil
}

// keyTypes returns ACM's names for the key types that it accepts.
func keyTypes() []string {
	return []string{"RSA_1024", "RSA_2048", "RSA_3072", "RSA_4096", "EC_prime256v1", "EC_secp384r1", "EC_secp521r1"}
}

// keyAlgorithm returns ACM's name for the key type of a certificate, or "" if ACM does not accept
// it.
func keyAlgorithm(c *x509.Certificate) string {
	name := ""
	switch public := c.PublicKey.(type) {
	case *rsa.PublicKey:
		name = fmt.Sprintf("RSA_%d", public.N.BitLen())
	case *ecdsa.PublicKey:
		name = map[string]string{"P-256": "EC_prime256v1", "P-384": "EC_secp384r1", "P-521": "EC_secp521r1"}[public.Curve.Params().Name]
	}
	if !slices.Contains(keyTypes(), name) {
		return ""
	}
	return name
}

func describeKey(c *x509.Certificate) string {
	switch public := c.PublicKey.(type) {
	case *rsa.PublicKey:
		return fmt.Sprintf("an RSA key of %d bits", public.N.BitLen())
	case *ecdsa.PublicKey:
		return "an ECDSA key on " + public.Curve.Params().Name
	}
	return "a key of type " + c.PublicKeyAlgorithm.String()
}
