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

	reads   *vendorapi.Client // tries again after each 5xx
	changes *vendorapi.Client // after those that say that nothing has been done
	once    *vendorapi.Client // never
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

// answerError is what AWS says went wrong, in JSON or, from STS, in XML.
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

// message is that of vendorapi.Options.
func message(body []byte) string {
	a := parseAnswer(body)
	if a.Code == "" {
		return ""
	}
	return strings.TrimSuffix(a.Code+": "+a.Message, ": ")
}

// codeOf is the code of an error that AWS answered, else "".
func codeOf(err error) string {
	if e, ok := errors.AsType[*vendorapi.StatusError](err); ok {
		return parseAnswer(e.Body).Code
	}
	return ""
}

// isThrottled reports whether AWS has refused a call because there are too many
// (https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html).
func isThrottled(e *vendorapi.StatusError) bool {
	return e.Status == http.StatusTooManyRequests || slices.Contains([]string{"ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "RequestThrottled", "SlowDown"}, parseAnswer(e.Body).Code)
}

// isUnproven reports whether AWS has refused the credentials themselves, which may have been replaced
// by now.
func isUnproven(err error) bool {
	return slices.Contains([]string{"ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId"}, codeOf(err))
}

// call makes a call. If AWS refuses the credentials, it has done nothing, and the call is made once more
// with new ones.
func (c *client) call(ctx context.Context, via *vendorapi.Client, operation, arn string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	r := &vendorapi.Request{Method: http.MethodPost, URL: c.url, Body: body, Reads: via == c.reads, Header: http.Header{
		"Content-Type": {"application/x-amz-json-1.1"}, "X-Amz-Target": {"CertificateManager." + operation}, "User-Agent": {managedBy},
	}}
	// Before a change is begun, which nothing cancels.
	if _, err := c.source.get(ctx); err != nil {
		return err
	}
	said, err := via.Do(ctx, r)
	if isUnproven(err) {
		c.source.forget()
		said, err = via.Do(ctx, r)
	}
	if err != nil {
		return c.explain(operation, arn, err)
	}
	if answer != nil && json.Unmarshal(said.Body, answer) != nil {
		return &strangeError{operation + ": the answer is not one of ACM: look at endpoint, and at what is before it"}
	}
	return nil
}

// explain says what an answer means, and what to do.
func (c *client) explain(operation, arn string, err error) error {
	if arn == "" {
		arn = "*"
	}
	from := c.source.from()
	hint := hintAbout(err, from)
	switch codeOf(err) {
	case "AccessDeniedException", "AccessDenied":
		hint = fmt.Sprintf("the credentials of %s need the permission acm:%s on %s, unless the message says something else", from, operation, arn)
	case "LimitExceededException":
		hint = "a quota of the account in this region is used up, of imports in a year or of certificates: ask AWS to raise it, or set certificate_arn to a certificate that is to be replaced"
	}
	if hint != "" {
		return fmt.Errorf("%s: %w: %s", operation, err, hint)
	}
	return fmt.Errorf("%s: %w", operation, err)
}

// hintAbout says what is wrong with credentials. It returns "" if something else is.
func hintAbout(err error, from string) string {
	switch codeOf(err) {
	case "ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId":
		return fmt.Sprintf("AWS does not accept the credentials of %s: they have expired, were withdrawn, or are of another partition", from)
	case "InvalidSignatureException", "SignatureDoesNotMatch", "RequestExpired":
		return fmt.Sprintf("the secret key of %s is not the right one, or this host's clock is wrong", from)
	}
	return ""
}

// tag is one of a certificate.
type tag struct {
	Key   string
	Value string `json:",omitempty"`
}

// byARN is the request of calls that are about one certificate.
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
		return "", &strangeError{"ImportCertificate: the answer has " + printable.Quote(answer.CertificateArn) + ", which is not the ARN of a certificate in this region"}
	}
	return answer.CertificateArn, nil
}

// strangeError is an answer of success that ACM would not give.
type strangeError struct{ problem string }

func (e *strangeError) Error() string { return e.problem }

// isOurs reports whether an ARN that came from outside is one of this region.
func (c *client) isOurs(arn string) bool {
	name, _ := partition(c.region)
	parts := arnForm().FindStringSubmatch(arn)
	return parts != nil && parts[1] == name && parts[2] == c.region
}

// get returns the PEM of a certificate and its chain. It returns "" if there is no such certificate.
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

// kind is IMPORTED, AMAZON_ISSUED or PRIVATE.
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

// remove deletes a certificate. It succeeds if that is gone already.
func (c *client) remove(ctx context.Context, arn string) error {
	err := c.call(ctx, c.changes, "DeleteCertificate", arn, byARN{arn}, nil)
	if codeOf(err) == "ResourceNotFoundException" {
		return nil
	}
	return err
}

const (
	// pageSize is the most that ACM lists at once. An account has 2,500 certificates unless it asked
	// for more.
	pageSize = 1000
	maxPages = 100 // which bounds what is remembered of a list, too

	// searchFor is how long the tags of all certificates may take to read: ACM tells those of about
	// ten in a second.
	searchFor = 10 * time.Minute
)

// imported lists the certificates that were imported: those with one of names, and the others. Without
// key types, ACM lists those with RSA keys alone.
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
			switch arn := strings.Clone(one.ARN); { // without the answer that it is a part of
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

// tagged finds the imported certificates that have the tags of a certificate of ours. Those with one
// of names are asked for their tags first, and the others only if none of these has them and if they
// are to be looked at: ACM tells the tags of one certificate at a time. A preview that is of no
// certificate in particular ("") finds none, and sees whether they may be listed.
func (c *client) tagged(ctx context.Context, certificateID string, names []string, renamed bool) (arns []string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, searchFor, fmt.Errorf("the tags of all imported certificates could not be read within %v: set certificate_arn", searchFor))
	defer cancel()
	likely, others, err := c.imported(ctx, names)
	if err != nil || certificateID == "" {
		return nil, err
	}
	for _, round := range [][]string{likely, others} {
		for _, arn := range round {
			have, err := c.tags(ctx, arn)
			if codeOf(err) == "ResourceNotFoundException" {
				continue // deleted just now
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
