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
	// margin is before the end of credentials at which they are replaced: a call may take as long.
	margin = time.Minute

	// maxFile bounds a file of AWS's configuration, or of a token, in bytes.
	maxFile = 256 << 10

	// maxMetadata bounds an answer of a metadata service, in bytes.
	maxMetadata = 64 << 10

	// metadataTimeout is for one try. On a host that is not in AWS nobody answers.
	metadataTimeout  = 2 * time.Second
	metadataPatience = 10 * time.Second
)

// source has the credentials that calls are signed with. They come from the first place that has any,
// in the order of AWS's SDKs (https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html).
type source struct {
	getenv func(string) string
	host   connector.Host
	target *targetconf.Config
	region string

	roleARN, externalID string // to assume on top; "": none

	sts      *vendorapi.Client
	stsURL   string
	metadata *vendorapi.Client

	issued *issued // nil: none yet
}

// issued are credentials with their origin.
type issued struct {
	sigv4.Credentials
	expires time.Time // zero: never, as far as is known
	from    string    // for errors
}

func newSource(c *config, host connector.Host, getenv func(string) string, target *targetconf.Config, trust vendorapi.Trust, p patience) (*source, error) {
	s := &source{getenv: getenv, host: host, target: target, region: c.Region, roleARN: c.RoleARN, externalID: c.ExternalID}
	_, domain := partition(c.Region)
	s.stsURL = cmp.Or(getenv("AWS_ENDPOINT_URL_STS"), "https://sts."+c.Region+"."+domain)
	u, err := url.Parse(s.stsURL)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return nil, errors.New("AWS_ENDPOINT_URL_STS: expected an https URL")
	}
	s.stsURL = strings.TrimSuffix(s.stsURL, "/") + "/"
	// STS gets no key, and a job has no say in where it is.
	options := vendorapi.Options{TLS: trust.Config, Message: message, Timeout: p.try, Patience: p.call,
		Busy: func(e *vendorapi.StatusError) bool { return isThrottled(e) || e.Status >= 500 }}
	options.Proxy = host.ProxyFor(u)
	s.sts = vendorapi.New(options)
	// What the metadata services say is for this host alone, and goes through no proxy.
	s.metadata = vendorapi.New(vendorapi.Options{Timeout: metadataTimeout, Patience: min(cmp.Or(p.call, metadataPatience), metadataPatience)})
	return s, nil
}

// get returns credentials that are good for one more call.
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

// forget makes the next call look for credentials again.
func (s *source) forget() { s.issued = nil }

// from says where the credentials are from.
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

// base are the credentials of this host.
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
		return nil, fmt.Errorf("AWS_PROFILE is %.100q, and there is no such profile in %s", name, s.files())
	}
	if file := s.getenv("AWS_WEB_IDENTITY_TOKEN_FILE"); file != "" {
		return s.assumeWithToken(ctx, file, s.getenv("AWS_ROLE_ARN"), s.getenv("AWS_ROLE_SESSION_NAME"))
	}
	if got, err = s.fromContainer(ctx); got != nil || err != nil {
		return got, err
	}
	return s.fromInstance(ctx)
}

// fromEnvironment returns nil if there are none.
func (s *source) fromEnvironment() (*issued, error) {
	id, key := s.getenv("AWS_ACCESS_KEY_ID"), s.getenv("AWS_SECRET_ACCESS_KEY")
	if id == "" && key == "" {
		return nil, nil
	}
	return newIssued("the environment", id, key, s.getenv("AWS_SESSION_TOKEN"), "")
}

// newIssued checks credentials that came from outside. Expires is as in RFC 3339; "": never.
func newIssued(from, id, key, token, expires string) (*issued, error) {
	got := &issued{sigv4.Credentials{AccessKeyID: id, SecretAccessKey: secret.New(key), SessionToken: secret.New(token)}, time.Time{}, from}
	unfit := func(text string) bool {
		return strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' })
	}
	switch {
	case id == "" || key == "":
		return nil, fmt.Errorf("%s has only one of access key and secret key", from)
	case unfit(id), unfit(key), unfit(token), strings.ContainsAny(id, "/,="):
		return nil, fmt.Errorf("%s has an invalid access key: there is a character in it that no key has", from)
	}
	if expires != "" {
		var err error
		if got.expires, err = time.Parse(time.RFC3339, expires); err != nil {
			return nil, fmt.Errorf("%s does not say when the credentials end", from)
		}
	}
	return got, nil
}

// said is the answer of a metadata service or a credential_process.
type said struct {
	Version         int
	Code, Message   string
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	Token           string // of the former
	SessionToken    string // of the latter
	Expiration      string
}

// fromContainer asks the agent of ECS or EKS. It returns nil if this is not one of its containers
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
	return parseSaid(from, answer.Body)
}

// isContainerHost reports whether credentials may come from there without TLS.
func isContainerHost(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	at, err := netip.ParseAddr(host)
	return err == nil && (at.IsLoopback() || at == netip.MustParseAddr("169.254.170.2") || at == netip.MustParseAddr("169.254.170.23") || at == netip.MustParseAddr("fd00:ec2::23"))
}

// readToken reads a token, which rotates.
func readToken(file string) (string, error) {
	data, _, _, err := trustedfile.Read(file, maxFile)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r < ' ' || r > '~' }) {
		return "", fmt.Errorf("%s holds no token", file)
	}
	return token, nil
}

func parseSaid(from string, data []byte) (*issued, error) {
	var got said
	if json.Unmarshal(data, &got) != nil {
		return nil, fmt.Errorf("%s: the answer is not one of AWS", from)
	}
	if got.Code != "" && got.Code != "Success" {
		return nil, fmt.Errorf("%s: %.100q", from, got.Code)
	}
	return newIssued(from, got.AccessKeyID, got.SecretAccessKey, cmp.Or(got.Token, got.SessionToken), got.Expiration)
}

// Where an instance finds its credentials, in version 2 of the metadata service alone
// (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html).
const (
	instanceURL   = "http://169.254.169.254"
	instanceURLv6 = "http://[fd00:ec2::254]"
	instanceToken = "/latest/api/token"
	instanceRoles = "/latest/meta-data/iam/security-credentials/"
)

// fromInstance asks the metadata service of the instance, which is the last place.
func (s *source) fromInstance(ctx context.Context) (*issued, error) {
	const from = "the role of this instance"
	const nowhere = "there are none: neither in the environment (AWS_ACCESS_KEY_ID, AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONTAINER_CREDENTIALS_*) nor in %s, and this host is not an EC2 instance with a role (%w)"
	if strings.EqualFold(s.getenv("AWS_EC2_METADATA_DISABLED"), "true") {
		return nil, fmt.Errorf(nowhere, s.files(), errors.New("AWS_EC2_METADATA_DISABLED says not to ask"))
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
	return parseSaid(from, []byte(text))
}
