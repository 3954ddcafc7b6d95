package ssh

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/sftp"
	"certctl-agent/internal/targetconf"
)

// A hostile server returns arbitrary answers to each kind of request.
type hostile map[byte]func(body []byte) (kind byte, answer string)

// Types of packets.
const (
	isOpen, isClose, isRead, isLstat, isOpenDir, isReadDir, isRemove, isRealPath = 3, 4, 5, 7, 11, 12, 13, 16
	isStatus, isHandle, isData, isName, isAttrs                                  = 101, 102, 103, 104, 105
)

func field(s string) string { return number32(len(s)) + s }
func number32(n int) string { return string(binary.BigEndian.AppendUint32(nil, uint32(n))) }
func attributes(mode int) string {
	const all = 0x0f
	return number32(all) + number32(0) + number32(1<<20) + number32(0) + number32(0) + number32(mode) + number32(0) + number32(0)
}

func status(code int, message string) (byte, string) {
	return isStatus, number32(code) + field(message) + field("")
}

// typ returns the type with the hostile server instead of ssh.
func (h hostile) typ(t *testing.T) connector.Type {
	typ := Type()
	typ.New = func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		made, err := newConnector(c, host)
		if err != nil {
			return nil, err
		}
		made.(*target).connect = func(ctx context.Context) (*session, error) {
			return h.connect(ctx, t)
		}
		return made, nil
	}
	return typ
}

func (h hostile) connect(ctx context.Context, t *testing.T) (*session, error) {
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	go h.serve(theirs)
	client, err := sftp.New(ctx, ours, time.Minute)
	return &session{Client: client, end: func() { ours.Close() }}, err
}

func (h hostile) serve(conn net.Conn) {
	for {
		head := make([]byte, 5)
		if _, err := io.ReadFull(conn, head); err != nil {
			return
		}
		body := make([]byte, binary.BigEndian.Uint32(head)-1)
		if _, err := io.ReadFull(conn, body); err != nil {
			return
		}
		kind, answer := byte(2), number32(3)+field(sftp.PosixRename)+field("1")
		if head[4] != 1 {
			id := string(body[:4])
			kind, answer = status(4, "no")
			if respond := h[head[4]]; respond != nil {
				kind, answer = respond(body[4:])
			}
			answer = id + answer
		}
		if _, err := io.WriteString(conn, number32(1+len(answer))+string(kind)+answer); err != nil {
			return
		}
	}
}

// says fails the test unless a deployment fails with a printable error that contains
// says.
func (h hostile) says(t *testing.T, says string) {
	t.Helper()
	there := newThere(t)
	config := there.config()
	config["timeout"] = "30ms"
	_, err := there.Deploy(t.Context(), h.typ(t), config, there.Material(t, there.ca))
	if err == nil || !strings.Contains(err.Error(), says) {
		t.Fatalf("got %v, want an error with %q", err, says)
	}
	if text := err.Error(); len(text) > 2000 || strings.ContainsAny(text, "\x1b\n") {
		t.Errorf("the error is %.100q…, %d bytes", text, len(text))
	}
}

func resolves(path string) func([]byte) (byte, string) {
	return func([]byte) (byte, string) {
		return isName, number32(1) + field(path) + field("") + attributes(0o100644)
	}
}

// TestHostile: the memory and time for a server's answers are bounded, and
// control characters are not printed.
func TestHostile(t *testing.T) {
	describes := func(body []byte) (byte, string) {
		if strings.HasSuffix(string(body), ".pem") {
			return isAttrs, attributes(0o100644)
		}
		return isAttrs, attributes(0o040755)
	}
	opens := func([]byte) (byte, string) { return isHandle, field("h") }
	done := func([]byte) (byte, string) { return status(0, "") }
	t.Run("a path with escapes", func(t *testing.T) {
		hostile{isRealPath: resolves("/x\x1b[2J\n/cert.pem")}.says(t, "which is not a valid path")
	})
	t.Run("a long path", func(t *testing.T) {
		hostile{isRealPath: resolves("/" + strings.Repeat("x", 100_000))}.says(t, "which is not a valid path")
	})
	t.Run("a message with escapes", func(t *testing.T) {
		hostile{isRealPath: func([]byte) (byte, string) { return status(4, strings.Repeat("\x1b[2J\n", 10_000)) }}.says(t, "�[2J")
	})
	t.Run("a file byte by byte", func(t *testing.T) {
		hostile{
			isRealPath: resolves("/tls/cert.pem"), isLstat: describes, isOpen: opens, isClose: done,
			isRead: func([]byte) (byte, string) { return isData, field("x") },
		}.says(t, "is too slow")
	})
	t.Run("many files of ours", func(t *testing.T) {
		c := &change{target: &target{id: "t"}}
		h := hostile{isOpenDir: opens, isClose: done, isRemove: func([]byte) (byte, string) { return status(3, "") }}
		lists := 0
		h[isReadDir] = func([]byte) (byte, string) {
			if lists++; lists > 200 {
				return status(1, "")
			}
			var list strings.Builder
			list.WriteString(number32(51))
			for i := range 50 {
				list.WriteString(field(fmt.Sprint(c.mark(), lists, "-", i, newSuffix)) + field("") + number32(0))
			}
			return isName, list.String() + field(c.mark()+strings.Repeat("x", 100_000)+newSuffix) + field("") + number32(0)
		}
		s, err := h.connect(t.Context(), t)
		must(t, err)
		paths, err := c.ours(t.Context(), s, []string{"/tls/cert.pem"}, isNew)
		if total := len(strings.Join(paths, "")); err != nil || len(paths) != maxOurs || total > 100*maxOurs {
			t.Errorf("%d paths of %d bytes, %v", len(paths), total, err)
		}
		lists = 0
		if err := c.sweep(t.Context(), s, []string{"/tls/cert.pem"}, isNew); err == nil || len(err.Error()) > 2000 {
			t.Errorf("got %.100v…", err)
		}
	})
}
