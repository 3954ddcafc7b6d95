package winrm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/secret"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/testing/winrmhost"
	"certctl-agent/internal/winrm"
)

const (
	user     = `CORP\deployer`
	password = "hunter2-höchst-geheim"
)

// echo answers with its input.
func echo(command []string, stdin []byte) ([]byte, []byte, int) {
	return append([]byte(strings.Join(command, "|")+"\n"), stdin...), []byte("to stderr: ü\n"), 3
}

// site is a host with the options to reach it.
type site struct {
	*winrmhost.Host
	options winrm.Options
}

// start runs a host, over HTTPS or plain HTTP.
func start(t *testing.T, https bool, o winrmhost.Options) *site {
	t.Helper()
	o.Domain, o.User, o.Password = "CORP", "deployer", password
	if o.Handler == nil {
		o.Handler = echo
	}
	ca := testca.Must(t)
	if https {
		certificate, err := ca.TLSCertificate("127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		o.Certificate = &certificate
	}
	client, err := ca.Issue(testca.Template{CommonName: "deployer"})
	if err != nil {
		t.Fatal(err)
	}
	o.ClientCA = ca.Pool()
	host, err := winrmhost.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(host.Close)
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, ca.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	pair := client.TLS()
	return &site{host, winrm.Options{Dial: dial, Host: "127.0.0.1", Port: host.Port, HTTPS: https, CAFile: file,
		User: user, Password: secret.New(password), Certificate: &pair, Timeout: 20 * time.Second}}
}

// startInMemory is start for a synctest bubble, in which nothing may wait for the network.
func startInMemory(t *testing.T, https bool, o winrmhost.Options) *site {
	t.Helper()
	p := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
	o.Listen = func() (net.Listener, error) { return p, nil }
	s := start(t, https, o)
	s.options.Dial = p.dial
	return s
}

// pipes is an in-memory listener.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial(ctx context.Context, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.conns <- far:
		return near, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func dial(ctx context.Context, address string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", address)
}

func (s *site) client(t *testing.T) *winrm.Client {
	t.Helper()
	client, err := winrm.New(s.options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// transports are all combinations of transport and authentication.
var transports = []struct {
	name  string
	https bool
	auth  string
}{{"http ntlm", false, winrm.NTLM}, {"https ntlm", true, winrm.NTLM}, {"https basic", true, winrm.Basic}, {"https certificate", true, winrm.Certificate}}

func TestRun(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport.name, func(t *testing.T) {
			s := start(t, transport.https, winrmhost.Options{Basic: true})
			s.options.Auth = transport.auth
			client := s.client(t)
			for range 2 { // the second over the same connection
				result, err := client.Run(t.Context(), []string{"powershell.exe", "-NoProfile"}, []byte("{\"a\": \"ß\"}"))
				if err != nil {
					t.Fatal(err)
				}
				if got := string(result.Stdout); got != "powershell.exe|-NoProfile\n{\"a\": \"ß\"}" || string(result.Stderr) != "to stderr: ü\n" || result.ExitCode != 3 {
					t.Errorf("result = %q, %q, %d", got, result.Stderr, result.ExitCode)
				}
			}
			counts := s.Counts()
			if s.Shells() != 0 || counts.Commands != 2 || counts.Failed != 0 {
				t.Errorf("%d shells are left, counts %+v", s.Shells(), counts)
			}
			if transport.auth == winrm.NTLM && counts.Logons != 1 {
				t.Errorf("%d logons, want one per connection", counts.Logons)
			}
		})
	}
}

// TestIPv6 uses addresses as hosts.
func TestIPv6(t *testing.T) { synctest.Test(t, testIPv6) }

func testIPv6(t *testing.T) {
	s := startInMemory(t, false, winrmhost.Options{})
	for _, s.options.Host = range []string{"2001:db8::1", "fe80::1%eth0"} {
		want, dial := net.JoinHostPort(s.options.Host, "5985"), s.options.Dial
		s.options.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			if address != want {
				t.Errorf("it dials %s, want %s", address, want)
			}
			return dial(ctx, address)
		}
		if _, err := s.client(t).Run(t.Context(), []string{"command"}, nil); err != nil {
			t.Errorf("%s: %v", s.options.Host, err)
		}
		s.options.Dial = dial
	}
}

// TestNothingInClear checks the data on the wire without TLS.
func TestNothingInClear(t *testing.T) {
	s := start(t, false, winrmhost.Options{})
	var wire bytes.Buffer
	s.options.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dial(ctx, address)
		return &tap{conn, &wire}, err
	}
	if _, err := s.client(t).Run(t.Context(), []string{"command"}, []byte("topsecret")); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(wire.String(), "Encrypted Boundary") {
		t.Error("no data was recorded")
	}
	for _, word := range []string{"topsecret", "dG9wc2VjcmV0", "hunter2", "h\x00u\x00n\x00t\x00e\x00r", "Envelope"} {
		if strings.Contains(wire.String(), word) {
			t.Errorf("the wire shows %q", word)
		}
	}
}

type tap struct {
	net.Conn
	wire *bytes.Buffer
}

func (c *tap) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.wire.Write(b[:n])
	return n, err
}

func (c *tap) Write(b []byte) (int, error) {
	c.wire.Write(b)
	return c.Conn.Write(b)
}

// TestLarge sends and receives more than fits into an envelope.
func TestLarge(t *testing.T) {
	for _, size := range []int{0, 112128, 112129, 300_000} {
		s := start(t, false, winrmhost.Options{Handler: func(_ []string, stdin []byte) ([]byte, []byte, int) { return stdin, nil, 0 }})
		data := make([]byte, size)
		rand.Read(data)
		copy(data, "binary") // not UTF-16 by chance
		result, err := s.client(t).Run(t.Context(), []string{"command"}, data)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(result.Stdout, data) {
			t.Errorf("sent %d bytes, got back %d", size, len(result.Stdout))
		}
		if largest := s.Counts().Largest; largest > 153600 || size > 112128 && largest < 150000 {
			t.Errorf("%d bytes went in envelopes of up to %d", size, largest)
		}
	}
}

func TestUTF16(t *testing.T) {
	s := start(t, true, winrmhost.Options{})
	s.SetUTF16(true)
	result, err := s.client(t).Run(t.Context(), []string{"command"}, []byte("größe 😀"))
	if err != nil {
		t.Fatal(err)
	}
	if string(result.Stdout) != "command\ngröße 😀" || string(result.Stderr) != "to stderr: ü\n" {
		t.Errorf("result = %q, %q", result.Stdout, result.Stderr)
	}
}

// TestWrongPassword checks that there is only one attempt, because Windows locks accounts.
func TestWrongPassword(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport.name, func(t *testing.T) {
			s := start(t, transport.https, winrmhost.Options{Basic: true, LockAfter: 3, Clock: -2 * time.Hour})
			s.options.Auth, s.options.Password = transport.auth, secret.New("wrong-"+password)
			if transport.auth == winrm.Certificate {
				other, err := testca.Must(t).TLSCertificate("other")
				if err != nil {
					t.Fatal(err)
				}
				s.options.Certificate = &other
			}
			client := s.client(t)
			for range 5 {
				_, err := client.Run(t.Context(), []string{"command"}, nil)
				if !errors.Is(err, winrm.ErrLogon) || strings.Contains(err.Error(), "clock is 2h0m0s behind") != (transport.auth == winrm.NTLM) || strings.Contains(err.Error(), "hunter2") {
					t.Errorf("error = %v", err)
				}
				if _, lost := errors.AsType[*winrm.LostError](err); lost {
					t.Errorf("a command without a shell may have run: %v", err)
				}
			}
			if counts := s.Counts(); counts.Failed != 1 || counts.Locked {
				t.Errorf("counts = %+v, want one failed logon", counts)
			}
		})
	}
}

// TestLocked checks that a refused logon is not retried even with the right password.
func TestLocked(t *testing.T) {
	s := start(t, false, winrmhost.Options{LockAfter: 1})
	s.options.Password = secret.New("wrong")
	s.client(t).Run(t.Context(), []string{"command"}, nil)
	s.options.Password = secret.New(password)
	client := s.client(t)
	for range 3 {
		if _, err := client.Run(t.Context(), []string{"command"}, nil); !errors.Is(err, winrm.ErrLogon) || !strings.Contains(err.Error(), "locked") {
			t.Errorf("error = %v", err)
		}
	}
	if counts := s.Counts(); counts.Failed != 1 || counts.Logons != 0 {
		t.Errorf("counts = %+v", counts)
	}
}

// TestClocks covers a host that sends its time, which the response repeats, and one that does not
// and refuses a response that looks too old.
func TestClocks(t *testing.T) {
	for _, test := range []struct {
		name string
		host winrmhost.Options
		want string
	}{
		{"sent", winrmhost.Options{Clock: 5 * time.Hour}, ""},
		{"hidden", winrmhost.Options{HideClock: true}, ""},
		{"hidden, ahead", winrmhost.Options{HideClock: true, Clock: 5 * time.Hour}, "clock is 5h0m0s ahead of this one's"},
	} {
		_, err := start(t, false, test.host).client(t).Run(t.Context(), []string{"command"}, nil)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

func TestTrust(t *testing.T) {
	s := start(t, true, winrmhost.Options{Basic: true})
	caFile := s.options.CAFile
	open := 0
	s.options.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dial(ctx, address)
		open++
		return &counted{Conn: conn, open: &open}, err
	}
	sum := fingerprint(t, s)
	for _, test := range []struct {
		name                string
		caFile, fingerprint string
		insecure            bool
		want                string
	}{
		{"authority", caFile, "", false, ""},
		{"system's", "", "", false, "unknown authority"},
		{"fingerprint", "", sum, false, ""},
		{"other fingerprint", caFile, strings.Repeat("00", 32), false, "server_fingerprint"},
		{"insecure", "", "", true, ""},
	} {
		for _, auth := range []string{winrm.NTLM, winrm.Basic} {
			s.options.CAFile, s.options.Fingerprint, s.options.Insecure, s.options.Auth = test.caFile, test.fingerprint, test.insecure, auth
			client := s.client(t)
			_, err := client.Run(t.Context(), []string{"command"}, nil)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s, %s: %v, want %q", test.name, auth, err, test.want)
			}
			client.Close()
			if open != 0 {
				t.Errorf("%s, %s: %d connections are open", test.name, auth, open)
			}
		}
	}
	if failed := s.Counts().Failed; failed != 0 {
		t.Errorf("%d logons at a host that is not trusted", failed)
	}
}

// counted counts open connections.
type counted struct {
	net.Conn
	open *int
	once sync.Once
}

func (c *counted) Close() error {
	c.once.Do(func() { *c.open-- })
	return c.Conn.Close()
}

func fingerprint(t *testing.T, s *site) string {
	t.Helper()
	conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Port), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sum := sha256.Sum256(conn.ConnectionState().PeerCertificates[0].Raw)
	return hex.EncodeToString(sum[:])
}

// TestRelay checks that channel bindings make the host refuse a logon that a man in the middle
// relays over another TLS connection.
func TestRelay(t *testing.T) {
	s := start(t, true, winrmhost.Options{})
	other, err := testca.Must(t).TLSCertificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{other}})
	if err != nil {
		t.Fatal(err)
	}
	var relays sync.WaitGroup
	defer relays.Wait()
	defer listener.Close()
	relays.Go(func() {
		near, err := listener.Accept()
		if err != nil {
			return
		}
		defer near.Close()
		far, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Port), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Error(err)
			return
		}
		defer far.Close()
		relays.Go(func() { io.Copy(near, far) })
		io.Copy(far, near)
	})
	s.options.Insecure = true
	s.options.Dial = func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx, listener.Addr().String()) }
	client := s.client(t)
	if _, err := client.Run(t.Context(), []string{"command"}, nil); !errors.Is(err, winrm.ErrLogon) {
		t.Errorf("error = %v", err)
	}
	client.Close()
	if counts := s.Counts(); counts.Failed != 1 || counts.Logons != 0 {
		t.Errorf("counts = %+v", counts)
	}
}

// TestTrouble makes each call fail in each way. The error must name the step and say whether the
// command may have run. No shell may be left once the host answers again.
func TestTrouble(t *testing.T) { synctest.Test(t, testTrouble) }

func testTrouble(t *testing.T) {
	const terrible = "Zugriff\x1b[31m verweigert\u202e <&>"
	for _, transport := range transports[:3] {
		s := startInMemory(t, transport.https, winrmhost.Options{Basic: true})
		s.options.Auth, s.options.Timeout = transport.auth, 30*time.Second
		for _, test := range []struct {
			action  string
			trouble winrmhost.Trouble
			want    string
			lost    bool
		}{
			{"Logon", winrmhost.Trouble{Hang: true}, "create a shell: no answer within 30s", false},
			{"Logon", winrmhost.Trouble{Drop: true}, "create a shell: ", false},
			{"Logon", winrmhost.Trouble{Status: 500, Body: "odd\x1b[0m"}, "unexpected answer 500 Internal Server Error: odd\ufffd[0m", false},
			{"Logon", winrmhost.Trouble{Status: 503}, "", false},
			{"Create", winrmhost.Trouble{Hang: true}, "create a shell: no answer within 30s", false},
			{"Create", winrmhost.Trouble{Drop: true}, "create a shell: ", false},
			{"Create", winrmhost.Trouble{Status: 503, Body: "busy"}, "", false},
			{"Create", winrmhost.Trouble{Status: 429, Body: "busy"}, "", false},
			{"Create", winrmhost.Trouble{Code: 5, Reason: terrible}, "create a shell: fault 0x00000005: Zugriff\ufffd[31m verweigert\ufffd <&> (the user must be a member of", false},
			{"Create", winrmhost.Trouble{Code: 7, Reason: strings.Repeat("long ", 1000)}, "…", false},
			{"Create", winrmhost.Trouble{Status: 200, Body: "<html>a proxy</html>"}, "unexpected answer 200 OK: <html>a proxy</html>", false},
			{"Create", winrmhost.Trouble{Status: 200, Body: strings.Repeat("x", 400_000)}, "longer than", false},
			{"Command", winrmhost.Trouble{Hang: true}, "start the command: no answer", true},
			{"Command", winrmhost.Trouble{Lose: true}, "start the command: ", true},
			{"Command", winrmhost.Trouble{Code: 2150858843, Reason: "weg"}, "start the command: fault 0x8033805b: weg (the shell is gone", false},
			{"Send", winrmhost.Trouble{Hang: true}, "send the command its input: no answer", true},
			{"Send", winrmhost.Trouble{Lose: true}, "send the command its input: ", true},
			{"Send", winrmhost.Trouble{Code: 995, Reason: terrible}, "send the command its input: fault 0x000003e3", true},
			{"Send", winrmhost.Trouble{Code: 2150858793, Reason: "busy", Late: true}, "", false},
			{"Receive", winrmhost.Trouble{Hang: true}, "receive the command's output: no answer", true},
			{"Receive", winrmhost.Trouble{Drop: true}, "receive the command's output: ", true},
			{"Receive", winrmhost.Trouble{Status: 503}, "receive the command's output: unexpected answer 503", true},
			{"Receive", winrmhost.Trouble{Code: 2150858843, Reason: "gone"}, "receive the command's output: fault 0x8033805b: gone (the shell is gone", true},
			{"Signal", winrmhost.Trouble{Code: 5}, "", false},
			{"Signal", winrmhost.Trouble{Drop: true}, "", false},
			{"Delete", winrmhost.Trouble{Lose: true}, "", false},
		} {
			var happened atomic.Bool
			s.SetTrouble(func(action string) *winrmhost.Trouble {
				if action != test.action || happened.Swap(true) {
					return nil
				}
				return &test.trouble
			})
			_, err := s.client(t).Run(t.Context(), []string{"command"}, []byte("input"))
			name := fmt.Sprintf("%s: %s %q", transport.name, test.action, test.want)
			if (err == nil) != (test.want == "") || err != nil && (!strings.Contains(err.Error(), test.want) || len(err.Error()) > 1500) {
				t.Errorf("%s: error = %v, want %q", name, err, test.want)
			}
			if _, lost := errors.AsType[*winrm.LostError](err); lost != test.lost {
				t.Errorf("%s: LostError %v, want %v", name, lost, test.lost)
			}
			if !happened.Load() {
				t.Errorf("%s did not happen", name)
			}
			if left := s.Shells(); left != 0 {
				t.Errorf("%s: %d shells are left", name, left)
			}
			s.DropShells()
		}
	}
}

// TestCancelled checks that a cancellation at any point ends the command and deletes the shell.
func TestCancelled(t *testing.T) { synctest.Test(t, testCancelled) }

func testCancelled(t *testing.T) {
	for _, test := range []struct {
		at      string
		trouble winrmhost.Trouble
		want    time.Duration
	}{
		{"Create", winrmhost.Trouble{}, 5 * time.Second}, // waits for the answer
		{"Create", winrmhost.Trouble{Hang: true}, 15 * time.Second},
		{"Command", winrmhost.Trouble{Hang: true}, 5 * time.Second},
		{"Send", winrmhost.Trouble{Hang: true}, 5 * time.Second},
		{"Receive", winrmhost.Trouble{Hang: true}, 5 * time.Second},
	} {
		s := startInMemory(t, false, winrmhost.Options{})
		ctx, cancel := context.WithCancelCause(t.Context())
		var deleted atomic.Bool
		s.SetTrouble(func(action string) *winrmhost.Trouble {
			if action == "Delete" {
				deleted.Store(true)
			}
			if action != test.at {
				return nil
			}
			cancel(errors.New("the operator stops it"))
			time.Sleep(5 * time.Second)
			return &test.trouble
		})
		client, begun := s.client(t), time.Now()
		_, err := client.Run(ctx, []string{"command"}, nil)
		if err == nil || !strings.Contains(err.Error(), "the operator stops it") {
			t.Errorf("%s: %v", test.at, err)
		}
		if _, lost := errors.AsType[*winrm.LostError](err); lost != (test.at != "Create") {
			t.Errorf("%s: LostError %v", test.at, lost)
		}
		if took := time.Since(begun); took > test.want {
			t.Errorf("%s: it took %v, want %v", test.at, took, test.want)
		}
		made := test.at != "Create" || !test.trouble.Hang
		if left := s.Shells(); left != 0 || deleted.Load() != made {
			t.Errorf("%s: %d shells are left, deleted: %v", test.at, left, deleted.Load())
		}
		s.SetTrouble(nil)
		if _, err := client.Run(t.Context(), []string{"command"}, nil); err != nil {
			t.Errorf("%s: the next command: %v", test.at, err)
		}
		if _, err := client.Run(ctx, []string{"command"}, nil); err == nil {
			t.Errorf("%s: a command runs although its context has ended", test.at)
		}
	}
}

// TestQuiet covers a command without output for longer than a call may take.
func TestQuiet(t *testing.T) { synctest.Test(t, testQuiet) }

func testQuiet(t *testing.T) {
	s := startInMemory(t, false, winrmhost.Options{Handler: func([]string, []byte) ([]byte, []byte, int) {
		time.Sleep(10 * time.Minute)
		return []byte("done"), nil, -1
	}})
	s.options.Timeout = 20 * time.Second
	result, err := s.client(t).Run(t.Context(), []string{"command"}, nil)
	if err != nil || string(result.Stdout) != "done" || result.ExitCode != -1 {
		t.Errorf("result = %+v, %v", result, err)
	}
}

// TestReboot checks that a command is reported as lost if the host restarts meanwhile, and that the
// next command works.
func TestReboot(t *testing.T) {
	var s *site
	var once sync.Once
	restarted := make(chan error, 1)
	s = start(t, true, winrmhost.Options{Handler: func([]string, []byte) ([]byte, []byte, int) {
		once.Do(func() { restarted <- s.Reboot() })
		return []byte("done"), nil, 0
	}})
	client := s.client(t)
	_, err := client.Run(t.Context(), []string{"command"}, nil)
	if _, lost := errors.AsType[*winrm.LostError](err); !lost {
		t.Errorf("error = %v, want a LostError", err)
	}
	if err := <-restarted; err != nil {
		t.Fatal(err)
	}
	if result, err := client.Run(t.Context(), []string{"command"}, nil); err != nil || string(result.Stdout) != "done" {
		t.Errorf("after the restart: %+v, %v", result, err)
	}
	s.Disconnect() // as Windows does with idle connections
	if result, err := client.Run(t.Context(), []string{"command"}, nil); err != nil || string(result.Stdout) != "done" {
		t.Errorf("after the connection was closed: %+v, %v", result, err)
	}
	if s.Shells() != 0 {
		t.Errorf("%d shells are left", s.Shells())
	}
}

// TestRestarting checks that an unreachable or busy host is retried for a minute.
func TestRestarting(t *testing.T) { synctest.Test(t, testRestarting) }

func testRestarting(t *testing.T) {
	s := startInMemory(t, false, winrmhost.Options{})
	back, dial := time.Now().Add(40*time.Second), s.options.Dial
	s.options.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		if time.Now().Before(back) {
			return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
		}
		return dial(ctx, address)
	}
	if _, err := s.client(t).Run(t.Context(), []string{"command"}, nil); err != nil {
		t.Error(err)
	}
	s.SetTrouble(func(action string) *winrmhost.Trouble { return &winrmhost.Trouble{Status: 503} })
	begun := time.Now()
	if _, err := s.client(t).Run(t.Context(), []string{"command"}, nil); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("error = %v", err)
	}
	if took := time.Since(begun); took < 50*time.Second || took > time.Minute {
		t.Errorf("given up after %v, want nearly a minute", took)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 5*time.Second, errors.New("the operator stops it"))
	defer cancel()
	begun = time.Now()
	if _, err := s.client(t).Run(ctx, []string{"command"}, nil); err == nil || !strings.Contains(err.Error(), "503") || !strings.Contains(err.Error(), "the operator stops it") {
		t.Errorf("error = %v", err)
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("cancelled after %v, want 5s", took)
	}
}

// TestDroppedShell covers an administrator who ends the shell while the command runs.
func TestDroppedShell(t *testing.T) {
	var s *site
	s = start(t, false, winrmhost.Options{Handler: func([]string, []byte) ([]byte, []byte, int) {
		s.DropShells()
		return nil, nil, 0
	}})
	_, err := s.client(t).Run(t.Context(), []string{"command"}, nil)
	if _, lost := errors.AsType[*winrm.LostError](err); !lost || !strings.Contains(err.Error(), "fault 0x") {
		t.Errorf("error = %v, want a LostError with the fault", err)
	}
}

// TestForged checks that forged answers over plain HTTP are rejected.
func TestForged(t *testing.T) {
	s := start(t, false, winrmhost.Options{})
	for name, change := range map[string]func([]byte) []byte{
		"in clear": func(b []byte) []byte {
			if !bytes.Contains(b, []byte("Encrypted Boundary")) {
				return b
			}
			const fault = `<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope"><s:Body><s:Fault/></s:Body></s:Envelope>`
			return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: application/soap+xml;charset=UTF-8\r\nContent-Length: %d\r\n\r\n%s", len(fault), fault)
		},
		"changed": func(b []byte) []byte {
			if at := bytes.Index(b, []byte("octet-stream\r\n")); at >= 0 {
				b[at+50] ^= 1
			}
			return b
		},
	} {
		s.options.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			return &forger{conn, change}, err
		}
		_, err := s.client(t).Run(t.Context(), []string{"command"}, nil)
		if _, isFault := errors.AsType[*winrm.Fault](err); err == nil || isFault {
			t.Errorf("%s: the answer is accepted: %v", name, err)
		}
	}
}

// TestEndless checks that the client disconnects from a host that sends endlessly.
func TestEndless(t *testing.T) {
	for name, test := range map[string]struct{ begin, more string }{
		"escapes": {"HTTP/1.1 200 OK\r\n", "\x1b[31m\u202e " + strings.Repeat("y", 1000)},
		"headers": {"HTTP/1.1 401 Unauthorized\r\n", "X: " + strings.Repeat("y", 1000) + "\r\n"},
		"body":    {"HTTP/1.1 401 Unauthorized\r\n\r\n", strings.Repeat("y", 1000)},
		"chunks":  {"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\ny\r\n"},
	} {
		sent := 0
		var talking sync.WaitGroup
		client, err := winrm.New(winrm.Options{Host: "h", User: "u", Password: secret.New("p"), Dial: func(context.Context, string) (net.Conn, error) {
			near, far := net.Pipe()
			talking.Go(func() { io.Copy(io.Discard, far) })
			talking.Go(func() {
				defer far.Close()
				_, err := io.WriteString(far, test.begin)
				for err == nil && sent < 10<<20 {
					_, err = io.WriteString(far, test.more)
					sent += len(test.more)
				}
			})
			return near, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.Run(t.Context(), []string{"command"}, nil); err == nil || len(err.Error()) > 1500 || strings.ContainsAny(err.Error(), "\x1b\u202e\r\n") {
			t.Errorf("%s: error = %.2000q", name, err)
		}
		talking.Wait()
		if sent > 1<<20 {
			t.Errorf("%s: %d bytes were read", name, sent)
		}
	}
}

// TestClosing checks the error for a host that closes the connection after each answer: NTLM does
// not work then.
func TestClosing(t *testing.T) {
	s := start(t, true, winrmhost.Options{Basic: true})
	s.SetKeepAlive(false)
	for auth, want := range map[string]string{winrm.Basic: "", winrm.NTLM: "does not keep the connection"} {
		s.options.Auth = auth
		_, err := s.client(t).Run(t.Context(), []string{"command"}, nil)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", auth, err, want)
		}
	}
}

// forger modifies the data that is read, in pieces larger than an answer.
type forger struct {
	net.Conn
	change func([]byte) []byte
}

func (f *forger) Read(b []byte) (int, error) {
	n, err := f.Conn.Read(b)
	return copy(b, f.change(bytes.Clone(b[:n]))), err
}

func TestOptions(t *testing.T) {
	good := winrm.Options{Host: "h", User: "u", Password: secret.New("p")}
	for name, test := range map[string]struct {
		change func(*winrm.Options)
		want   string
	}{
		"good":                  {func(*winrm.Options) {}, ""},
		"basic in clear":        {func(o *winrm.Options) { o.Auth = winrm.Basic }, "requires HTTPS"},
		"certificate in clear":  {func(o *winrm.Options) { o.Auth = winrm.Certificate }, "requires HTTPS"},
		"no certificate":        {func(o *winrm.Options) { o.Auth, o.HTTPS = winrm.Certificate, true }, "no certificate"},
		"no password":           {func(o *winrm.Options) { o.Password = secret.String{} }, "no password"},
		"no user":               {func(o *winrm.Options) { o.User = "" }, "no user"},
		"colon":                 {func(o *winrm.Options) { o.Auth, o.HTTPS, o.User = winrm.Basic, true, "a:b" }, "colon"},
		"other way":             {func(o *winrm.Options) { o.Auth = "kerberos" }, "kerberos"},
		"malformed fingerprint": {func(o *winrm.Options) { o.Fingerprint = "00" }, "fingerprint"},
	} {
		o := good
		test.change(&o)
		if _, err := winrm.New(o); (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

// TestCommandLine checks that characters that are special to cmd.exe are rejected.
func TestCommandLine(t *testing.T) {
	client, err := winrm.New(winrm.Options{Host: "h", User: "u", Password: secret.New("p")})
	if err != nil {
		t.Fatal(err)
	}
	for _, words := range [][]string{nil, {""}, {"a b"}, {"a", "&b"}, {"%PATH%"}, {"a|b"}, {"a\nb"}, {`"a"`}, {"a^b"}, {"ä"}, {"a;b"}, {"<a"}, {strings.Repeat("a", 8192)}} {
		if _, err := client.Run(t.Context(), words, nil); err == nil || strings.Contains(err.Error(), "WinRM of") {
			t.Errorf("%.20q: %v", words, err)
		}
	}
}

// TestSecrets formats a client and its errors with every verb.
func TestSecrets(t *testing.T) {
	s := start(t, false, winrmhost.Options{})
	s.options.Password = secret.New("hunter2-wrong")
	client := s.client(t)
	_, err := client.Run(t.Context(), []string{"command"}, []byte("hunter2-stdin"))
	for _, verb := range []string{"%v", "%+v", "%#v"} {
		if text := fmt.Sprintf(verb+verb+verb, s.options, client, err); strings.Contains(text, "hunter2") {
			t.Errorf("%s prints a secret: %s", verb, text)
		}
	}
}
