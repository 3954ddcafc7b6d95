// Package azure is a fake of the services that a client of Azure Key Vault uses: vaults with
// certificates, the token endpoints of Microsoft Entra ID, and the managed identities of virtual
// machines and App Service, in the public, US government and China clouds. It keeps state and
// refuses what the real services refuse. Any call can be made to fail, hang, be throttled or lose
// its answer.
//
// It listens on loopback only. Clients reach the hosts of the clouds through its proxy.
package azure

import (
	"cmp"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"time"

	"certctl-agent/internal/testing/testca"
)

// Cloud is one of Azure's clouds with its domain names, see
// https://learn.microsoft.com/azure/key-vault/general/about-keys-secrets-certificates#dns-suffixes-for-object-identifiers
// and https://learn.microsoft.com/entra/identity-platform/authentication-national-cloud.
type Cloud struct {
	Vaults    string // domain of vaults
	Authority string // host of the token endpoint
}

// Public is the global cloud.
func Public() Cloud { return Cloud{"vault.azure.net", "login.microsoftonline.com"} }

// USGovernment is Azure Government.
func USGovernment() Cloud { return Cloud{"vault.usgovcloudapi.net", "login.microsoftonline.us"} }

// China is Azure operated by 21Vianet.
func China() Cloud { return Cloud{"vault.azure.cn", "login.chinacloudapi.cn"} }

func clouds() []Cloud { return []Cloud{Public(), USGovernment(), China()} }

// Resource returns the resource of tokens for vaults of the cloud.
func (c Cloud) Resource() string { return "https://" + c.Vaults }

// Tenant is the directory of the fake's vaults and applications.
const Tenant = "9c3e2b0a-51f4-4d76-8f1c-2f6a4f0b7d11"

// Fault makes a call fail.
type Fault struct {
	Status int    // answer with it and do nothing
	Code   string // error code
	After  int    // Retry-After, in seconds; 0: none
	Body   string // instead of an error of the usual form
	Echo   bool   // the message repeats the request, with its credentials

	Hang bool   // never answer and do nothing
	Drop bool   // close the connection and do nothing
	Lose bool   // carry out the call and close the connection
	Then func() // with Lose: called afterwards; may be nil
	Late bool   // carry out the call and answer with a gateway timeout
}

// Throttled returns the answer to too many requests, see
// https://learn.microsoft.com/azure/key-vault/general/overview-throttling.
func Throttled(seconds int) Fault {
	return Fault{Status: http.StatusTooManyRequests, Code: "Throttled", After: seconds}
}

// Server is the fake.
type Server struct {
	ProxyURL    string // of the proxy that connects to the clouds
	MetadataURL string // of the metadata service of a virtual machine
	AppURL      string // IDENTITY_ENDPOINT of App Service
	AppHeader   string // IDENTITY_HEADER

	tls, proxy, metadata *httptest.Server
	gone                 chan struct{} // closed by Close
	relays               sync.WaitGroup

	mu         sync.Mutex // guards the fields below
	vaults     map[string]*Vault
	tokens     map[string]token
	apps       map[string]*App
	identities map[string]bool // client ids of managed identities; "" for the system-assigned one
	life       time.Duration   // of tokens
	refuse     bool            // no token is accepted
	faults     map[string][]Fault
	calls      []string
	connected  []string
	imported   []string
}

// Start starts the fake. Its servers have certificates of ca.
func Start(ca *testca.CA) (*Server, error) {
	var names []string
	for _, c := range clouds() {
		names = append(names, "*."+c.Vaults, c.Authority)
	}
	pair, err := ca.TLSCertificate(names...)
	if err != nil {
		return nil, err
	}
	s := &Server{
		AppHeader: random(), gone: make(chan struct{}), vaults: make(map[string]*Vault), tokens: make(map[string]token), apps: make(map[string]*App),
		identities: make(map[string]bool), life: time.Hour, faults: make(map[string][]Fault),
	}
	quiet := log.New(io.Discard, "", 0) // clients that have gone
	s.tls = httptest.NewUnstartedServer(http.HandlerFunc(s.serveCloud))
	// The post-quantum exchange is slow under the race detector.
	s.tls.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, CurvePreferences: []tls.CurveID{tls.X25519}}
	s.tls.Config.ErrorLog = quiet
	s.tls.StartTLS()
	s.proxy = httptest.NewServer(http.HandlerFunc(s.connect))
	s.metadata = httptest.NewServer(http.HandlerFunc(s.serveMetadata))
	s.proxy.Config.ErrorLog, s.metadata.Config.ErrorLog = quiet, quiet
	s.ProxyURL, s.MetadataURL, s.AppURL = s.proxy.URL, s.metadata.URL, s.metadata.URL+"/msi/token"
	return s, nil
}

// Close stops the fake.
func (s *Server) Close() {
	close(s.gone)
	s.proxy.CloseClientConnections()
	s.proxy.Close()
	s.tls.CloseClientConnections()
	s.tls.Close()
	s.metadata.CloseClientConnections()
	s.metadata.Close()
	s.relays.Wait()
}

// Next makes the next calls of an operation fail, one after the other. Operations are named as in
// Calls; without the part after the blank, calls for any name count.
func (s *Server) Next(operation string, faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[operation] = append(s.faults[operation], faults...)
}

// Calls returns the calls so far: "import www", "get www", "update www", "secret www", "versions
// www", "policy www", "delete www", "deleted www", "recover www", "purge www" of vaults, "challenge
// www" for a request without a token, "token client id", "imds", "app".
func (s *Server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Connected returns the addresses that clients asked the proxy for.
func (s *Server) Connected() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.connected)
}

// Imported returns the values and passwords of all imports so far.
func (s *Server) Imported() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.imported)
}

// Forget discards all recorded calls, connections and faults.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.connected = nil, nil
	clear(s.faults)
}

// begin records a call and applies its fault. It reports whether the call should be carried out,
// and returns what to do instead of answering, or nil.
func (s *Server) begin(w http.ResponseWriter, r *http.Request, operation, of string) (proceed bool, instead func()) {
	name := strings.TrimSpace(operation + " " + of)
	s.mu.Lock()
	s.calls = append(s.calls, name)
	var fault Fault
	for _, key := range []string{name, operation} {
		if queue := s.faults[key]; len(queue) > 0 {
			fault, s.faults[key] = queue[0], queue[1:]
			break
		}
	}
	s.mu.Unlock()
	switch {
	case fault.Hang:
		_, _ = io.Copy(io.Discard, r.Body) // so that the server notices when the client has gone
		select {
		case <-r.Context().Done():
		case <-s.gone:
		}
		panic(http.ErrAbortHandler)
	case fault.Drop:
		panic(http.ErrAbortHandler)
	case fault.Status != 0:
		if fault.After > 0 {
			w.Header().Set("Retry-After", fmt.Sprint(fault.After))
		}
		if fault.Body != "" {
			w.WriteHeader(fault.Status)
			_, _ = io.WriteString(w, fault.Body)
			return false, nil
		}
		words := "made to fail"
		if fault.Echo {
			body, _ := io.ReadAll(r.Body) // empty if the form has been read
			words = r.Header.Get("Authorization") + " " + r.PostForm.Encode() + " " + r.PostForm.Get("client_secret") + " " + string(body)
		}
		if operation == "token" {
			answer(w, fault.Status, map[string]any{"error": "invalid_request", "error_description": words})
			return false, nil
		}
		fail(w, &problem{fault.Status, cmp.Or(fault.Code, "BadParameter"), words, ""})
		return false, nil
	}
	switch {
	case fault.Lose:
		instead = func() {
			if fault.Then != nil {
				fault.Then()
			}
			panic(http.ErrAbortHandler)
		}
	case fault.Late:
		instead = func() { http.Error(w, "<html>Gateway Timeout", http.StatusGatewayTimeout) }
	}
	return true, instead
}

// serveCloud answers requests to all hosts of the clouds.
func (s *Server) serveCloud(w http.ResponseWriter, r *http.Request) {
	host := strings.TrimSuffix(r.Host, ":443")
	for _, c := range clouds() {
		if host == c.Authority {
			s.serveAuthority(w, r, c)
			return
		}
	}
	s.mu.Lock()
	v := s.vaults[host]
	s.mu.Unlock()
	if v == nil {
		http.Error(w, "no such host", http.StatusMisdirectedRequest)
		return
	}
	s.serveVault(w, r, v)
}

// connect is a CONNECT proxy (RFC 9110, section 9.3.6) that leads to this host for all names of the
// clouds.
func (s *Server) connect(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.connected = append(s.connected, r.Host)
	s.mu.Unlock()
	known := slices.ContainsFunc(clouds(), func(c Cloud) bool {
		return r.Host == c.Authority+":443" || strings.HasSuffix(r.Host, "."+c.Vaults+":443")
	})
	if r.Method != http.MethodConnect || !known {
		http.Error(w, "not a host of the clouds", http.StatusForbidden)
		return
	}
	to, err := net.Dial("tcp", s.tls.Listener.Addr().String())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	w.WriteHeader(http.StatusOK)
	from, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		to.Close()
		return
	}
	done := make(chan struct{})
	s.relays.Go(func() {
		select {
		case <-done:
		case <-s.gone:
		}
		from.Close()
		to.Close()
	})
	s.relays.Go(func() { _, _ = io.Copy(from, to); from.Close() })
	s.relays.Go(func() { defer close(done); _, _ = io.Copy(to, buffered) })
}

// problem is an error in Key Vault's format, see
// https://learn.microsoft.com/azure/key-vault/general/authentication-requests-and-responses#error-responses.
type problem struct {
	status      int
	code, words string
	inner       string
}

func fail(w http.ResponseWriter, p *problem) {
	said := map[string]any{"code": p.code, "message": p.words}
	if p.inner != "" {
		said["innererror"] = map[string]any{"code": p.inner}
	}
	answer(w, p.status, map[string]any{"error": said})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the client may have gone
}

// random returns 32 random hexadecimal digits.
func random() string {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	return hex.EncodeToString(id)
}
