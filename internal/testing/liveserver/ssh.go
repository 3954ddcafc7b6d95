package liveserver

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"time"
)

const sshdConf = `ListenAddress 127.0.0.1
Port %[2]s
HostKey %[1]s/host
AuthorizedKeysFile %[1]s/login.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
Subsystem sftp internal-sftp
`

// StartSSH starts nginx as if on another host: it is reached through OpenSSH's server, where this
// user logs in.
func StartSSH(ctx context.Context, dir string, pair Pair) (*Server, error) {
	sshd, err := program("sshd")
	if err != nil {
		return nil, err
	}
	keygen, err := program("ssh-keygen")
	if err != nil {
		return nil, err
	}
	if _, err := program("ssh"); err != nil {
		return nil, err
	}
	s, err := StartNGINX(ctx, dir, pair)
	if err != nil {
		return nil, err
	}
	if err := s.behindSSH(ctx, dir, sshd, keygen); err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

func (s *Server) behindSSH(ctx context.Context, dir, sshd, keygen string) error {
	for _, name := range []string{"host", "login"} {
		if out, err := exec.CommandContext(ctx, keygen, "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, name)).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", keygen, err, out)
		}
	}
	me, err := user.Current()
	if err != nil {
		return err
	}
	hostKey, err := os.ReadFile(filepath.Join(dir, "host.pub"))
	if err != nil {
		return err
	}
	identity, err := os.ReadFile(filepath.Join(dir, "login"))
	if err != nil {
		return err
	}
	port, err := FreePort()
	if err != nil {
		return err
	}
	conf := filepath.Join(dir, "sshd_config")
	if err := os.WriteFile(conf, fmt.Appendf(nil, sshdConf, dir, port), 0o600); err != nil {
		return err
	}
	if os.Geteuid() == 0 { // created by the service before it starts sshd
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			return err
		}
	}
	if err := s.run(sshd, "-D", "-e", "-f", conf); err != nil {
		return err
	}
	for deadline := time.Now().Add(startTimeout); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("sshd does not listen on port %s: %w; it printed: %s", port, err, s.Log())
		}
	}
	s.Name, s.Type = "nginx behind ssh", "SSH"
	maps.Copy(s.Config, map[string]any{
		"port": port, "user": me.Username, "private_key": string(identity), "host_key": strings.TrimSpace(string(hostKey)),
		"post_deploy_verify": map[string]any{"endpoint": s.Endpoint.Address},
	})
	return nil
}
