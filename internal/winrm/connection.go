package winrm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/ntlm"
	"certctl-agent/internal/printable"
)

const (
	// maxHeader bounds the HTTP header of an answer, in bytes.
	maxHeader = 64 << 10

	// maxAnswer bounds the body of an answer, in bytes: an envelope, possibly in UTF-16, and the
	// parts around an encrypted one.
	maxAnswer = 2*maxEnvelope + 8<<10

	// maxSkew is the difference of clocks from which a refused logon mentions it.
	maxSkew = 5 * time.Minute
)

// connection is a connection to the host. NTLM authenticates connections, so the transport of
// net/http, which opens new ones at will, is not suitable.
type connection struct {
	net.Conn
	in      *io.LimitedReader
	reader  *bufio.Reader
	closing bool          // the host closes it after the last answer
	session *ntlm.Session // nil with TLS: messages are not encrypted again
}

func (c *Client) address() string {
	return net.JoinHostPort(c.options.Host, strconv.Itoa(c.options.Port))
}

func (c *Client) url() string {
	u := url.URL{Scheme: "http", Host: c.address(), Path: "/wsman"}
	if c.options.HTTPS {
		u.Scheme = "https"
	}
	return u.String()
}

func (c *Client) disconnect() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// call sends a request, for a shell or nil, and returns the answer. After an error other than a
// Fault the connection is closed.
func (c *Client) call(ctx context.Context, r request, s *shell) (*envelope, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.options.Timeout, fmt.Errorf("no answer within %v", c.options.Timeout))
	defer cancel()
	answer, err := c.tryCall(ctx, r, s)
	if _, isFault := errors.AsType[*Fault](err); err != nil && !isFault {
		c.disconnect()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}
	return answer, err
}

func (c *Client) tryCall(ctx context.Context, r request, s *shell) (*envelope, error) {
	if c.conn == nil {
		if err := c.connect(ctx); err != nil {
			return nil, err
		}
	}
	id, shellID := newID(), ""
	if s != nil {
		shellID = s.id
	}
	message := envelopeOf(r, c.url(), id, shellID, min(maxWait, c.options.Timeout/2))
	if len(message) > maxEnvelope {
		return nil, fmt.Errorf("the request has %d bytes, and the host's limit is %d", len(message), maxEnvelope)
	}
	body, err := c.exchange(ctx, message)
	if err != nil {
		return nil, err
	}
	if c.conn.closing {
		c.disconnect()
	}
	answer, err := parseEnvelope(body)
	if err != nil {
		return nil, err
	}
	return answer, answer.answers(id)
}

// exchange sends an envelope and returns the envelope of the answer.
func (c *Client) exchange(ctx context.Context, message []byte) ([]byte, error) {
	header := http.Header{"Content-Type": {plainType + ";charset=UTF-8"}}
	session := c.conn.session
	if session != nil {
		message = encrypt(session, message)
		header.Set("Content-Type", encryptedType)
	}
	switch c.options.Auth {
	case Basic:
		header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(c.options.User+":"+c.options.Password.Reveal())))
	case Certificate: // the profile of DSP0226, annex C
		header.Set("Authorization", "http://schemas.dmtf.org/wbem/wsman/1/wsman/secprofile/https/mutual")
	}
	answer, body, err := c.post(ctx, header, message)
	switch {
	case err != nil:
		return nil, err
	case answer.StatusCode == http.StatusUnauthorized && c.options.Auth != NTLM:
		c.refused = c.refusal(time.Time{})
		return nil, c.refused
	case session != nil && isEncrypted(answer.Header.Get("Content-Type")):
		return decrypt(session, body)
	case session == nil && strings.HasPrefix(answer.Header.Get("Content-Type"), plainType):
		return body, nil
	}
	return nil, newStatusError(answer, body)
}

// statusError is an answer that is not from WS-Management, or that cannot be authenticated.
type statusError struct {
	code int
	text string
}

func newStatusError(answer *http.Response, body []byte) error {
	text := fmt.Sprintf("unexpected answer %s", printable.Line(answer.Status, maxMessage))
	if said := printable.Line(body, maxMessage); said != "" {
		text += ": " + said
	}
	return &statusError{answer.StatusCode, text}
}

func (e *statusError) Error() string { return e.text }

// isBusy reports whether the host did not accept a call but may do so later.
func isBusy(err error) bool {
	if status, ok := errors.AsType[*statusError](err); ok {
		return status.code == http.StatusServiceUnavailable || status.code == http.StatusTooManyRequests
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// connect dials and logs on.
func (c *Client) connect(ctx context.Context) error {
	if c.refused != nil {
		return fmt.Errorf("%w; there is no second attempt, because it could lock the account", c.refused)
	}
	conn, err := c.options.Dial(ctx, c.address())
	if err != nil {
		return err
	}
	var bindings [16]byte
	if c.options.HTTPS {
		if conn, bindings, err = c.handshake(ctx, conn); err != nil {
			return err
		}
	}
	in := &io.LimitedReader{R: conn}
	c.conn = &connection{Conn: conn, in: in, reader: bufio.NewReader(in)}
	if c.options.Auth == NTLM {
		return c.logOn(ctx, bindings)
	}
	return nil
}

func (c *Client) handshake(ctx context.Context, raw net.Conn) (net.Conn, [16]byte, error) {
	config, err := c.trust.Config()
	if err != nil {
		raw.Close()
		return nil, [16]byte{}, err
	}
	config.ServerName = c.options.Host
	if c.options.Auth == Certificate {
		// Windows asks for the certificate after it has seen the request, by renegotiation.
		// crypto/tls does not support the equivalent in TLS 1.3.
		config.Certificates = []tls.Certificate{*c.options.Certificate}
		config.Renegotiation = tls.RenegotiateOnceAsClient
		config.MaxVersion = tls.VersionTLS12
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, [16]byte{}, fmt.Errorf("TLS handshake: %w", printableError(err))
	}
	return conn, ntlm.Bindings(conn.ConnectionState().PeerCertificates[0]), nil
}

// logOn logs on with NTLM (RFC 4559, section 4). Windows accepts its messages without SPNEGO.
func (c *Client) logOn(ctx context.Context, bindings [16]byte) error {
	client := ntlm.New(c.options.User, c.options.Password, "HTTP/"+c.options.Host, bindings)
	answer, body, err := c.post(ctx, negotiate(client.Negotiate()), nil)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusUnauthorized {
		return newStatusError(answer, body)
	}
	challenge, err := challengeOf(answer)
	if err != nil {
		return err
	}
	if c.conn.closing {
		return errors.New("the host does not keep the connection open, which NTLM requires: look for a proxy in front of it")
	}
	message, session := client.Authenticate(challenge)
	answer, body, err = c.post(ctx, negotiate(message), nil)
	switch {
	case err != nil:
		return err
	case answer.StatusCode == http.StatusUnauthorized:
		clock := challenge.Time()
		if clock.IsZero() {
			clock, _ = http.ParseTime(answer.Header.Get("Date"))
		}
		c.refused = c.refusal(clock)
		return c.refused
	case answer.StatusCode != http.StatusOK:
		return newStatusError(answer, body)
	}
	if !c.options.HTTPS {
		c.conn.session = session
	}
	return nil
}

func negotiate(message []byte) http.Header {
	return http.Header{"Authorization": {"Negotiate " + base64.StdEncoding.EncodeToString(message)}}
}

// challengeOf returns the NTLM challenge in an answer.
func challengeOf(answer *http.Response) (*ntlm.Challenge, error) {
	offers := answer.Header.Values("WWW-Authenticate")
	for _, offer := range offers {
		scheme, token, _ := strings.Cut(offer, " ")
		if !strings.EqualFold(scheme, "Negotiate") {
			continue
		}
		message, err := base64.StdEncoding.DecodeString(strings.TrimSpace(token))
		if err != nil || len(message) == 0 {
			break
		}
		return ntlm.ParseChallenge(message)
	}
	return nil, fmt.Errorf("the host does not offer NTLM, only %s: enable WSMan:\\localhost\\Service\\Auth\\Negotiate on it", printable.Quote(strings.Join(offers, ", ")))
}

// refusal explains a 401. Windows gives no reason, to reveal nothing to someone who guesses
// passwords. clock is the host's, or zero if it does not matter.
func (c *Client) refusal(clock time.Time) error {
	reason := fmt.Sprintf("of %s: the password is wrong, or the account is locked, disabled, expired or not allowed to log on over the network; event 4625 on the host has the reason",
		printable.Quote(c.options.User))
	switch c.options.Auth {
	case NTLM:
		if c.options.HTTPS {
			reason += "; or a proxy in between terminates TLS"
		}
	case Basic:
		reason += "; or WSMan:\\localhost\\Service\\Auth\\Basic is off on the host"
	case Certificate:
		reason = "with the certificate: WSMan:\\localhost\\ClientCertificate must map it to a user, and WSMan:\\localhost\\Service\\Auth\\Certificate must be on"
	}
	if skew := time.Until(clock).Round(time.Minute); !clock.IsZero() && skew.Abs() >= maxSkew {
		direction := "ahead of"
		if skew < 0 {
			direction = "behind"
		}
		reason += fmt.Sprintf("; the host's clock is %v %s this one's, which may be the reason: set the clocks first", skew.Abs(), direction)
	}
	return fmt.Errorf("%w %s", ErrLogon, reason)
}

// post performs an HTTP request.
func (c *Client) post(ctx context.Context, header http.Header, body []byte) (*http.Response, []byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url(), bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	request.Header = header
	header.Set("User-Agent", "certctl-agent")
	conn := c.conn
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			conn.closing = true // its deadline has passed, or is about to
		}
	}()
	c.conn.in.N = maxHeader + maxAnswer
	if err := request.Write(c.conn); err != nil {
		return nil, nil, err
	}
	answer, err := http.ReadResponse(c.conn.reader, request)
	if err != nil {
		return nil, nil, printableError(err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, nil, printableError(err)
	case len(data) > maxAnswer:
		return nil, nil, fmt.Errorf("the host's answer is longer than %d bytes", maxAnswer)
	}
	conn.closing = answer.Close
	return answer, data, nil
}

// printableError makes an error safe to print that contains data from the server, such as names in
// a certificate or header lines.
func printableError(err error) error {
	if isBroken(err) {
		return err
	}
	return errors.New(printable.Line(err.Error(), maxMessage))
}

// isBroken reports whether the connection is closed.
func isBroken(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, net.ErrClosed)
}
