package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"certctl-agent/internal/printable"
	"certctl-agent/internal/testing/devplane"
)

// hostileProxy answers every request with a status line that contains terminal escapes.
func hostileProxy(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if _, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
					io.WriteString(conn, "HTTP/1.1 403 \x1b[31mno\x1b]0;owned\x07\u202e\r\n\r\n")
				}
			}()
		}
	}()
	return "http://" + listener.Addr().String()
}

// TestCommandsPrintWhatPrints: terminal escapes from a proxy, a file name or the environment do not
// reach the terminal.
func TestCommandsPrintWhatPrints(t *testing.T) {
	t.Parallel()
	const evil = "\x1b[31mevil\x07\u202e"
	h := newHost(t, devplane.Options{})
	h.env["HTTPS_PROXY"] = hostileProxy(t)
	h.env["CERTCTL_SERVER_URL"] = "https://plane.test:1"
	h.write("targets.d/"+evil+"\n  ok       agent.json", "{", 0o600)
	if err := os.Mkdir(h.path("dir"+evil), 0o755); err != nil {
		t.Fatal(err)
	}
	h.write("dir"+evil+"/a.pem", "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", 0o600)
	h.write("named"+evil, "CERTCTL_AGENT_NAME=x\n", 0o600)
	for _, test := range []struct {
		args []string
		env  map[string]string
		want string // the untrusted text as it may be shown
	}{
		{[]string{"check"}, nil, "\ufffd[31mno\ufffd]0;owned"},
		{[]string{"check"}, map[string]string{"CERTCTL_DISCOVERY_DIRS": h.path("missing" + evil)}, "\ufffd[31mevil"},
		{[]string{"check"}, map[string]string{"CERTCTL_CONFIG": h.path("named" + evil)}, "x (" + h.path("named\ufffd[31mevil\ufffd\ufffd") + ")"},
		{[]string{"check", "-json"}, nil, "no"},
		{[]string{"register", "-name", "x"}, nil, "\ufffd[31mno\ufffd]0;owned"},
		{[]string{"scan", h.path("missing" + evil)}, nil, "\ufffd[31mevil"},
		{[]string{"scan", h.path("dir" + evil)}, nil, "\ufffd[31mevil"},
		{[]string{"scan", "-json", h.path("dir" + evil)}, nil, `evil\u0007\u202e`},
		{[]string{"status", "-state-dir", h.path("dir" + evil)}, nil, "\ufffd[31mevil"},
		{[]string{"scan", "-" + evil}, nil, "\ufffd[31mevil"},
		{[]string{evil}, nil, "evil"},
		{nil, map[string]string{"CERTCTL_CONFIG": h.path(evil)}, "\ufffd[31mevil"},
		{nil, map[string]string{"CERTCTL_CONFIG": h.path("\n" + evil), "CERTCTL_POLL_INTERVAL": "1"}, "\ufffd[31mevil"},
	} {
		_, output := h.runWith(test.env, test.args...)
		if strings.ContainsAny(output, "\x1b\x07\u202e\r") || !strings.Contains(output, test.want) {
			t.Errorf("%q prints %q, want %q in it", test.args, output, test.want)
		}
		for line := range strings.Lines(output) {
			if strings.HasPrefix(line, "  ok       agent") {
				t.Errorf("%q: a forged line: %q", test.args, line)
			}
		}
	}
}

// TestPrintJSON: for programs the strings are unchanged.
func TestPrintJSON(t *testing.T) {
	want := []string{"a\x1b\u202e\u200d\u009b", "\U000e0001", "證書", "\\u001b", "a\nb\"<&>"}
	var out strings.Builder
	if err := printJSON(printable.Writer{Out: &out}, want); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(out.String(), "\x1b\u202e\u200d\u009b\U000e0001\ufffd") || !strings.Contains(out.String(), "證書") {
		t.Errorf("printed %q", out.String())
	}
	var got []string
	if err := json.Unmarshal([]byte(out.String()), &got); err != nil || fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("read back as %q, %v; want %q", got, err, want)
	}
}
