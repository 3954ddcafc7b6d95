package controlplane

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
)

// maxRetryAfter bounds Retry-After: a wrong header must not silence an agent for a day.
const maxRetryAfter = 15 * time.Minute

// decode reads a success into answer. It rejects a proxy's web page with status 200, since a report
// that got one is lost.
func decode(resp *http.Response, call call, answer any) error {
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); kind == "text/html" {
		return fmt.Errorf("%w: it is a web page: check the server URL", api.ErrUnreadable)
	}
	if coding := coding(resp); coding != "" {
		return fmt.Errorf("%w: it is encoded (%s) although the request forbids that: look for a proxy that compresses", api.ErrUnreadable, coding)
	}
	limit := cmp.Or(call.limit, maxAnswer)
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if int64(len(body)) > limit {
		return fmt.Errorf("%w: over %d KiB", api.ErrTooLarge, limit>>10)
	}
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return fmt.Errorf("%w: %w", api.ErrUnreadable, err)
	}
	return nil
}

// coding returns the content coding of a body, or "" if there is none.
func coding(resp *http.Response) string {
	codings := strings.Join(resp.Header.Values("Content-Encoding"), ", ")
	if strings.EqualFold(codings, "identity") {
		return ""
	}
	return codings
}

// incomplete is the error for a success without a required field.
func incomplete(call, field string) error {
	return fmt.Errorf("%s: %w: it has no %s: check that the server URL is that of the control plane", call, api.ErrUnreadable, field)
}

// refusal is the error for an answer that is not a success.
func refusal(call call, resp *http.Response, key secret.String, now time.Time) error {
	// After a read error, use what came before it.
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	fields := fields(body)
	text := message(fields, body)
	if coding := coding(resp); coding != "" {
		text = "its body is encoded (" + coding + ") although the request forbids that"
	}
	if resp.StatusCode < 400 {
		text = location(resp)
	}
	return &api.StatusError{
		Call:       call.name,
		Status:     resp.StatusCode,
		Body:       clip(text, key),
		RetryAfter: retryAfter(resp.Header.Get("Retry-After"), now),
		Final:      call.final,
		Own:        fields.Own(resp.StatusCode),
	}
}

// fields decodes an error body. It returns no fields if the body is not a JSON object.
func fields(body []byte) api.Refusal {
	var fields api.Refusal
	// Unmarshal skips fields of the wrong type and decodes the rest.
	if err := json.Unmarshal(body, &fields); err != nil {
		if _, wrongType := errors.AsType[*json.UnmarshalTypeError](err); !wrongType {
			return api.Refusal{}
		}
	}
	return fields
}

// message returns the message or error field with the request id, which helps to search the
// server's log. If there is neither field, it returns the whole body.
func message(fields api.Refusal, body []byte) string {
	text := cmp.Or(fields.Message, fields.Error)
	if text == "" {
		return string(body)
	}
	if fields.RequestID != "" {
		text += " (request " + fields.RequestID + ")"
	}
	return text
}

// location returns where a redirect points, without the parts that may be secret.
func location(resp *http.Response) string {
	u, err := url.Parse(resp.Header.Get("Location"))
	if err != nil || u.Path == "" && u.Host == "" {
		return ""
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return "it points to " + u.String()
}

// retryAfter parses RFC 9110, section 10.2.3: seconds or a date. It returns 0 if the value is
// invalid or in the past. A date is relative to now, which is the server's clock if known.
func retryAfter(value string, now time.Time) time.Duration {
	value = strings.TrimSpace(value)
	var wait time.Duration
	if seconds, err := strconv.ParseUint(value, 10, 64); err == nil || errors.Is(err, strconv.ErrRange) {
		// Limited before the multiplication, which could overflow.
		wait = time.Duration(min(seconds, uint64(maxRetryAfter/time.Second))) * time.Second
	} else if date, err := http.ParseTime(value); err == nil {
		wait = date.Sub(now)
	}
	return min(max(wait, 0), maxRetryAfter)
}

// failure is the error for a request that got no usable answer.
func (c *Client) failure(ctx context.Context, call call, key secret.String, err error) error {
	if context.Cause(ctx) == errTimeout {
		err = errTimeout
	}
	text := fmt.Sprintf("%s: %s: %v", call.name, c.address, err)
	if advice := Advice(err); advice != "" {
		text += ": " + advice
	}
	return &callError{text: clip(text, key), err: err}
}

// Advice returns what to check after a TLS failure, or "".
func Advice(err error) string {
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "the certificate is for another host: check CERTCTL_SERVER_URL (-server)"
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		// The error does not say which certificate of the chain it is about.
		what := "the control plane's certificate"
		if invalid.Cert.IsCA {
			what = "the CA certificate"
		}
		return fmt.Sprintf("%s %s is valid from %s to %s: renew it, or correct the clock of this host", what,
			invalid.Cert.Subject, invalid.Cert.NotBefore.UTC().Format(time.DateOnly), invalid.Cert.NotAfter.UTC().Format(time.DateOnly))
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "check that CERTCTL_SERVER_CA_BUNDLE_PATH (-ca-bundle) names the CA that signed the control plane's certificate"
	}
	// crypto/tls does not export its alerts.
	if strings.Contains(err.Error(), "protocol version") {
		return "the control plane must offer TLS 1.3"
	}
	return ""
}

// clip makes untrusted text fit for a log. It removes the API key, since an answer may quote the
// request.
func clip(text string, key secret.String) string {
	if !key.IsZero() {
		text = strings.ReplaceAll(text, key.Reveal(), key.String())
	}
	return printable.Line(text, maxErrorText)
}

// callError is a failure with a safe text that wraps its cause.
type callError struct {
	text string
	err  error
}

func (e *callError) Error() string { return e.text }
func (e *callError) Unwrap() error { return e.err }

// errTimeout is context.DeadlineExceeded with a better text.
var errTimeout error = &callError{fmt.Sprintf("no answer within %v", timeout), context.DeadlineExceeded}
