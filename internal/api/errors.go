package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

var (
	// ErrRetired is a 410 on a heartbeat or a poll: this agent's record is
	// retired for good.
	ErrRetired = errors.New("the control plane has retired this agent")

	// ErrGone is a 410 on any other call. One misrouted path must not end a
	// fleet, so the agent asks by a heartbeat, whose answer decides.
	ErrGone = errors.New("the control plane answered 410 Gone")

	// ErrRedirected is a 3xx: a redirect would carry the API key elsewhere and
	// is never followed.
	ErrRedirected = errors.New("the control plane answered with a redirect, which is never followed")

	// ErrTooLarge is an answer longer than the call allows.
	ErrTooLarge = errors.New("the answer is larger than allowed")

	// ErrUnreadable is a success whose body is not what the call answers.
	ErrUnreadable = errors.New("the answer cannot be read")

	// ErrBadID is an identifier that cannot be a path segment: the request was
	// not sent.
	ErrBadID = errors.New("the identifier cannot stand in a path")
)

// StatusError is an answer other than the one that means success.
type StatusError struct {
	Call       string        // what was asked, such as "heartbeat"
	Status     int           // HTTP status code
	Body       string        // at most 1 KiB of the answer, printable
	RetryAfter time.Duration // 0 where the answer had none; at most 15 minutes
	Decides    bool          // a 410 to this call is final: heartbeat and poll
}

// Error says in plain words what the operator should look at.
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
	case e.Status == http.StatusNotFound && e.Decides:
		text += ": the control plane does not know this agent id"
	case e.Is(ErrRedirected):
		text += ": a redirect is never followed: check the server URL"
	}
	if e.Body != "" {
		text += ": " + e.Body
	}
	return text
}

// Is translates a 410 and a redirect; it is the one place where the verdict of
// the control plane on this agent is decided.
func (e *StatusError) Is(target error) bool {
	switch target {
	case ErrRetired:
		return e.Status == http.StatusGone && e.Decides
	case ErrGone:
		return e.Status == http.StatusGone && !e.Decides
	case ErrRedirected:
		return e.Status >= 300 && e.Status < 400
	}
	return false
}

// Temporary reports whether the same request may succeed later. Anything that
// is no answer from the control plane (no route, time-out, TLS) may; so may an
// answer that blames the moment, the key or the agent's record, which a person
// can put right meanwhile. A cancelled request was not refused either. An answer
// that is too large will be so again, and an identifier that cannot be sent too.
func Temporary(err error) bool {
	status, ok := errors.AsType[*StatusError](err)
	if !ok {
		return err != nil && !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrBadID)
	}
	switch status.Status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusRequestTimeout, http.StatusGone,
		http.StatusTooEarly, http.StatusTooManyRequests:
		return true
	case http.StatusNotFound:
		return status.Decides
	}
	return status.Status >= 500 || status.Status < 400
}

// Denied reports whether the control plane refused who is asking rather than
// what was asked.
func Denied(err error) bool {
	status, ok := errors.AsType[*StatusError](err)
	return ok && (status.Status == http.StatusUnauthorized || status.Status == http.StatusForbidden ||
		status.Status == http.StatusNotFound && status.Decides)
}

// RateLimited reports whether the control plane asked to come back later. On a
// large fleet that is an ordinary event, not a failure.
func RateLimited(err error) bool {
	status, ok := errors.AsType[*StatusError](err)
	return ok && status.Status == http.StatusTooManyRequests
}

// RetryAfter is the floor that the control plane set for the next try, or 0.
func RetryAfter(err error) time.Duration {
	if status, ok := errors.AsType[*StatusError](err); ok {
		return status.RetryAfter
	}
	return 0
}

// Kind names the class of a failure in one word, for metrics and logs.
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
