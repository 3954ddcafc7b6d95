// Package tlsprobe finds out which certificate an endpoint serves, also after STARTTLS.
//
// It does not verify the chain, since a private CA that this host does not trust may have issued
// the certificate. Callers compare the fingerprint with the one they expect, and must not use a
// result for anything else.
package tlsprobe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/pemutil"
)

// defaultTimeout bounds a probe whose context has no deadline.
const defaultTimeout = 10 * time.Second

// Endpoint is a TLS server to probe.
type Endpoint struct {
	Address    string // host:port
	ServerName string // sent as SNI, unless it is an IP address (RFC 6066, section 3); "": none
	StartTLS   string // SMTP, IMAP or POP3; "": TLS from the first byte

	// KeyType is the key type of the expected certificate. A server with several certificates may
	// answer with another one first, and is then asked for one of KeyType. Zero: any.
	KeyType x509.PublicKeyAlgorithm

	ProxyProtocol bool // the listener expects a PROXY protocol header first
}

// Protocols that start in plaintext and switch to TLS on request.
const (
	SMTP = "smtp"
	IMAP = "imap"
	POP3 = "pop3"
)

// Result is what an endpoint serves. The server has proved that it has the leaf's private key.
type Result struct {
	Fingerprint string              // of the leaf: SHA-256 of the DER, lower-case hex
	State       tls.ConnectionState // the first peer certificate is the leaf
}

func (r Result) keyType() x509.PublicKeyAlgorithm {
	return r.State.PeerCertificates[0].PublicKeyAlgorithm
}

// GuessStartTLS returns the usual protocol of a port, such as SMTP for 587. It returns "" for ports
// that use TLS from the first byte.
func GuessStartTLS(port string) string {
	switch port {
	case "25", "587":
		return SMTP
	case "143":
		return IMAP
	case "110":
		return POP3
	}
	return ""
}

// Probe connects to an endpoint and returns what it serves.
func Probe(ctx context.Context, endpoint Endpoint) (Result, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultTimeout)
		defer cancel()
	}
	result, err := probe(ctx, endpoint)
	switch {
	case err == nil:
		return result, nil
	case context.Cause(ctx) == context.DeadlineExceeded:
		err = fmt.Errorf("not done in time: %w", err) // err names the step
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	return Result{}, fmt.Errorf("probe %s: %w", endpoint.Address, err)
}

// probe first connects as browsers do. If the server refuses that, probe offers every cipher suite
// of crypto/tls. If the server answers with another key type, probe offers only suites for KeyType.
func probe(ctx context.Context, endpoint Endpoint) (Result, error) {
	result, err := connect(ctx, endpoint, nil, 0)
	if _, refused := errors.AsType[*refusedError](err); refused {
		result, err = connect(ctx, endpoint, suites("TLS_"), 0)
	}
	if err != nil || endpoint.KeyType == 0 || result.keyType() == endpoint.KeyType {
		return result, err
	}
	var offered []uint16
	switch endpoint.KeyType {
	case x509.RSA:
		offered = suites("TLS_ECDHE_RSA_", "TLS_RSA_")
	case x509.ECDSA, x509.Ed25519: // RFC 8422, section 5.10
		offered = suites("TLS_ECDHE_ECDSA_")
	default:
		return result, nil
	}
	// TLS 1.3 suites do not determine the key type.
	other, err := connect(ctx, endpoint, offered, tls.VersionTLS12)
	if err == nil && other.keyType() == endpoint.KeyType {
		return other, nil
	}
	return result, nil
}

// suites returns the cipher suites whose names begin with one of prefixes. It includes broken ones,
// since a probe sends nothing secret.
func suites(prefixes ...string) []uint16 {
	var ids []uint16
	for _, suite := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		if slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(suite.Name, prefix) }) {
			ids = append(ids, suite.ID)
		}
	}
	return ids
}

// proxyHeader is a PROXY protocol version 2 header with the command LOCAL and no addresses, as
// proxies send it for health checks (https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt,
// section 2.2).
const proxyHeader = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"

// connect does one handshake. If offered is nil it offers the default suites of crypto/tls. Version
// is the highest TLS version; 0 means the newest.
func connect(ctx context.Context, endpoint Endpoint, offered []uint16, version uint16) (Result, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", endpoint.Address)
	if err != nil {
		return Result{}, err
	}
	defer conn.Close()
	// ctx bounds every read and write: a deadline in the past ends those under way.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	if endpoint.ProxyProtocol {
		if _, err := io.WriteString(conn, proxyHeader); err != nil {
			return Result{}, err
		}
	}
	if err := startTLS(conn, endpoint.StartTLS); err != nil {
		return Result{}, err
	}
	return handshake(ctx, conn, endpoint.ServerName, offered, version)
}

// refusedError is a handshake that the server ended.
type refusedError struct{ error }

func (e *refusedError) Unwrap() error { return e.error }

func handshake(ctx context.Context, conn net.Conn, serverName string, offered []uint16, version uint16) (Result, error) {
	if _, err := netip.ParseAddr(serverName); err == nil {
		serverName = ""
	}
	var served tls.ConnectionState
	asked := false // the server asked for a client certificate
	client := tls.Client(conn, &tls.Config{
		ServerName:         strings.TrimSuffix(serverName, "."),
		InsecureSkipVerify: true, // see the package comment
		// For old appliances; a probe sends nothing secret.
		MinVersion:   tls.VersionTLS10,
		MaxVersion:   version,
		CipherSuites: offered,
		VerifyConnection: func(state tls.ConnectionState) error {
			served = state
			return nil
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			asked = true
			return new(tls.Certificate), nil
		},
	})
	err := client.HandshakeContext(ctx)
	// Below TLS 1.3, a server that requires a client certificate ends the handshake without one. By
	// then crypto/tls has checked the server's signature, so the result is still valid. An RSA key
	// exchange has no signature: only a complete handshake proves that the server has the key.
	switch alert := isAlert(err); {
	case err == nil:
		served = client.ConnectionState()
	case alert && asked && !slices.Contains(suites("TLS_RSA_"), served.CipherSuite):
	case alert || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET):
		return Result{}, &refusedError{fmt.Errorf("TLS handshake: %w", err)}
	default:
		return Result{}, fmt.Errorf("TLS handshake: %w", err)
	}
	if len(served.PeerCertificates) == 0 {
		return Result{}, errors.New("TLS handshake: the server sent no certificate")
	}
	return Result{pemutil.Fingerprint(served.PeerCertificates[0]), served}, nil
}

// isAlert reports whether err is an alert that the server sent.
func isAlert(err error) bool {
	operation, ok := errors.AsType[*net.OpError](err)
	return ok && operation.Op == "remote error"
}
