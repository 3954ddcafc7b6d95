package tlsprobe

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/testca"
)

// A script is what a server sends: its greeting, then one answer for each line that it receives.
// After the last answer it starts TLS.
type script []string

// play runs one session and returns the lines that the client sent.
func (s script) play(conn net.Conn, certificate tls.Certificate) []string {
	var lines []string
	in := bufio.NewReader(conn)
	for i, answer := range s {
		if i > 0 {
			line, err := in.ReadString('\n')
			if err != nil {
				return lines
			}
			lines = append(lines, line)
		}
		if _, err := io.WriteString(conn, answer); err != nil {
			return lines
		}
	}
	tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{certificate}}).Handshake()
	return lines
}

// probeScript probes a server that follows s.
func probeScript(t *testing.T, protocol string, s script, certificate tls.Certificate) (Result, []string, error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	var lines []string
	var server sync.WaitGroup
	server.Go(func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		lines = s.play(conn, certificate)
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	result, err := Probe(ctx, Endpoint{Address: listener.Addr().String(), ServerName: "localhost", StartTLS: protocol})
	server.Wait()
	return result, lines, err
}

func TestStartTLS(t *testing.T) {
	issued, err := testca.Must(t).Issue(testca.Template{})
	if err != nil {
		t.Fatal(err)
	}
	smtpSent := []string{"EHLO [127.0.0.1]\r\n", "STARTTLS\r\n"}
	tests := []struct {
		name     string
		protocol string
		script   script
		sent     []string
		err      string // part of the error; "" for success
	}{
		{"smtp", SMTP, script{"220 mx ESMTP\r\n", "250-mx\r\n250-SIZE 1\r\n250 STARTTLS\r\n", "220 go ahead\r\n"}, smtpSent, ""},
		{"smtp, several lines each", SMTP, script{"220-a\r\n220-b\r\n220 c\r\n", "250-mx\r\n250-starttls\r\n250 HELP\r\n", "220-2.0.0\r\n220 go\r\n"}, smtpSent, ""},
		{"smtp, bare codes and line feeds", SMTP, script{"220\n", "250-mx\n250 STARTTLS\n", "220\n"}, smtpSent, ""},
		{"imap", IMAP, script{"* OK [CAPABILITY IMAP4rev1] ready\r\n", "a1 OK begin\r\n"}, []string{"a1 STARTTLS\r\n"}, ""},
		{"imap, untagged lines and case", IMAP, script{"* ok\r\n", "* CAPABILITY IMAP4\r\n* 3 EXISTS\r\nA1 ok\r\n"}, []string{"a1 STARTTLS\r\n"}, ""},
		{"pop3", POP3, script{"+OK ready <1896.697170952@host>\r\n", "+OK\r\n"}, []string{"STLS\r\n"}, ""},

		{"smtp, greeting refused", SMTP, script{"554 go away\r\n"}, nil, "answered the connection with: 554 go away"},
		{"smtp, another code in the middle", SMTP, script{"220-a\r\n554 b\r\n"}, nil, "554 b"},
		{"smtp, longer code", SMTP, script{"2200 a\r\n"}, nil, "2200 a"},
		{"smtp, EHLO refused", SMTP, script{"220 mx\r\n", "502 no\r\n"}, nil, "answered EHLO with: 502 no"},
		{"smtp, not offered", SMTP, script{"220 mx\r\n", "250-mx\r\n250 SIZE\r\n"}, nil, "does not offer STARTTLS"},
		{"smtp, only looks like it", SMTP, script{"220 mx\r\n", "250-mx\r\n250 XSTARTTLS\r\n"}, nil, "does not offer STARTTLS"},
		{"smtp, STARTTLS refused", SMTP, script{"220 mx\r\n", "250 STARTTLS\r\n", "454 not now\r\n"}, nil, "answered STARTTLS with: 454 not now"},
		{"imap, BYE", IMAP, script{"* BYE overloaded\r\n"}, nil, "* BYE overloaded"},
		{"imap, PREAUTH", IMAP, script{"* PREAUTH hello\r\n"}, nil, "* PREAUTH hello"},
		{"imap, NO", IMAP, script{"* OK\r\n", "a1 NO\r\n"}, nil, "answered STARTTLS with: a1 NO"},
		{"imap, another tag", IMAP, script{"* OK\r\n", "a2 OK\r\n"}, nil, "a2 OK"},
		{"pop3, greeting refused", POP3, script{"-ERR no\r\n"}, nil, "-ERR no"},
		{"pop3, STLS refused", POP3, script{"+OK\r\n", "-ERR unknown\r\n"}, nil, "answered STLS with: -ERR unknown"},

		{"smtp, injection", SMTP, script{"220 mx\r\n", "250 STARTTLS\r\n", "220 go\r\n250 injected\r\n"}, nil, "plaintext after it agreed to TLS"},
		{"imap, injection", IMAP, script{"* OK\r\n", "a1 OK\r\n* 1 EXISTS\r\n"}, nil, "plaintext after it agreed to TLS"},
		{"pop3, injection", POP3, script{"+OK\r\n", "+OK\r\n+"}, nil, "plaintext after it agreed to TLS"},

		{"smtp, endless banner", SMTP, script{strings.Repeat("220-hello\r\n", 1000)}, nil, "more than 100 lines"},
		{"imap, endless answer", IMAP, script{"* OK\r\n", strings.Repeat("* NO\r\n", 1000)}, nil, "more than 100 lines"},
		{"endless line", POP3, script{"+OK" + strings.Repeat("x", 100_000)}, nil, "longer than 4096 bytes: +OKxxx"},
		{"terminal escapes", SMTP, script{"554 \x1b[2J\xff\r\n"}, nil, "554 \ufffd[2J\ufffd"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			result, sent, err := probeScript(t, test.protocol, test.script, issued.TLS())
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.protocol+": ") || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error = %v, want one with %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := pemutil.Fingerprint(issued.Leaf); result.Fingerprint != want {
				t.Errorf("fingerprint = %s, want %s", result.Fingerprint, want)
			}
			if !slices.Equal(sent, test.sent) {
				t.Errorf("sent %q, want %q", sent, test.sent)
			}
		})
	}
}

// TestSlowServer: a trickle of bytes does not extend the deadline.
func TestSlowServer(t *testing.T) {
	client, server := net.Pipe()
	defer client.Close()
	var drip sync.WaitGroup
	drip.Go(func() {
		defer server.Close()
		for {
			if _, err := server.Write([]byte("2")); err != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	started := time.Now()
	client.SetDeadline(started.Add(50 * time.Millisecond))
	if err := startTLS(client, SMTP); err == nil {
		t.Error("STARTTLS succeeded")
	}
	if took := time.Since(started); took > 30*time.Second {
		t.Errorf("took %v", took)
	}
	client.Close()
	drip.Wait()
}

func TestAddressLiteral(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1:25":        "[192.0.2.1]",
		"[2001:db8::1]:25":    "[IPv6:2001:db8::1]",
		"[fe80::1%eth0]:25":   "[IPv6:fe80::1]",
		"[::ffff:1.2.3.4]:25": "[1.2.3.4]",
		"pipe":                "[127.0.0.1]",
	} {
		if got := addressLiteral(namedAddr(address)); got != want {
			t.Errorf("addressLiteral(%s) = %s, want %s", address, got, want)
		}
	}
}

type namedAddr string

func (namedAddr) Network() string  { return "tcp" }
func (a namedAddr) String() string { return string(a) }

// replay is a connection whose server sends data whatever it receives.
type replay struct {
	net.Conn
	data io.Reader
	sent bytes.Buffer
}

func (r *replay) Read(p []byte) (int, error)  { return r.data.Read(p) }
func (r *replay) Write(p []byte) (int, error) { return r.sent.Write(p) }
func (r *replay) LocalAddr() net.Addr         { return namedAddr("192.0.2.1:1") }

func FuzzStartTLS(f *testing.F) {
	f.Add(SMTP, []byte("220 mx\r\n250-mx\r\n250 STARTTLS\r\n220 go\r\n"))
	f.Add(IMAP, []byte("* OK ready\r\n* CAPABILITY\r\na1 OK\r\n"))
	f.Add(POP3, []byte("+OK\r\n+OK\r\n+OK injected\r\n"))
	f.Add(SMTP, bytes.Repeat([]byte("220-"), 2000))
	commands := regexp.MustCompile(`^(EHLO \[192\.0\.2\.1\]\r\n)?((a1 )?STARTTLS\r\n|STLS\r\n)?$`)
	f.Fuzz(func(t *testing.T, protocol string, data []byte) {
		rest := bytes.NewReader(data)
		conn := &replay{data: rest}
		err := startTLS(conn, protocol)
		if !commands.Match(conn.sent.Bytes()) {
			t.Errorf("sent %q", conn.sent.Bytes())
		}
		// If all data fits into the buffer, none may be left over.
		if err == nil && protocol != "" && len(data) < maxReplyLine && data[len(data)-1] != '\n' {
			t.Errorf("%q counts as agreement", data)
		}
		if read := len(data) - rest.Len(); read > (maxReplyLines*2+1)*maxReplyLine+maxReplyLine {
			t.Errorf("read %d bytes", read)
		}
	})
}
