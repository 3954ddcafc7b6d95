package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// SocketName is the socket's name in the state directory.
const SocketName = "agent.sock"

const (
	// askTimeout is how long the loop may take to answer. The loop never blocks: if it needs
	// seconds, it is stuck or the host is overloaded.
	askTimeout = 5 * time.Second

	// getTimeout leaves the daemon time to answer that its loop is stuck.
	getTimeout = askTimeout + 3*time.Second

	// ioTimeout bounds reads and writes on the local socket.
	ioTimeout = 5 * time.Second

	maxRequest = 8 << 10
	maxAnswer  = 16 << 20 // a few thousand certificates take 2 MiB

	// maxPath is the longest path of a socket on macOS, in bytes; Linux allows 107.
	maxPath = 103
)

var (
	// errNotRunning means that no daemon listens in the state directory.
	errNotRunning = errors.New("no agent is running")

	// errStuck means that the daemon runs but its loop does not answer.
	errStuck = errors.New("the agent's loop is stuck")
)

// Source asks the loop for a snapshot. It fails if ctx ends first.
type Source func(ctx context.Context) (Snapshot, error)

// Server answers on the socket: GET /status with the snapshot as JSON, GET
// /metrics with Prometheus' text format.
type Server struct {
	source   Source
	listener *net.UnixListener
	path     string
	http     http.Server
	log      *slog.Logger
	stop     context.CancelFunc // ends waiting requests
}

// Listen creates the socket in a state directory, with mode 0600 from the start. It replaces the
// socket of a process that has ended, and fails if another agent is running.
func Listen(dir string, source Source, log *slog.Logger) (*Server, error) {
	path := filepath.Join(dir, SocketName)
	listener, err := bind(dir)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	s := &Server{source: source, listener: listener, path: path, log: log}
	open, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.http = http.Server{
		Handler:        s.routes(),
		BaseContext:    func(net.Listener) context.Context { return open },
		ReadTimeout:    ioTimeout,
		WriteTimeout:   askTimeout + ioTimeout,
		MaxHeaderBytes: maxRequest,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	s.http.SetKeepAlivesEnabled(false)
	return s, nil
}

// Serve answers requests until Close.
func (s *Server) Serve() {
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		s.log.Warn("the status socket has failed: certctl-agent status does not work until the agent restarts", "error", err)
	}
}

// Close stops the server and removes the socket. Requests that wait for the loop fail, since it may
// have ended.
func (s *Server) Close() {
	s.stop()
	ctx, cancel := context.WithTimeout(context.Background(), ioTimeout)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		s.http.Close()
	}
	os.Remove(s.path)
}

// bind creates the socket in a directory that other users cannot enter, because the umask sets its
// first mode. It changes the mode and then moves the socket to its place.
func bind(dir string) (*net.UnixListener, error) {
	switch conn, err := dial(context.Background(), dir); {
	case err == nil:
		conn.Close()
		return nil, errors.New("another agent is running")
	case !errors.Is(err, errNotRunning):
		return nil, err
	}
	closed := filepath.Join(dir, ".socket")
	if err := os.RemoveAll(closed); err != nil {
		return nil, err
	}
	if err := os.Mkdir(closed, 0o700); err != nil {
		return nil, err
	}
	defer os.RemoveAll(closed)
	address, release, err := address(closed)
	if err != nil {
		return nil, err
	}
	defer release()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false)
	made := filepath.Join(closed, SocketName)
	err = os.Chmod(made, 0o600)
	if err == nil {
		err = os.Rename(made, filepath.Join(dir, SocketName))
	}
	if err != nil {
		listener.Close()
		return nil, err
	}
	return listener, nil
}

func dial(ctx context.Context, dir string) (net.Conn, error) {
	address, release, err := address(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w with the state directory %s", errNotRunning, dir)
	}
	if err != nil {
		return nil, err
	}
	defer release()
	conn, err := (&net.Dialer{Timeout: ioTimeout}).DialContext(ctx, "unix", address)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w with the state directory %s", errNotRunning, dir)
	}
	return conn, err
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", s.answer("application/json", func(w io.Writer, s Snapshot) error { return json.NewEncoder(w).Encode(s) }))
	mux.HandleFunc("GET /metrics", s.answer(metricsType, WriteMetrics))
	return mux
}

func (s *Server) answer(contentType string, write func(io.Writer, Snapshot) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
		defer cancel()
		snapshot, err := s.source(ctx)
		if err != nil {
			http.Error(w, "the agent's loop does not answer: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		if snapshot.Certificates == nil {
			snapshot.Certificates = []Certificate{} // a list in JSON too
		}
		w.Header().Set("Content-Type", contentType)
		if err := write(w, snapshot); err != nil {
			s.log.Debug("status not delivered", "error", err)
		}
	}
}

// Get asks the daemon of a state directory for a snapshot. The error says whether no daemon runs or
// its loop does not answer.
func Get(ctx context.Context, dir string) (Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, dir) },
	}
	// The host name has no meaning on a unix socket.
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/status", nil)
	if err != nil {
		return Snapshot{}, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return Snapshot{}, explain(dir, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return Snapshot{}, explain(dir, err)
	}
	if resp.StatusCode != http.StatusOK {
		return Snapshot{}, fmt.Errorf("%w: it answers %s", errStuck, resp.Status)
	}
	var s Snapshot
	if err := json.Unmarshal(body, &s); err != nil {
		return Snapshot{}, fmt.Errorf("the answer of the agent in %s cannot be read: %w", dir, err)
	}
	return s, nil
}

func explain(dir string, err error) error {
	switch {
	case errors.Is(err, errNotRunning):
		return err
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: no answer within %v in %s", errStuck, getTimeout, dir)
	}
	return fmt.Errorf("ask the agent in %s: %w", dir, err)
}
