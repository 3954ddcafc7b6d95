package caddy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestNewAdmin(t *testing.T) {
	tests := []struct {
		address  string
		anywhere bool
		base     string // "": an error
	}{
		{"http://localhost:2019", false, "http://localhost:2019"},
		{"http://127.0.0.1:2019/", false, "http://127.0.0.1:2019"},
		{"http://[::1]:2019", false, "http://[::1]:2019"},
		{"http://[::ffff:127.0.0.1]:2019", false, "http://[::ffff:127.0.0.1]:2019"},
		{"unix//run/caddy/admin.sock", false, "http://unix"},
		{"http://192.0.2.1:2019", false, ""},
		{"http://192.0.2.1:2019", true, "http://192.0.2.1:2019"},
		{"https://caddy.example.org", true, "https://caddy.example.org"},
		{"http://0.0.0.0:2019", false, ""},
		{"localhost:2019", false, ""},
		{"http://user:word@localhost", false, ""},
		{"http://localhost/config/", false, ""},
		{"http://localhost?a=b", false, ""},
		{"http://:2019", false, ""},
		{"unix/run/admin.sock", false, ""},
		{"unix//run/../etc/admin.sock", false, ""},
	}
	for _, test := range tests {
		a, err := newAdmin(test.address, time.Minute, test.anywhere)
		switch {
		case test.base == "" && err == nil:
			t.Errorf("%s: accepted as %s", test.address, a.base)
		case test.base == "" && strings.Contains(err.Error(), "word"):
			t.Errorf("%s: the password is in %v", test.address, err)
		case test.base != "" && (err != nil || a.base != test.base):
			t.Errorf("%s: got %v, %v, want %s", test.address, a, err, test.base)
		}
	}
}

func TestUnixSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "admin.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "" {
			http.Error(w, "host not allowed: "+r.Host, http.StatusForbidden)
		}
	}))
	server.Listener.Close()
	server.Listener = listener
	server.Start()
	defer server.Close()
	a, err := newAdmin("unix/"+socket, time.Minute, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.call(t.Context(), http.MethodGet, "/config/", nil); err != nil {
		t.Error(err)
	}
}

// Caddy requires an Origin with enforce_origin. Without, it refuses an unknown
// Origin.
func TestOrigin(t *testing.T) {
	for _, enforced := range []bool{false, true} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if sent := r.Header.Get("Origin") == "http://"+r.Host; sent != enforced {
				w.WriteHeader(http.StatusForbidden)
			}
		}))
		defer server.Close()
		a, err := newAdmin(server.URL, time.Minute, false)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := a.call(t.Context(), http.MethodPost, "/load", []byte("{}")); err != nil {
				t.Errorf("enforced: %v: %v", enforced, err)
			}
		}
	}
}

func TestCallErrors(t *testing.T) {
	key := strings.Repeat("MHcCAQEEIFvN8Zk2", 4)
	tests := []struct {
		name    string
		handler http.HandlerFunc
		says    string
	}{
		{"Caddy's words", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, `{"error":"loading new config: PEM pair 0:\n no \u001b[31mPEM"}`, http.StatusInternalServerError)
		}, "500 Internal Server Error: loading new config: PEM pair 0: no"},
		{"no JSON", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "gone fishing", http.StatusBadGateway) }, "gone fishing"},
		{"a key", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, `{"error":"cannot use -----BEGIN EC PRIVATE KEY-----\n`+key+`\n"}`, http.StatusBadRequest)
		}, "cannot use [...]"},
		{"a line of a key", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "bad value "+key+" at 7", http.StatusBadRequest)
		}, "bad value [...] at 7"},
		{"redirect", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }, "302"},
		{"flood", func(w http.ResponseWriter, _ *http.Request) {
			for block := make([]byte, 1<<20); ; {
				if _, err := w.Write(block); err != nil {
					return
				}
			}
		}, "longer than 64 MiB"},
		{"cut off", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "POST /load: EOF"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			server := httptest.NewServer(test.handler)
			defer server.Close()
			a, err := newAdmin(server.URL, time.Minute, false)
			if err != nil {
				t.Fatal(err)
			}
			_, err = a.call(t.Context(), http.MethodPost, "/load", []byte(key))
			if err == nil || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), key) || len(err.Error()) > 2*maxMessage {
				t.Errorf("got %v, want an error with %q and no key", err, test.says)
			}
		})
	}
}

// TestConnections: each change starts another admin server, so none is kept. One that
// hangs is not waited for.
func TestConnections(t *testing.T) {
	var made atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hang" {
			<-r.Context().Done()
		}
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			made.Add(1)
		}
	}
	server.Start()
	defer server.Close()
	a, err := newAdmin(server.URL, time.Minute, false)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := a.call(t.Context(), http.MethodGet, "/config/", nil); err != nil {
			t.Fatal(err)
		}
	}
	if made.Load() != 2 {
		t.Errorf("%d connections for two calls, want 2", made.Load())
	}
	a.timeout = 100 * time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := a.call(ctx, http.MethodGet, "/hang", nil); !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		t.Errorf("got %v, want the end of its time", err)
	}
}

func TestReloadWithoutConfiguration(t *testing.T) {
	api := newFake(t, "null")
	a, err := newAdmin(api.URL, time.Minute, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.reload(t.Context()); err == nil || len(api.made()) > 0 {
		t.Errorf("got %v after %q, want an error and no change", err, api.made())
	}
}
