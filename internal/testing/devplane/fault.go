package devplane

import (
	"net"
	"net/http"
	"path"
	"slices"
	"time"
)

// Names of calls in Fault and Request.
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
	CallUnknown     = "unknown" // not a path of the API
)

// Fault is a fault to inject. The first fault that matches a request is applied, before the API key
// is checked.
type Fault struct {
	// The requests that it matches. Empty fields match everything.
	Call  string
	Agent string
	Path  string                                  // pattern of path.Match for the escaped path
	Match func(r *http.Request, body []byte) bool // must not call the Plane

	Skip  int // number of matching requests to leave alone first
	Times int // number of requests to apply it to; 0 means until it is removed

	// What happens, in this order. After a Delay alone the request is answered normally.
	Delay      time.Duration
	Handler    http.Handler // answers; it can read the request's body
	Drop       bool         // cut the connection without handling the request
	LoseAnswer bool         // handle the request, then cut the connection
	Status     int          // answer with this status and the fields below
	Body       string       // empty: as a control plane answers
	RetryAfter string       // header
	Header     http.Header
}

// Inject adds a fault and returns a function that removes it.
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

// fault returns the fault to apply to a request, or nil.
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

// pause waits for d. It reports whether the client still waits for an answer.
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

// cut closes the connection without an answer. It does not return.
func cut(r *http.Request) {
	if conn, ok := r.Context().Value(connKey{}).(net.Conn); ok {
		// Below TLS: without close_notify, as after a crash.
		if secured, ok := conn.(interface{ NetConn() net.Conn }); ok {
			conn = secured.NetConn()
		}
		conn.Close()
	}
	panic(http.ErrAbortHandler)
}
