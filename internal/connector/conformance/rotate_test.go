package conformance

import (
	"context"
	"crypto/tls"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

// verdict is a testing.TB that records failures.
type verdict struct {
	testing.TB
	failed bool
}

func (v *verdict) Helper()               {}
func (v *verdict) Log(...any)            {}
func (v *verdict) Errorf(string, ...any) { v.failed = true }

// TestRotate: an old worker may answer for a while,
// even with the certificate from before the rotation, but not permanently.
func TestRotate(t *testing.T) {
	for _, test := range []struct {
		name   string
		stays  time.Duration // an old worker
		passes bool
	}{
		{"at once", 0, true},
		{"longer than usual", 300 * time.Millisecond, true},
		{"permanently", time.Hour, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			host, ca := NewHost(t, nil), testca.Must(t)
			var mu sync.Mutex
			var serves [2]tls.Certificate // before and now; guarded by mu
			var since time.Time           // guarded by mu
			deploy := func(_ context.Context, m *connector.Material) error {
				pair, err := tls.X509KeyPair(PEM(m.Leaf), m.KeyPEM)
				mu.Lock()
				defer mu.Unlock()
				serves[0], serves[1], since = serves[1], pair, time.Now()
				return err
			}
			if err := deploy(t.Context(), host.Material(t, ca)); err != nil {
				t.Fatal(err)
			}
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			var serving sync.WaitGroup
			serving.Go(func() {
				for worker := 0; ; worker = 1 - worker {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					mu.Lock()
					pair := serves[1]
					if worker == 0 && time.Since(since) < test.stays {
						pair = serves[0]
					}
					mu.Unlock()
					_ = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{pair}}).HandshakeContext(t.Context())
					conn.Close()
				}
			})
			defer serving.Wait()
			defer listener.Close()

			v := &verdict{TB: t}
			figures := Rotate(v, Rotation{
				Endpoint: tlsprobe.Endpoint{Address: listener.Addr().String(), ServerName: "localhost"},
				Rounds:   1,
				Material: func() *connector.Material { return host.Material(t, ca) },
				Deploy:   deploy,
				maxDrain: 3 * time.Second,
			})
			if v.failed == test.passes || strings.Contains(figures.String(), "mismatched pair, 0 with an old") == (figures.Stale > 0) {
				t.Errorf("failed: %v, want it to pass: %v; %v", v.failed, test.passes, figures)
			}
		})
	}
}

// TestTurnedAway: a server that closes the session before TLS has not failed a handshake.
func TestTurnedAway(t *testing.T) {
	for _, test := range []struct {
		protocol, greeting string
		away               bool
	}{
		{tlsprobe.IMAP, "* BYE Shutting down\r\n", true},
		{tlsprobe.IMAP, "* NO\r\n", false},
		{tlsprobe.SMTP, "421 shutting down\r\n", true},
		{tlsprobe.SMTP, "554 no service\r\n", false},
		{tlsprobe.POP3, "-ERR [SYS/TEMP] later\r\n", true},
		{tlsprobe.POP3, "-ERR\r\n", false},
		{"", "* BYE Shutting down\r\n", false},
		{tlsprobe.IMAP, "", false},
	} {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var serving sync.WaitGroup
		serving.Go(func() {
			if conn, err := listener.Accept(); err == nil {
				_, _ = conn.Write([]byte(test.greeting))
				conn.Close()
			}
		})
		run := new(rotation)
		run.connect(t.Context(), tlsprobe.Endpoint{Address: listener.Addr().String(), StartTLS: test.protocol})
		listener.Close()
		serving.Wait()
		want := Figures{Failed: 1}
		if test.away {
			want = Figures{TurnedAway: 1}
		}
		if run.figures != want {
			t.Errorf("%s %q: got %v, want %v", test.protocol, test.greeting, run.figures, want)
		}
	}
}

func TestNoticed(t *testing.T) {
	for _, test := range []struct {
		figures         Figures
		rounds, clients int
		want            bool
	}{
		{Figures{Rotations: 50}, 50, 1, false},
		{Figures{Rotations: 49}, 50, 1, true},
		{Figures{Rotations: 50, Failed: 1}, 50, 1, true},
		{Figures{Rotations: 50, Stale: 1}, 50, 1, true},
		{Figures{Rotations: 50, TurnedAway: 5}, 50, 1, false},
		{Figures{Rotations: 50, TurnedAway: 6}, 50, 1, true},
		{Figures{Rotations: 50, TurnedAway: 10}, 50, 2, false},
		{Figures{Rotations: 1, TurnedAway: 1}, 1, 1, false},
		{Figures{Rotations: 1, TurnedAway: 2}, 1, 1, true},
	} {
		if got := test.figures.noticed(test.rounds, test.clients); got != test.want {
			t.Errorf("%v: got %v", test.figures, got)
		}
	}
}
