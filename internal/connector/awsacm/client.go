package awsacm

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/printable"
	"certctl-agent/internal/sigv4"
	"certctl-agent/internal/vendorapi"
)

// client calls ACM in one region (https://docs.aws.amazon.com/acm/latest/APIReference/).
type client struct {
	url, region string
	source      *source

	reads   *vendorapi.Client // retries after every 5xx
	changes *vendorapi.Client // retries only if AWS did nothing
	once    *vendorapi.Client // never retries
}

func newClient(url, region string, s *source, o vendorapi.Options) *client {
	c := &client{url: url, region: region, source: s}
	o.Sign = func(ctx context.Context, r *http.Request, body []byte) error {
		issued, err := s.get(ctx)
		if err == nil {
			sigv4.Sign(r, body, issued.Credentials, sigv4.Scope{Region: region, Service: "acm"}, time.Now())
		}
		return err
	}
	o.Busy = isThrottled
	c.changes = vendorapi.New(o)
	o.Busy = func(e *vendorapi.StatusError) bool { return isThrottled(e) || e.Status >= 500 }
	c.reads = vendorapi.New(o)
	o.Patience = -1
	c.once = vendorapi.New(o)
	return c
}

// answerError is an error answer of AWS, in JSON or, from STS, in XML.
type answerError struct {
	Type    string `json:"__type" xml:"-"`
	Code    string `json:"code" xml:"Error>Code"`
	Message string `json:"message" xml:"Error>Message"`
}

func parseAnswer(body []byte) (a answerError) {
	if json.Unmarshal(body, &a) != nil && xml.Unmarshal(body, &a) != nil {
		return answerError{}
	}
	if a.Type != "" {
		a.Code = a.Type[strings.LastIndex(a.Type, "#")+1:]
	}
	return a
}

// message returns the error message of an answer, for vendorapi.Options.
func message(body []byte) string {
	a := parseAnswer(body)
	if a.Code == "" {
		return ""
	}
	return strings.TrimSuffix(a.Code+": "+a.Message, ": ")
}

// codeOf returns the error code that AWS answered, or "" for other errors.
func codeOf(err error) string {
	if e, ok := errors.AsType[*vendorapi.StatusError](err); ok {
		return parseAnswer(e.Body).Code
	}
	return ""
}

// isThrottled reports whether AWS refused a call because there were too many
// (https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html).
func isThrottled(e *vendorapi.StatusError) bool {
	return e.Status == http.StatusTooManyRequests || slices.Contains([]string{"ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "RequestThrottled", "SlowDown"}, parseAnswer(e.Body).Code)
}

// isRejected reports whether AWS refused the credentials. Newer ones may be available.
func isRejected(err error) bool {
	return slices.Contains([]string{"ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId"}, codeOf(err))
}

// call makes a call. If AWS refuses the credentials, it did nothing, so call tries once more with
// new ones.
func (c *client) call(ctx context.Context, via *vendorapi.Client, operation, arn string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	r := &vendorapi.Request{Method: http.MethodPost, URL: c.url, Body: body, Reads: via == c.reads, Header: http.Header{
		"Content-Type": {"application/x-amz-json-1.1"}, "X-Amz-Target": {"CertificateManager." + operation}, "User-Agent": {managedBy},
	}}
	// Get the credentials before a change starts, since nothing cancels it then.
	if _, err := c.source.get(ctx); err != nil {
		return err
	}
	received, err := via.Do(ctx, r)
	if isRejected(err) {
		c.source.forget()
		received, err = via.Do(ctx, r)
	}
	if err != nil {
		return c.explain(operation, arn, err)
	}
	if answer != nil && json.Unmarshal(received.Body, answer) != nil {
		return &answerFormatError{operation + ": the answer is not from ACM: check endpoint and any proxy before it"}
	}
	return nil
}

// explain adds to an error what to do about it.
func (c *client) explain(operation, arn string, err error) error {
	if arn == "" {
		arn = "*"
	}
	from := c.source.from()
	hint := hintAbout(err, from)
	switch codeOf(err) {
	case "AccessDeniedException", "AccessDenied":
		hint = fmt.Sprintf("unless the message says otherwise, the credentials of %s need the permission acm:%s on %s", from, operation, arn)
	case "LimitExceededException":
		hint = "the account's quota of yearly imports or of certificates in this region is used up: ask AWS to raise it, or set certificate_arn to a certificate to replace"
	}
	if hint != "" {
		return fmt.Errorf("%s: %w: %s", operation, err, hint)
	}
	return fmt.Errorf("%s: %w", operation, err)
}

// hintAbout explains an error that is about credentials. It returns "" for other errors.
func hintAbout(err error, from string) string {
	switch codeOf(err) {
	case "ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId":
		return fmt.Sprintf("AWS does not accept the credentials of %s: they have expired, were revoked, or belong to another partition", from)
	case "InvalidSignatureException", "SignatureDoesNotMatch", "RequestExpired":
		return fmt.Sprintf("the secret key of %s is wrong, or this host's clock is", from)
	}
	return ""
}

// tag is a tag of a certificate.
type tag struct {
	Key   string
	Value string `json:",omitempty"`
}

// byARN is the request of calls for one certificate.
type byARN struct{ CertificateArn string }

func (c *client) importCertificate(ctx context.Context, via *vendorapi.Client, arn string, leaf, key, chain []byte, tags []tag) (string, error) {
	request := struct {
		CertificateArn          string `json:",omitempty"`
		Certificate, PrivateKey []byte
		CertificateChain        []byte `json:",omitempty"`
		Tags                    []tag  `json:",omitempty"`
	}{arn, leaf, key, chain, tags}
	var answer byARN
	if err := c.call(ctx, via, "ImportCertificate", arn, request, &answer); err != nil {
		return "", err
	}
	if !c.isOurs(answer.CertificateArn) {
		return "", &answerFormatError{"ImportCertificate: the answer has " + printable.Quote(answer.CertificateArn) + ", which is not the ARN of a certificate in this region"}
	}
	return answer.CertificateArn, nil
}

// answerFormatError is a successful answer that ACM would not give.
type answerFormatError struct{ problem string }

func (e *answerFormatError) Error() string { return e.problem }

// isOurs reports whether arn is valid and in this region.
func (c *client) isOurs(arn string) bool {
	name, _ := partition(c.region)
	parts := arnForm().FindStringSubmatch(arn)
	return parts != nil && parts[1] == name && parts[2] == c.region
}

// get returns a certificate and its chain as PEM, or "" if it does not exist.
func (c *client) get(ctx context.Context, arn string) (leaf, chain string, err error) {
	var answer struct{ Certificate, CertificateChain string }
	err = c.call(ctx, c.reads, "GetCertificate", arn, byARN{arn}, &answer)
	if codeOf(err) == "ResourceNotFoundException" {
		return "", "", nil
	}
	if err == nil && answer.Certificate == "" {
		err = errors.New("GetCertificate: the answer has no certificate")
	}
	return answer.Certificate, answer.CertificateChain, err
}

// kind returns IMPORTED, AMAZON_ISSUED or PRIVATE.
func (c *client) kind(ctx context.Context, arn string) (string, error) {
	var answer struct{ Certificate struct{ Type string } }
	err := c.call(ctx, c.reads, "DescribeCertificate", arn, byARN{arn}, &answer)
	return answer.Certificate.Type, err
}

func (c *client) tags(ctx context.Context, arn string) (map[string]string, error) {
	var answer struct{ Tags []tag }
	if err := c.call(ctx, c.reads, "ListTagsForCertificate", arn, byARN{arn}, &answer); err != nil {
		return nil, err
	}
	have := make(map[string]string)
	for _, t := range answer.Tags {
		have[t.Key] = t.Value
	}
	return have, nil
}

func (c *client) addTags(ctx context.Context, arn string, tags []tag) error {
	request := struct {
		CertificateArn string
		Tags           []tag
	}{arn, tags}
	return c.call(ctx, c.changes, "AddTagsToCertificate", arn, request, nil)
}

// remove deletes a certificate. It is not an error if it does not exist.
func (c *client) remove(ctx context.Context, arn string) error {
	err := c.call(ctx, c.changes, "DeleteCertificate", arn, byARN{arn}, nil)
	if codeOf(err) == "ResourceNotFoundException" {
		return nil
	}
	return err
}

const (
	// pageSize is ACM's largest page. The default quota is 2,500 certificates per account.
	pageSize = 1000
	maxPages = 100 // also bounds the memory for a list

	// searchFor bounds reading the tags of all certificates. ACM allows about ten calls a second.
	searchFor = 10 * time.Minute
)

// imported lists the imported certificates: those that have one of names, and the others. The
// request has all key types, since ACM lists only RSA certificates by default.
func (c *client) imported(ctx context.Context, names []string) (likely, others []string, err error) {
	request := struct {
		Includes  map[string][]string
		MaxItems  int
		NextToken string `json:",omitempty"`
	}{Includes: map[string][]string{"keyTypes": keyTypes()}, MaxItems: pageSize}
	for range maxPages {
		var answer struct {
			CertificateSummaryList []struct {
				ARN   string   `json:"CertificateArn"`
				Names []string `json:"SubjectAlternativeNameSummaries"`
				Type  string
			}
			NextToken string
		}
		if err := c.call(ctx, c.reads, "ListCertificates", "", request, &answer); err != nil {
			return nil, nil, err
		}
		if len(answer.CertificateSummaryList) > pageSize {
			return nil, nil, fmt.Errorf("ListCertificates: a page has more than %d certificates", pageSize)
		}
		for _, one := range answer.CertificateSummaryList {
			switch arn := strings.Clone(one.ARN); { // do not keep the whole answer in memory
			case one.Type != "IMPORTED" || !c.isOurs(arn):
			case slices.ContainsFunc(one.Names, func(name string) bool { return slices.Contains(names, strings.ToLower(name)) }):
				likely = append(likely, arn)
			default:
				others = append(others, arn)
			}
		}
		if answer.NextToken == "" {
			return likely, others, nil
		}
		request.NextToken = answer.NextToken
	}
	return nil, nil, fmt.Errorf("ListCertificates: the list does not end after %d pages", maxPages)
}

// tagged returns the imported certificates that have the tags of certificateID. Since reading tags
// takes a call per certificate, it first reads those of certificates with one of names, and the
// others only if that finds nothing and renamed is set. In a preview without a certificate ("") it
// only checks that listing is allowed.
func (c *client) tagged(ctx context.Context, certificateID string, names []string, renamed bool) (arns []string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, searchFor, fmt.Errorf("reading the tags of all imported certificates took longer than %v: set certificate_arn", searchFor))
	defer cancel()
	likely, others, err := c.imported(ctx, names)
	if err != nil || certificateID == "" {
		return nil, err
	}
	for _, round := range [][]string{likely, others} {
		for _, arn := range round {
			have, err := c.tags(ctx, arn)
			if codeOf(err) == "ResourceNotFoundException" {
				continue // deleted meanwhile
			}
			if err != nil {
				return nil, err
			}
			if _, managed := have[managedByTag]; managed && have[certificateTag] == certificateID {
				arns = append(arns, arn)
			}
		}
		if len(arns) > 0 || !renamed {
			break
		}
	}
	return arns, nil
}
