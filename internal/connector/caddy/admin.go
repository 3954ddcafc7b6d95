package caddy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"certctl-agent/internal/peer"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/targetconf"
)

const (
	// maxConfig bounds the configuration that Caddy returns, in bytes. Thousands of pairs take some
	// ten MiB.
	maxConfig = 64 << 20

	// maxMessage bounds the part of Caddy's error messages that is kept, in bytes.
	maxMessage = 1 << 10
)

// admin is a client of Caddy's admin API (https://caddyserver.com/docs/api).
type admin struct {
	address string // as configured
	base    string // URL
	host    string // Host header; "": from base
	client  *http.Client
	timeout time.Duration
	origin  bool // send an Origin header
}

// caddyUser is the user that Caddy's own packages and units run it as.
const caddyUser = "caddy"

// newAdmin returns a client for address. Since the agent sends private keys there, the address must
// be on this host and belong to Caddy, unless trusted says that the owner of this host chose it.
func newAdmin(address string, timeout time.Duration, trusted bool) (*admin, error) {
	dialer := &peer.Dialer{Users: []string{caddyUser}, Unchecked: trusted}
	transport := &http.Transport{
		DialContext:       dialer.DialContext, // never through a proxy
		DisableKeepAlives: true,               // each change restarts the admin server
	}
	a := &admin{address: address, timeout: timeout, client: &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	if socket, ok := strings.CutPrefix(address, "unix/"); ok {
		path, err := targetconf.ParsePath(socket)
		if err != nil {
			return nil, err
		}
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", string(path))
		}
		a.base = "http://unix"
		// Caddy requires an empty Host here. net/http sends an empty one for an invalid name.
		a.host = "/"
		return a, nil
	}
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" ||
		u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("expected http://host:port or unix//path")
	}
	a.base = u.Scheme + "://" + u.Host
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && !trusted && !ip.Unmap().IsLoopback() {
		return nil, errNotLocal
	}
	return a, nil
}

var errNotLocal = errors.New("private keys are sent only to loopback addresses and unix sockets where root, " +
	"the agent's user or " + caddyUser + " listens, unless the target's overlay on this host sets admin_api")

// reload makes Caddy load its running configuration again, including the files that it names.
// Without must-revalidate Caddy would ignore an unchanged configuration
// (https://caddyserver.com/docs/api#post-load).
func (a *admin) reload(ctx context.Context) error {
	running, err := a.call(ctx, http.MethodGet, "/config/", nil)
	if err != nil {
		return err
	}
	if string(bytes.TrimSpace(running.body)) == "null" {
		return errors.New("admin API of Caddy: there is no running configuration to load again")
	}
	_, err = a.call(ctx, http.MethodPost, "/load", running.body, "Cache-Control", "must-revalidate")
	return err
}

// reply is a successful answer.
type reply struct {
	body []byte
	etag string
}

// statusError is an answer with a status other than 2xx.
type statusError struct {
	status  int
	message string
}

func (e *statusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s: %s", e.status, http.StatusText(e.status), e.message))
}

// status returns the status of a statusError, or 0 for other errors.
func status(err error) int {
	if e, ok := errors.AsType[*statusError](err); ok {
		return e.status
	}
	return 0
}

// conflict reports whether another client changed the configuration first.
func conflict(err error) bool {
	return status(err) == http.StatusPreconditionFailed || status(err) == http.StatusConflict
}

// call sends one request. Headers are alternate names and values.
func (a *admin) call(ctx context.Context, method, path string, body []byte, headers ...string) (*reply, error) {
	r, err := a.send(ctx, method, path, body, headers)
	if status(err) == http.StatusForbidden && !a.origin {
		// Caddy requires an Origin with enforce_origin. Without, it refuses an unknown Origin, so
		// the first request has none.
		a.origin = true
		r, err = a.send(ctx, method, path, body, headers)
	}
	if err != nil {
		return nil, fmt.Errorf("admin API of Caddy, %s %s: %w", method, path, err)
	}
	return r, nil
}

func (a *admin) send(ctx context.Context, method, path string, body []byte, headers []string) (*reply, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Host = a.host
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if a.origin {
		request.Header.Set("Origin", a.base)
	}
	response, err := a.client.Do(request)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err // the caller names the request
		}
		if errors.Is(err, peer.ErrUntrusted) {
			err = fmt.Errorf("%w: %w", err, errNotLocal)
		}
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(response.Body, maxConfig+1))
	switch {
	case response.StatusCode/100 != 2:
		return nil, &statusError{response.StatusCode, message(answer)}
	case err != nil:
		return nil, err
	case len(answer) > maxConfig:
		return nil, fmt.Errorf("the answer is longer than %d MiB", maxConfig>>20)
	}
	// Caddy sends the entity tag after the body, as a trailer.
	return &reply{answer, cmp.Or(response.Trailer.Get("Etag"), response.Header.Get("Etag"))}, nil
}

// withoutKeys removes possible key material: everything from the first PEM header, and long runs of
// base64.
func withoutKeys(text string) string {
	const base64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
	const maxRun = 40 // characters; PEM lines have 64
	text, _, cut := strings.Cut(text, "-----BEGIN")
	var kept strings.Builder
	for text != "" {
		rest := strings.TrimLeft(text, base64)
		if run := len(text) - len(rest); run < maxRun {
			kept.WriteString(text[:run])
		} else {
			kept.WriteString("[...]")
		}
		end := strings.IndexAny(rest, base64)
		if end < 0 {
			end = len(rest)
		}
		kept.WriteString(rest[:end])
		text = rest[end:]
	}
	if cut {
		kept.WriteString("[...]")
	}
	return kept.String()
}

// message returns Caddy's error message without the keys of the request, which it may quote.
func message(answer []byte) string {
	var body struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(answer, &body) != nil {
		body.Error = string(answer[:min(len(answer), 8*maxMessage)])
	}
	return printable.Line(withoutKeys(body.Error), maxMessage)
}
