// Package tlsprobe finds out which certificate an endpoint serves, after
// STARTTLS too.
//
// It verifies no chain, since the certificate may be of a private CA that this
// host does not trust. It compares nothing either: callers compare the
// fingerprint with the one they expect, and must rely on a result for nothing
// else.
package tlsprobe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"certctl-agent/internal/pemutil"
)

// DefaultTimeout bounds a probe whose context has no deadline.
const DefaultTimeout = 10 * time.Second

// Endpoint is where to look.
type Endpoint struct {
	Address    string // host:port
	ServerName string // sent as SNI, unless it is an IP address (RFC 6066, section 3); "": none
	StartTLS   string // SMTP, IMAP or POP3; "": TLS from the first byte
}

// Protocols that begin in clear and are turned to TLS on request.
const (
	SMTP = "smtp"
	IMAP = "imap"
	POP3 = "pop3"
)

// Result is what an endpoint serves. The server has proved that it holds the
// private key of the leaf.
type Result struct {
	Leaf        *x509.Certificate
	Chain       []*x509.Certificate // as sent, the leaf first
	Fingerprint string              // of the leaf: SHA-256 of the DER, lower-case hex
	Version     string              // such as "TLS 1.3"
	Group       string              // of the key exchange, such as "X25519MLKEM768"; "" where there is none
}

// GuessStartTLS is the protocol that is usual on a port, such as SMTP on 587,
// and "" for ports that speak TLS from the first byte.
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

// Probe connects to an endpoint and returns what it serves. All of it ends with
// ctx.
func Probe(ctx context.Context, endpoint Endpoint) (Result, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DefaultTimeout)
		defer cancel()
	}
	result, err := probe(ctx, endpoint)
	switch {
	case err == nil:
		return result, nil
	case context.Cause(ctx) == context.DeadlineExceeded:
		err = fmt.Errorf("not done in time: %w", err) // which step it was
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	return Result{}, fmt.Errorf("probe %s: %w", endpoint.Address, err)
}

func probe(ctx context.Context, endpoint Endpoint) (Result, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", endpoint.Address)
	if err != nil {
		return Result{}, err
	}
	defer conn.Close()
	// The end of ctx is the one deadline of every read and write: a time in the
	// past ends those under way.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	if err := startTLS(conn, endpoint.StartTLS); err != nil {
		return Result{}, err
	}
	return handshake(ctx, conn, endpoint.ServerName)
}

func handshake(ctx context.Context, conn net.Conn, serverName string) (Result, error) {
	if _, err := netip.ParseAddr(serverName); err == nil {
		serverName = ""
	}
	var served tls.ConnectionState
	asked := false // for our certificate
	client := tls.Client(conn, &tls.Config{
		ServerName:         strings.TrimSuffix(serverName, "."),
		InsecureSkipVerify: true, // see the package comment
		// Whatever old appliances speak: nothing is sent over this connection.
		MinVersion: tls.VersionTLS10,
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
	// A server that insists on a client's certificate ends a handshake below TLS
	// 1.3 for want of one. By then crypto/tls has checked the server's signature,
	// so that what is served is known all the same.
	switch refused := asked && isAlert(err); {
	case err == nil:
		served = client.ConnectionState()
	case !refused:
		return Result{}, fmt.Errorf("TLS handshake: %w", err)
	}
	if len(served.PeerCertificates) == 0 {
		return Result{}, errors.New("TLS handshake: the server has sent no certificate")
	}
	leaf := served.PeerCertificates[0]
	result := Result{
		Leaf:        leaf,
		Chain:       served.PeerCertificates,
		Fingerprint: pemutil.Fingerprint(leaf),
		Version:     tls.VersionName(served.Version),
	}
	if served.CurveID != 0 {
		result.Group = served.CurveID.String()
	}
	return result, nil
}

// isAlert reports whether err is an alert that the server sent.
func isAlert(err error) bool {
	operation, ok := errors.AsType[*net.OpError](err)
	return ok && operation.Op == "remote error"
}
