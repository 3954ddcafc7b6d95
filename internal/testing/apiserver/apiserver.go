// Package apiserver runs a Kubernetes API server with RBAC and a dedicated etcd, for tests and the
// demo. Both listen on loopback only.
package apiserver

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
)

const (
	// Etcd and APIServer are the names of the programs. Debian packages the first; .ci/run builds
	// the second.
	Etcd      = "etcd"
	APIServer = "kube-apiserver"

	// startTimeout is how long the API server may take to become ready. On a busy machine that
	// takes minutes.
	startTimeout = 4 * time.Minute

	maxLog = 64 << 10 // bytes of each program's output to keep
)

// Admin is a user with all permissions.
const Admin = "admin"

// Server is a running API server.
type Server struct {
	URL string // https
	CA  *testca.CA

	dir       string
	programs  [2]string
	etcdURL   string
	peerURL   string
	etcd, api *process
}

// Start starts both programs, which are at the given paths, in dir, which must be empty. users,
// like Admin, can authenticate with Token, but have no permissions until Allow grants some.
func Start(ctx context.Context, dir, etcd, apiserver string, users ...string) (*Server, error) {
	s := &Server{dir: dir, programs: [2]string{etcd, apiserver}}
	var err error
	if s.CA, err = testca.New(); err == nil {
		err = s.prepare(users)
	}
	if err == nil {
		err = s.startEtcd()
	}
	if err == nil {
		err = s.StartAPI(ctx)
	}
	if err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

// Token returns the bearer token of a user.
func Token(user string) string { return "token-of-" + user }

func (s *Server) file(name string) string { return filepath.Join(s.dir, name) }

// prepare writes the files of the API server.
func (s *Server) prepare(users []string) error {
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	s.URL, s.etcdURL, s.peerURL = "https://"+ports[0], "http://"+ports[1], "http://"+ports[2]
	serving, err := s.CA.Issue(testca.Template{CommonName: "kube-apiserver", Names: []string{"127.0.0.1", "localhost", "kubernetes.default.svc"}})
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	tokens := new(strings.Builder)
	fmt.Fprintf(tokens, "%s,%s,%s,system:masters\n", Token(Admin), Admin, Admin)
	for _, user := range users {
		fmt.Fprintf(tokens, "%s,%s,%s\n", Token(user), user, user)
	}
	for name, data := range map[string][]byte{
		"serving.crt": serving.PEM(), "serving.key": serving.KeyPEM(), "ca.crt": s.CA.PEM(), "tokens.csv": []byte(tokens.String()),
		"sa.key": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
	} {
		if err := os.WriteFile(s.file(name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// freePorts returns n loopback addresses with unused ports.
func freePorts(n int) (addresses []string, err error) {
	for range n {
		listener, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer listener.Close()
		addresses = append(addresses, listener.Addr().String())
	}
	return addresses, nil
}

func (s *Server) startEtcd() (err error) {
	s.etcd, err = start(s.programs[0], "--data-dir="+s.file("etcd"), "--listen-client-urls="+s.etcdURL, "--advertise-client-urls="+s.etcdURL,
		"--listen-peer-urls="+s.peerURL, "--initial-advertise-peer-urls="+s.peerURL, "--initial-cluster=default="+s.peerURL, "--unsafe-no-fsync")
	return err
}

// StartAPI starts the API server, also again after StopAPI, and waits until it is ready.
func (s *Server) StartAPI(ctx context.Context) (err error) {
	address, err := url.Parse(s.URL)
	if err != nil {
		return err
	}
	s.api, err = start(s.programs[1], "--bind-address=127.0.0.1", "--secure-port="+address.Port(), "--advertise-address=192.0.2.1", "--endpoint-reconciler-type=none",
		"--etcd-servers="+s.etcdURL, "--tls-cert-file="+s.file("serving.crt"), "--tls-private-key-file="+s.file("serving.key"), "--client-ca-file="+s.file("ca.crt"),
		"--cert-dir="+s.file("made"), "--token-auth-file="+s.file("tokens.csv"), "--authorization-mode=RBAC", "--service-cluster-ip-range=10.0.0.0/24",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-signing-key-file="+s.file("sa.key"), "--service-account-key-file="+s.file("sa.key"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		_, err := s.Do(ctx, http.MethodGet, "/readyz", nil)
		if err == nil {
			_, err = s.Do(ctx, http.MethodGet, "/api/v1/namespaces/default", nil) // created a little later
		}
		if err == nil {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-s.api.done:
			return fmt.Errorf("the API server has ended: %s; etcd printed: %s", s.api.log(), s.etcd.log())
		case <-ctx.Done():
			return fmt.Errorf("the API server is not ready: %w; it printed: %s", err, s.api.log())
		}
	}
}

// StopAPI stops the API server. Its data remains.
func (s *Server) StopAPI() { s.api.stop() }

// Stop stops both programs.
func (s *Server) Stop() {
	s.api.stop()
	s.etcd.stop()
}

// StatusError is an unsuccessful answer.
type StatusError struct {
	Code int
	Body string
}

func (e *StatusError) Error() string { return fmt.Sprintf("%d: %s", e.Code, e.Body) }

// Do sends a request as Admin and returns the answer. It sends body as JSON unless that is nil.
func (s *Server) Do(ctx context.Context, method, path string, body any) ([]byte, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	if body == nil {
		data = nil
	}
	request, err := http.NewRequestWithContext(ctx, method, s.URL+path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+Token(Admin))
	request.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		request.Header.Set("Content-Type", "application/merge-patch+json")
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.CA.Pool()}, DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode/100 != 2 {
		err = &StatusError{response.StatusCode, string(answer)}
	}
	return answer, err
}

// Namespace creates a namespace.
func (s *Server) Namespace(ctx context.Context, name string) error {
	_, err := s.Do(ctx, http.MethodPost, "/api/v1/namespaces", map[string]any{"metadata": map[string]any{"name": name}})
	return err
}

// Allow grants a user verbs on the secrets with the given names in a namespace. The verb create
// cannot be restricted to names and is granted for all.
func (s *Server) Allow(ctx context.Context, namespace, user string, names []string, verbs ...string) error {
	type rule map[string]any
	var rules []rule
	for _, verb := range verbs {
		r := rule{"apiGroups": []string{""}, "resources": []string{"secrets"}, "verbs": []string{verb}}
		if verb != "create" {
			r["resourceNames"] = names
		}
		rules = append(rules, r)
	}
	metadata := map[string]any{"name": user, "namespace": namespace}
	base := "/apis/rbac.authorization.k8s.io/v1/namespaces/" + namespace
	for path, body := range map[string]map[string]any{
		base + "/roles": {"rules": rules},
		base + "/rolebindings": {
			"subjects": []any{map[string]any{"kind": "User", "name": user}},
			"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": user},
		},
	} {
		body["metadata"] = metadata
		if _, err := s.Do(ctx, http.MethodPost, path, body); err != nil {
			return err
		}
	}
	return s.effective(ctx, namespace, user, names, verbs)
}

// effective waits until the API server applies a new role.
func (s *Server) effective(ctx context.Context, namespace, user string, names, verbs []string) error {
	name := ""
	if last := verbs[len(verbs)-1]; last != "create" {
		name = names[0]
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		answer, err := s.Do(ctx, http.MethodPost, "/apis/authorization.k8s.io/v1/subjectaccessreviews", map[string]any{"spec": map[string]any{
			"user": user, "resourceAttributes": map[string]any{"namespace": namespace, "verb": verbs[len(verbs)-1], "resource": "secrets", "name": name}}})
		if err != nil {
			return err
		}
		var review struct{ Status struct{ Allowed bool } }
		if err := json.Unmarshal(answer, &review); err != nil || review.Status.Allowed {
			return err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return errors.New("a role did not take effect")
		}
	}
}

// Kubeconfig returns a kubeconfig with the token of a user.
func (s *Server) Kubeconfig(user string) []byte {
	return s.KubeconfigAt(s.URL, user)
}

// KubeconfigAt is Kubeconfig with another address, such as that of a proxy in front of the server.
func (s *Server) KubeconfigAt(server, user string) []byte {
	text, _ := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "test",
		"clusters": []any{map[string]any{"name": "test", "cluster": map[string]any{"server": server, "certificate-authority-data": s.CA.PEM()}}},
		"users":    []any{map[string]any{"name": user, "user": map[string]any{"token": Token(user)}}},
		"contexts": []any{map[string]any{"name": "test", "context": map[string]any{"cluster": "test", "user": user}}},
	}) // cannot fail
	return text
}

// ClientCertificate returns a certificate that authenticates a user.
func (s *Server) ClientCertificate(user string) (certificate, key []byte, err error) {
	issued, err := s.CA.Issue(testca.Template{CommonName: user, Names: []string{user}})
	if err != nil {
		return nil, nil, err
	}
	return pemutil.EncodeCertificates(issued.Leaf), issued.KeyPEM(), nil
}

// process is a running program.
type process struct {
	command *exec.Cmd
	done    chan struct{} // closed when the program has ended
	output  *output
}

func start(program string, args ...string) (*process, error) {
	p := &process{command: exec.Command(program, args...), done: make(chan struct{}), output: new(output)}
	p.command.Stdout, p.command.Stderr = p.output, p.output
	p.command.WaitDelay = time.Second
	if err := p.command.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		_ = p.command.Wait()
	}()
	return p, nil
}

func (p *process) stop() {
	if p == nil {
		return
	}
	_ = p.command.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second): // it waits for running requests
		_ = p.command.Process.Kill()
		<-p.done
	}
}

func (p *process) log() string { return p.output.String() }

// output keeps the end of a program's output.
type output struct {
	mu   sync.Mutex
	data []byte // guarded by mu
}

func (o *output) Write(data []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.data = append(o.data, data...)
	o.data = slices.Delete(o.data, 0, max(0, len(o.data)-maxLog))
	return len(data), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.data)
}
