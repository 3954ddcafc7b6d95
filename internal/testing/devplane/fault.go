package devplane

import (
	"net"
	"net/http"
	"path"
	"slices"
	"time"
)

// Calls, as they are named in Fault and Request.
const (
	CallHeartbeat   = "heartbeat"
	CallWork        = "work"
	CallCSR         = "csr"
	CallCertificate = "certificate"
	CallStatus      = "status"
	CallVerify      = "verify"
	CallDiscoveries = "discoveries"
	CallRegister    = "register"
	CallHealth      = "health"
	CallUnknown     = "unknown" // a path that the API does not have
)

// Fault is trouble to order. The first fault that matches a request happens to
// it, before the key is looked at.
type Fault struct {
	// What it happens to. Empty fields match everything.
	Call  string
	Agent string
	Path  string                                  // pattern of path.Match for the escaped path
	Match func(r *http.Request, body []byte) bool // must not call the Plane

	Skip  int // matching requests that go through first
	Times int // requests it happens to; 0 means until it is removed

	// What happens, in this order. With Delay alone the request is then
	// answered as usual.
	Delay      time.Duration
	Handler    http.Handler // answers; the request's body can be read
	Drop       bool         // the connection is cut before anything is done
	LoseAnswer bool         // the request is carried out, and the connection cut
	Status     int          // the answer, with the fields below
	Body       string       // empty: what a control plane says
	RetryAfter string       // header
	Header     http.Header
}

// Inject orders a fault, and returns what takes it back.
func (p *Plane) Inject(fault Fault) (remove func()) {
	if _, err := path.Match(fault.Path, ""); err != nil {
		panic("devplane: fault path: " + err.Error())
	}
	p.update(func() { p.state.faults = append(p.state.faults, &fault) })
	return func() {
		p.update(func() {
			p.state.faults = slices.DeleteFunc(p.state.faults, func(f *Fault) bool { return f == &fault })
		})
	}
}

// fault takes the fault that a request has coming, or nil.
func (p *Plane) fault(call *request) *Fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, fault := range p.state.faults {
		if !fault.matches(call) {
			continue
		}
		if fault.Skip > 0 {
			fault.Skip--
			continue
		}
		happens := *fault
		if fault.Times > 0 {
			if fault.Times--; fault.Times == 0 {
				p.state.faults = slices.Delete(p.state.faults, i, i+1)
			}
		}
		return &happens
	}
	return nil
}

func (f *Fault) matches(call *request) bool {
	if f.Call != "" && f.Call != call.call || f.Agent != "" && f.Agent != call.agent {
		return false
	}
	if f.Path != "" {
		if ok, _ := path.Match(f.Path, call.http.URL.EscapedPath()); !ok {
			return false
		}
	}
	return f.Match == nil || f.Match(call.http, call.body)
}

// pause reports whether the client still waits afterwards.
func (p *Plane) pause(r *http.Request, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.Context().Done():
	case <-p.done:
	}
	return false
}

// cut ends the connection without an answer. It does not return.
func cut(r *http.Request) {
	if conn, ok := r.Context().Value(connKey{}).(net.Conn); ok {
		// Below TLS: an end without its close_notify, as a crash leaves it.
		if secured, ok := conn.(interface{ NetConn() net.Conn }); ok {
			conn = secured.NetConn()
		}
		conn.Close()
	}
	panic(http.ErrAbortHandler)
}
