package ntlm

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/secret"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

// python is Debian's interpreter, which finds Debian's modules.
const python = "/usr/bin/python3"

// acceptor is a program that accepts a logon.
type acceptor struct {
	in     io.WriteCloser
	out    *bufio.Scanner
	errors *bytes.Buffer
	wait   func() error
}

// startAcceptor runs gss-ntlmssp, an independent implementation, with a file of users.
func startAcceptor(t *testing.T, users string, arguments ...string) *acceptor {
	t.Helper()
	needs.Need(t, python)
	if err := exec.Command(python, "-c", "import gssapi; assert '1.3.6.1.4.1.311.2.2.10' in str(gssapi.raw.indicate_mechs())").Run(); err != nil {
		needs.Missing(t, "python3-gssapi or gss-ntlmssp is not installed")
	}
	file := filepath.Join(t.TempDir(), "users")
	if err := os.WriteFile(file, []byte(users+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), python, append([]string{filepath.Join("testdata", "acceptor.py")}, arguments...)...)
	command.Env = append(os.Environ(), "NTLM_USER_FILE="+file)
	a := &acceptor{errors: new(bytes.Buffer), wait: command.Wait}
	command.Stderr = a.errors
	out, err := command.StdoutPipe()
	if err == nil {
		a.in, err = command.StdinPipe()
	}
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	a.out = bufio.NewScanner(out)
	a.out.Buffer(nil, 1<<20)
	return a
}

// ask sends a message and returns the answer, or nil if the program has ended.
func (a *acceptor) ask(t *testing.T, message []byte) []byte {
	t.Helper()
	fmt.Fprintf(a.in, "%x\n", message)
	if !a.out.Scan() {
		return nil
	}
	answer, err := hex.DecodeString(a.out.Text())
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// end ends the program and returns its error output.
func (a *acceptor) end() string {
	a.in.Close()
	if err := a.wait(); err != nil {
		return fmt.Sprintf("%v: %s", err, a.errors)
	}
	return a.errors.String()
}

func TestLive(t *testing.T) {
	issued, err := testca.Must(t).Issue(testca.Template{})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(issued.Leaf.Raw)
	theirs := hex.EncodeToString(append([]byte("tls-server-end-point:"), sum[:]...))
	for _, test := range []struct {
		name, account, password string
		theirs                  []string
		ours                    [16]byte
		refused                 bool
	}{
		{"plain", `CORP\deployer`, "geheim-ß€", nil, [16]byte{}, false},
		{"case", `CORP\Deployer`, "geheim-ß€", nil, [16]byte{}, false},
		{"bindings", `CORP\deployer`, "geheim-ß€", []string{theirs}, Bindings(issued.Leaf), false},
		{"other bindings", `CORP\deployer`, "geheim-ß€", []string{theirs + "00"}, Bindings(issued.Leaf), true},
		{"wrong password", `CORP\deployer`, "geheim", nil, [16]byte{}, true},
		{"unknown user", `CORP\nobody`, "geheim-ß€", nil, [16]byte{}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := startAcceptor(t, "CORP:deployer:geheim-ß€", test.theirs...)
			client := New(test.account, secret.New(test.password), "HTTP/host", test.ours)
			challenge, err := ParseChallenge(a.ask(t, client.Negotiate()))
			if err != nil {
				t.Fatal(err, a.end())
			}
			message, session := client.Authenticate(challenge)
			name := a.ask(t, message)
			if test.refused {
				if complaint := a.end(); name != nil || !strings.Contains(complaint, "accept_sec_context") {
					t.Errorf("accepted %s: %s", name, complaint)
				}
				return
			}
			if !strings.EqualFold(string(name), test.account) {
				t.Errorf("accepted %q, want %q: %s", name, test.account, a.end())
			}
			for _, text := range []string{"first", "second", strings.Repeat("long ", 30_000)} {
				signature, sealed := session.Wrap([]byte(text))
				answer := a.ask(t, append(signature, sealed...))
				if len(answer) < SignatureSize {
					t.Fatalf("no answer to a message of %d bytes: %s", len(text), a.end())
				}
				got, err := session.Unwrap(answer[:SignatureSize], answer[SignatureSize:])
				if err != nil || string(got) != text {
					t.Errorf("sent %d bytes, got back %d: %v", len(text), len(got), err)
				}
			}
			if complaint := a.end(); complaint != "" {
				t.Error(complaint)
			}
		})
	}
}
