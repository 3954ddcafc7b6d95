package tlsprobe

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"certctl-agent/internal/printable"
)

const (
	// maxReplyLine is the longest line that a server may send before TLS, in bytes. RFC 5321,
	// section 4.5.3.1.5, allows 512; an IMAP greeting lists capabilities and may be longer.
	maxReplyLine = 4096

	// maxReplyLines bounds the lines of one reply. The reply to EHLO has one for each extension, a
	// few dozen at most.
	maxReplyLines = 100

	// imapTag is the tag of the only IMAP command.
	imapTag = "a1"
)

// startTLS makes the server expect a TLS ClientHello.
func startTLS(conn net.Conn, protocol string) error {
	d := &dialogue{conn: conn, in: bufio.NewReaderSize(conn, maxReplyLine)}
	var err error
	switch protocol {
	case "":
		return nil
	case SMTP:
		err = d.smtp()
	case IMAP:
		err = d.imap()
	case POP3:
		err = d.pop3()
	default:
		return fmt.Errorf("STARTTLS protocol %q is not supported: expected %s, %s or %s", protocol, SMTP, IMAP, POP3)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", protocol, err)
	}
	// Plaintext must not become part of the TLS session (RFC 3207, section 6, and the STARTTLS
	// injections of 2011 and 2021). A correct server waits for the ClientHello here.
	if d.in.Buffered() > 0 {
		return fmt.Errorf("%s: the server sent more plaintext after it agreed to TLS", protocol)
	}
	return nil
}

// dialogue is the plaintext part of a session.
type dialogue struct {
	conn net.Conn
	in   *bufio.Reader
}

func (d *dialogue) send(line string) error {
	_, err := d.conn.Write([]byte(line + "\r\n"))
	return err
}

// line reads a line and returns it without the line break.
func (d *dialogue) line() (string, error) {
	line, err := d.in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return "", fmt.Errorf("the server sent a line longer than %d bytes: %s", maxReplyLine, printable.Line(line, 100))
	}
	if err != nil {
		return "", err
	}
	return strings.TrimRight(string(line), "\r\n"), nil
}

// expect reads a line that must begin with these words.
func (d *dialogue) expect(to string, words ...string) error {
	line, err := d.line()
	if err == nil && !hasWords(line, words...) {
		err = refusal(to, line)
	}
	return err
}

// refusal returns the error for an unexpected answer.
func refusal(to, answer string) error {
	return fmt.Errorf("the server answered %s with: %s", to, printable.Line(answer, 200))
}

var errTooManyLines = fmt.Errorf("the server sent more than %d lines", maxReplyLines)

// smtp starts TLS by RFC 3207.
func (d *dialogue) smtp() error {
	if _, err := d.smtpReply("the connection", "220"); err != nil {
		return err
	}
	if err := d.send("EHLO " + addressLiteral(d.conn.LocalAddr())); err != nil {
		return err
	}
	extensions, err := d.smtpReply("EHLO", "250")
	if err != nil {
		return err
	}
	isSTARTTLS := func(extension string) bool { return strings.EqualFold(strings.TrimSpace(extension), "STARTTLS") }
	if !slices.ContainsFunc(extensions, isSTARTTLS) {
		return errors.New("the server does not offer STARTTLS")
	}
	if err := d.send("STARTTLS"); err != nil {
		return err
	}
	_, err = d.smtpReply("STARTTLS", "220")
	return err
}

// smtpReply reads a reply of one or more lines (RFC 5321, section 4.2.1) that
// must have the given code, and returns the text of each line.
func (d *dialogue) smtpReply(to, code string) ([]string, error) {
	var texts []string
	for range maxReplyLines {
		line, err := d.line()
		if err != nil {
			return nil, err
		}
		text, ok := strings.CutPrefix(line, code)
		if !ok || text != "" && text[0] != ' ' && text[0] != '-' {
			return nil, refusal(to, line)
		}
		texts = append(texts, strings.TrimLeft(text, " -"))
		if !strings.HasPrefix(text, "-") {
			return texts, nil
		}
	}
	return nil, errTooManyLines
}

// addressLiteral names this host in EHLO. Servers refuse host names that do not resolve (RFC 5321,
// section 4.1.4).
func addressLiteral(local net.Addr) string {
	address, err := netip.ParseAddrPort(local.String())
	if err != nil {
		return "[127.0.0.1]"
	}
	ip := address.Addr().Unmap().WithZone("")
	if ip.Is6() {
		return "[IPv6:" + ip.String() + "]" // RFC 5321, section 4.1.3
	}
	return "[" + ip.String() + "]"
}

// imap starts TLS by RFC 9051, section 6.2.1.
func (d *dialogue) imap() error {
	// Not BYE, and not PREAUTH, after which STARTTLS is not allowed.
	if err := d.expect("the connection", "*", "OK"); err != nil {
		return err
	}
	if err := d.send(imapTag + " STARTTLS"); err != nil {
		return err
	}
	for range maxReplyLines {
		line, err := d.line()
		if err != nil {
			return err
		}
		if hasWords(line, imapTag, "OK") {
			return nil
		}
		if !strings.HasPrefix(line, "* ") {
			return refusal("STARTTLS", line)
		}
	}
	return errTooManyLines
}

// pop3 starts TLS by RFC 2595, section 4.
func (d *dialogue) pop3() error {
	if err := d.expect("the connection", "+OK"); err != nil {
		return err
	}
	if err := d.send("STLS"); err != nil {
		return err
	}
	return d.expect("STLS", "+OK")
}

// hasWords reports whether line begins with these words, in any case.
func hasWords(line string, words ...string) bool {
	fields := strings.Fields(line)
	return len(fields) >= len(words) && slices.EqualFunc(fields[:len(words)], words, strings.EqualFold)
}
