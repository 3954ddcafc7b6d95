package awsacm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/sigv4"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/trustedfile"
	"certctl-agent/internal/vendorapi"
)

const (
	// margin is how long before they expire credentials are replaced: the longest time of a call.
	margin = time.Minute

	// maxFile bounds a configuration or token file, in bytes.
	maxFile = 256 << 10

	// maxMetadata bounds an answer of a metadata service, in bytes.
	maxMetadata = 64 << 10

	// metadataTimeout bounds one try. Outside AWS nothing answers.
	metadataTimeout  = 2 * time.Second
	metadataPatience = 10 * time.Second
)

// source provides the credentials that sign calls. It uses the first place that has any, in the
// order of AWS's SDKs
// (https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html).
type source struct {
	getenv func(string) string
	host   connector.Host
	target *targetconf.Config
	region string

	roleARN, externalID string // role to assume with them; "": none

	sts      *vendorapi.Client
	stsURL   string
	metadata *vendorapi.Client

	issued *issued // nil: none yet
}

// issued is a set of credentials and its origin.
type issued struct {
	sigv4.Credentials
	expires time.Time // zero: never, or unknown
	from    string    // for errors
}

func newSource(c *config, host connector.Host, getenv func(string) string, target *targetconf.Config, trust vendorapi.Trust, w waits) (*source, error) {
	s := &source{getenv: getenv, host: host, target: target, region: c.Region, roleARN: c.RoleARN, externalID: c.ExternalID}
	_, domain := partition(c.Region)
	s.stsURL = cmp.Or(getenv("AWS_ENDPOINT_URL_STS"), "https://sts."+c.Region+"."+domain)
	u, err := url.Parse(s.stsURL)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return nil, errors.New("AWS_ENDPOINT_URL_STS: expected an https URL")
	}
	s.stsURL = strings.TrimSuffix(s.stsURL, "/") + "/"
	// STS gets no key, and a job cannot choose its address, so the policy is not asked.
	options := vendorapi.Options{TLS: trust.Config, Message: message, Timeout: w.try, Patience: w.call,
		Busy: func(e *vendorapi.StatusError) bool { return isThrottled(e) || e.Status >= 500 }}
	options.Proxy = host.ProxyFor(u)
	s.sts = vendorapi.New(options)
	// Metadata services answer for the host that asks, so never through a proxy.
	s.metadata = vendorapi.New(vendorapi.Options{Timeout: metadataTimeout, Patience: min(cmp.Or(w.call, metadataPatience), metadataPatience)})
	return s, nil
}

// get returns credentials that are valid for at least one more call.
func (s *source) get(ctx context.Context) (*issued, error) {
	if s.issued != nil && (s.issued.expires.IsZero() || time.Until(s.issued.expires) > margin) {
		return s.issued, nil
	}
	got, err := s.resolve(ctx)
	if err != nil {
		return nil, fmt.Errorf("AWS credentials: %w", err)
	}
	s.issued = got
	return got, nil
}

// forget makes the next get look for new credentials.
func (s *source) forget() { s.issued = nil }

// from names the origin of the credentials.
func (s *source) from() string {
	if s.issued == nil {
		return "this host"
	}
	return s.issued.from
}

func (s *source) resolve(ctx context.Context) (*issued, error) {
	got, err := s.base(ctx)
	if err != nil || s.roleARN == "" {
		return got, err
	}
	return s.assumeRole(ctx, got, s.roleARN, s.externalID, managedBy)
}

// base returns the credentials of this host.
func (s *source) base(ctx context.Context) (*issued, error) {
	got, err := s.fromEnvironment()
	if got != nil || err != nil {
		return got, err
	}
	name := s.getenv("AWS_PROFILE")
	profiles, err := s.readProfiles()
	if err != nil {
		return nil, err
	}
	if got, err = s.fromProfile(ctx, profiles, cmp.Or(name, "default"), nil); got != nil || err != nil {
		return got, err
	}
	if name != "" && profiles[name] == nil {
		return nil, fmt.Errorf("AWS_PROFILE is %.100q, but %s has no such profile", name, s.files())
	}
	if file := s.getenv("AWS_WEB_IDENTITY_TOKEN_FILE"); file != "" {
		return s.assumeWithToken(ctx, file, s.getenv("AWS_ROLE_ARN"), s.getenv("AWS_ROLE_SESSION_NAME"))
	}
	if got, err = s.fromContainer(ctx); got != nil || err != nil {
		return got, err
	}
	return s.fromInstance(ctx)
}

// fromEnvironment returns the credentials in the environment, or nil if there are none.
func (s *source) fromEnvironment() (*issued, error) {
	id, key := s.getenv("AWS_ACCESS_KEY_ID"), s.getenv("AWS_SECRET_ACCESS_KEY")
	if id == "" && key == "" {
		return nil, nil
	}
	return newIssued("the environment", id, key, s.getenv("AWS_SESSION_TOKEN"), "")
}

// newIssued checks and returns credentials. Expires has the format of RFC 3339; "" means never.
func newIssued(from, id, key, token, expires string) (*issued, error) {
	got := &issued{sigv4.Credentials{AccessKeyID: id, SecretAccessKey: secret.New(key), SessionToken: secret.New(token)}, time.Time{}, from}
	isInvalid := func(text string) bool {
		return strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' })
	}
	switch {
	case id == "" || key == "":
		return nil, fmt.Errorf("%s has only one of access key id and secret key", from)
	case isInvalid(id), isInvalid(key), isInvalid(token), strings.ContainsAny(id, "/,="):
		return nil, fmt.Errorf("%s has an invalid access key: it contains a character that is not allowed", from)
	}
	if expires != "" {
		var err error
		if got.expires, err = time.Parse(time.RFC3339, expires); err != nil {
			return nil, fmt.Errorf("%s has no valid expiry time for the credentials", from)
		}
	}
	return got, nil
}

// credentialDocument is the output of a metadata service or a credential_process.
type credentialDocument struct {
	Version         int
	Code, Message   string
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	Token           string // of a metadata service
	SessionToken    string // of a credential_process
	Expiration      string
}

// fromContainer gets the credentials of an ECS or EKS container. It returns nil if this is not one
// (https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html).
func (s *source) fromContainer(ctx context.Context) (*issued, error) {
	const from = "the role of this container"
	at := s.getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI")
	if relative := s.getenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"); relative != "" {
		at = "http://169.254.170.2/" + strings.TrimPrefix(relative, "/")
	}
	if at == "" {
		return nil, nil
	}
	u, err := url.Parse(at)
	if err != nil || u.Scheme != "https" && (u.Scheme != "http" || !isContainerHost(u.Hostname())) {
		return nil, errors.New("AWS_CONTAINER_CREDENTIALS_FULL_URI: expected https, or http to loopback or to the agent of ECS or EKS")
	}
	header := http.Header{"Accept": {"application/json"}}
	token := s.getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN")
	if file := s.getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"); file != "" {
		if token, err = readToken(file); err != nil {
			return nil, fmt.Errorf("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE: %w", err)
		}
	}
	if token != "" {
		header.Set("Authorization", token)
	}
	answer, err := s.metadata.Do(ctx, &vendorapi.Request{Method: http.MethodGet, URL: at, Header: header, MaxAnswer: maxMetadata})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return parseDocument(from, answer.Body)
}

// isContainerHost reports whether host may provide credentials without TLS.
func isContainerHost(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	at, err := netip.ParseAddr(host)
	return err == nil && (at.IsLoopback() || at == netip.MustParseAddr("169.254.170.2") || at == netip.MustParseAddr("169.254.170.23") || at == netip.MustParseAddr("fd00:ec2::23"))
}

// readToken reads a token file. The token rotates, so it is read each time.
func readToken(file string) (string, error) {
	data, _, _, err := trustedfile.Read(file, maxFile)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r < ' ' || r > '~' }) {
		return "", fmt.Errorf("%s does not contain a token", file)
	}
	return token, nil
}

func parseDocument(from string, data []byte) (*issued, error) {
	var got credentialDocument
	if json.Unmarshal(data, &got) != nil {
		return nil, fmt.Errorf("%s: the answer is not from AWS", from)
	}
	if got.Code != "" && got.Code != "Success" {
		return nil, fmt.Errorf("%s: %.100q", from, got.Code)
	}
	return newIssued(from, got.AccessKeyID, got.SecretAccessKey, cmp.Or(got.Token, got.SessionToken), got.Expiration)
}

// The instance metadata service. Only its version 2 is used
// (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html).
const (
	instanceURL   = "http://169.254.169.254"
	instanceURLv6 = "http://[fd00:ec2::254]"
	instanceToken = "/latest/api/token"
	instanceRoles = "/latest/meta-data/iam/security-credentials/"
)

// fromInstance gets the credentials of an EC2 instance. It is the last place to look.
func (s *source) fromInstance(ctx context.Context) (*issued, error) {
	const from = "the role of this instance"
	const nowhere = "found none in the environment (AWS_ACCESS_KEY_ID, AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONTAINER_CREDENTIALS_*) or in %s, and this host is not an EC2 instance with a role (%w)"
	if strings.EqualFold(s.getenv("AWS_EC2_METADATA_DISABLED"), "true") {
		return nil, fmt.Errorf(nowhere, s.files(), errors.New("AWS_EC2_METADATA_DISABLED is set"))
	}
	base := s.getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
	if base == "" {
		base = instanceURL
		if strings.EqualFold(s.getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"), "ipv6") {
			base = instanceURLv6
		}
	}
	base = strings.TrimSuffix(base, "/")
	ask := func(method, path string, header http.Header) (string, error) {
		answer, err := s.metadata.Do(ctx, &vendorapi.Request{Method: method, URL: base + path, Header: header, MaxAnswer: maxMetadata, Reads: true})
		if err != nil {
			return "", err
		}
		return string(answer.Body), nil
	}
	token, err := ask(http.MethodPut, instanceToken, http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"300"}})
	if err != nil {
		return nil, fmt.Errorf(nowhere, s.files(), err)
	}
	header := http.Header{"X-Aws-Ec2-Metadata-Token": {token}}
	role, err := ask(http.MethodGet, instanceRoles, header)
	role, _, _ = strings.Cut(strings.TrimSpace(role), "\n")
	if vendorapi.StatusOf(err) == http.StatusNotFound || err == nil && role == "" {
		return nil, fmt.Errorf(nowhere, s.files(), errors.New("it has no role"))
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	text, err := ask(http.MethodGet, instanceRoles+url.PathEscape(role), header)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return parseDocument(from, []byte(text))
}
