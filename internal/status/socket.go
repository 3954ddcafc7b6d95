package status

import (
	"bufio"
	"bytes"
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
	"sync"
	"syscall"
	"time"
)

// SocketName is the socket's name in the state directory.
const SocketName = "agent.sock"

const (
	// askTimeout is how long the loop has for an answer. It never blocks: one
	// that needs seconds is stuck, or the host is out of processor time.
	askTimeout = 5 * time.Second

	// getTimeout leaves the daemon time to say that its loop is stuck.
	getTimeout = askTimeout + 3*time.Second

	// ioTimeout is for requests and answers on the local socket.
	ioTimeout = 5 * time.Second

	maxRequest = 8 << 10
	maxAnswer  = 16 << 20 // some thousand certificates are 2 MiB

	// maxPath is the longest name of a socket on macOS; Linux allows 107.
	maxPath = 103
)

var (
	// ErrNotRunning means that no daemon listens in the state directory.
	ErrNotRunning = errors.New("no agent is running")

	// ErrStuck means that there is a daemon whose loop does not answer.
	ErrStuck = errors.New("the agent's loop is stuck")

	// ErrRunning means that another daemon listens already.
	ErrRunning = errors.New("another agent is running")
)

// Source asks the loop for a snapshot. It returns an error when ctx ends before
// the loop has answered.
type Source func(ctx context.Context) (Snapshot, error)

// Server answers on the socket: GET /status with the snapshot as JSON, GET
// /metrics with Prometheus' text format. Each connection has one request. An
// http.Server would do more than that, and make the program half a megabyte
// larger.
type Server struct {
	source   Source
	listener *net.UnixListener
	path     string
	log      *slog.Logger

	open        context.Context // until Close
	stop        context.CancelFunc
	connections sync.WaitGroup
}

// Listen makes the socket in a state directory, 0600 from the moment that it
// exists. It replaces the socket of a process that is gone; with one that lives
// it returns ErrRunning.
func Listen(dir string, source Source, log *slog.Logger) (*Server, error) {
	path := filepath.Join(dir, SocketName)
	switch conn, err := dial(context.Background(), dir); {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, ErrRunning)
	case !errors.Is(err, ErrNotRunning):
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	listener, err := bind(dir)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	s := &Server{source: source, listener: listener, path: path, log: log}
	s.open, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// Serve answers until Close.
func (s *Server) Serve() {
	defer s.connections.Wait()
	for {
		conn, err := s.listener.Accept()
		switch {
		case err == nil:
			s.connections.Go(func() { s.answer(conn) })
		case s.open.Err() != nil:
			return
		default: // out of descriptors, for one
			s.log.Warn("the status socket could not take a connection", "error", err)
			select {
			case <-time.After(time.Second):
			case <-s.open.Done():
			}
		}
	}
}

// Close stops answering and removes the socket.
func (s *Server) Close() {
	s.stop()
	s.listener.Close()
	os.Remove(s.path)
}

// bind makes the socket in a directory that is closed to others, since it gets
// a mode from the umask, and moves it to its place when it has its own mode.
func bind(dir string) (*net.UnixListener, error) {
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

// dial connects to the daemon of a state directory.
func dial(ctx context.Context, dir string) (net.Conn, error) {
	address, release, err := address(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w with the state directory %s", ErrNotRunning, dir)
	}
	if err != nil {
		return nil, err
	}
	defer release()
	conn, err := (&net.Dialer{Timeout: ioTimeout}).DialContext(ctx, "unix", address)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w with the state directory %s", ErrNotRunning, dir)
	}
	return conn, err
}

// answer serves one connection.
func (s *Server) answer(conn net.Conn) {
	defer conn.Close()
	defer context.AfterFunc(s.open, func() { conn.Close() })()
	conn.SetDeadline(time.Now().Add(ioTimeout))
	request, err := http.ReadRequest(bufio.NewReader(io.LimitReader(conn, maxRequest)))
	if err != nil {
		s.log.Debug("a request on the status socket cannot be read", "error", err)
		return
	}
	conn.SetDeadline(time.Now().Add(askTimeout + ioTimeout))
	status, contentType, body := s.respond(request)
	response := http.Response{
		StatusCode: status,
		ProtoMajor: 1, ProtoMinor: 1,
		Header:        http.Header{"Content-Type": {contentType}},
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
		Close:         true,
		Request:       request,
	}
	if err := response.Write(conn); err != nil {
		s.log.Debug("status not delivered", "error", err)
	}
}

// respond says what a request is answered.
func (s *Server) respond(request *http.Request) (status int, contentType string, body []byte) {
	refuse := func(status int, text string) (int, string, []byte) {
		return status, "text/plain; charset=utf-8", []byte(text + "\n")
	}
	if request.Method != http.MethodGet && request.Method != http.MethodHead {
		return refuse(http.StatusMethodNotAllowed, "only GET is answered")
	}
	var write func(io.Writer, Snapshot) error
	switch request.URL.Path {
	case "/status":
		contentType = "application/json"
		write = func(w io.Writer, s Snapshot) error { return json.NewEncoder(w).Encode(s) }
	case "/metrics":
		contentType, write = metricsType, WriteMetrics
	default:
		return refuse(http.StatusNotFound, "there are /status and /metrics")
	}
	ctx, cancel := context.WithTimeout(s.open, askTimeout)
	defer cancel()
	snapshot, err := s.source(ctx)
	if err != nil {
		return refuse(http.StatusServiceUnavailable, "the agent's loop does not answer: "+err.Error())
	}
	if snapshot.Certificates == nil {
		snapshot.Certificates = []Certificate{} // a list in JSON too
	}
	var out bytes.Buffer
	if err := write(&out, snapshot); err != nil {
		return refuse(http.StatusInternalServerError, err.Error())
	}
	return http.StatusOK, contentType, out.Bytes()
}

// Get asks the daemon of a state directory. The error is ErrNotRunning where
// there is none, and ErrStuck where its loop does not answer.
func Get(ctx context.Context, dir string) (Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, dir) },
	}
	// The host's name is of no meaning on a socket.
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/status", nil)
	if err != nil {
		return Snapshot{}, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return Snapshot{}, asked(dir, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return Snapshot{}, asked(dir, err)
	}
	if resp.StatusCode != http.StatusOK {
		return Snapshot{}, fmt.Errorf("%w: it answers %s", ErrStuck, resp.Status)
	}
	var s Snapshot
	if err := json.Unmarshal(body, &s); err != nil {
		return Snapshot{}, fmt.Errorf("the answer of the agent in %s cannot be read: %w", dir, err)
	}
	return s, nil
}

// asked explains why there is no answer.
func asked(dir string, err error) error {
	switch {
	case errors.Is(err, ErrNotRunning):
		return err
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: no answer within %v in %s", ErrStuck, getTimeout, dir)
	}
	return fmt.Errorf("ask the agent in %s: %w", dir, err)
}
