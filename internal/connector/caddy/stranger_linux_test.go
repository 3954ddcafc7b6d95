package caddy

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/needs"
)

// strangersListener is a listener of a user who is neither root nor Caddy. The user
// who accepts owns the connection, so it accepts in a thread of that user.
type strangersListener struct {
	net.Listener
	accepted chan net.Conn
}

func (l *strangersListener) Accept() (net.Conn, error) {
	conn, ok := <-l.accepted
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func listenAsStranger(t *testing.T) net.Listener {
	t.Helper()
	const stranger = 4201
	l := &strangersListener{accepted: make(chan net.Conn)}
	listening := make(chan error, 1)
	go func() {
		defer close(l.accepted)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		keep := ^uintptr(0)
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, stranger, keep); errno != 0 {
			listening <- errno
			return
		}
		var err error
		l.Listener, err = net.Listen("tcp", "127.0.0.1:0")
		listening <- err
		for err == nil {
			var conn net.Conn
			if conn, err = l.Listener.Accept(); err == nil {
				l.accepted <- conn
			}
		}
	}()
	must(t, <-listening)
	return l
}

// Any user may listen where Caddy does not.
func TestStranger(t *testing.T) {
	needs.Root(t, "becoming another user")
	f := newFixture(t, running)
	var requests atomic.Int32
	theirs := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		f.api.ServeHTTP(w, r)
	}))
	theirs.Listener.Close()
	theirs.Listener = listenAsStranger(t)
	theirs.Start()
	defer theirs.Close()

	for _, mode := range []string{modeAPI, modeFile} {
		f.config = map[string]any{"mode": mode, "cert_dir": f.Dir, "admin_api": theirs.URL}
		_, err := f.deploy(t.Context(), f.Material(t, f.ca))
		if err == nil || !strings.Contains(err.Error(), "runs as user 4201") || !strings.Contains(err.Error(), "overlay") {
			t.Errorf("mode %s: got %v, want a refusal that says what to do", mode, err)
		}
	}
	if n := requests.Load(); n > 0 {
		t.Errorf("the stranger was sent %d requests", n)
	}
	// An overlay may allow it.
	f.config = map[string]any{}
	must(t, os.WriteFile(filepath.Join(f.Overlays, conformance.TargetID+".json"), []byte(`{"admin_api": "`+theirs.URL+`"}`), 0o600))
	if _, err := f.deploy(t.Context(), f.Material(t, f.ca)); err != nil || requests.Load() == 0 {
		t.Errorf("an address that the overlay names: %v after %d requests", err, requests.Load())
	}
}
