package status

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func fixed(s Snapshot) Source {
	return func(context.Context) (Snapshot, error) { return s, nil }
}

// serve runs a server until the test ends.
func serve(t *testing.T, dir string, source Source) *Server {
	t.Helper()
	s, err := Listen(dir, source, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(s.Serve)
	t.Cleanup(running.Wait)
	t.Cleanup(s.Close)
	return s
}

// shortDir returns a temporary directory whose path is short enough for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestGet(t *testing.T) {
	dir := shortDir(t)
	old := syscall.Umask(0) // the worst case for the socket's mode
	s := serve(t, dir, fixed(busy()))
	syscall.Umask(old)
	got, err := Get(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	want := busy()
	want.Certificates[1].CommonName = strings.ToValidUTF8(want.Certificates[1].CommonName, "\uFFFD") // as JSON has it
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	info, err := os.Lstat(filepath.Join(dir, SocketName))
	if err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("socket %v, %v, want mode 0600", info.Mode(), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("directory holds %v, %v, want only the socket", entries, err)
	}
	s.Close()
	if _, err := os.Lstat(filepath.Join(dir, SocketName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket outlives the server: %v", err)
	}
	if _, err := Get(t.Context(), dir); !errors.Is(err, errNotRunning) {
		t.Errorf("after Close: %v, want errNotRunning", err)
	}
}

func TestGetWithoutDaemon(t *testing.T) {
	dir := shortDir(t)
	for _, dir := range []string{dir, filepath.Join(dir, "none"), filepath.Join(dir, strings.Repeat("x", 200))} {
		if _, err := Get(t.Context(), dir); runtime.GOOS == "linux" && !errors.Is(err, errNotRunning) || err == nil {
			t.Errorf("%s: %v, want errNotRunning", dir, err)
		}
	}
}

func TestLongPath(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux reaches a socket through a handle of its directory")
	}
	dir := filepath.Join(shortDir(t), strings.Repeat("x", 200))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	serve(t, dir, fixed(busy()))
	if _, err := Get(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

func TestSecondDaemon(t *testing.T) {
	dir := shortDir(t)
	serve(t, dir, fixed(busy()))
	if _, err := Listen(dir, fixed(Snapshot{}), slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "another agent is running") {
		t.Errorf("second daemon: %v, want \"another agent is running\"", err)
	}
	if got, err := Get(t.Context(), dir); err != nil || got.Version != busy().Version {
		t.Errorf("the first one answers %v, %v", got, err)
	}
}

func TestSocketOfTheDead(t *testing.T) {
	for name, leave := range map[string]func(dir string) error{
		"socket": func(dir string) error {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, SocketName), Net: "unix"})
			if err != nil {
				return err
			}
			l.SetUnlinkOnClose(false)
			return l.Close()
		},
		"file":                func(dir string) error { return os.WriteFile(filepath.Join(dir, SocketName), nil, 0o644) },
		"half-made directory": func(dir string) error { return os.MkdirAll(filepath.Join(dir, ".socket", "x"), 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			if err := leave(dir); err != nil {
				t.Fatal(err)
			}
			serve(t, dir, fixed(busy()))
			if _, err := Get(t.Context(), dir); err != nil {
				t.Error(err)
			}
		})
	}
}

// ask sends a request to the handler, without a socket.
func ask(t *testing.T, source Source, method, path string) (status int, contentType, body string) {
	t.Helper()
	s := &Server{source: source, log: slog.New(slog.DiscardHandler)}
	w := httptest.NewRecorder()
	s.routes().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, nil))
	return w.Code, w.Header().Get("Content-Type"), w.Body.String()
}

// TestStuckLoop: if the loop does not answer, requests fail in time.
func TestStuckLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := func(ctx context.Context) (Snapshot, error) {
			<-ctx.Done()
			return Snapshot{}, ctx.Err()
		}
		for _, path := range []string{"/status", "/metrics"} {
			started := time.Now()
			got, _, _ := ask(t, stuck, http.MethodGet, path)
			if got != http.StatusServiceUnavailable || time.Since(started) != askTimeout {
				t.Errorf("%s: %d after %v, want 503 after %v", path, got, time.Since(started), askTimeout)
			}
		}
	})
}

func TestGetFromStuckDaemon(t *testing.T) {
	dir := shortDir(t)
	serve(t, dir, func(context.Context) (Snapshot, error) { return Snapshot{}, context.DeadlineExceeded })
	if _, err := Get(t.Context(), dir); !errors.Is(err, errStuck) {
		t.Errorf("loop without an answer: %v, want errStuck", err)
	}

	// The kernel accepts connections for a stopped process, which never answers.
	silent := shortDir(t)
	l, err := net.Listen("unix", filepath.Join(silent, SocketName))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Get(ctx, silent); !errors.Is(err, errStuck) {
		t.Errorf("silent daemon: %v, want errStuck", err)
	}
}

func TestPaths(t *testing.T) {
	for _, test := range []struct {
		method, path string
		want         int
		contains     string
	}{
		{http.MethodGet, "/status", 200, `"certificates":[]`},
		{http.MethodGet, "/metrics", 200, "certctl_agent_build_info{"},
		{http.MethodPost, "/status", 405, ""},
		{http.MethodGet, "/", 404, ""},
	} {
		got, _, body := ask(t, fixed(Snapshot{}), test.method, test.path)
		if got != test.want || !strings.Contains(body, test.contains) {
			t.Errorf("%s %s: %d %s, want %d with %q", test.method, test.path, got, body, test.want, test.contains)
		}
	}
	if _, got, _ := ask(t, fixed(Snapshot{}), http.MethodGet, "/metrics"); got != metricsType {
		t.Errorf("metrics have the type %q, want %q", got, metricsType)
	}
}

// TestCloseWhileTheLoopIsGone: Close does not wait for answers of the loop.
func TestCloseWhileTheLoopIsGone(t *testing.T) {
	dir, asked := shortDir(t), make(chan bool)
	s := serve(t, dir, func(ctx context.Context) (Snapshot, error) {
		close(asked)
		<-ctx.Done()
		return Snapshot{}, context.Cause(ctx)
	})
	answered := make(chan error)
	go func() {
		_, err := Get(t.Context(), dir)
		answered <- err
	}()
	<-asked
	started := time.Now()
	s.Close()
	if took := time.Since(started); took >= askTimeout {
		t.Errorf("Close took %v", took)
	}
	if err := <-answered; err == nil {
		t.Error("the request was answered")
	}
}
