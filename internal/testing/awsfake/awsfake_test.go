package awsfake_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/sigv4"
	"certctl-agent/internal/testing/awsfake"
	"certctl-agent/internal/testing/testca"
)

// caller signs requests to a fake.
type caller struct {
	t     *testing.T
	cloud *awsfake.Cloud
	sigv4.Credentials
	at    time.Time
	scope sigv4.Scope
}

func newCaller(t *testing.T) *caller {
	cloud := awsfake.Start(t)
	id, key := cloud.AddUser("tester")
	return &caller{t, cloud, sigv4.Credentials{AccessKeyID: id, SecretAccessKey: secret.New(key)}, time.Now(), sigv4.Scope{Region: cloud.Region, Service: "acm"}}
}

// call returns the code of the error, and the answer otherwise.
func (c *caller) call(operation string, request any) (code string, answer map[string]any) {
	c.t.Helper()
	body, err := json.Marshal(request)
	must(c.t, err)
	r, err := http.NewRequest(http.MethodPost, c.cloud.URL, bytes.NewReader(body))
	must(c.t, err)
	r.Header.Set("Content-Type", "application/x-amz-json-1.1")
	r.Header.Set("X-Amz-Target", "CertificateManager."+operation)
	sigv4.Sign(r, body, c.Credentials, c.scope, c.at)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: c.cloud.CA.Pool()}, DisableKeepAlives: true}}
	response, err := client.Do(r)
	must(c.t, err)
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	must(c.t, err)
	if len(data) > 0 {
		must(c.t, json.Unmarshal(data, &answer))
	}
	code, _ = answer["__type"].(string)
	return code, answer
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestRefusals checks that the fake refuses what ACM refuses according to its documentation.
func TestRefusals(t *testing.T) {
	c := newCaller(t)
	issue := func(template testca.Template) map[string]any {
		issued, err := c.cloud.CA.Issue(template)
		must(t, err)
		return map[string]any{"Certificate": issued.LeafPEM(), "PrivateKey": issued.KeyPEM(), "CertificateChain": pemutil.EncodeCertificates(issued.Chain[1:]...)}
	}
	with := func(request map[string]any, key string, value any) map[string]any {
		request[key] = value
		return request
	}
	plain := func() map[string]any { return issue(testca.Template{}) }
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	must(t, err)
	other := testca.Must(t)
	_, answer := c.call("ImportCertificate", plain())
	arn, _ := answer["CertificateArn"].(string)
	if arn == "" {
		t.Fatalf("a valid request: %v", answer)
	}
	_, answer = c.call("ImportCertificate", issue(testca.Template{ExtKeyUsage: []x509.ExtKeyUsage{}}))
	bare, _ := answer["CertificateArn"].(string)
	wide := testca.Template{KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageCodeSigning}}
	tag := func(key, value string) any { return []any{map[string]any{"Key": key, "Value": value}} }
	var many []any
	for i := range 51 {
		many = append(many, map[string]any{"Key": fmt.Sprint("k", i)})
	}
	for _, test := range []struct {
		name, operation string
		request         any
		code            string
	}{
		{"again", "ImportCertificate", with(plain(), "CertificateArn", arn), ""},
		{"tags on a re-import", "ImportCertificate", with(with(plain(), "CertificateArn", arn), "Tags", tag("a", "b")), "ValidationException"},
		{"another kind of key", "ImportCertificate", with(issue(testca.Template{Key: p384}), "CertificateArn", arn), "ValidationException"},
		{"usages added, and client authentication taken away", "ImportCertificate", with(issue(wide), "CertificateArn", arn), ""},
		{"a usage taken away", "ImportCertificate", with(issue(testca.Template{KeyUsage: x509.KeyUsageKeyEncipherment, ExtKeyUsage: wide.ExtKeyUsage}), "CertificateArn", arn), "ValidationException"},
		{"an extended usage taken away", "ImportCertificate", with(plain(), "CertificateArn", arn), "ValidationException"},
		{"encipherment taken from an ECDSA key", "ImportCertificate", with(issue(testca.Template{ExtKeyUsage: wide.ExtKeyUsage}), "CertificateArn", arn), ""},
		{"an extension added", "ImportCertificate", with(plain(), "CertificateArn", bare), "ValidationException"},
		{"an unknown ARN", "ImportCertificate", with(plain(), "CertificateArn", arn[:len(arn)-1]+"x"), "ResourceNotFoundException"},
		{"no ARN", "ImportCertificate", with(plain(), "CertificateArn", ""), "InvalidArnException"},
		{"P-224", "ImportCertificate", issue(testca.Template{Key: p224}), "ValidationException"},
		{"another's key", "ImportCertificate", with(plain(), "PrivateKey", plain()["PrivateKey"]), "ValidationException"},
		{"another's chain", "ImportCertificate", with(plain(), "CertificateChain", other.PEM()), "ValidationException"},
		{"no chain", "ImportCertificate", with(plain(), "CertificateChain", nil), "ValidationException"},
		{"chain in the certificate", "ImportCertificate", with(plain(), "Certificate", append(c.cloud.CA.PEM(), c.cloud.CA.PEM()...)), "ValidationException"},
		{"expired", "ImportCertificate", issue(testca.Template{NotBefore: time.Now().AddDate(0, 0, -2), NotAfter: time.Now().AddDate(0, 0, -1)}), "ValidationException"},
		{"no names", "ImportCertificate", issue(testca.Template{CommonName: "x", Names: []string{}}), "ValidationException"},
		{"long key", "ImportCertificate", with(plain(), "PrivateKey", make([]byte, 5121)), "ValidationException"},
		{"reserved tag", "ImportCertificate", with(plain(), "Tags", tag("aws:x", "")), "InvalidTagException"},
		{"odd tag", "AddTagsToCertificate", map[string]any{"CertificateArn": arn, "Tags": tag("a", "b;c")}, "InvalidTagException"},
		{"many tags", "AddTagsToCertificate", map[string]any{"CertificateArn": arn, "Tags": many}, "TooManyTagsException"},
		{"no tags", "AddTagsToCertificate", map[string]any{"CertificateArn": arn}, "ValidationException"},
		{"misspelt", "GetCertificate", map[string]any{"CertificateARNs": arn}, "SerializationException"},
		{"large page", "ListCertificates", map[string]any{"MaxItems": 1001}, "ValidationException"},
		{"another list's token", "ListCertificates", map[string]any{"NextToken": "RSA_1024 " + arn}, "ValidationException"},
		{"key type", "ListCertificates", map[string]any{"Includes": map[string]any{"keyTypes": []string{"EC_P256"}}}, "ValidationException"},
		{"unknown", "ExportCertificate", map[string]any{}, "UnknownOperationException"},
	} {
		if code, answer := c.call(test.operation, test.request); code != test.code {
			t.Errorf("%s: got %v, want %q", test.name, answer, test.code)
		}
	}
	c.cloud.Use(arn, "arn:aws:elasticloadbalancing:eu-central-1:123456789012:loadbalancer/app/www/1")
	if code, _ := c.call("DeleteCertificate", map[string]any{"CertificateArn": arn}); code != "ResourceInUseException" {
		t.Errorf("in use: got %q", code)
	}
	c.cloud.Set(func(cloud *awsfake.Cloud) { cloud.Quota = 2 })
	if code, _ := c.call("ImportCertificate", plain()); code != "LimitExceededException" || c.cloud.Imports() != 2 {
		t.Errorf("over the quota: got %q, %d imports", code, c.cloud.Imports())
	}
}

// TestSignatures checks that requests need a signature by a valid key, for the current time, the
// region and the service.
func TestSignatures(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(c *caller)
		code  string
	}{
		"good":            {func(c *caller) {}, ""},
		"another secret":  {func(c *caller) { c.SecretAccessKey = secret.New("x") }, "InvalidSignatureException"},
		"unknown key":     {func(c *caller) { c.AccessKeyID = "AKIAX" }, "UnrecognizedClientException"},
		"a token too":     {func(c *caller) { c.SessionToken = secret.New("x") }, "UnrecognizedClientException"},
		"another region":  {func(c *caller) { c.scope.Region = "us-east-1" }, "InvalidSignatureException"},
		"another service": {func(c *caller) { c.scope.Service = "s3" }, "InvalidSignatureException"},
		"old":             {func(c *caller) { c.at = c.at.Add(-6 * time.Minute) }, "InvalidSignatureException"},
		"denied":          {func(c *caller) { c.cloud.Deny("ListCertificates") }, "AccessDeniedException"},
	} {
		c := newCaller(t)
		test.spoil(c)
		if code, answer := c.call("ListCertificates", map[string]any{}); code != test.code {
			t.Errorf("%s: got %v, want %q", name, answer, test.code)
		}
	}
}

// TestMetadata checks that version 1 of the instance metadata service is off and that proxied
// requests are refused.
func TestMetadata(t *testing.T) {
	cloud := awsfake.Start(t)
	cloud.SetInstance("machine")
	ask := func(method, path string, header ...string) (int, string) {
		r, err := http.NewRequest(method, cloud.MetadataURL+path, nil)
		must(t, err)
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		response, err := http.DefaultClient.Do(r)
		must(t, err)
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		must(t, err)
		return response.StatusCode, string(body)
	}
	const roles, ttl, token = "/latest/meta-data/iam/security-credentials/", "X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "X-Aws-Ec2-Metadata-Token"
	for _, test := range []struct {
		method, path string
		header       []string
		status       int
	}{
		{"GET", roles, nil, 401},
		{"GET", roles, []string{token, "x"}, 401},
		{"PUT", "/latest/api/token", nil, 400},
		{"PUT", "/latest/api/token", []string{ttl, "21601"}, 400},
		{"PUT", "/latest/api/token", []string{ttl, "60", "X-Forwarded-For", "203.0.113.1"}, 403},
		{"GET", awsfake.ContainerPath, nil, 404},
	} {
		if status, body := ask(test.method, test.path, test.header...); status != test.status {
			t.Errorf("%s %s %q: got %d %s, want %d", test.method, test.path, test.header, status, body, test.status)
		}
	}
	_, session := ask("PUT", "/latest/api/token", ttl, "60")
	if status, body := ask("GET", roles, token, session); status != 200 || body != "machine" {
		t.Errorf("got %d %q", status, body)
	}
	if status, body := ask("GET", roles+"machine", token, session); status != 200 || !strings.Contains(body, `"Token"`) {
		t.Errorf("got %d %q", status, body)
	}
}
