package devplane

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// memoryHost is the host in the URL of a control plane without a socket.
const memoryHost = "plane.test"

// memoryAddr is an address of the in-memory network.
type memoryAddr string

const (
	memoryServer memoryAddr = "192.0.2.1:443"
	memoryClient memoryAddr = "192.0.2.2:50000"
)

// Network returns "tcp", which the in-memory network imitates.
func (memoryAddr) Network() string  { return "tcp" }
func (a memoryAddr) String() string { return string(a) }

// memoryListener is an in-memory network with one server. Unlike net.Pipe, its connections buffer,
// so that both peers can write at the same time. Nothing blocks while holding a mutex, so that
// virtual time advances in a testing/synctest bubble.
type memoryListener struct {
	accepting chan net.Conn
	done      chan struct{}
	closeOnce sync.Once

	mu    sync.Mutex
	halfs []*half // of all connections
}

func newMemoryListener() *memoryListener {
	return &memoryListener{accepting: make(chan net.Conn), done: make(chan struct{})}
}

func (l *memoryListener) dial(ctx context.Context, network string) (net.Conn, error) {
	up, down := newHalf(), newHalf()
	client := &memoryConn{in: down, out: up, local: memoryClient, remote: memoryServer}
	if network == "udp" {
		return client, nil
	}
	server := &memoryConn{in: up, out: down, local: memoryServer, remote: memoryClient}
	select {
	case l.accepting <- server:
	case <-l.done:
		return nil, &net.OpError{Op: "dial", Net: network, Addr: memoryServer, Err: net.ErrClosed}
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.halfs = append(l.halfs, up, down)
	return client, nil
}

func (l *memoryListener) stall() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, half := range l.halfs {
		half.change(func() { half.stalled = true })
	}
	l.halfs = nil
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.accepting:
		return conn, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memoryListener) Close() error {
	l.closeOnce.Do(func() { close(l.done) })
	return nil
}

func (l *memoryListener) Addr() net.Addr { return memoryServer }

// memoryConn is one end of a connection.
type memoryConn struct {
	in, out       *half
	local, remote net.Addr
}

func (c *memoryConn) Read(b []byte) (int, error)         { return c.in.read(b) }
func (c *memoryConn) Write(b []byte) (int, error)        { return c.out.write(b) }
func (c *memoryConn) LocalAddr() net.Addr                { return c.local }
func (c *memoryConn) RemoteAddr() net.Addr               { return c.remote }
func (c *memoryConn) SetWriteDeadline(t time.Time) error { return nil } // writes do not block
func (c *memoryConn) SetDeadline(t time.Time) error      { return c.SetReadDeadline(t) }

func (c *memoryConn) SetReadDeadline(t time.Time) error {
	c.in.change(func() {
		c.in.deadline = t
		if c.in.timer != nil {
			c.in.timer.Stop()
		}
		if !t.IsZero() {
			c.in.timer = time.AfterFunc(time.Until(t), func() { c.in.change(func() {}) })
		}
	})
	return nil
}

func (c *memoryConn) Close() error {
	_ = c.SetReadDeadline(time.Time{})
	c.in.change(func() { c.in.readerGone, c.in.data = true, nil })
	c.out.change(func() { c.out.writerGone = true })
	return nil
}

// half is one direction of a connection.
type half struct {
	mu         sync.Mutex // guards the fields below
	wake       *sync.Cond
	data       []byte
	writerGone bool // the rest of data can still be read
	readerGone bool
	stalled    bool // nothing arrives any more, not even EOF
	deadline   time.Time
	timer      *time.Timer // wakes the reader at the deadline
}

func newHalf() *half {
	h := new(half)
	h.wake = sync.NewCond(&h.mu)
	return h
}

func (h *half) change(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
	h.wake.Broadcast()
}

func (h *half) read(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.readerGone:
			return 0, net.ErrClosed
		case !h.deadline.IsZero() && !time.Now().Before(h.deadline):
			return 0, os.ErrDeadlineExceeded
		case h.stalled:
		case len(h.data) > 0:
			n := copy(b, h.data)
			h.data = h.data[n:]
			return n, nil
		case h.writerGone:
			return 0, io.EOF
		}
		h.wake.Wait()
	}
}

func (h *half) write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.writerGone:
		return 0, net.ErrClosed
	case h.stalled:
		return len(b), nil
	case h.readerGone:
		return 0, io.ErrClosedPipe
	}
	h.data = append(h.data, b...)
	h.wake.Broadcast()
	return len(b), nil
}
