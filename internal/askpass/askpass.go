// Package askpass answers what ssh asks for (SSH_ASKPASS in ssh(1)): passwords
// and passphrases. ssh runs the agent's own program once more, under the name of
// a link in a directory that only the agent can enter. That process asks, over a
// socket in the same directory, the one that wants to log in. So a secret is in
// no argument, in no environment and in no file.
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
	socketName = "a" // the path of a socket has at most 104 bytes

	// maxPrompt and maxAnswer bound what goes over the socket, in bytes.
	maxPrompt = 4 << 10
	maxAnswer = 64 << 10

	// patience is how long either side waits for the other.
	patience = 10 * time.Second
)

// Server answers.
type Server struct {
	link     string
	listener net.Listener
	serving  sync.WaitGroup
}

// Serve answers prompts with what answer returns; false declines. The directory
// must be the agent's alone.
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
	_ = conn.SetDeadline(time.Now().Add(patience))
	prompt, err := io.ReadAll(io.LimitReader(conn, maxPrompt))
	if err != nil {
		return
	}
	if text, ok := answer(string(prompt)); ok {
		_, _ = io.WriteString(conn, text.Reveal())
	}
}

// Environment is what ssh needs to know, beside the rest of its environment.
// Versions before 8.4 want a DISPLAY and no terminal.
func (s *Server) Environment() []string {
	return []string{"SSH_ASKPASS=" + s.link, "SSH_ASKPASS_REQUIRE=force", "DISPLAY=none"}
}

// Close ends the answering and waits for it.
func (s *Server) Close() {
	s.listener.Close()
	s.serving.Wait()
}

// Asked reports whether ssh has run this process, with these arguments, to ask
// for something. Main is then all that it has to do.
func Asked(args []string) bool {
	return len(args) > 0 && filepath.Base(args[0]) == linkName
}

// Main asks the agent and prints the answer.
func Main(args []string, stdout io.Writer) error {
	conn, err := net.DialTimeout("unix", filepath.Join(filepath.Dir(args[0]), socketName), patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
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
		err = errors.New("there is no answer to that")
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s\n", answer)
	return err
}
