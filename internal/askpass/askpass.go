// Package askpass gives passwords and passphrases to ssh (SSH_ASKPASS in ssh(1)). ssh runs the
// agent's program again, through a symlink in a directory that only the agent can enter. The new
// process gets the answer from the agent over a socket in that directory. So no secret is in an
// argument, an environment variable or a file.
package askpass

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"certctl-agent/internal/secret"
)

const (
	linkName   = "certctl-askpass"
	socketName = "a" // short: a socket's path has at most 104 bytes

	// maxPrompt and maxAnswer are in bytes.
	maxPrompt = 4 << 10
	maxAnswer = 64 << 10

	// ioTimeout is how long either side waits for the other.
	ioTimeout = 10 * time.Second
)

// Server answers the prompts of ssh.
type Server struct {
	link     string
	listener net.Listener
	serving  sync.WaitGroup
}

// Serve starts a server. Answer returns the secret for a prompt, or false to decline. Only the
// agent may have access to dir.
func Serve(dir string, answer func(prompt string) (secret.String, bool)) (*Server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &Server{link: filepath.Join(dir, linkName)}
	if err := os.Symlink(self, s.link); err != nil {
		return nil, err
	}
	if s.listener, err = net.Listen("unix", filepath.Join(dir, socketName)); err != nil {
		return nil, err
	}
	s.serving.Go(func() {
		for {
			conn, err := s.listener.Accept()
			if err != nil {
				return
			}
			serve(conn, answer)
		}
	})
	return s, nil
}

func serve(conn net.Conn, answer func(string) (secret.String, bool)) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(ioTimeout))
	prompt, err := io.ReadAll(io.LimitReader(conn, maxPrompt))
	if err != nil {
		return
	}
	if text, ok := answer(string(prompt)); ok {
		_, _ = io.WriteString(conn, text.Reveal())
	}
}

// Environment returns the variables that ssh needs. Versions before 8.4 need a DISPLAY, and no
// terminal.
func (s *Server) Environment() []string {
	return []string{"SSH_ASKPASS=" + s.link, "SSH_ASKPASS_REQUIRE=force", "DISPLAY=none"}
}

// Close stops the server and waits for it to end.
func (s *Server) Close() {
	s.listener.Close()
	s.serving.Wait()
}

// Asked reports whether ssh ran this process, with these arguments, to ask for a secret. If so, the
// process must call Main and do nothing else.
func Asked(args []string) bool {
	return len(args) > 0 && filepath.Base(args[0]) == linkName
}

// Main asks the agent for the secret and prints it.
func Main(args []string, stdout io.Writer) error {
	conn, err := net.DialTimeout("unix", filepath.Join(filepath.Dir(args[0]), socketName), ioTimeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(ioTimeout))
	if len(args) > 1 {
		if _, err := io.WriteString(conn, args[1]); err != nil {
			return err
		}
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(io.LimitReader(conn, maxAnswer))
	if err == nil && len(answer) == 0 {
		err = errors.New("the agent has no answer to this prompt")
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s\n", answer)
	return err
}
