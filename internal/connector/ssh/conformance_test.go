package ssh

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"certctl-agent/internal/askpass"
	"certctl-agent/internal/command"
	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/sftp"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/needs"
)

// ssh runs this program to ask for a passphrase.
func TestMain(m *testing.M) {
	if askpass.Asked(os.Args) {
		if askpass.Main(os.Args, os.Stdout) != nil {
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// sftpServer returns the path of OpenSSH's sftp-server.
func sftpServer(t testing.TB) string {
	t.Helper()
	for _, path := range []string{"/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/libexec/sftp-server", "/usr/lib/ssh/sftp-server"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	needs.Missing(t, "OpenSSH's sftp-server is not installed")
	return ""
}

// pipe is a process with its streams.
type pipe struct {
	io.Reader
	io.WriteCloser
	command *exec.Cmd
	once    sync.Once
}

func (p *pipe) Close() error {
	p.once.Do(func() {
		_ = p.command.Process.Kill()
		_ = p.command.Wait()
	})
	return nil
}

// local returns the type with OpenSSH's real SFTP server on this host, without ssh in
// between. Wrap can wrap the connection.
func local(t testing.TB, wrap func(io.ReadWriteCloser) io.ReadWriteCloser) connector.Type {
	server := sftpServer(t)
	typ := Type()
	typ.New = func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		made, err := newConnector(c, host)
		if err != nil {
			return nil, err
		}
		made.(*target).connect = func(ctx context.Context) (*session, error) {
			cmd := exec.Command(server)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				return nil, err
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				return nil, err
			}
			if err := cmd.Start(); err != nil {
				return nil, err
			}
			var conn io.ReadWriteCloser = &pipe{Reader: stdout, WriteCloser: stdin, command: cmd}
			if wrap != nil {
				conn = wrap(conn)
			}
			client, err := sftp.New(ctx, conn, 10*time.Second)
			if err != nil {
				return nil, err
			}
			return &session{
				Client: client,
				run: func(ctx context.Context, line string, timeout time.Duration) error {
					_, err := command.Run(ctx, []string{"/bin/sh", "-c", line}, timeout)
					return err
				},
				end: func() { conn.Close() },
			}, nil
		}
		return made, nil
	}
	return typ
}

// elsewhere maps each directory of the suite to a directory of the other host.
type elsewhere struct {
	t    *testing.T
	base string
	made sync.Map
	n    atomic.Int32
}

func newElsewhere(t *testing.T) *elsewhere {
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &elsewhere{t: t, base: base}
}

func (e *elsewhere) of(dir string) string {
	if there, ok := e.made.Load(dir); ok {
		return there.(string)
	}
	there := filepath.Join(e.base, fmt.Sprint(e.n.Add(1)))
	if err := os.Mkdir(there, 0o755); err != nil {
		e.t.Error(err)
	}
	actual, _ := e.made.LoadOrStore(dir, there)
	return actual.(string)
}

// stateOf returns the files of a directory with mode and owner.
func stateOf(dir string) map[string]string {
	state := make(map[string]string)
	entries, err := os.ReadDir(dir)
	if err != nil {
		panic(err) // a test's own directory
	}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		data, err := os.ReadFile(path)
		info, statErr := os.Lstat(path)
		if err != nil || statErr != nil {
			panic(fmt.Sprint(err, statErr))
		}
		state[entry.Name()] = string(data)
		state[entry.Name()+" is"] = info.Mode().String() + " " + ownerOf(info)
		state[entry.Name()+conformance.Written] = info.ModTime().String()
	}
	return state
}

func TestConformance(t *testing.T) {
	there := newElsewhere(t)
	conformance.Run(t, conformance.Harness{
		Type:     local(t, nil),
		Required: []string{"host", "user", "cert_path", "key_path"},
		Secrets:  []string{"hunter2"},
		Config: func(dir string) map[string]any {
			dir = there.of(dir)
			return map[string]any{
				"host": "192.0.2.1", "user": "deploy", "private_key": "-----BEGIN OPENSSH PRIVATE KEY-----", "passphrase": "hunter2",
				"cert_path": filepath.Join(dir, "cert.pem"), "key_path": filepath.Join(dir, "key.pem"), "chain_path": filepath.Join(dir, "chain.pem"),
				"validate_command": "test -s " + filepath.Join(dir, "cert.pem"), "reload_command": "test -s " + filepath.Join(dir, "key.pem"),
			}
		},
		State: func(dir string) map[string]string { return attributed(stateOf(there.of(dir))) },
		Want: func(m *connector.Material) map[string][]byte {
			return map[string][]byte{"cert.pem": conformance.PEM(m.Leaf), "chain.pem": conformance.PEM(m.Chain...), "key.pem": m.KeyPEM}
		},
		UndoOnly: func(name string) bool { return strings.HasPrefix(name, markPrefix) },
	})
}

// attributed names attributes like the suite.
func attributed(state map[string]string) map[string]string {
	named := make(map[string]string)
	for name, value := range state {
		if short, ok := strings.CutSuffix(name, " is"); ok {
			name = short + " (attributes)"
		}
		named[name] = value
	}
	return named
}

func ownerOf(info fs.FileInfo) string {
	uid, gid := hostfile.Owner(info)
	return fmt.Sprintf("%d:%d", uid, gid)
}
