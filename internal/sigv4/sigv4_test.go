package sigv4

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/secret"
)

const (
	exampleKey    = "AKIDEXAMPLE"
	exampleSecret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
)

// examples are of AWS's signing test suite, as
// https://github.com/awslabs/aws-c-auth/tree/main/tests/aws-signing-test-suite has it, and, the last
// one, of the guide that the package comment names. Each was signed at exampleTime.
var examples = []struct {
	name                 string
	method, url          string
	service              string
	header               []string // pairs
	body, token          string
	signedHeaders, wants string
}{
	{name: "get-vanilla", method: "GET", url: "https://example.amazonaws.com/",
		signedHeaders: "host;x-amz-date", wants: "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
	{name: "post-vanilla", method: "POST", url: "https://example.amazonaws.com/",
		signedHeaders: "host;x-amz-date", wants: "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"},
	{name: "get-vanilla-with-session-token", method: "GET", url: "https://example.amazonaws.com/",
		token:         "6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267",
		signedHeaders: "host;x-amz-date;x-amz-security-token", wants: "07ec1639c89043aa0e3e2de82b96708f198cceab042d4a97044c66dd9f74e7f8"},
	{name: "post-sts-header-before", method: "POST", url: "https://example.amazonaws.com/",
		token:         "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==",
		signedHeaders: "host;x-amz-date;x-amz-security-token", wants: "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead"},
	{name: "get-header-value-order", method: "GET", url: "https://example.amazonaws.com/",
		header:        []string{"My-Header1", "value4", "My-Header1", "value1", "My-Header1", "value3", "My-Header1", "value2"},
		signedHeaders: "host;my-header1;x-amz-date", wants: "08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01"},
	{name: "get-header-value-trim", method: "GET", url: "https://example.amazonaws.com/",
		header:        []string{"My-Header1", " value1", "My-Header2", ` "a   b   c"`},
		signedHeaders: "host;my-header1;my-header2;x-amz-date", wants: "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736"},
	{name: "post-header-value-case", method: "POST", url: "https://example.amazonaws.com/", header: []string{"My-Header1", "VALUE1"},
		signedHeaders: "host;my-header1;x-amz-date", wants: "cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d"},
	{name: "get-unreserved", method: "GET", url: "https://example.amazonaws.com/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
		signedHeaders: "host;x-amz-date", wants: "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f"},
	{name: "get-vanilla-query-order-key-case", method: "GET", url: "https://example.amazonaws.com/?Param2=value2&Param1=value1",
		signedHeaders: "host;x-amz-date", wants: "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"},
	{name: "get-vanilla-utf8-query", method: "GET", url: "https://example.amazonaws.com/?ሴ=bar",
		signedHeaders: "host;x-amz-date", wants: "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04"},
	{name: "post-vanilla-query", method: "POST", url: "https://example.amazonaws.com/?Param1=value1",
		signedHeaders: "host;x-amz-date", wants: "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11"},
	{name: "post-x-www-form-urlencoded", method: "POST", url: "https://example.amazonaws.com/", body: "Param1=value1",
		header: []string{"Content-Type", "application/x-www-form-urlencoded", "Content-Length", "13",
			"x-amz-content-sha256", "9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e"},
		signedHeaders: "content-length;content-type;host;x-amz-content-sha256;x-amz-date", wants: "d3875051da38690788ef43de4db0d8f280229d82040bfac253562e56c3f20e0b"},
	{name: "the guide's ListUsers", service: "iam", method: "GET", url: "https://iam.amazonaws.com/?Action=ListUsers&Version=2010-05-08",
		header:        []string{"Content-Type", "application/x-www-form-urlencoded; charset=utf-8"},
		signedHeaders: "content-type;host;x-amz-date", wants: "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"},
}

var exampleTime = time.Date(2015, 8, 30, 14, 36, 0, 0, time.FixedZone("CEST", 7200))

func TestExamples(t *testing.T) {
	for _, test := range examples {
		t.Run(test.name, func(t *testing.T) {
			r, err := http.NewRequest(test.method, test.url, nil)
			if err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(test.header); i += 2 {
				r.Header.Add(test.header[i], test.header[i+1])
			}
			r.Header.Set("User-Agent", "not signed")
			scope := Scope{"us-east-1", "service"}
			if test.service != "" {
				scope.Service = test.service
			}
			c := Credentials{exampleKey, secret.New(exampleSecret), secret.New(test.token)}
			Sign(r, []byte(test.body), c, scope, exampleTime)
			want := "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/" + scope.Service + "/aws4_request, SignedHeaders=" +
				test.signedHeaders + ", Signature=" + test.wants
			if got := r.Header.Get("Authorization"); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}

			s, err := Parse(r)
			if err != nil {
				t.Fatal(err)
			}
			if s.AccessKeyID != exampleKey || s.SessionToken != test.token || s.Scope != scope || !s.At.Equal(exampleTime) {
				t.Errorf("parsed %+v", s)
			}
			if !s.Verify(r, []byte(test.body), c.SecretAccessKey) {
				t.Error("the signature does not verify")
			}
			if s.Verify(r, []byte(test.body+"x"), c.SecretAccessKey) || s.Verify(r, []byte(test.body), secret.New("other")) {
				t.Error("another body or key also verifies")
			}
			r.Host = "elsewhere.example.org"
			if s.Verify(r, []byte(test.body), c.SecretAccessKey) {
				t.Error("another host also verifies")
			}
		})
	}
}

// Signing a request again with other credentials leaves no trace of the first ones.
func TestSignAgain(t *testing.T) {
	r, err := http.NewRequest("POST", "https://example.amazonaws.com/", nil)
	if err != nil {
		t.Fatal(err)
	}
	Sign(r, nil, Credentials{exampleKey, secret.New(exampleSecret), secret.New("token")}, Scope{"us-east-1", "service"}, exampleTime.AddDate(0, 0, -1))
	Sign(r, nil, Credentials{exampleKey, secret.New(exampleSecret), secret.String{}}, Scope{"us-east-1", "service"}, exampleTime)
	if got := r.Header.Get("Authorization"); !strings.HasSuffix(got, "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b") {
		t.Errorf("got %s", got)
	}
}

func TestParseRefuses(t *testing.T) {
	good := func() *http.Request {
		r, _ := http.NewRequest("POST", "https://example.amazonaws.com/", nil)
		Sign(r, nil, Credentials{exampleKey, secret.New(exampleSecret), secret.New("token")}, Scope{"us-east-1", "service"}, exampleTime)
		return r
	}
	for name, spoil := range map[string]func(h http.Header){
		"none":             func(h http.Header) { h.Del("Authorization") },
		"another scheme":   func(h http.Header) { h.Set("Authorization", "Bearer x") },
		"incomplete":       func(h http.Header) { h.Set("Authorization", algorithm+" Credential=AKIDEXAMPLE/20150830") },
		"no date":          func(h http.Header) { h.Del(dateHeader) },
		"another day":      func(h http.Header) { h.Set(dateHeader, "20150831T123600Z") },
		"an unsigned one":  func(h http.Header) { h.Set("X-Amz-Target", "DeleteEverything") },
		"an unsigned host": func(h http.Header) { h.Set("Authorization", strings.Replace(h.Get("Authorization"), "host;", "", 1)) },
	} {
		r := good()
		spoil(r.Header)
		if s, err := Parse(r); err == nil {
			t.Errorf("%s: got %+v", name, s)
		}
	}
	if _, err := Parse(good()); err != nil {
		t.Errorf("a good one: %v", err)
	}
}

// Fakes in tests parse the signatures of any client, so Parse must not panic.
func FuzzParse(f *testing.F) {
	f.Add(algorithm+" Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host, Signature=00", "20150830T123600Z")
	f.Add(algorithm+" Credential=////aws4_request,Signature=x", "x")
	f.Fuzz(func(t *testing.T, authorization, date string) {
		r, _ := http.NewRequest("GET", "https://example.amazonaws.com/", nil)
		r.Header.Set("Authorization", authorization)
		r.Header.Set(dateHeader, date)
		if s, err := Parse(r); err == nil && s.Verify(r, nil, secret.New("a key that nobody signed with")) {
			t.Errorf("%q verifies", authorization)
		}
	})
}
