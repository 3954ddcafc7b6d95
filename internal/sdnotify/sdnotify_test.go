package sdnotify_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"certctl-agent/internal/sdnotify"
)

// listen is the service manager's end.
func listen(t *testing.T, socket string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestNotices(t *testing.T) {
	sockets := []string{filepath.Join(t.TempDir(), "s")}
	if runtime.GOOS == "linux" {
		sockets = append(sockets, fmt.Sprintf("@certctl-agent-test-%d", os.Getpid()))
	}
	for _, socket := range sockets {
		conn := listen(t, socket)
		n := sdnotify.New(socket)
		for _, test := range []struct {
			send func()
			want string
		}{
			{n.Ready, "READY=1"},
			{n.Reloading, "RELOADING=1"},
			{n.Stopping, "STOPPING=1"},
			{n.Watchdog, "WATCHDOG=1"},
			{func() { n.Status("2 jobs") }, "STATUS=2 jobs"},
			{func() { n.Status("x\nREADY=1\r\n\x00y") }, "STATUS=x READY=1 y"},
			{func() { n.Status("") }, "STATUS="},
		} {
			test.send()
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			buffer := make([]byte, 100)
			size, err := conn.Read(buffer)
			if got := string(buffer[:size]); err != nil || got != test.want {
				t.Errorf("%s: got %q (%v), want %q", socket, got, err, test.want)
			}
		}
	}
}

func TestWithoutServiceManager(t *testing.T) {
	if sdnotify.New("") != nil {
		t.Error("there is a Notifier without a socket")
	}
	for _, socket := range []string{"", filepath.Join(t.TempDir(), "gone"), "vsock:2:1"} {
		n := sdnotify.New(socket) // each call returns, and that is all
		n.Ready()
		if sent := n.Status("x"); sent != (socket == "") { // without a service manager nothing needs repeating
			t.Errorf("%q: Status reports %v", socket, sent)
		}
		n.Watchdog()
	}
}

// TestManagerDoesNotRead: a full socket does not block the caller for long.
func TestManagerDoesNotRead(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	listen(t, socket)
	n := sdnotify.New(socket)
	for range 5000 {
		began := time.Now()
		if n.Status("x") {
			continue
		}
		// The queue was full.
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("a notice took %v", took)
		}
		return
	}
	t.Error("Status reports a line as sent although the queue was full")
}

func TestWatchdogInterval(t *testing.T) {
	own := strconv.Itoa(os.Getpid())
	for _, test := range []struct {
		usec, pid string
		want      time.Duration
	}{
		{"30000000", own, 15 * time.Second},
		{"30000000", "", 15 * time.Second},
		{"30000000", "1" + own, 0},
		{"", own, 0},
		{"0", own, 0},
		{"-1", own, 0},
		{"30s", own, 0},
		{"9223372036854775807", own, 0},
		{"18446744073709551615", own, 0}, // USEC_INFINITY
	} {
		if got := sdnotify.WatchdogInterval(test.usec, test.pid); got != test.want {
			t.Errorf("WatchdogInterval(%q, %q) = %v, want %v", test.usec, test.pid, got, test.want)
		}
	}
}
