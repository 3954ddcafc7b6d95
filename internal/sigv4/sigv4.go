// Package sigv4 signs requests to AWS and verifies such signatures: Signature Version 4,
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html.
package sigv4

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/secret"
)

const (
	algorithm  = "AWS4-HMAC-SHA256"
	terminator = "aws4_request"

	dateHeader  = "X-Amz-Date"
	tokenHeader = "X-Amz-Security-Token"

	// timeForm is AWS's variant of ISO 8601. Its first eight bytes are the day.
	timeForm = "20060102T150405Z"
	dayLen   = 8
)

// Credentials are an access key.
type Credentials struct {
	AccessKeyID     string
	SecretAccessKey secret.String
	SessionToken    secret.String // for temporary credentials, else zero
}

// Scope is the scope of a signature, which is valid on the day of signing.
type Scope struct{ Region, Service string }

func (s Scope) of(day string) string {
	return strings.Join([]string{day, s.Region, s.Service, terminator}, "/")
}

// Sign signs a request with the given body: the method, path, query, host and all header fields
// except those that proxies change.
func Sign(r *http.Request, body []byte, c Credentials, scope Scope, at time.Time) {
	stamp := at.UTC().Format(timeForm)
	r.Header.Set(dateHeader, stamp)
	r.Header.Del("Authorization")
	if r.Header.Del(tokenHeader); !c.SessionToken.IsZero() {
		r.Header.Set(tokenHeader, c.SessionToken.Reveal())
	}
	names := []string{"host"}
	for name := range r.Header {
		if name = strings.ToLower(name); !slices.Contains(unsigned, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	signed := strings.Join(names, ";")
	r.Header.Set("Authorization", fmt.Sprintf("%s Credential=%s/%s, SignedHeaders=%s, Signature=%s",
		algorithm, c.AccessKeyID, scope.of(stamp[:dayLen]), signed, signature(r, body, c.SecretAccessKey, scope, stamp, names)))
}

// unsigned are the fields that proxies add or change.
var unsigned = []string{"authorization", "connection", "expect", "transfer-encoding", "user-agent", "x-amzn-trace-id"}

func signature(r *http.Request, body []byte, key secret.String, scope Scope, stamp string, names []string) string {
	digest := sha256.Sum256([]byte(canonical(r, body, names)))
	text := strings.Join([]string{algorithm, stamp, scope.of(stamp[:dayLen]), hex.EncodeToString(digest[:])}, "\n")
	sum := []byte("AWS4" + key.Reveal())
	for _, part := range []string{stamp[:dayLen], scope.Region, scope.Service, terminator, text} {
		mac := hmac.New(sha256.New, sum)
		mac.Write([]byte(part))
		sum = mac.Sum(nil)
	}
	return hex.EncodeToString(sum)
}

// canonical returns the canonical request.
func canonical(r *http.Request, body []byte, names []string) string {
	path := r.URL.Path
	if path == "" {
		path = "/"
	}
	lines := []string{r.Method, escape(path, true), canonicalQuery(r.URL.Query())}
	for _, name := range names {
		lines = append(lines, name+":"+strings.Join(values(r, name), ","))
	}
	digest := sha256.Sum256(body)
	return strings.Join(append(lines, "", strings.Join(names, ";"), hex.EncodeToString(digest[:])), "\n")
}

// values returns the values of a header field with normalized white space.
func values(r *http.Request, name string) []string {
	if name == "host" {
		if r.Host != "" {
			return []string{r.Host}
		}
		return []string{r.URL.Host}
	}
	var all []string
	for _, value := range r.Header.Values(name) {
		all = append(all, strings.Join(strings.Fields(value), " "))
	}
	return all
}

func canonicalQuery(query url.Values) string {
	var pairs []string
	for key, values := range query {
		for _, value := range values {
			pairs = append(pairs, escape(key, false)+"="+escape(value, false))
		}
	}
	slices.Sort(pairs)
	return strings.Join(pairs, "&")
}

// escape escapes all but the unreserved characters of RFC 3986, section 2.3.
func escape(text string, keepSlash bool) string {
	var out strings.Builder
	for _, b := range []byte(text) {
		switch {
		case b >= 'A' && b <= 'Z', b >= 'a' && b <= 'z', b >= '0' && b <= '9', strings.IndexByte("-._~", b) >= 0, b == '/' && keepSlash:
			out.WriteByte(b)
		default:
			fmt.Fprintf(&out, "%%%02X", b)
		}
	}
	return out.String()
}

// A Signature is the signature in a request.
type Signature struct {
	AccessKeyID  string
	SessionToken string
	Scope        Scope
	At           time.Time

	stamp string
	names []string // of the signed fields
	sum   string
}

// Parse reads the signature of a request without verifying it.
func Parse(r *http.Request) (*Signature, error) {
	s := &Signature{SessionToken: r.Header.Get(tokenHeader), stamp: r.Header.Get(dateHeader)}
	rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), algorithm+" ")
	if !ok {
		return nil, errors.New("the request is not signed with " + algorithm)
	}
	fields := make(map[string]string)
	for part := range strings.SplitSeq(rest, ",") {
		key, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		fields[key] = value
	}
	credential := strings.Split(fields["Credential"], "/")
	if len(credential) != 5 || credential[4] != terminator || fields["Signature"] == "" {
		return nil, errors.New("the Authorization field is incomplete")
	}
	s.AccessKeyID, s.Scope, s.sum = credential[0], Scope{credential[2], credential[3]}, fields["Signature"]
	s.names = strings.Split(fields["SignedHeaders"], ";")
	var err error
	if s.At, err = time.Parse(timeForm, s.stamp); err != nil || credential[1] != s.stamp[:dayLen] {
		return nil, errors.New("the date of the request differs from that of its scope")
	}
	if !slices.IsSorted(s.names) || !slices.Contains(s.names, "host") {
		return nil, errors.New("the signed fields are not sorted, or host is not one of them")
	}
	for name := range r.Header {
		if name = strings.ToLower(name); strings.HasPrefix(name, "x-amz-") && !slices.Contains(s.names, name) {
			return nil, fmt.Errorf("the field %s is not signed", name)
		}
	}
	return s, nil
}

// Verify reports whether the request was signed with this key.
func (s *Signature) Verify(r *http.Request, body []byte, key secret.String) bool {
	return hmac.Equal([]byte(s.sum), []byte(signature(r, body, key, s.Scope, s.stamp, s.names)))
}
