package tlsprobe_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

// serve runs handle for each connection and returns the address. Connections
// are closed when handle returns and when the test ends, which waits for both.
func serve(t *testing.T, handle func(net.Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { conn.Close() })()
				handle(conn)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		stop()
		all.Wait()
	})
	return listener.Addr().String()
}

func serveTLS(t *testing.T, config *tls.Config) string {
	return serve(t, func(conn net.Conn) { tls.Server(conn, config).Handshake() })
}

func issue(t *testing.T, ca *testca.CA, template testca.Template) *testca.Issued {
	t.Helper()
	issued, err := ca.Issue(template)
	if err != nil {
		t.Fatal(err)
	}
	return issued
}

func TestProbe(t *testing.T) {
	ca := testca.Must(t)
	issued := issue(t, ca, testca.Template{Intermediates: 1})
	expired := issue(t, ca, testca.Template{NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(-24 * time.Hour)})
	tests := []struct {
		name    string
		config  *tls.Config
		want    *testca.Issued
		version string
	}{
		{"newest", &tls.Config{}, issued, "TLS 1.3"},
		{"TLS 1.2", &tls.Config{MaxVersion: tls.VersionTLS12}, issued, "TLS 1.2"},
		{"TLS 1.0", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}, issued, "TLS 1.0"},
		{"expired", &tls.Config{}, expired, "TLS 1.3"},
		{"asks for a client certificate", &tls.Config{ClientAuth: tls.RequestClientCert}, issued, "TLS 1.3"},
		{"insists on a client certificate", &tls.Config{ClientAuth: tls.RequireAnyClientCert}, issued, "TLS 1.3"},
		{"insists on a client certificate, TLS 1.2", &tls.Config{ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12}, issued, "TLS 1.2"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			test.config.Certificates = []tls.Certificate{test.want.TLS()}
			address := serveTLS(t, test.config)
			result, err := tlsprobe.Probe(t.Context(), tlsprobe.Endpoint{Address: address, ServerName: "localhost"})
			if err != nil {
				t.Fatal(err)
			}
			if want := pemutil.Fingerprint(test.want.Leaf); result.Fingerprint != want || !result.State.PeerCertificates[0].Equal(test.want.Leaf) {
				t.Errorf("fingerprint = %s, want %s", result.Fingerprint, want)
			}
			if chain := result.State.PeerCertificates; !slices.EqualFunc(chain, test.want.Chain, (*x509.Certificate).Equal) {
				t.Errorf("the chain has %d certificates, want the %d that were sent", len(chain), len(test.want.Chain))
			}
			if version := tls.VersionName(result.State.Version); version != test.version {
				t.Errorf("version = %s, want %s", version, test.version)
			}
			if group := result.State.CurveID; test.version == "TLS 1.3" && group != tls.X25519MLKEM768 {
				t.Errorf("group = %v, want X25519MLKEM768", group)
			}
		})
	}
}

func TestServerName(t *testing.T) {
	certificate := issue(t, testca.Must(t), testca.Template{}).TLS()
	for _, test := range []struct{ name, want string }{
		{"www.example.org", "www.example.org"},
		{"www.example.org.", "www.example.org"},
		{"", ""},
		{"192.0.2.1", ""},
		{"2001:db8::1", ""},
		{"fe80::1%eth0", ""},
	} {
		got := make(chan string, 1)
		address := serveTLS(t, &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			got <- hello.ServerName
			return &certificate, nil
		}})
		if _, err := tlsprobe.Probe(t.Context(), tlsprobe.Endpoint{Address: address, ServerName: test.name}); err != nil {
			t.Errorf("%q: %v", test.name, err)
			continue
		}
		if sent := <-got; sent != test.want {
			t.Errorf("%q is sent as %q, want %q", test.name, sent, test.want)
		}
	}
}

// TestMismatchedPair: a server without the key of its certificate fails the probe.
func TestMismatchedPair(t *testing.T) {
	ca := testca.Must(t)
	pair := issue(t, ca, testca.Template{}).TLS()
	pair.PrivateKey = issue(t, ca, testca.Template{}).Key
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, auth := range []tls.ClientAuthType{tls.NoClientCert, tls.RequireAnyClientCert} {
			address := serveTLS(t, &tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: version, ClientAuth: auth})
			result, err := tlsprobe.Probe(t.Context(), tlsprobe.Endpoint{Address: address})
			if err == nil || !strings.Contains(err.Error(), "signature") {
				t.Errorf("%s, %v: result %q, error %v, want an invalid signature", tls.VersionName(version), auth, result.Fingerprint, err)
			}
		}
	}
}

func TestNoAnswer(t *testing.T) {
	closed := serve(t, func(net.Conn) {})
	silent := func(conn net.Conn) { io.Copy(io.Discard, conn) }
	tests := []struct {
		name     string
		endpoint tlsprobe.Endpoint
		want     string
	}{
		{"no server", tlsprobe.Endpoint{Address: unusedAddress(t)}, "connection refused"},
		{"no port", tlsprobe.Endpoint{Address: "127.0.0.1"}, "missing port"},
		{"closes at once", tlsprobe.Endpoint{Address: closed}, "TLS handshake"},
		{"closes at once, STARTTLS", tlsprobe.Endpoint{Address: closed, StartTLS: "smtp"}, "smtp: "},
		{"no TLS", tlsprobe.Endpoint{Address: serve(t, func(conn net.Conn) {
			io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
			silent(conn)
		})}, "TLS handshake"},
		{"silent", tlsprobe.Endpoint{Address: serve(t, silent)}, "not done in time"},
		{"silent, STARTTLS", tlsprobe.Endpoint{Address: serve(t, silent), StartTLS: "imap"}, "not done in time"},
		{"an unknown protocol", tlsprobe.Endpoint{Address: closed, StartTLS: "ldap"}, `"ldap" is not supported`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			// On a busy machine an answer may take longer than the timeout for silence.
			ctx, cancel := context.WithTimeout(t.Context(), map[bool]time.Duration{true: 300 * time.Millisecond, false: time.Minute}[test.want == "not done in time"])
			defer cancel()
			_, err := tlsprobe.Probe(ctx, test.endpoint)
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "probe "+test.endpoint.Address) {
				t.Errorf("error = %v, want one with %q and the address", err, test.want)
			}
		})
	}
}

func unusedAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

func TestCancel(t *testing.T) {
	cause := errors.New("the agent stops")
	for _, protocol := range []string{"", "smtp"} {
		connected := make(chan struct{})
		address := serve(t, func(conn net.Conn) {
			close(connected)
			io.Copy(io.Discard, conn)
		})
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			<-connected
			cancel(cause)
		}()
		if _, err := tlsprobe.Probe(ctx, tlsprobe.Endpoint{Address: address, StartTLS: protocol}); !errors.Is(err, cause) {
			t.Errorf("%q: error = %v, want the cause of the cancellation", protocol, err)
		}
	}
}

// keys issues a certificate for a key of each type.
func keys(t *testing.T) (ecdsaPair, rsaPair, ed25519Pair *testca.Issued) {
	t.Helper()
	ca := testca.Must(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return issue(t, ca, testca.Template{}), issue(t, ca, testca.Template{Key: rsaKey}), issue(t, ca, testca.Template{Key: edKey})
}

// TestKeyType: a server with several certificates answers with one of them.
func TestKeyType(t *testing.T) {
	onECDSA, onRSA, onEd25519 := keys(t)
	tests := []struct {
		name    string
		has     []*testca.Issued // the first is the server's choice
		version uint16           // the newest that it supports; 0: TLS 1.3
		oldest  uint16
		want    x509.PublicKeyAlgorithm
		got     *testca.Issued
	}{
		{"RSA behind ECDSA", []*testca.Issued{onECDSA, onRSA}, 0, 0, x509.RSA, onRSA},
		{"ECDSA behind RSA", []*testca.Issued{onRSA, onECDSA}, 0, 0, x509.ECDSA, onECDSA},
		{"Ed25519 behind RSA", []*testca.Issued{onRSA, onEd25519}, 0, 0, x509.Ed25519, onEd25519},
		{"TLS 1.2", []*testca.Issued{onECDSA, onRSA}, tls.VersionTLS12, 0, x509.RSA, onRSA},
		{"the server's choice", []*testca.Issued{onECDSA, onRSA}, 0, 0, x509.ECDSA, onECDSA},
		{"any", []*testca.Issued{onECDSA, onRSA}, 0, 0, 0, onECDSA},
		{"none of that type", []*testca.Issued{onECDSA}, 0, 0, x509.RSA, onECDSA},
		{"another on the same suites", []*testca.Issued{onECDSA}, 0, 0, x509.Ed25519, onECDSA},
		{"of a type that suites do not know", []*testca.Issued{onECDSA}, 0, 0, x509.DSA, onECDSA},
		{"TLS 1.3 alone cannot be asked", []*testca.Issued{onECDSA, onRSA}, 0, tls.VersionTLS13, x509.RSA, onECDSA},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			config := &tls.Config{MinVersion: test.oldest, MaxVersion: test.version}
			for _, issued := range test.has {
				config.Certificates = append(config.Certificates, issued.TLS())
			}
			result, err := tlsprobe.Probe(t.Context(), tlsprobe.Endpoint{Address: serveTLS(t, config), ServerName: "localhost", KeyType: test.want})
			if err != nil {
				t.Fatal(err)
			}
			if want := pemutil.Fingerprint(test.got.Leaf); result.Fingerprint != want {
				t.Errorf("got the certificate with %v, want the one with %v", result.State.PeerCertificates[0].PublicKeyAlgorithm, test.got.Leaf.PublicKeyAlgorithm)
			}
		})
	}
}

// TestOldSuites: cipher suites that only old appliances use.
func TestOldSuites(t *testing.T) {
	_, issued, _ := keys(t)
	_, other, _ := keys(t)
	mismatched := issued.TLS()
	mismatched.PrivateKey = other.Key
	for _, suite := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		if !strings.HasPrefix(suite.Name, "TLS_RSA_") && !strings.HasPrefix(suite.Name, "TLS_ECDHE_RSA_") {
			continue
		}
		t.Run(suite.Name, func(t *testing.T) {
			probe := func(pair tls.Certificate, auth tls.ClientAuthType) (tlsprobe.Result, error) {
				address := serveTLS(t, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: auth,
					CipherSuites: []uint16{suite.ID}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS12})
				return tlsprobe.Probe(t.Context(), tlsprobe.Endpoint{Address: address, ServerName: "localhost"})
			}
			result, err := probe(issued.TLS(), tls.NoClientCert)
			if err != nil || result.Fingerprint != pemutil.Fingerprint(issued.Leaf) {
				t.Errorf("got %s, %v", result.Fingerprint, err)
			}
			for _, auth := range []tls.ClientAuthType{tls.NoClientCert, tls.RequireAnyClientCert} {
				if result, err := probe(mismatched, auth); err == nil {
					t.Errorf("%v: %s counts as served by a server that does not have its key", auth, result.Fingerprint)
				}
			}
		})
	}
}

func TestProxyProtocol(t *testing.T) {
	issued := issue(t, testca.Must(t), testca.Template{})
	// Section 2.2 of the specification: the signature, version 2 and LOCAL, an
	// unspecified family, and no bytes of addresses.
	header := []byte{0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, 0x20, 0x00, 0x00, 0x00}
	for _, protocol := range []string{"", tlsprobe.POP3} {
		address := serve(t, func(conn net.Conn) {
			got := make([]byte, len(header))
			if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, header) {
				t.Errorf("the connection begins with % x (%v)", got, err)
				return
			}
			if protocol != "" {
				io.WriteString(conn, "+OK\r\n")
				io.ReadFull(conn, make([]byte, len("STLS\r\n")))
				io.WriteString(conn, "+OK\r\n")
			}
			tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{issued.TLS()}}).Handshake()
		})
		result, err := tlsprobe.Probe(t.Context(), tlsprobe.Endpoint{Address: address, StartTLS: protocol, ProxyProtocol: true})
		if err != nil || result.Fingerprint != pemutil.Fingerprint(issued.Leaf) {
			t.Errorf("%q: got %s, %v", protocol, result.Fingerprint, err)
		}
	}
}

func TestGuessStartTLS(t *testing.T) {
	for port, want := range map[string]string{
		"25": "smtp", "587": "smtp", "143": "imap", "110": "pop3", "465": "", "993": "", "995": "", "443": "", "": "",
	} {
		if got := tlsprobe.GuessStartTLS(port); got != want {
			t.Errorf("GuessStartTLS(%q) = %q, want %q", port, got, want)
		}
	}
}
