// Package netfault provides a TCP proxy on loopback that breaks connections as bad networks do, for
// tests with real programs.
package netfault

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// Action is something that happens to a connection once.
type Action int

const (
	// Nothing happens.
	Nothing Action = iota

	// Close closes the connection normally, on both sides.
	Close

	// Reset sends a TCP reset to both sides.
	Reset

	// Silence drops all data, in both directions, until Fault.For has passed or Heal is called.
	// Then it resets the connection, like a router that has forgotten it.
	Silence

	// HalfOpen resets the server's side without telling the client, whose side stays silent.
	HalfOpen

	// Hold delays data from the client until Heal. The data arrives even if the client has closed
	// the connection meanwhile, as when a kernel retransmits.
	Hold

	// Garbage sends bytes that are not TLS to the client and closes the connection.
	Garbage
)

// Fault describes how a connection fails. The zero value is a good connection.
type Fault struct {
	Latency time.Duration // before each piece of data, in both directions
	Up      int           // bytes per second to the server; 0: no limit
	Down    int           // bytes per second to the client; 0: no limit

	// Then happens after After bytes to the client, or to the server if CountUp is set. With After
	// 0 it happens at once.
	Then    Action
	After   int
	CountUp bool
	For     time.Duration // of Silence; 0: until Heal
}

// piece is how much is forwarded at a time, in bytes, unless a rate requires less.
const piece = 16 << 10

// Proxy forwards connections to one server.
type Proxy struct {
	backend  string
	choose   func(n int) Fault
	listener net.Listener
	work     sync.WaitGroup
	closed   chan struct{}

	mu     sync.Mutex // guards the fields below
	healed chan struct{}
	well   bool
	conns  map[*conn]bool
	count  int
}

// New starts a proxy in front of backend. Choose returns the fault of the nth connection, counted
// from 0. It is not called after Heal.
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

// Addr returns the address for clients.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Connections returns the number of connections so far.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

// Heal repairs the network: for new connections completely, for old ones as their Action says. It
// ends latency and rate limits.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.well {
		p.well = true
		close(p.healed)
	}
}

// Close closes all connections and waits for the proxy's goroutines.
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

// next returns the fault of a new connection.
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
		c.act() // before connecting to the server
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
		c.done = c.fault.Then // no lock needed yet
		c.act()
	}
	var both sync.WaitGroup
	both.Go(func() { c.pump(c.server, c.client, c.fault.Up, true) })
	both.Go(func() { c.pump(c.client, c.server, c.fault.Down, false) })
	both.Wait()
}

// add adds a connection. It returns false if the proxy is closed.
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

	mu   sync.Mutex // guards the fields below
	done Action     // has happened
	held []byte     // delayed by Hold
}

// state returns the action that has happened to the connection.
func (c *conn) state() Action {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.done
}

// act carries out the action.
func (c *conn) act() {
	switch c.fault.Then {
	case Close:
		_ = c.client.CloseWrite() // Close would send a reset if there is unread data
		if c.server != nil {
			c.server.Close()
		}
	case Reset:
		c.end(true)
	case HalfOpen:
		reset(c.server)
	case Garbage:
		_, _ = c.client.Write([]byte("HTTP/1.1 200 OK\r\n\r\n<html>this is not TLS</html>\r\n"))
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

// wait waits until Heal is called, or until limit has passed if it is not 0. It returns false if
// the proxy is closed.
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

// release forwards the delayed data and stops delaying.
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

// pump forwards data in one direction until its end.
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

// slowDown applies latency and rate.
func (c *conn) slowDown(n, rate int) {
	wait := c.fault.Latency
	if rate > 0 {
		wait += time.Duration(n) * time.Second / time.Duration(rate)
	}
	if n > 0 && wait > 0 {
		c.proxy.wait(wait)
	}
}

// pass forwards data, unless it is dropped or delayed.
func (c *conn) pass(to *net.TCPConn, data []byte, up bool) {
	if !c.keeps(data, up) {
		_, _ = to.Write(data) // the other pump notices errors
	}
}

// passLast forwards the last data before the action. The action already applies to the answer.
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

// keeps reports whether data is dropped or delayed.
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

// finish forwards the end of one direction.
func (c *conn) finish(to *net.TCPConn, err error, up bool) {
	switch state := c.state(); {
	case state == Silence || state == HalfOpen || state == Close:
		return // not forwarded
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
