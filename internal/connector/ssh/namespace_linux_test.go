package ssh

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

var inNamespace = flag.Bool("in-namespace", false, "this process has its own network and mounts")

// An account that exists only in the namespace.
const (
	deployUser = "certctl-deploy"
	accountID  = 4242
	password   = "correct horse, battery"
)

// TestNamespace runs tests that need their own accounts, mounts and networks in a
// child process that has them. Nothing on this host changes.
func TestNamespace(t *testing.T) {
	if os.Geteuid() != 0 && !*inNamespace {
		needs.Missing(t, "creating accounts for sshd needs root")
	}
	for _, program := range []string{"sshd", "dropbear", "dropbearconvert", "nginx", "ip", "unshare", "nsenter", "openssl"} {
		needs.Need(t, program)
	}
	if !*inNamespace {
		child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestNamespace$", "-test.v", "-in-namespace")
		child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
		out, err := child.CombinedOutput()
		t.Logf("in its own namespaces:\n%s", out)
		if err != nil {
			t.Error(err)
		}
		return
	}
	home := enter(t)
	t.Run("passwords", func(t *testing.T) { passwords(t, home) })
	t.Run("passphrase", passphrase)
	t.Run("host keys", hostKeys)
	t.Run("chroot", func(t *testing.T) { chrooted(t, home) })
	t.Run("Dropbear", func(t *testing.T) { dropbear(t, home) })
	t.Run("jump host", jumpHost)
	t.Run("full disk", fullDisk)
	t.Run("rotation", rotation)
}

func output(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return string(out)
}

// enter sets up the namespace: an account with a password, and a login shell of root that
// starts at once. It returns the account's home.
func enter(t *testing.T) string {
	must(t, syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	output(t, "ip", "link", "set", "lo", "up")
	// As on loopback. Otherwise a rotation of more than a minute runs out of ports. Some containers
	// do not allow this.
	_ = os.WriteFile("/proc/sys/net/ipv4/tcp_tw_reuse", []byte("1"), 0)
	base := t.TempDir()
	must(t, os.Chmod(filepath.Dir(base), 0o755))
	must(t, syscall.Mount("tmpfs", "/srv", "tmpfs", 0, "mode=755"))
	home := "/srv/home"
	must(t, os.MkdirAll(filepath.Join(home, ".ssh"), 0o700))
	must(t, os.Chown(home, accountID, accountID))
	must(t, os.Chown(filepath.Join(home, ".ssh"), accountID, accountID))
	hash := strings.TrimSpace(output(t, "openssl", "passwd", "-6", password))
	for name, line := range map[string]string{
		"passwd": fmt.Sprintf("%s:x:%d:%d::%s:/bin/sh", deployUser, accountID, accountID, home),
		"shadow": fmt.Sprintf("%s:%s:19000:0:99999:7:::", deployUser, hash),
		"group":  fmt.Sprintf("%s:x:%d:", deployUser, accountID),
	} {
		at := filepath.Join("/etc", name)
		data := strings.Replace(readFile(t, at), ":/root:/bin/bash\n", ":/root:/bin/sh\n", 1)
		mode := map[bool]os.FileMode{true: 0o600, false: 0o644}[name == "shadow"]
		must(t, os.WriteFile(filepath.Join(base, name), []byte(strings.TrimRight(data, "\n")+"\n"+line+"\n"), mode))
		must(t, syscall.Mount(filepath.Join(base, name), at, "", syscall.MS_BIND, ""))
	}
	return home
}

func passwords(t *testing.T, home string) {
	for _, way := range []string{"password", "keyboard-interactive"} {
		t.Run(way, func(t *testing.T) {
			options := []string{"PasswordAuthentication yes", "KbdInteractiveAuthentication no"}
			if way == "keyboard-interactive" {
				options = []string{"PasswordAuthentication no", "KbdInteractiveAuthentication yes", "UsePAM yes"}
			}
			l := newLogin(t, openssh(t, options...))
			must(t, os.Chown(l.server.certs, accountID, accountID))
			must(t, os.Chown(l.server.dir, accountID, accountID))
			login := []any{"user", deployUser, "auth_method", "password", "private_key_path", nil, "password"}
			l.works(append(login, password)...)
			l.refuses("refuses the password", append(login, "wrong")...)
			info, err := os.Stat(filepath.Join(l.server.certs, "key.pem"))
			must(t, err)
			if got := info.Mode().String() + " " + ownerOf(info); got != "-rw------- 4242:4242" {
				t.Errorf("the key is %s", got)
			}
			l.refuses("only root can do this", append(login, password, "key_owner", "root")...)
		})
	}
}

func passphrase(t *testing.T) {
	s := newServer(t)
	s.identity = keygen(t, filepath.Join(s.dir, "locked"), "-t", "ed25519", "-N", password)
	must(t, os.WriteFile(filepath.Join(s.dir, "authorized_keys"), []byte(readFile(t, s.identity+".pub")), 0o600))
	s.start(t)
	l := newLogin(t, s)
	l.works("passphrase", password)
	l.refuses("passphrase", "passphrase", "wrong")
	l.refuses("passphrase")
	l.works("passphrase", password, "private_key_path", nil, "private_key", readFile(t, s.identity))
	must(t, os.Chmod(s.identity, 0o644))
	l.refuses("chmod 600", "passphrase", password)
}

func hostKeys(t *testing.T) {
	s := newServer(t)
	process := s.start(t)
	l := newLogin(t, s)
	known := filepath.Join(s.dir, "known_hosts")
	kind, key, _ := strings.Cut(strings.Join(strings.Fields(s.hostKey)[:2], " "), " ")
	line := fmt.Sprintf("[127.0.0.1]:%d %s %s", s.port, kind, key)
	fingerprint := strings.Fields(output(t, "ssh-keygen", "-lf", filepath.Join(s.dir, "host.pub")))[1]

	must(t, os.WriteFile(known, nil, 0o600))
	byFile := []any{"host_key", nil, "known_hosts", known}
	for _, says := range []string{"not known", fingerprint, line, known} {
		l.refuses(says, byFile...)
	}
	l.refuses("is not known. Compare it on the server", "host_key", nil) // nor is it to the user
	must(t, os.WriteFile(known, []byte("# mine\n"+line+"\n"), 0o600))
	l.works(byFile...)

	// This host accepts new keys.
	l.AcceptNewHostKeys = true
	l.works("host_key", nil)
	if got := readFile(t, filepath.Join(l.StateDir, remembered)); strings.TrimSpace(got) != line {
		t.Errorf("remembered %q, want %q", got, line)
	}
	if !strings.Contains(l.Log(), fingerprint) {
		t.Error("the new key was not logged")
	}
	l.AcceptNewHostKeys = false
	l.works("host_key", nil) // it is remembered

	// The key changes.
	l.AcceptNewHostKeys = true
	must(t, process.Signal(syscall.SIGTERM))
	other := newServer(t)
	other.port, other.certs = s.port, s.certs
	must(t, os.WriteFile(filepath.Join(other.dir, "authorized_keys"), []byte(readFile(t, s.identity+".pub")), 0o600))
	waitFree(t, s.address())
	other.start(t)
	for _, changes := range [][]any{nil, byFile, {"host_key", nil}} {
		l.refuses("the connection may be intercepted", changes...)
		l.refuses(strings.Fields(other.hostKey)[1], changes...)
	}
	// A key of another type is another key.
	must(t, os.WriteFile(filepath.Join(l.StateDir, remembered), []byte(strings.Replace(readFile(t, keygen(t, filepath.Join(s.dir, "ecdsa"), "-t", "ecdsa")+".pub"),
		"ecdsa-sha2", fmt.Sprintf("[127.0.0.1]:%d ecdsa-sha2", s.port), 1)), 0o600))
	l.refuses("the connection may be intercepted", "host_key", nil)
}

// chrooted: internal-sftp in a directory, without a shell.
func chrooted(t *testing.T, home string) {
	must(t, os.MkdirAll("/srv/jail/certs", 0o755))
	must(t, os.Chown("/srv/jail/certs", accountID, accountID))
	s := newServer(t)
	must(t, os.Chmod(filepath.Join(s.dir, "authorized_keys"), 0o644))
	s.start(t, "ChrootDirectory /srv/jail", "ForceCommand internal-sftp", "PasswordAuthentication no")
	s.certs = "/srv/jail/certs"
	l := newLogin(t, s)
	l.works("user", deployUser, "reload_command", nil, "cert_path", "/certs/cert.pem", "key_path", "/certs/key.pem")
	checkFiles(t, "/srv/jail/certs", "cert.pem", "key.pem")
	l.refuses("true", "user", deployUser, "cert_path", "/certs/cert.pem", "key_path", "/certs/key.pem", "reload_command", "true")
}

func dropbear(t *testing.T, home string) {
	s := newServer(t)
	s.user = deployUser
	must(t, os.Chown(s.certs, accountID, accountID))
	must(t, os.Chown(s.dir, accountID, accountID))
	pub := filepath.Join(home, ".ssh", "authorized_keys")
	must(t, os.WriteFile(pub, []byte(readFile(t, s.identity+".pub")), 0o600))
	must(t, os.Chown(pub, accountID, accountID))
	output(t, "dropbearconvert", "openssh", "dropbear", filepath.Join(s.dir, "host"), filepath.Join(s.dir, "host.db"))
	conformance.Serve(t, s.address(), needs.Need(t, "dropbear"), "-F", "-E", "-p", s.address(), "-r", filepath.Join(s.dir, "host.db"), "-P", filepath.Join(s.dir, "pid"))
	l := newLogin(t, s)
	l.works()
	l.works("auth_method", "password", "private_key_path", nil, "password", password)
	l.refuses("failed: made to", "reload_command", "sh "+script(t, s.dir, "echo failed: made to; exit 3"))
}

func script(t testing.TB, dir, text string) string {
	path := filepath.Join(dir, "script")
	must(t, os.WriteFile(path, []byte(text+"\n"), 0o755))
	return path
}

func jumpHost(t *testing.T) {
	jump, s := openssh(t), openssh(t)
	l := newLogin(t, s)
	config := filepath.Join(s.dir, "ssh_config")
	text := fmt.Sprintf(`Host inner
	HostName 127.0.0.1
	ProxyJump jump
Host jump
	HostName 127.0.0.1
	Port %d
	User root
	IdentityFile %s
	HostKeyAlias jump
	UserKnownHostsFile %s/known_jump
`, jump.port, jump.identity, jump.dir)
	must(t, os.WriteFile(config, []byte(text), 0o600))
	must(t, os.WriteFile(filepath.Join(jump.dir, "known_jump"), []byte("jump "+jump.hostKey+"\n"), 0o600))
	l.refuses("overlay", "host", "inner", "ssh_config", config)
	l.overlay("ssh_config", config)
	l.works("host", "inner")
	must(t, os.WriteFile(filepath.Join(jump.dir, "known_jump"), nil, 0o600))
	l.refuses("Host key verification failed", "host", "inner")
}

// fullDisk: nothing is replaced, and no files are left.
func fullDisk(t *testing.T) {
	l := newLogin(t, openssh(t))
	must(t, syscall.Mount("tmpfs", l.server.certs, "tmpfs", 0, "size=32k,mode=755"))
	defer syscall.Unmount(l.server.certs, syscall.MNT_DETACH)
	l.works()
	filler, err := os.Create(filepath.Join(l.server.certs, "filler"))
	must(t, err)
	for err == nil {
		_, err = filler.Write(make([]byte, 4<<10))
	}
	filler.Close()
	l.refuses("is the disk full?")
}

// otherHost has its own address, network and file system.
type otherHost struct {
	*server
	pid     string
	address string
}

func newOtherHost(t *testing.T) *otherHost {
	holder := exec.Command("unshare", "--net", "--mount", "--propagation", "private", "sleep", "infinity")
	holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, holder.Start())
	t.Cleanup(func() { _ = holder.Process.Kill(); _ = holder.Wait() })
	o := &otherHost{server: newServer(t), pid: strconv.Itoa(holder.Process.Pid), address: "192.0.2.2"}
	ours, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	for { // wait for unshare
		if theirs, err := os.Readlink("/proc/" + o.pid + "/ns/net"); err == nil && theirs != ours && strings.Contains(readFile(t, "/proc/"+o.pid+"/comm"), "sleep") {
			break
		}
	}
	output(t, "ip", "link", "add", "agent", "type", "veth", "peer", "name", "other", "netns", o.pid)
	output(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "agent")
	output(t, "ip", "link", "set", "agent", "up")
	o.run(t, "ip", "addr", "add", o.address+"/24", "dev", "other")
	o.run(t, "ip", "link", "set", "other", "up")
	o.run(t, "ip", "link", "set", "lo", "up")
	o.run(t, "mount", "-t", "tmpfs", "tmpfs", "/mnt")
	o.run(t, "mkdir", "-p", "/mnt/tls", "/mnt/tmp")
	return o
}

func (o *otherHost) inside(argv ...string) []string {
	return append([]string{"nsenter", "--target", o.pid, "--net", "--mount", "--"}, argv...)
}

func (o *otherHost) run(t testing.TB, argv ...string) string {
	t.Helper()
	return output(t, o.inside(argv...)...)
}

const nginxConf = `pid /mnt/nginx.pid;
error_log stderr warn;
worker_processes 2;
daemon off;
events {}
http {
	access_log off;
	client_body_temp_path /mnt/tmp;
	proxy_temp_path /mnt/tmp;
	fastcgi_temp_path /mnt/tmp;
	uwsgi_temp_path /mnt/tmp;
	scgi_temp_path /mnt/tmp;
	server {
		listen 192.0.2.2:443 ssl;
		ssl_certificate /mnt/tls/cert.pem;
		ssl_certificate_key /mnt/tls/key.pem;
		return 200 "ok\n";
	}
}
`

// rotation rotates the certificate of an nginx on the other host under load.
func rotation(t *testing.T) {
	o := newOtherHost(t)
	conf := filepath.Join(o.dir, "nginx.conf")
	must(t, os.WriteFile(conf, []byte(nginxConf), 0o644))
	o.port = 22
	sshdConf := filepath.Join(o.dir, "sshd_config")
	must(t, os.WriteFile(sshdConf, fmt.Appendf(nil, "ListenAddress %s\nPort 22\nHostKey %s/host\nPidFile none\nUsePAM no\nStrictModes no\nAuthorizedKeysFile %s/authorized_keys\nPermitRootLogin yes\nSubsystem sftp internal-sftp\n",
		o.address, o.dir, o.dir), 0o600))
	conformance.Serve(t, o.address+":22", o.inside(needs.Need(t, "sshd"), "-D", "-e", "-f", sshdConf)...)

	h := conformance.NewHost(t, conformance.RunCommand)
	ca := testca.Must(t)
	config := conformance.Verified(o.address + ":443")
	nginx := needs.Need(t, "nginx") + " -c " + conf
	maps.Copy(config, map[string]any{
		"host": o.address, "user": "root", "private_key": readFile(t, o.identity), "host_key": o.hostKey,
		"cert_path": "/mnt/tls/cert.pem", "key_path": "/mnt/tls/key.pem", "validate_command": nginx + " -t -q", "reload_command": nginx + " -s reload",
	})
	// nginx does not start without a pair.
	first := h.Material(t, ca)
	if _, err := h.Deploy(t.Context(), Type(), map[string]any{
		"host": o.address, "user": "root", "private_key": readFile(t, o.identity), "host_key": o.hostKey, "cert_path": "/mnt/tls/cert.pem", "key_path": "/mnt/tls/key.pem",
	}, first); err != nil {
		t.Fatal(err)
	}
	conformance.Serve(t, o.address+":443", o.inside(needs.Need(t, "nginx"), "-c", conf)...)
	conformance.Rotate(t, conformance.Rotation{
		Endpoint: tlsprobe.Endpoint{Address: o.address + ":443", ServerName: "localhost"},
		Material: func() *connector.Material { return h.Material(t, ca) },
		Deploy: func(ctx context.Context, m *connector.Material) error {
			_, err := h.Deploy(ctx, Type(), config, m)
			return err
		},
	})
	if got := strings.Fields(o.run(t, "ls", "-A", "/mnt/tls")); fmt.Sprint(got) != "[cert.pem key.pem]" {
		t.Errorf("the other host holds %v", got)
	}
	// The old certificate is restored if the new one does not pass.
	was := o.run(t, "sha256sum", "/mnt/tls/cert.pem", "/mnt/tls/key.pem")
	config["post_deploy_verify"] = map[string]any{"enabled": true, "endpoint": o.address + ":1"}
	config["post_deploy_verify_attempts"] = 1
	if _, err := h.Deploy(t.Context(), Type(), config, h.Material(t, ca)); err == nil || !strings.Contains(err.Error(), "previous certificate is back") {
		t.Errorf("got %v, want the previous certificate back", err)
	}
	if is := o.run(t, "sha256sum", "/mnt/tls/cert.pem", "/mnt/tls/key.pem"); is != was {
		t.Errorf("the files are %s, were %s", is, was)
	}
}

// waitFree waits until nothing listens.
func waitFree(t testing.TB, address string) {
	t.Helper()
	for {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		must(t, t.Context().Err())
	}
}
