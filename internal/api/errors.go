package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

var (
	// ErrRetired is a 410 on a heartbeat or a poll: this agent is permanently retired.
	ErrRetired = errors.New("the control plane has retired this agent")

	// ErrGone is a 410 on any other call. A misrouted path must not end a fleet, so the agent sends
	// a heartbeat, whose answer decides.
	ErrGone = errors.New("the control plane answered 410 Gone")

	// ErrRedirected is a 3xx. Redirects are not followed, since they could send the API key to
	// another server.
	ErrRedirected = errors.New("the control plane answered with a redirect, which is never followed")

	// ErrTooLarge is an answer longer than the call allows.
	ErrTooLarge = errors.New("the answer is larger than allowed")

	// ErrUnreadable is a success whose body is not the expected one.
	ErrUnreadable = errors.New("the answer cannot be read")

	// ErrNoTurn means that the request waited too long for its turn (see package budget).
	ErrNoTurn = errors.New("it waited too long for its turn: the control plane accepts fewer requests than this agent needs to send")

	// ErrBadID is an identifier that cannot be a path segment. The request was not sent.
	ErrBadID = errors.New("the identifier cannot be part of a path")
)

// StatusError is an answer that is not a success.
type StatusError struct {
	Call       string        // name of the call, such as "heartbeat"
	Status     int           // HTTP status code
	Body       string        // at most 1 KiB of the answer, printable
	RetryAfter time.Duration // 0 if the answer had none; at most 15 minutes
	Final      bool          // a 410 to this call means retired: heartbeat and poll
	Own        bool          // comes from the control plane itself; see Refusal.Own
}

// Refusal is the body of the control plane's errors.
type Refusal struct {
	Error     string `json:"error"`
	Message   string `json:"message"`
	RequestID string `json:"request_id"`
}

// Own reports whether the answer comes from the control plane itself, and not from a proxy or
// gateway in front of it. Those answer 404 or 405 while the control plane restarts, some of them
// with a message and a request id in JSON. Few of them inspect a request and blame it in JSON.
func (r Refusal) Own(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusConflict, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
		return r.Error != "" || r.Message != ""
	}
	return r.Error != "" && r.RequestID != ""
}

// Error includes what the operator should check.
func (e *StatusError) Error() string {
	text := fmt.Sprintf("%s: the control plane answered %d", e.Call, e.Status)
	if name := http.StatusText(e.Status); name != "" {
		text += " " + name
	}
	switch {
	case e.Status == http.StatusUnauthorized:
		text += ": the API key is wrong or expired"
	case e.Status == http.StatusForbidden:
		text += ": the API key lacks the permission"
	case e.Status == http.StatusNotFound && e.Final:
		text += ": the control plane does not know this agent id"
	case e.Is(ErrRedirected):
		text += ": a redirect is never followed: check the server URL"
	case e.blames() && !e.Own:
		text += " (not in the control plane's own format: a proxy or gateway may have answered)"
	}
	if e.Body != "" {
		text += ": " + e.Body
	}
	return text
}

// Is matches ErrRetired, ErrGone and ErrRedirected. Nothing else decides whether this agent is
// retired.
func (e *StatusError) Is(target error) bool {
	switch target {
	case ErrRetired:
		return e.Status == http.StatusGone && e.Final
	case ErrGone:
		return e.Status == http.StatusGone && !e.Final
	case ErrRedirected:
		return e.Status >= 300 && e.Status < 400
	}
	return false
}

// blames reports whether an answer blames the request itself, and not the moment, the API key or
// the agent's record, which an operator can fix.
func (e *StatusError) blames() bool {
	switch e.Status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusRequestTimeout, http.StatusGone,
		http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	case http.StatusNotFound:
		return !e.Final
	}
	return e.Status >= 400 && e.Status < 500
}

// Temporary reports whether the same request may succeed later. Only the control plane itself can
// refuse a request permanently. Network and TLS errors, cancellations and unreadable answers are
// temporary; ErrBadID is not.
func Temporary(err error) bool {
	if status, ok := errors.AsType[*StatusError](err); ok {
		return !status.blames() || !status.Own
	}
	return err != nil && !errors.Is(err, ErrBadID)
}

// Doubtful reports whether a temporary failure may be permanent, so that the caller should give up
// if it lasts: a refusal that may be a gateway's, or an answer that is too large.
func Doubtful(err error) bool {
	if status, ok := errors.AsType[*StatusError](err); ok {
		return status.blames() && !status.Own
	}
	return errors.Is(err, ErrTooLarge)
}

// Denied reports whether the control plane rejected the agent or its API key, not the request.
func Denied(err error) bool {
	status, ok := errors.AsType[*StatusError](err)
	return ok && (status.Status == http.StatusUnauthorized || status.Status == http.StatusForbidden ||
		status.Status == http.StatusNotFound && status.Final)
}

// RateLimited reports whether the control plane asked to retry later. In a large fleet that is
// normal and not a failure.
func RateLimited(err error) bool {
	status, ok := errors.AsType[*StatusError](err)
	return ok && status.Status == http.StatusTooManyRequests || errors.Is(err, ErrNoTurn)
}

// RetryAfter returns the minimum wait that the control plane asked for, or 0.
func RetryAfter(err error) time.Duration {
	if status, ok := errors.AsType[*StatusError](err); ok {
		return status.RetryAfter
	}
	return 0
}

// Kind returns the kind of a failure in one word, for metrics and logs.
func Kind(err error) string {
	status, ok := errors.AsType[*StatusError](err)
	switch {
	case err == nil:
		return ""
	case ok && status.Status == http.StatusGone:
		return "gone"
	case RateLimited(err):
		return "rate_limited"
	case Denied(err):
		return "denied"
	case ok && status.Status >= 500:
		return "server"
	case ok:
		return "refused"
	case errors.Is(err, ErrTooLarge), errors.Is(err, ErrUnreadable):
		return "answer"
	case errors.Is(err, ErrBadID):
		return "refused"
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	}
	return "network"
}
