// Package awsfake is a fake of the parts of AWS that deal with certificates: ACM, the STS calls
// that issue credentials, and the services that provide them to containers and instances. It keeps
// state, verifies signatures, and refuses everything that AWS refuses according to its
// documentation. It listens on loopback only.
package awsfake

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/sigv4"
	"certctl-agent/internal/testing/testca"
)

// Account is the only account.
const Account = "123456789012"

// maxBody bounds a request, in bytes. A chain may take 2 MiB.
const maxBody = 4 << 20

// Cloud is a running fake. Its exported fields may be changed before the first call and with Set.
type Cloud struct {
	URL         string // of ACM and STS; https, with a certificate issued by CA
	MetadataURL string // of the metadata services; http
	CA          *testca.CA

	Region   string        // the only region that accepts signatures
	Quota    int           // allowed imports, not counting re-imports
	PageSize int           // page size of lists, whatever the request asks for
	Lag      int           // number of calls in which a new certificate does not appear yet
	Lifetime time.Duration // lifetime of issued credentials

	mu           sync.Mutex // guards the fields below
	imports      int
	certificates []*certificate // in the order of their import
	keys         map[string]*key
	issued       []string // secrets
	roles        map[string]*role
	webTokens    map[string]string // from tokens to the roles that they may assume
	container    containerRole
	instance     instanceRole
	denied       []string // operations without permission
	calls        []string
	fault        func(operation string, n int) Fault
}

// A Fault makes a call fail.
type Fault int

// The faults.
const (
	None        Fault = iota
	Throttled         // ThrottlingException
	TooMany           // 429 without a body
	Broken            // 500 InternalFailure
	Busy              // 503
	Dropped           // the connection closes before the call is carried out
	Lost              // the connection closes after the call is carried out
	Hanging           // no answer, and the call is not carried out
	HangingLate       // no answer, but the call is carried out
)

// Start starts a fake for a test.
func Start(t testing.TB) *Cloud {
	t.Helper()
	c := &Cloud{
		CA: testca.Must(t), Region: "eu-central-1", Quota: 5000, PageSize: 2, Lifetime: time.Hour,
		keys: make(map[string]*key), roles: make(map[string]*role), webTokens: make(map[string]string), instance: instanceRole{tokens: make(map[string]time.Time)},
	}
	// The names are for clients that connect through a proxy.
	certificate, err := c.CA.TLSCertificate("127.0.0.1", "localhost", "*.eu-central-1.amazonaws.com", "*.us-gov-west-1.amazonaws.com", "*.cn-north-1.amazonaws.com.cn")
	if err != nil {
		t.Fatal(err)
	}
	api := httptest.NewUnstartedServer(http.HandlerFunc(c.serve))
	api.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	metadata := httptest.NewUnstartedServer(http.HandlerFunc(c.serveMetadata))
	for _, server := range []*httptest.Server{api, metadata} {
		server.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that distrust the certificate or have gone
		t.Cleanup(server.Close)
	}
	api.StartTLS()
	metadata.Start()
	c.URL, c.MetadataURL = api.URL, metadata.URL
	return c
}

// OnCall makes choose decide on the fault of each call. n counts the calls of an operation from 1.
// choose may be called concurrently. Nil means no faults.
func (c *Cloud) OnCall(choose func(operation string, n int) Fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault, c.calls = choose, nil
}

// Set changes fields between calls.
func (c *Cloud) Set(change func(c *Cloud)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c)
}

// Deny denies permission for the given operations and grants all others.
func (c *Cloud) Deny(operations ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.denied = operations
}

// Calls returns the operations called since OnCall, in order.
func (c *Cloud) Calls() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.calls)
}

// Imports returns the number of imports that created a certificate, including deleted ones.
func (c *Cloud) Imports() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.imports
}

// note records a call and returns its fault.
func (c *Cloud) note(operation string) Fault {
	c.mu.Lock()
	c.calls = append(c.calls, operation)
	n := 0
	for _, call := range c.calls {
		if call == operation {
			n++
		}
	}
	choose := c.fault
	c.mu.Unlock()
	if choose == nil {
		return None
	}
	return choose(operation, n)
}

// problem is an AWS error.
type problem struct {
	status  int
	code    string
	message string
}

func refuse(code, format string, args ...any) *problem {
	return &problem{http.StatusBadRequest, code, fmt.Sprintf(format, args...)}
}

// protocol is the format of a service's answers.
type protocol struct {
	contentType string
	problem     func(*problem) []byte
}

// serve answers the requests of ACM and STS.
func (c *Cloud) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return
	}
	w.Header().Set("X-Amzn-Requestid", randomText())
	speaks, operation, call := c.acm(r, body)
	if r.Header.Get("X-Amz-Target") == "" {
		speaks, operation, call = c.sts(r, body)
	}
	w.Header().Set("Content-Type", speaks.contentType)
	answer := func(p *problem, body []byte) {
		if p != nil {
			w.WriteHeader(p.status)
			body = speaks.problem(p)
		}
		_, _ = w.Write(body)
	}
	fault := c.note(operation)
	switch fault {
	case Throttled:
		answer(refuse("ThrottlingException", "Rate exceeded"), nil)
		return
	case TooMany:
		w.WriteHeader(http.StatusTooManyRequests)
		return
	case Broken:
		answer(&problem{http.StatusInternalServerError, "InternalFailure", "The request processing has failed because of an unknown error"}, nil)
		return
	case Busy:
		answer(&problem{http.StatusServiceUnavailable, "ServiceUnavailable", "Try again"}, nil)
		return
	case Dropped:
		drop(w)
		return
	case Hanging:
		<-r.Context().Done()
		return
	}
	if r.Method != http.MethodPost || r.URL.Path != "/" {
		answer(&problem{http.StatusNotFound, "UnknownOperationException", ""}, nil)
		return
	}
	c.mu.Lock()
	result, p := call()
	c.mu.Unlock()
	switch fault {
	case Lost:
		drop(w)
	case HangingLate:
		<-r.Context().Done()
	default:
		answer(p, result)
	}
}

func drop(w http.ResponseWriter) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		conn.Close()
	}
}

// caller returns the key that signed a request.
func (c *Cloud) caller(r *http.Request, body []byte, service string) (*key, *problem) {
	s, err := sigv4.Parse(r)
	if err != nil {
		return nil, refuse("IncompleteSignatureException", "%v", err)
	}
	k := c.keys[s.AccessKeyID]
	switch {
	case k == nil || k.token != s.SessionToken:
		return nil, refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
	case !s.Verify(r, body, k.secret):
		return nil, refuse("InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
	case s.Scope != sigv4.Scope{Region: c.Region, Service: service}:
		return nil, refuse("InvalidSignatureException", "Credential should be scoped to a valid region and to service %s, not %v.", service, s.Scope)
	case time.Since(s.At).Abs() > 5*time.Minute:
		return nil, refuse("InvalidSignatureException", "Signature expired: %v", s.At)
	case !k.expires.IsZero() && !time.Now().Before(k.expires):
		return nil, refuse("ExpiredTokenException", "The security token included in the request is expired")
	}
	return k, nil
}

// allow returns an error if a caller lacks the permission for an action.
func (c *Cloud) allow(k *key, action, resource string) *problem {
	if _, operation, _ := strings.Cut(action, ":"); !slices.Contains(c.denied, operation) {
		return nil
	}
	return refuse("AccessDeniedException", "User: %s is not authorized to perform: %s on resource: %s because no identity-based policy allows the %s action",
		k.arn, action, resource, action)
}

func (c *Cloud) partition() string {
	switch {
	case strings.HasPrefix(c.Region, "cn-"):
		return "aws-cn"
	case strings.HasPrefix(c.Region, "us-gov-"):
		return "aws-us-gov"
	}
	return "aws"
}

// isLoopback reports whether a request came over loopback, without a proxy.
func isLoopback(r *http.Request) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	ip := net.ParseIP(host)
	return err == nil && ip != nil && ip.IsLoopback() && r.Header.Get("X-Forwarded-For") == "" && r.Header.Get("Via") == ""
}

func randomText() string {
	random := make([]byte, 16)
	rand.Read(random)
	return hex.EncodeToString(random)
}

// uuid returns a random UUID (RFC 9562, section 5.4).
func uuid() string {
	b := make([]byte, 16)
	rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
