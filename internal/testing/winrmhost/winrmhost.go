// Package winrmhost is a fake Windows host with WS-Management, for tests. A function implements its
// commands. It rejects what Windows rejects according to [MS-WSMV], [MS-NLMP] and [DSP0226].
//
// The documents are
// https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-wsmv/,
// https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-nlmp/ and
// https://www.dmtf.org/sites/default/files/standards/documents/DSP0226_1.2.0.pdf.
package winrmhost

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Handler runs a command, given its words and its whole standard input.
type Handler func(command []string, stdin []byte) (stdout, stderr []byte, exit int)

// Options configure a host.
type Options struct {
	Domain, User, Password string // of its only account; Domain may be omitted by clients
	Handler                Handler

	Certificate *tls.Certificate // nil for plain HTTP
	ClientCA    *x509.CertPool   // its certificates are mapped to the account; may be nil
	Basic       bool             // accept Basic over HTTPS

	Listen func() (net.Listener, error) // nil means on a port of 127.0.0.1

	LockAfter int           // number of failed logons that lock the account, or 0
	Clock     time.Duration // how far its clock is ahead
	HideClock bool          // challenges do not contain the time, as before Windows Vista
}

// Trouble makes a call fail. The first field that is set applies.
type Trouble struct {
	Hang   bool   // no answer, and the call is not carried out
	Drop   bool   // the connection is closed, and the call is not carried out
	Lose   bool   // the call is carried out, then the connection is closed
	Status int    // HTTP status of an error answer
	Body   string // HTML for Status
	Code   uint32 // fault code, or 0
	Reason string // of a fault
	Late   bool   // with a fault: the call is carried out first
}

// Host is a running host.
type Host struct {
	Port int // of 127.0.0.1; 0 with Options.Listen

	options Options
	serving sync.WaitGroup // the server, its calls, and commands
	stop    context.CancelFunc
	stopped context.Context

	mu      sync.Mutex // guards the fields below
	server  *http.Server
	closed  bool
	conns   map[*conn]bool
	shells  map[string]*shell
	trouble func(action string) *Trouble
	utf16   bool
	counts  Counts
}

// Counts counts events since the start.
type Counts struct {
	Shells, Commands int  // created, started
	Logons, Failed   int  // per connection with NTLM, else per call
	Locked           bool // the account is locked
	Largest          int  // size of the largest envelope from a client, in bytes
}

// Start starts a host.
func Start(o Options) (*Host, error) {
	h := &Host{options: o, conns: make(map[*conn]bool), shells: make(map[string]*shell)}
	h.stopped, h.stop = context.WithCancel(context.Background())
	if o.Listen == nil {
		listener, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		h.Port = listener.Addr().(*net.TCPAddr).Port
		h.run(listener)
		return h, nil
	}
	return h, h.listen()
}

// listen listens on the same address as before.
func (h *Host) listen() error {
	listen := h.options.Listen
	if listen == nil {
		listen = func() (net.Listener, error) { return net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", h.Port)) }
	}
	listener, err := listen()
	if err == nil {
		h.run(listener)
	}
	return err
}

func (h *Host) run(listener net.Listener) {
	if h.options.Certificate != nil {
		config := &tls.Config{Certificates: []tls.Certificate{*h.options.Certificate}}
		if h.options.ClientCA != nil {
			config.ClientAuth = tls.RequestClientCert
		}
		listener = tls.NewListener(listener, config)
	}
	server := &http.Server{
		Handler:  http.HandlerFunc(h.serve),
		ErrorLog: log.New(io.Discard, "", 0), // handshakes aborted by clients
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			state := &conn{Conn: c}
			h.mu.Lock()
			h.conns[state] = true
			h.mu.Unlock()
			return context.WithValue(ctx, connKey{}, state)
		},
	}
	h.mu.Lock()
	h.server = server
	h.mu.Unlock()
	h.serving.Go(func() { server.Serve(listener) })
}

// Close stops the host and waits for its commands.
func (h *Host) Close() {
	h.stop()
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.closeServer()
	h.serving.Wait()
}

func (h *Host) closeServer() {
	h.mu.Lock()
	server := h.server
	h.mu.Unlock()
	server.Close()
}

// Reboot closes the connections and discards shells and logons.
func (h *Host) Reboot() error {
	h.closeServer()
	h.DropShells()
	h.mu.Lock()
	clear(h.conns)
	h.mu.Unlock()
	return h.listen()
}

// Disconnect closes the connections.
func (h *Host) Disconnect() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.conns {
		c.Close()
	}
	clear(h.conns)
}

// DropShells ends all shells, as an administrator would.
func (h *Host) DropShells() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.shells {
		s.end()
	}
	clear(h.shells)
}

// Shells returns the number of shells.
func (h *Host) Shells() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.shells)
}

// Counts returns the counts.
func (h *Host) Counts() Counts {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.counts
}

// SetTrouble sets a function that decides on the trouble of each call; it may be nil. Actions are
// Logon, Create, Command, Send, Receive, Signal and Delete.
func (h *Host) SetTrouble(trouble func(action string) *Trouble) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.trouble = trouble
}

// SetKeepAlive sets whether connections are kept open after an answer.
func (h *Host) SetKeepAlive(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.server.SetKeepAlivesEnabled(on)
}

// SetUTF16 makes commands write UTF-16 with a byte order mark.
func (h *Host) SetUTF16(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.utf16 = on
}

func (h *Host) isTLS() bool { return h.options.Certificate != nil }

type connKey struct{}

// maxEnvelope bounds a request: 150 KiB, the smallest default of Windows ([MS-WSMV] 2.2.4.10,
// 3.1.4.1.20).
const maxEnvelope = 150 << 10

// serve handles an HTTP request.
func (h *Host) serve(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return
	}
	h.serving.Add(1)
	h.mu.Unlock()
	defer h.serving.Done()
	c := r.Context().Value(connKey{}).(*conn)
	w.Header().Set("Server", "Microsoft-HTTPAPI/2.0")
	w.Header().Set("Date", time.Now().Add(h.options.Clock).UTC().Format(http.TimeFormat))
	if r.Method != http.MethodPost || r.URL.Path != "/wsman" {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 2*maxEnvelope))
	if err != nil {
		return
	}
	if !h.authenticate(w, r, c) || len(body) == 0 {
		return
	}
	contentType := r.Header.Get("Content-Type")
	if c.session != nil && !h.isTLS() {
		if contentType != `multipart/encrypted;protocol="application/HTTP-SPNEGO-session-encrypted";boundary="Encrypted Boundary"` {
			w.WriteHeader(http.StatusInternalServerError) // AllowUnencrypted is off
			return
		}
		if body, err = c.decrypt(body); err != nil {
			c.Close()
			return
		}
	} else if kind, charset, _ := strings.Cut(contentType, ";"); kind != "application/soap+xml" || !strings.EqualFold(strings.ReplaceAll(charset, " ", ""), "charset=utf-8") {
		w.WriteHeader(http.StatusUnsupportedMediaType)
		return
	}
	answer, status := h.handle(w, r, c, body)
	if answer == nil {
		return
	}
	w.Header().Set("Content-Type", "application/soap+xml;charset=UTF-8")
	if c.session != nil && !h.isTLS() {
		answer = c.encrypt(answer)
		w.Header().Set("Content-Type", `multipart/encrypted;protocol="application/HTTP-SPNEGO-session-encrypted";boundary="Encrypted Boundary"`)
	}
	w.WriteHeader(status)
	w.Write(answer)
}

// handle returns the answer to an envelope. It returns nil if there is none, or if it has already
// sent one that is not WS-Management.
func (h *Host) handle(w http.ResponseWriter, r *http.Request, c *conn, body []byte) (answer []byte, status int) {
	request, err := parse(body)
	if fault, ok := errors.AsType[*fault](err); ok {
		return fault.envelope(request), http.StatusInternalServerError
	}
	h.mu.Lock()
	h.counts.Largest = max(h.counts.Largest, len(body))
	h.mu.Unlock()
	trouble := h.troubleOf(request.action)
	if h.happens(w, r, c, trouble) {
		return nil, 0
	}
	if trouble.Late {
		h.do(r.Context(), c, request)
	}
	if trouble.Code != 0 {
		return (&fault{"w:InternalError", trouble.Code, trouble.Reason}).envelope(request), http.StatusInternalServerError
	}
	content, err := h.do(r.Context(), c, request)
	if trouble.Lose {
		c.Close()
		return nil, 0
	}
	if fault, ok := errors.AsType[*fault](err); ok {
		return fault.envelope(request), http.StatusInternalServerError
	}
	return request.answer(content), http.StatusOK
}

func (h *Host) troubleOf(action string) Trouble {
	h.mu.Lock()
	f := h.trouble
	h.mu.Unlock()
	if f != nil {
		if t := f(action); t != nil {
			return *t
		}
	}
	return Trouble{}
}

// happens reports whether trouble has ended the call.
func (h *Host) happens(w http.ResponseWriter, r *http.Request, c *conn, t Trouble) bool {
	switch {
	case t.Hang:
		select {
		case <-r.Context().Done():
		case <-h.stopped.Done():
		}
		c.Close()
	case t.Drop:
		c.Close()
	case t.Status != 0:
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(t.Status)
		io.WriteString(w, t.Body)
	default:
		return false
	}
	return true
}

// minIdle and maxShells, per user, are the defaults of Windows.
const (
	minIdle   = time.Minute
	maxShells = 30
)

func (h *Host) do(ctx context.Context, c *conn, r *request) (string, error) {
	if r.action == "Create" {
		return h.create(c, r)
	}
	h.mu.Lock()
	s := h.shells[r.shellID]
	h.mu.Unlock()
	if s == nil || s.owner != c.user {
		return "", &fault{"w:InvalidSelectors", 2150858843, "The request for the Windows Remote Shell with ShellId " + r.shellID + " failed because the shell was not found on the server."}
	}
	switch r.action {
	case "Command":
		return h.command(s, r)
	case "Send":
		return h.send(s, r)
	case "Receive":
		return s.receive(ctx, r)
	case "Signal":
		return "<rsp:SignalResponse/>", s.signal(r)
	}
	h.mu.Lock() // Delete
	delete(h.shells, r.shellID)
	h.mu.Unlock()
	s.end()
	return "", nil
}

func (h *Host) create(c *conn, r *request) (string, error) {
	b := r.body.Shell
	if b == nil || r.shellID != "" {
		return "", invalid("Create needs a Shell and no selector")
	}
	for name := range r.options {
		if name != "WINRS_NOPROFILE" && name != "WINRS_CODEPAGE" {
			return "", invalid("unknown option " + name)
		}
	}
	if b.Input != "stdin" || b.Output != "stdout stderr" {
		return "", invalid("unknown streams")
	}
	if b.Idle != "" {
		if idle, err := parseDuration(b.Idle); err != nil || idle < minIdle {
			return "", invalid("IdleTimeOut " + b.Idle)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.shells) >= maxShells {
		return "", &fault{"w:QuotaLimit", 2150859173, "This user is allowed a maximum number of 30 concurrent shells, which has been exceeded."}
	}
	s := &shell{id: newID(), owner: c.user, utf16: h.utf16}
	h.shells[s.id] = s
	h.counts.Shells++
	return `<x:ResourceCreated xmlns:x="http://schemas.xmlsoap.org/ws/2004/09/transfer"><a:Address>http://127.0.0.1/wsman</a:Address>` +
		`<a:ReferenceParameters><w:ResourceURI>http://schemas.microsoft.com/wbem/wsman/1/windows/shell/cmd</w:ResourceURI>` +
		`<w:SelectorSet><w:Selector Name="ShellId">` + s.id + `</w:Selector></w:SelectorSet></a:ReferenceParameters></x:ResourceCreated>` +
		`<rsp:Shell><rsp:ShellId>` + s.id + `</rsp:ShellId></rsp:Shell>`, nil
}

// shell is a WinRM shell. It has at most one command at a time ([MS-WSMV] 2.2.4.38).
type shell struct {
	id, owner string
	utf16     bool

	mu      sync.Mutex // guards the fields below
	current *command
}

type command struct {
	id       string
	words    []string
	pipe     bool // reads standard input to its end
	stdin    bytes.Buffer
	ended    bool          // its input has ended
	finished chan struct{} // closed when the command or its shell has ended
	out, err []byte
	exit     int
	killed   bool
}

func (s *shell) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != nil {
		s.current.kill()
	}
}

// kill ends the command. The caller must hold the lock.
func (c *command) kill() {
	c.killed = true
	select {
	case <-c.finished:
	default:
		close(c.finished)
	}
}

// command starts a command ([MS-WSMV] 3.1.4.11).
func (h *Host) command(s *shell, r *request) (string, error) {
	b := r.body.CommandLine
	if b == nil || b.Command == "" {
		return "", invalid("missing command")
	}
	for name, value := range r.options {
		if name != "WINRS_CONSOLEMODE_STDIN" && name != "WINRS_SKIP_CMD_SHELL" || value != "TRUE" && value != "FALSE" {
			return "", invalid("unknown option " + name)
		}
	}
	line := strings.Join(append([]string{b.Command}, b.Arguments...), " ")
	if len(line) > 8191 {
		return "", invalid("The command line is too long.")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != nil {
		return "", invalid("a command is still running: terminate it first")
	}
	c := &command{id: newID(), words: strings.Fields(strings.ReplaceAll(line, `"`, "")), pipe: r.options["WINRS_CONSOLEMODE_STDIN"] == "FALSE", finished: make(chan struct{})}
	s.current = c
	h.mu.Lock()
	h.counts.Commands++
	h.mu.Unlock()
	if !c.pipe {
		h.start(s, c)
	}
	return "<rsp:CommandResponse><rsp:CommandId>" + c.id + "</rsp:CommandId></rsp:CommandResponse>", nil
}

// start runs a command whose input is complete.
func (h *Host) start(s *shell, c *command) {
	h.serving.Go(func() {
		stdout, stderr, exit := h.options.Handler(c.words, c.stdin.Bytes())
		if s.utf16 {
			stdout, stderr = toUTF16(stdout), toUTF16(stderr)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if !c.killed {
			c.out, c.err, c.exit = stdout, stderr, exit
			close(c.finished)
		}
	})
}

// find returns the command of a request.
func (s *shell) find(id string) (*command, error) {
	if s.current == nil || !strings.EqualFold(s.current.id, id) {
		return nil, invalid("unknown command " + id)
	}
	return s.current, nil
}

// send accepts input ([MS-WSMV] 3.1.4.13).
func (h *Host) send(s *shell, r *request) (string, error) {
	if r.body.Send == nil {
		return "", invalid("there is nothing to send")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, stream := range r.body.Send.Streams {
		c, err := s.find(stream.CommandID)
		if err != nil {
			return "", err
		}
		data, err := base64.StdEncoding.DecodeString(stream.Data)
		if err != nil || stream.Name != "stdin" || c.ended || !c.pipe {
			return "", invalid("a stream that cannot be sent")
		}
		c.stdin.Write(data)
		if stream.End == "true" || stream.End == "TRUE" {
			c.ended = true
			h.start(s, c)
		}
	}
	return "<rsp:SendResponse/>", nil
}

// chunk is the part of the output in one answer, in bytes. In base64 it fits into the smallest
// envelope that a client may request.
const chunk = 4 << 10

// receive returns output ([MS-WSMV] 3.1.4.14).
func (s *shell) receive(ctx context.Context, r *request) (string, error) {
	if r.body.Receive == nil || strings.TrimSpace(r.body.Receive.Stream.Names) != "stdout stderr" {
		return "", invalid("unknown streams")
	}
	s.mu.Lock()
	c, err := s.find(r.body.Receive.Stream.CommandID)
	s.mu.Unlock()
	if err != nil {
		return "", err
	}
	wait := time.NewTimer(r.wait)
	defer wait.Stop()
	select {
	case <-c.finished:
	case <-ctx.Done():
	case <-wait.C:
		return "", &fault{"w:TimedOut", 2150858793, "The WS-Management service cannot complete the operation within the time specified in OperationTimeout."}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.killed {
		return "", &fault{"w:InternalError", 995, "The I/O operation has been aborted because of either a thread exit or an application request."}
	}
	var content strings.Builder
	content.WriteString("<rsp:ReceiveResponse>")
	size := max(chunk, (min(r.maxEnvelope, 512<<10)-8<<10)/2)
	for name, data := range map[string]*[]byte{"stdout": &c.out, "stderr": &c.err} {
		part := (*data)[:min(len(*data), size/2)]
		*data = (*data)[len(part):]
		fmt.Fprintf(&content, `<rsp:Stream Name="%s" CommandId="%s">%s</rsp:Stream>`, name, c.id, base64.StdEncoding.EncodeToString(part))
	}
	state := `<rsp:CommandState CommandId="` + c.id + `" State="http://schemas.microsoft.com/wbem/wsman/1/windows/shell/CommandState/`
	if len(c.out)+len(c.err) > 0 {
		return content.String() + state + `Running"/></rsp:ReceiveResponse>`, nil
	}
	return content.String() + state + fmt.Sprintf(`Done"><rsp:ExitCode>%d</rsp:ExitCode></rsp:CommandState></rsp:ReceiveResponse>`, c.exit), nil
}

// signal handles a signal ([MS-WSMV] 3.1.4.12).
func (s *shell) signal(r *request) error {
	b := r.body.Signal
	if b == nil {
		return invalid("missing signal")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c, err := s.find(b.CommandID)
	if err != nil {
		return err
	}
	code, ok := strings.CutPrefix(b.Code, "http://schemas.microsoft.com/wbem/wsman/1/windows/shell/signal/")
	switch {
	case !ok:
		return invalid("unknown signal " + b.Code)
	case strings.EqualFold(code, "terminate"):
		c.kill()
		s.current = nil
	case code == "ctrl_c" || code == "ctrl_break":
		c.kill()
	default:
		return invalid("unknown signal " + code)
	}
	return nil
}
