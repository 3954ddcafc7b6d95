package netfault_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/testing/netfault"
)

// echo is a server that echoes each line and records it.
type echo struct {
	net.Listener
	mu    sync.Mutex
	lines []string
}

func newEcho(t *testing.T) *echo {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &echo{Listener: listener}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				in := bufio.NewReader(conn)
				for {
					line, err := in.ReadString('\n')
					if err != nil {
						return
					}
					e.mu.Lock()
					e.lines = append(e.lines, line)
					e.mu.Unlock()
					if _, err := io.WriteString(conn, line); err != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() { listener.Close(); serving.Wait() })
	return e
}

func (e *echo) got() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Join(e.lines, "")
}

func start(t *testing.T, e *echo, fault netfault.Fault) (*netfault.Proxy, net.Conn) {
	t.Helper()
	p, err := netfault.New(e.Addr().String(), func(int) netfault.Fault { return fault })
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	// Close the connection first: the proxy waits for both of its ends.
	t.Cleanup(func() { conn.Close(); p.Close() })
	return p, conn
}

// say sends a line and returns the answer, or "silence" if there is none. It waits only briefly if
// the test wants silence.
func say(t *testing.T, conn net.Conn, line, want string) string {
	t.Helper()
	wait := time.Minute
	if want == "silence" {
		wait = 150 * time.Millisecond
	}
	if err := conn.SetDeadline(time.Now().Add(wait)); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(conn, line)
	buffer := make([]byte, 4096)
	n, err := io.ReadAtLeast(conn, buffer, len(line))
	switch {
	case errors.Is(err, syscall.ECONNRESET):
		return string(buffer[:n]) + "reset"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return string(buffer[:n]) + "end"
	case err != nil && err.(net.Error).Timeout():
		return string(buffer[:n]) + "silence"
	case err != nil:
		t.Fatal(err)
	}
	return string(buffer[:n])
}

func TestFaults(t *testing.T) {
	tests := []struct {
		name  string
		fault netfault.Fault
		first string // answer to "one\n"
		then  string // answer to "two\n", if the first one was "one\n"
		heard string // received by the server
	}{
		{"none", netfault.Fault{}, "one\n", "two\n", "one\ntwo\n"},
		{"close after the first answer", netfault.Fault{Then: netfault.Close, After: 4}, "one\n", "end", "one\n"},
		{"cut in the middle of an answer", netfault.Fault{Then: netfault.Close, After: 2}, "onend", "", "one\n"},
		{"reset in the second request", netfault.Fault{Then: netfault.Reset, After: 6, CountUp: true}, "one\n", "reset", "one\n"},
		{"silence at once", netfault.Fault{Then: netfault.Silence}, "silence", "", ""},
		{"silence in the second request", netfault.Fault{Then: netfault.Silence, After: 6, CountUp: true}, "one\n", "silence", "one\n"},
		{"half open", netfault.Fault{Then: netfault.HalfOpen, After: 4}, "one\n", "silence", "one\n"},
		{"delayed", netfault.Fault{Then: netfault.Hold, After: 4, CountUp: true}, "one\n", "silence", "one\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			server := newEcho(t)
			_, conn := start(t, server, test.fault)
			got := say(t, conn, "one\n", test.first)
			if got != test.first {
				t.Errorf("first answer %q, want %q", got, test.first)
			}
			if test.then != "" {
				if got := say(t, conn, "two\n", test.then); got != test.then {
					t.Errorf("second answer %q, want %q", got, test.then)
				}
			}
			if got := server.got(); got != test.heard {
				t.Errorf("the server heard %q, want %q", got, test.heard)
			}
		})
	}
}

func TestGarbageAndRefusal(t *testing.T) {
	server := newEcho(t)
	_, conn := start(t, server, netfault.Fault{Then: netfault.Garbage})
	got, _ := io.ReadAll(conn)
	if !strings.Contains(string(got), "not TLS") {
		t.Errorf("got %q", got)
	}
	p, err := netfault.New(server.Addr().String(), func(int) netfault.Fault { return netfault.Fault{Then: netfault.Reset} })
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	refused, err := net.Dial("tcp", p.Addr()) // may see the reset already
	if err == nil {
		_, err = io.ReadAll(refused)
		refused.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	if got := server.got(); got != "" {
		t.Errorf("the server heard %q", got)
	}
}

// TestHeldBackArrives: delayed data arrives whether or not the sender is still connected.
func TestHeldBackArrives(t *testing.T) {
	for _, gone := range []bool{false, true} {
		server := newEcho(t)
		p, conn := start(t, server, netfault.Fault{Then: netfault.Hold})
		say(t, conn, "late\n", "silence")
		if gone {
			conn.Close()
		}
		p.Heal()
		for deadline := time.Now().Add(time.Minute); server.got() != "late\n"; {
			if time.Now().After(deadline) {
				t.Fatalf("gone %v: the server heard %q", gone, server.got())
			}
			time.Sleep(time.Millisecond)
		}
		if !gone {
			if got := say(t, conn, "next\n", "late\n"); got != "late\nnext\n"[:len(got)] || len(got) < 5 {
				t.Errorf("after it healed: %q", got)
			}
		}
	}
}

func TestLatencyAndRate(t *testing.T) {
	server := newEcho(t)
	p, conn := start(t, server, netfault.Fault{Latency: 20 * time.Millisecond, Down: 2000})
	begun := time.Now()
	if err := conn.SetDeadline(begun.Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(conn, strings.Repeat("x", 199)+"\n")
	if _, err := io.ReadAtLeast(conn, make([]byte, 200), 200); err != nil {
		t.Fatal(err)
	}
	// 200 bytes at 2,000 a second, in two pieces, and three latencies.
	if took := time.Since(begun); took < 140*time.Millisecond {
		t.Errorf("it took %v", took)
	}
	p.Heal()
	if got := say(t, conn, "fast\n", "fast\n"); got != "fast\n" {
		t.Errorf("after it healed: %q", got)
	}
}

func TestHealResetsSilence(t *testing.T) {
	server := newEcho(t)
	p, conn := start(t, server, netfault.Fault{Then: netfault.Silence})
	if got := say(t, conn, "lost\n", "silence"); got != "silence" {
		t.Errorf("%q, want silence", got)
	}
	p.Heal()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	fresh, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Close()
	if got := say(t, fresh, "back\n", "back\n"); got != "back\n" || p.Connections() != 2 {
		t.Errorf("a connection after it healed: %q, %d connections", got, p.Connections())
	}
}
