package ssh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"certctl-agent/internal/askpass"
	"certctl-agent/internal/command"
	"certctl-agent/internal/filelock"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/sftp"
)

// Names in the private directory of a connection, which is ssh's working
// directory: as plain names they need no quoting in ssh's configuration, and the
// path of a socket cannot be too long.
const (
	lockFile     = "lock"
	identityFile = "identity"
	knownFile    = "known_hosts"
	offeredFile  = "offered"
	controlFile  = "m"
)

const (
	dirPrefix = "certctl-ssh-"

	// maxKnownHosts bounds a file of host keys, in bytes.
	maxKnownHosts = 16 << 20

	// maxStderr bounds what is kept of what ssh says, and maxReason what an error
	// quotes of it, in bytes.
	maxStderr = 16 << 10
	maxReason = 1 << 10

	// maxAddresses is how many addresses of a name are tried.
	maxAddresses = 8

	// parting is how long ssh may take to end by itself.
	parting = 2 * time.Second
)

// A session is one connection: ssh, and SFTP through it.
type session struct {
	*sftp.Client
	run func(ctx context.Context, line string, timeout time.Duration) error // in the account's shell
	end func()
}

func (s *session) close() { s.end() }

// A loginError is the failure of ssh to connect and log in.
type loginError struct {
	said    string // by ssh, printable
	problem string
	hostKey hostKeyProblem
	again   bool // another try may succeed
}

func (e *loginError) Error() string { return e.problem }

// transient reports whether another try may succeed: the connection was lost, or
// could not be made.
func transient(err error) bool {
	login, ok := errors.AsType[*loginError](err)
	_, lost := errors.AsType[*sftp.LostError](err)
	return lost || ok && login.again
}

// pauses are before the second try and those after it.
func pauses() []time.Duration { return []time.Duration{time.Second, 3 * time.Second} }

// dial connects and logs in. A server that is starting, or has too many
// connections (MaxStartups of sshd_config(5)), is tried again.
func (t *target) dial(ctx context.Context) (*session, error) {
	for try := 0; ; try++ {
		s, err := t.dialOnce(ctx)
		if err == nil || !transient(err) || try == len(pauses()) {
			return s, err
		}
		select {
		case <-time.After(pauses()[try]):
		case <-ctx.Done():
			return nil, err
		}
	}
}

func (t *target) dialOnce(ctx context.Context) (*session, error) {
	program, err := command.Find("ssh")
	if err != nil {
		return nil, fmt.Errorf("OpenSSH's client is needed (Debian: openssh-client): ssh: %w", err)
	}
	addresses, err := t.resolve(ctx)
	if err != nil {
		return nil, err
	}
	d, err := newDirectory(t)
	if err != nil {
		return nil, fmt.Errorf("prepare the connection: %w", err)
	}
	for i, address := range addresses {
		var s *session
		s, err = d.login(ctx, program, address)
		login, ok := errors.AsType[*loginError](err)
		if ok && login.hostKey != hostKeyFine {
			if err = d.unknown(ctx, program, address, login); err == nil { // it is known now
				s, err = d.login(ctx, program, address)
			}
		}
		if err == nil {
			return s, nil
		}
		if !transient(err) || ctx.Err() != nil || i == len(addresses)-1 {
			break
		}
	}
	d.remove()
	return nil, fmt.Errorf("log in to %s: %w", t.peer(), err)
}

// resolve returns the addresses to connect to, of those that the policy allows.
// With a configuration of ssh, that says where to connect, and how: the answer is
// one address that is not valid.
func (t *target) resolve(ctx context.Context) ([]netip.Addr, error) {
	if t.SSHConfig != "" {
		return []netip.Addr{{}}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, t.timeout())
	defer cancel()
	allowed, err := t.at.Resolve(ctx)
	if err != nil {
		return nil, err
	}
	var addresses []netip.Addr
	for _, at := range allowed[:min(len(allowed), maxAddresses)] {
		addresses = append(addresses, at.Addr())
	}
	return addresses, nil
}

// directory is private to one connection. It holds what ssh is told in files.
type directory struct {
	*target
	path  string
	lock  *filelock.Lock
	asked *askpass.Server // nil: ssh may ask nothing
}

// newDirectory makes one, and removes those that killed agents left.
func newDirectory(t *target) (*directory, error) {
	base := os.TempDir()
	if len(base) > 40 {
		base = "/tmp" // the socket of askpass has a full path
	}
	sweep(base)
	path, err := os.MkdirTemp(base, dirPrefix)
	if err != nil {
		return nil, err
	}
	d := &directory{target: t, path: path}
	if err := d.fill(); err != nil {
		d.remove()
		return nil, err
	}
	return d, nil
}

// sweep removes directories of connections whose agent has been killed: they may
// hold a key. The kernel has let go of their locks. A lock without an owner in it
// is about to be taken.
func sweep(base string) {
	old, err := filepath.Glob(filepath.Join(base, dirPrefix+"*"))
	if err != nil {
		return
	}
	for _, path := range old {
		if info, err := os.Lstat(path); err != nil || !info.IsDir() || !hostfile.Ours(info) {
			continue
		}
		lock := filepath.Join(path, lockFile)
		if info, err := os.Lstat(lock); err == nil && info.Size() > 0 && filelock.Free(lock) {
			os.RemoveAll(path)
		}
	}
}

func (d *directory) fill() error {
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return err
	}
	defer root.Close()
	if d.lock, err = filelock.Take(root, lockFile, "certctl-agent"); err != nil && !filelock.Unsupported(err) {
		return err
	}
	if err := d.writeKnownHosts(root); err != nil {
		return err
	}
	switch {
	case d.AuthMethod == byPassword:
		d.asked, err = askpass.Serve(d.path, d.answer)
		return err
	case !d.PrivateKey.IsZero():
		// In a form, line ends become those of Windows, and the last one is lost.
		text := strings.ReplaceAll(strings.TrimSpace(d.PrivateKey.Reveal()), "\r\n", "\n") + "\n"
		err = root.WriteFile(identityFile, []byte(text), 0o600)
	case d.PrivateKeyPath != "":
		if _, err := os.Stat(string(d.PrivateKeyPath)); err != nil {
			return err
		}
		// OpenSSH's certificates are found by the name of the key.
		for _, suffix := range []string{"", "-cert.pub"} {
			err = errors.Join(err, root.Symlink(string(d.PrivateKeyPath)+suffix, identityFile+suffix))
		}
	}
	if err == nil && !d.Passphrase.IsZero() {
		d.asked, err = askpass.Serve(d.path, d.answer)
	}
	return err
}

// answer answers what ssh asks for, and nothing else: with a configuration of
// ssh a jump host may ask too, and must not get what is the target's.
func (d *directory) answer(prompt string) (secret.String, bool) {
	if d.AuthMethod == byKey {
		return d.Passphrase, strings.HasPrefix(prompt, "Enter passphrase for") && strings.Contains(prompt, "'"+identityFile+"'")
	}
	// Since 8.5 ssh says whose question it passes on. Before, the server's own
	// words are all.
	whose := fmt.Sprintf("%.30s@%.128s", d.User, d.alias())
	ours := strings.HasPrefix(prompt, whose+"'s password") || strings.HasPrefix(prompt, "("+whose+") ") ||
		d.SSHConfig == "" && !strings.HasPrefix(prompt, "(")
	return d.Password, ours && strings.Contains(strings.ToLower(prompt), "password")
}

// named reports whether ssh knows the host by our name. With a configuration of
// its own, it may know the keys of another name.
func (d *directory) named() bool { return d.SSHConfig == "" || len(d.keys) > 0 }

// secrets removes what is only needed to log in.
func (d *directory) secrets() {
	if d.asked != nil {
		d.asked.Close()
	}
	os.Remove(filepath.Join(d.path, identityFile))
}

func (d *directory) remove() {
	d.secrets()
	os.RemoveAll(d.path)
	d.lock.Close()
}

// arguments are what every call of ssh begins with: nothing of it is left to the
// configuration of a user. The address may be none.
func (d *directory) arguments(address netip.Addr, strict string) []string {
	arguments := []string{"-F", "none"}
	if d.SSHConfig != "" {
		arguments[1] = string(d.SSHConfig)
	}
	option := func(name, value string) { arguments = append(arguments, "-o", name+"="+value) }
	if address.IsValid() {
		option("HostName", strings.ReplaceAll(address.Unmap().String(), "%", "%%")) // of a zone
		option("ProxyCommand", "none")
		option("CanonicalizeHostname", "no")
	}
	if d.named() {
		option("HostKeyAlias", d.alias())
	}
	option("StrictHostKeyChecking", strict)
	option("CheckHostIP", "no")
	option("VerifyHostKeyDNS", "no")
	option("UpdateHostKeys", "no")
	option("ConnectTimeout", strconv.Itoa(max(1, int(d.timeout().Seconds()))))
	option("ConnectionAttempts", "1")
	option("ServerAliveInterval", "5")
	option("ServerAliveCountMax", "3")
	option("TCPKeepAlive", "yes")
	option("LogLevel", "ERROR")
	option("ClearAllForwardings", "yes")
	option("ForwardAgent", "no")
	option("ForwardX11", "no")
	option("Tunnel", "no")
	option("PermitLocalCommand", "no")
	option("RequestTTY", "no")
	option("EscapeChar", "none")
	option("ControlPersist", "no")
	return append(arguments, "-l", d.User, "-p", strconv.Itoa(d.Port))
}

// authentication is how to log in.
func (d *directory) authentication() []string {
	arguments := []string{"-o", "NumberOfPasswordPrompts=1", "-o", "GSSAPIAuthentication=no", "-o", "HostbasedAuthentication=no",
		"-o", "BatchMode=" + map[bool]string{true: "no", false: "yes"}[d.asked != nil]}
	if d.AuthMethod == byPassword {
		return append(arguments, "-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=password,keyboard-interactive")
	}
	arguments = append(arguments, "-o", "PreferredAuthentications=publickey", "-o", "PasswordAuthentication=no")
	if d.PrivateKeyPath == "" && d.PrivateKey.IsZero() {
		return arguments // ssh's configuration says with which key
	}
	return append(arguments, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "AddKeysToAgent=no", "-i", identityFile)
}

// login starts ssh with SFTP in it. The commands go through the same connection.
func (d *directory) login(ctx context.Context, program string, address netip.Addr) (*session, error) {
	arguments := slices.Concat(d.arguments(address, "yes"), d.knownHostsOptions(), d.authentication())
	if d.ValidateCommand != "" || d.ReloadCommand != "" {
		arguments = append(arguments, "-o", "ControlMaster=yes", "-o", "ControlPath="+controlFile)
	} else {
		arguments = append(arguments, "-o", "ControlMaster=no", "-o", "ControlPath=none")
	}
	p, err := d.start(program, append(arguments, "-s", "--", d.Host, "sftp"))
	if err != nil {
		return nil, err
	}
	client, err := sftp.New(ctx, p, d.timeout())
	if err != nil {
		return nil, d.explain(ctx, p, err)
	}
	// Whatever is needed to log in is not needed any more.
	d.secrets()
	if !client.Has(sftp.PosixRename) {
		p.Close()
		return nil, fmt.Errorf("its SFTP server does not have the extension %s, without which files cannot be replaced in one step: OpenSSH's sftp-server has it", sftp.PosixRename)
	}
	// Without the connection that is there, it fails.
	again := slices.Concat(d.arguments(address, "yes"), []string{
		"-o", "BatchMode=yes", "-o", "ControlMaster=no", "-o", "ControlPath=" + controlFile, "-o", "ProxyCommand=false", "-T"})
	asked := false
	return &session{
		Client: client,
		run: func(ctx context.Context, line string, timeout time.Duration) error {
			if !asked && d.onlySFTP(ctx, program, again) {
				return errors.New("the account runs no commands: a forced command (ForceCommand, or command= in authorized_keys) answers each with SFTP")
			}
			asked = true
			_, err := command.RunIn(ctx, d.path, slices.Concat([]string{"ssh"}, again, []string{"-n", "--", d.Host, line}), timeout)
			return err
		},
		end: func() { p.end(); d.remove() },
	}, nil
}

// onlySFTP reports whether the account has sftp-server in place of any command:
// that ends without an error when nobody speaks to it, as if the command had run.
func (d *directory) onlySFTP(ctx context.Context, program string, arguments []string) bool {
	p, err := d.start(program, slices.Concat(arguments, []string{"--", d.Host, "true"}))
	if err != nil {
		return false
	}
	defer p.Close()
	_, err = sftp.New(ctx, p, d.timeout())
	return err == nil
}

// process is ssh, and the stream of what it runs at the other end.
type process struct {
	command *exec.Cmd
	stdin   io.WriteCloser
	stdout  io.ReadCloser
	stderr  said
	ended   chan struct{}
}

func (d *directory) start(program string, arguments []string) (*process, error) {
	p := &process{command: exec.Command(program, arguments...), ended: make(chan struct{})}
	p.command.Dir = d.path
	p.command.Env = command.Environment()
	if d.asked != nil {
		p.command.Env = append(p.command.Env, d.asked.Environment()...)
	}
	p.command.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no terminal to ask on; and a group
	p.command.Stderr = &p.stderr
	p.command.WaitDelay = parting
	var err error
	if p.stdin, err = p.command.StdinPipe(); err != nil {
		return nil, err
	}
	// Not StdoutPipe: Wait would close it under a reader.
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.stdout, p.command.Stdout = read, write
	err = p.command.Start()
	write.Close()
	if err != nil {
		read.Close()
		return nil, fmt.Errorf("start ssh: %w", err)
	}
	go func() {
		_ = p.command.Wait()
		p.kill() // what it has started
		close(p.ended)
	}()
	return p, nil
}

// kill kills ssh, with whatever it has started. Long after the end of ssh, the
// number of its group may be another's.
func (p *process) kill() { _ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL) }

func (p *process) Read(data []byte) (int, error)  { return p.stdout.Read(data) }
func (p *process) Write(data []byte) (int, error) { return p.stdin.Write(data) }

// Close kills ssh, unless it has ended, and waits for it.
func (p *process) Close() error {
	select {
	case <-p.ended:
	default:
		p.kill()
		<-p.ended
	}
	return p.stdout.Close()
}

// end lets ssh end by itself: the server hears of it.
func (p *process) end() {
	p.stdin.Close()
	p.wait()
	p.Close()
}

// wait waits a little for the end of ssh.
func (p *process) wait() {
	select {
	case <-p.ended:
	case <-time.After(parting):
	}
}

// said keeps the beginning of what is written.
type said struct {
	mu   sync.Mutex
	data bytes.Buffer // guarded by mu
}

func (s *said) Write(data []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data.Write(data[:min(len(data), maxStderr-s.data.Len())])
	return len(data), nil
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.data.String()
}

// explain makes an error for people of what ssh said when it ended, after which
// err was seen.
func (d *directory) explain(ctx context.Context, p *process, err error) error {
	<-p.ended
	text := p.stderr.String()
	// The server's own words come with it.
	e := &loginError{said: printable.Line(command.Redact(text), maxReason), hostKey: hostKeyProblemOf(text)}
	says := func(words string) bool { return strings.Contains(text, words) }
	lost, wasLost := errors.AsType[*sftp.LostError](err)
	switch {
	case ctx.Err() != nil:
		return err
	case says("UNPROTECTED PRIVATE KEY FILE"):
		e.problem = fmt.Sprintf("others than the agent's user can read the private key %s, so ssh does not use it: chmod 600", d.PrivateKeyPath)
	case says("incorrect passphrase"):
		e.problem = "the passphrase does not open the private key"
	case says("Permission denied") && d.AuthMethod == byPassword:
		e.problem = fmt.Sprintf("the server refuses the password of %s (it may also take none: PasswordAuthentication and PermitRootLogin of its sshd_config): %s", d.User, e.said)
	case says("Permission denied"):
		e.problem = fmt.Sprintf("the server refuses the private key for %s: is its public key in authorized_keys there, and does the key need a passphrase? %s", d.User, e.said)
	case says("subsystem request failed"):
		e.problem = "the server has no SFTP: its sshd_config needs a Subsystem sftp (Debian: openssh-sftp-server)"
	case e.said != "":
		e.problem, e.again = "ssh: "+e.said, connects(text)
	case wasLost:
		noise, isNoise := errors.AsType[*sftp.NoiseError](lost.Err)
		if isNoise {
			e.problem = fmt.Sprintf("the account of %s sends %v: its shell's start-up files must print nothing when no terminal is there, and it needs a shell or ForceCommand internal-sftp", d.User, noise)
		} else {
			e.problem, e.again = lost.Err.Error(), true
		}
	default:
		return err
	}
	return e
}

// connects reports whether ssh says that there was no connection, or that it was
// cut before anybody had logged in.
func connects(text string) bool {
	return slices.ContainsFunc([]string{"connect to host", "Connection refused", "Connection timed out", "Connection reset", "Connection closed by",
		"kex_exchange_identification", "banner exchange", "Broken pipe", "not responding"},
		func(words string) bool { return strings.Contains(text, words) })
}
