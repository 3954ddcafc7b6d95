// Package liveserver runs real TLS servers on loopback for tests and the demo. Each has its own
// configuration and directory, separate from any server that the host already runs.
package liveserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"certctl-agent/internal/pkcs12"
	"certctl-agent/internal/tlsprobe"
)

// startTimeout is how long a server may take to accept its first connection. On a busy machine Java
// takes much longer than usual.
const startTimeout = time.Minute

// ErrMissing means that the server's program is not installed.
var ErrMissing = errors.New("not installed")

// Server is a running server.
type Server struct {
	Name     string // product name
	Type     string // type of targets that deploy to it
	Config   map[string]any
	Endpoint tlsprobe.Endpoint
	Others   []tlsprobe.Endpoint // other endpoints with the same certificate
	CertPath string              // file with the certificate that it serves, read by OnDisk

	// Broken overrides parts of Config to make a deployment fail. If nil, a broken reload command
	// does.
	Broken map[string]any

	// Resets means that a reload closes the listener, so waiting connections are reset.
	Resets bool

	commands []*exec.Cmd
	stop     func() error // replaces a signal to the process; may be nil
	log      *lockedBuffer
	logFile  string // for a server that prints nothing, else ""
	ended    sync.WaitGroup
}

// Pair is the certificate, followed by its chain, and the key with which a server starts, in PEM.
type Pair struct {
	Certificate, Key []byte
}

// Starter starts a product in dir, which must be empty.
type Starter func(ctx context.Context, dir string, pair Pair) (*Server, error)

// Starters returns the products by name.
func Starters() map[string]Starter {
	return map[string]Starter{
		"apache":       StartApache,
		"caddy":        StartCaddy,
		"dovecot":      StartDovecot,
		"haproxy":      StartHAProxy,
		"javakeystore": StartJava,
		"kubernetes":   StartKubernetes,
		"nginx":        StartNGINX,
		"postfix":      StartPostfixInOneFile,
		"ssh":          StartSSH,
	}
}

// run starts a program that stays in the foreground.
func (s *Server) run(name string, args ...string) error {
	return s.start(exec.Command(name, args...))
}

func (s *Server) start(command *exec.Cmd) error {
	if s.log == nil {
		s.log = new(lockedBuffer)
	}
	command.Stdout, command.Stderr = s.log, s.log
	command.WaitDelay = time.Second // for children that hold the output open
	if err := command.Start(); err != nil {
		return fmt.Errorf("start %s: %w", s.Name, err)
	}
	s.commands = append(s.commands, command)
	s.ended.Go(func() { _ = command.Wait() })
	return nil
}

// ready waits until the endpoint completes a handshake.
func (s *Server) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		_, err := tlsprobe.Probe(ctx, s.Endpoint)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			s.Stop()
			return fmt.Errorf("%s does not answer on %s: %w; it printed: %s", s.Name, s.Endpoint.Address, err, s.Log())
		}
	}
}

// OnDisk returns the certificate in CertPath: the first of a PEM file, or that of a key store.
func (s *Server) OnDisk() (*x509.Certificate, error) {
	data, err := os.ReadFile(s.CertPath)
	if err != nil {
		return nil, err
	}
	if pkcs12.Is(data) {
		return storedCertificate(data)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			return x509.ParseCertificate(block.Bytes)
		}
	}
	return nil, errors.New("it contains no certificate")
}

// Log returns the server's output.
func (s *Server) Log() string {
	var printed string
	if s.log != nil {
		printed = s.log.String()
	}
	if s.logFile != "" {
		file, _ := os.ReadFile(s.logFile)
		printed += string(file[max(0, len(file)-maxLog):])
	}
	return printed
}

// Stop stops the server's processes, and no others, and waits for them.
func (s *Server) Stop() {
	if s.stop != nil {
		_ = s.stop()
	}
	for _, command := range s.commands {
		_ = command.Process.Signal(syscall.SIGTERM)
	}
	killer := time.AfterFunc(5*time.Second, func() {
		for _, command := range s.commands {
			_ = command.Process.Kill()
		}
	})
	defer killer.Stop()
	s.ended.Wait()
}

// FreePort returns an unused loopback port.
func FreePort() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	return strconv.Itoa(listener.Addr().(*net.TCPAddr).Port), nil
}

// freePorts returns n different unused ports.
func freePorts(n int) ([]string, error) {
	var ports []string
	for len(ports) < n {
		port, err := FreePort()
		if err != nil {
			return nil, err
		}
		if !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	return ports, nil
}

// program finds an installed program. Servers are often outside a user's PATH.
func program(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, ErrMissing)
}

// tlsDir is the subdirectory that holds only the server's certificates.
const tlsDir = "tls"

// A writer writes the first pair and returns its paths.
type writer func(dir string, pair Pair) (certPath, keyPath string, err error)

// writePair writes the first pair into separate files and returns their paths.
func writePair(dir string, pair Pair) (certPath, keyPath string, err error) {
	certPath, keyPath = filepath.Join(dir, tlsDir, "cert.pem"), filepath.Join(dir, tlsDir, "key.pem")
	if _, err := tls.X509KeyPair(pair.Certificate, pair.Key); err != nil {
		return "", "", fmt.Errorf("the first pair does not match: %w", err)
	}
	if err := os.Mkdir(filepath.Dir(certPath), 0o755); err != nil {
		return "", "", err
	}
	if err := os.WriteFile(certPath, pair.Certificate, 0o644); err != nil {
		return "", "", err
	}
	return certPath, keyPath, os.WriteFile(keyPath, pair.Key, 0o600)
}

// writeOneFile is writePair with key and certificate in one file.
func writeOneFile(dir string, pair Pair) (certPath, keyPath string, err error) {
	path := filepath.Join(dir, tlsDir, "all.pem")
	err = errors.Join(os.Mkdir(filepath.Dir(path), 0o755), os.WriteFile(path, slices.Concat(pair.Key, pair.Certificate), 0o600))
	return path, path, err
}

// lockedBuffer keeps the end of a server's output.
type lockedBuffer struct {
	mu   sync.Mutex // guards data
	data bytes.Buffer
}

const maxLog = 64 << 10

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.data.Write(p)
	if over := b.data.Len() - maxLog; over > 0 {
		b.data.Next(over)
	}
	return len(p), nil
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data.String()
}
