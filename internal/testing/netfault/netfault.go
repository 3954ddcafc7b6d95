// Package netfault is a TCP proxy on loopback that does to connections what bad
// networks do, for tests that let real programs talk through it.
package netfault

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// Action is what happens to a connection, once.
type Action int

const (
	// Nothing happens.
	Nothing Action = iota

	// Close ends the connection in good order, on both sides.
	Close

	// Reset ends it with a TCP reset on both sides.
	Reset

	// Silence lets everything vanish, in both directions, until Fault.For has
	// passed or Heal is called. Then the connection is reset: a router dropped
	// packets, and has forgotten it.
	Silence

	// HalfOpen resets the server's side, and the client never learns: its
	// connection is silent for as long as it keeps it.
	HalfOpen

	// Hold keeps back what the client sends. It arrives with Heal, even if the
	// client has given up and gone meanwhile: its kernel retransmits what was
	// sent before an end.
	Hold

	// Garbage sends the client bytes that are no TLS, and ends the connection.
	Garbage
)

// Fault is what is wrong with a connection. The zero value is nothing.
type Fault struct {
	Latency time.Duration // before each piece of data, in both directions
	Up      int           // bytes per second to the server; 0: no bound
	Down    int           // bytes per second to the client; 0: no bound

	// Then happens when After bytes have passed to the client, or with
	// CountUp to the server. With After 0 it happens at once.
	Then    Action
	After   int
	CountUp bool
	For     time.Duration // of Silence; 0: until Heal
}

// piece is how much is passed on at a time, unless a rate asks for less.
const piece = 16 << 10

// Proxy passes connections on to one server.
type Proxy struct {
	backend  string
	choose   func(n int) Fault
	listener net.Listener
	work     sync.WaitGroup
	closed   chan struct{}

	mu     sync.Mutex // guards what follows
	healed chan struct{}
	well   bool
	conns  map[*conn]bool
	count  int
}

// New starts a proxy in front of backend. Choose says what is wrong with the
// nth connection, from 0; it is not asked after Heal.
func New(backend string, choose func(n int) Fault) (*Proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{backend: backend, choose: choose, listener: listener, closed: make(chan struct{}),
		healed: make(chan struct{}), conns: make(map[*conn]bool)}
	p.work.Go(p.serve)
	return p, nil
}

// Addr is where clients connect.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Connections is how many connections there have been.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

// Heal makes the network good: for new connections at once, for old ones
// according to their Action. Latency and rates end.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.well {
		p.well = true
		close(p.healed)
	}
}

// Close ends everything, and waits for it.
func (p *Proxy) Close() {
	close(p.closed)
	p.listener.Close()
	p.mu.Lock()
	for c := range p.conns {
		c.end(true)
	}
	p.mu.Unlock()
	p.work.Wait()
}

func (p *Proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.work.Go(func() { p.handle(client.(*net.TCPConn)) })
	}
}

// next is the fault of a new connection.
func (p *Proxy) next() Fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.count
	p.count++
	if p.well {
		return Fault{}
	}
	return p.choose(n)
}

func (p *Proxy) handle(client *net.TCPConn) {
	c := &conn{proxy: p, fault: p.next(), client: client}
	defer c.end(false)
	if c.fault.After == 0 && (c.fault.Then == Reset || c.fault.Then == Close || c.fault.Then == Garbage) {
		c.act() // before the server hears of it
		return
	}
	server, err := net.Dial("tcp", p.backend)
	if err != nil {
		c.end(true)
		return
	}
	c.server = server.(*net.TCPConn)
	if !p.add(c) {
		return
	}
	defer p.remove(c)
	if c.fault.After == 0 {
		c.done = c.fault.Then // before anything else uses the connection
		c.act()
	}
	var both sync.WaitGroup
	both.Go(func() { c.pump(c.server, c.client, c.fault.Up, true) })
	both.Go(func() { c.pump(c.client, c.server, c.fault.Down, false) })
	both.Wait()
}

// add reports whether the proxy is still open.
func (p *Proxy) add(c *conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.closed:
		return false
	default:
	}
	p.conns[c] = true
	return true
}

func (p *Proxy) remove(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// isHealed reports whether Heal was called.
func (p *Proxy) isHealed() bool {
	select {
	case <-p.healed:
		return true
	default:
		return false
	}
}

// conn is one connection through the proxy.
type conn struct {
	proxy          *Proxy
	fault          Fault
	client, server *net.TCPConn

	mu   sync.Mutex // guards what follows
	done Action     // what has happened
	held []byte     // what Hold keeps back
}

// state is what has happened to the connection.
func (c *conn) state() Action {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.done
}

// act makes the ordered thing happen.
func (c *conn) act() {
	switch c.fault.Then {
	case Close:
		_ = c.client.CloseWrite() // closed with data unread, it would be reset
		if c.server != nil {
			c.server.Close()
		}
	case Reset:
		c.end(true)
	case HalfOpen:
		reset(c.server)
	case Garbage:
		_, _ = c.client.Write([]byte("HTTP/1.1 200 OK\r\n\r\n<html>this is no TLS</html>\r\n"))
		c.end(false)
	case Silence:
		c.proxy.work.Go(func() {
			c.proxy.wait(c.fault.For)
			c.end(true)
		})
	case Hold:
		c.proxy.work.Go(func() {
			if c.proxy.wait(0) {
				c.release()
			}
		})
	}
}

// wait returns when the network is good or limit, if it is not 0, has passed;
// false when the proxy ends.
func (p *Proxy) wait(limit time.Duration) bool {
	var over <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-p.healed:
		return true
	case <-over:
		return true
	case <-p.closed:
		return false
	}
}

// release sends on what was held back, and holds nothing back any more.
func (c *conn) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _ = c.server.Write(c.held)
	c.done, c.held = Nothing, nil
}

// end closes both sides.
func (c *conn) end(hard bool) {
	for _, side := range []*net.TCPConn{c.client, c.server} {
		switch {
		case side == nil:
		case hard:
			reset(side)
		default:
			side.Close()
		}
	}
}

// reset closes a side with a TCP reset.
func reset(side *net.TCPConn) {
	_ = side.SetLinger(0)
	side.Close()
}

// pump passes data on in one direction until its end.
func (c *conn) pump(to, from *net.TCPConn, rate int, up bool) {
	counted := c.fault.Then != Nothing && c.fault.After > 0 && c.fault.CountUp == up
	passed := 0
	buffer := make([]byte, piece)
	for {
		size := piece
		if rate > 0 && !c.proxy.isHealed() {
			size = min(size, max(rate/20, 1))
		}
		n, err := from.Read(buffer[:size])
		data := buffer[:n]
		c.slowDown(n, rate)
		for len(data) > 0 {
			now := data
			if counted && passed < c.fault.After {
				now = data[:min(len(data), c.fault.After-passed)]
			}
			data = data[len(now):]
			if passed += len(now); counted && passed == c.fault.After {
				c.passLast(to, now, up)
				continue
			}
			c.pass(to, now, up)
		}
		if err != nil {
			c.finish(to, err, up)
			return
		}
	}
}

// slowDown is latency and rate.
func (c *conn) slowDown(n, rate int) {
	wait := c.fault.Latency
	if rate > 0 {
		wait += time.Duration(n) * time.Second / time.Duration(rate)
	}
	if n > 0 && wait > 0 {
		c.proxy.wait(wait)
	}
}

// pass sends data on, unless it vanishes or is held back.
func (c *conn) pass(to *net.TCPConn, data []byte, up bool) {
	if !c.keeps(data, up) {
		_, _ = to.Write(data) // the other pump sees what is wrong
	}
}

// passLast passes on the last data before the fault. What the other side sends
// in answer is late already.
func (c *conn) passLast(to *net.TCPConn, data []byte, up bool) {
	kept := c.keeps(data, up)
	c.mu.Lock()
	c.done = c.fault.Then
	c.mu.Unlock()
	if !kept {
		_, _ = to.Write(data)
	}
	c.act()
}

func (c *conn) keeps(data []byte, up bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.done == Silence || c.done == HalfOpen || c.done == Close || c.done == Reset:
		return true
	case c.done == Hold && up:
		c.held = append(c.held, data...)
		return true
	}
	return false
}

// finish passes an end on.
func (c *conn) finish(to *net.TCPConn, err error, up bool) {
	switch state := c.state(); {
	case state == Silence || state == HalfOpen || state == Close:
		return // nobody hears of it
	case state == Hold && up:
		if c.proxy.wait(0) {
			c.release()
			_ = to.CloseWrite()
		}
		return
	}
	if errors.Is(err, io.EOF) {
		_ = to.CloseWrite()
		return
	}
	c.end(true)
}
