package ssh

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/needs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// server is a real server on loopback, where the user of this process can log in as
// itself.
type server struct {
	dir      string // its own
	certs    string // for certificates
	port     int
	user     string
	identity string // the private key to log in with
	hostKey  string // public key line
}

// keygen makes a key pair and returns the path of the private key.
func keygen(t testing.TB, path string, arguments ...string) string {
	t.Helper()
	if !strings.Contains(strings.Join(arguments, " "), "-N") {
		arguments = append(arguments, "-N", "")
	}
	out, err := exec.CommandContext(t.Context(), needs.Need(t, "ssh-keygen"), append([]string{"-q", "-f", path}, arguments...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	return path
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	return string(data)
}

// newServer prepares the files of a server.
func newServer(t testing.TB) *server {
	t.Helper()
	me, err := user.Current()
	must(t, err)
	dir, err := os.MkdirTemp("/var/tmp", "certctl-test") // sshd does not trust files below /tmp
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	s := &server{dir: dir, certs: filepath.Join(dir, "certs"), user: me.Username, port: needs.FreePort(t)}
	must(t, os.Mkdir(s.certs, 0o755))
	s.identity = keygen(t, filepath.Join(dir, "id"), "-t", "ed25519")
	s.hostKey = strings.TrimSpace(readFile(t, keygen(t, filepath.Join(dir, "host"), "-t", "ed25519")+".pub"))
	must(t, os.WriteFile(filepath.Join(dir, "authorized_keys"), []byte(readFile(t, s.identity+".pub")), 0o600))
	return s
}

func (s *server) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// openssh starts OpenSSH's server.
func openssh(t testing.TB, more ...string) *server {
	t.Helper()
	s := newServer(t)
	s.start(t, more...)
	return s
}

func (s *server) start(t testing.TB, more ...string) *os.Process {
	t.Helper()
	sshd := needs.Need(t, "sshd")
	lines := []string{
		"ListenAddress 127.0.0.1", "Port " + strconv.Itoa(s.port), "HostKey " + filepath.Join(s.dir, "host"), "PidFile none", "UsePAM no",
		"StrictModes no", "AuthorizedKeysFile " + filepath.Join(s.dir, "authorized_keys"), "PermitRootLogin yes", "MaxStartups 100", "LogLevel VERBOSE",
	}
	lines = append(more, lines...) // sshd uses the first value
	if !strings.Contains(strings.Join(more, "\n"), "Subsystem") {
		lines = append(lines, "Subsystem sftp internal-sftp")
	}
	config := filepath.Join(s.dir, "sshd_config")
	must(t, os.WriteFile(config, []byte(strings.Join(lines, "\n")+"\n"), 0o600))
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil && os.Geteuid() == 0 {
		t.Fatal(err)
	}
	return conformance.Serve(t, s.address(), sshd, "-D", "-e", "-f", config)
}

// config returns a configuration that can log in.
func (s *server) config() map[string]any {
	return map[string]any{
		"host": "127.0.0.1", "port": s.port, "user": s.user, "private_key_path": s.identity, "host_key": s.hostKey,
		"cert_path": filepath.Join(s.certs, "cert.pem"), "key_path": filepath.Join(s.certs, "key.pem"),
		"reload_command": "touch " + filepath.Join(s.dir, "reloaded"),
	}
}

func (s *server) reloaded() bool {
	_, err := os.Stat(filepath.Join(s.dir, "reloaded"))
	return err == nil
}

// checkFiles fails the test unless dir holds exactly these names.
func checkFiles(t testing.TB, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s holds %v, want %v", dir, got, want)
	}
}
