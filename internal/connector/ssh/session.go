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

// Names in the private directory of a connection, which is ssh's working directory. Plain names
// need no quoting in ssh's configuration, and a socket's path cannot be too long.
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

	// maxStderr bounds the part of ssh's error output that is kept, and maxReason the part that an
	// error quotes, in bytes.
	maxStderr = 16 << 10
	maxReason = 1 << 10

	// maxAddresses bounds how many addresses of a name are tried.
	maxAddresses = 8

	// exitWait is how long ssh may take to exit.
	exitWait = 2 * time.Second
)

// A session is one connection: an ssh process and SFTP through it.
type session struct {
	*sftp.Client
	run func(ctx context.Context, line string, timeout time.Duration) error // in the account's shell
	end func()
}

func (s *session) close() { s.end() }

// A loginError is a failure of ssh to connect or log in.
type loginError struct {
	output  string // of ssh, printable
	problem string
	hostKey hostKeyProblem
	retry   bool // another try may succeed
}

func (e *loginError) Error() string { return e.problem }

// transient reports whether another try may succeed: the connection was lost or failed.
func transient(err error) bool {
	login, ok := errors.AsType[*loginError](err)
	_, lost := errors.AsType[*sftp.LostError](err)
	return lost || ok && login.retry
}

// pauses returns the pauses before the second and each later try.
func pauses() []time.Duration { return []time.Duration{time.Second, 3 * time.Second} }

// dial connects and logs in. It retries, since the server may be starting or have too many
// connections (MaxStartups in sshd_config(5)).
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
		return nil, fmt.Errorf("ssh is %w: install OpenSSH's client (Debian: openssh-client)", err)
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
			if err = d.unknown(ctx, program, address, login); err == nil { // the key is known now
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

// resolve returns the addresses to connect to that the policy allows. If ssh_config is set, it
// determines the connection, and resolve returns one invalid address.
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

// directory is the private directory of one connection. It holds ssh's input files.
type directory struct {
	*target
	path    string
	lock    *filelock.Lock
	askpass *askpass.Server // nil: ssh may not ask for anything
}

// newDirectory creates a directory, and removes those of killed agents.
func newDirectory(t *target) (*directory, error) {
	base := os.TempDir()
	if len(base) > 40 {
		base = "/tmp" // the path of askpass's socket is limited
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

// sweep removes the directories of killed agents, which may hold a key. The kernel has released
// their locks. A lock file without an owner in it is about to be locked.
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
		d.askpass, err = askpass.Serve(d.path, d.answer)
		return err
	case !d.PrivateKey.IsZero():
		// Web forms convert line ends to CRLF and drop the last one.
		text := strings.ReplaceAll(strings.TrimSpace(d.PrivateKey.Reveal()), "\r\n", "\n") + "\n"
		err = root.WriteFile(identityFile, []byte(text), 0o600)
	case d.PrivateKeyPath != "":
		if _, err := os.Stat(string(d.PrivateKeyPath)); err != nil {
			return err
		}
		// ssh finds an OpenSSH certificate by the name of its key.
		for _, suffix := range []string{"", "-cert.pub"} {
			err = errors.Join(err, root.Symlink(string(d.PrivateKeyPath)+suffix, identityFile+suffix))
		}
	}
	if err == nil && !d.Passphrase.IsZero() {
		d.askpass, err = askpass.Serve(d.path, d.answer)
	}
	return err
}

// answer answers ssh's prompts for the target. With ssh_config a jump host may ask too, which must
// not get the target's password.
func (d *directory) answer(prompt string) (secret.String, bool) {
	if d.AuthMethod == byKey {
		return d.Passphrase, strings.HasPrefix(prompt, "Enter passphrase for") && strings.Contains(prompt, "'"+identityFile+"'")
	}
	// Since 8.5, ssh adds the account to a server's prompt. Older versions show only the server's
	// text.
	whose := fmt.Sprintf("%.30s@%.128s", d.User, d.alias())
	ours := strings.HasPrefix(prompt, whose+"'s password") || strings.HasPrefix(prompt, "("+whose+") ") ||
		d.SSHConfig == "" && !strings.HasPrefix(prompt, "(")
	return d.Password, ours && strings.Contains(strings.ToLower(prompt), "password")
}

// named reports whether ssh looks up the host's keys by alias. With ssh_config it may use another
// name.
func (d *directory) named() bool { return d.SSHConfig == "" || len(d.keys) > 0 }

// removeSecrets removes the secrets that are only needed to log in.
func (d *directory) removeSecrets() {
	if d.askpass != nil {
		d.askpass.Close()
	}
	os.Remove(filepath.Join(d.path, identityFile))
}

func (d *directory) remove() {
	d.removeSecrets()
	os.RemoveAll(d.path)
	d.lock.Close()
}

// arguments returns the first arguments of every call of ssh. They do not depend on a user's
// configuration. The address may be invalid, see resolve.
func (d *directory) arguments(address netip.Addr, strict string) []string {
	arguments := []string{"-F", "none"}
	if d.SSHConfig != "" {
		arguments[1] = string(d.SSHConfig)
	}
	option := func(name, value string) { arguments = append(arguments, "-o", name+"="+value) }
	if address.IsValid() {
		option("HostName", strings.ReplaceAll(address.Unmap().String(), "%", "%%")) // before a zone
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

// authentication returns the arguments for logging in.
func (d *directory) authentication() []string {
	arguments := []string{"-o", "NumberOfPasswordPrompts=1", "-o", "GSSAPIAuthentication=no", "-o", "HostbasedAuthentication=no",
		"-o", "BatchMode=" + map[bool]string{true: "no", false: "yes"}[d.askpass != nil]}
	if d.AuthMethod == byPassword {
		return append(arguments, "-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=password,keyboard-interactive")
	}
	arguments = append(arguments, "-o", "PreferredAuthentications=publickey", "-o", "PasswordAuthentication=no")
	if d.PrivateKeyPath == "" && d.PrivateKey.IsZero() {
		return arguments // ssh_config selects the key
	}
	return append(arguments, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "AddKeysToAgent=no", "-i", identityFile)
}

// login starts ssh with the SFTP subsystem. Commands use the same connection.
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
	d.removeSecrets()
	if !client.Has(sftp.PosixRename) {
		p.Close()
		return nil, fmt.Errorf("its SFTP server does not support the extension %s, which is needed to replace files atomically: use OpenSSH's sftp-server", sftp.PosixRename)
	}
	// ProxyCommand makes ssh fail instead of opening a new connection.
	shared := slices.Concat(d.arguments(address, "yes"), []string{
		"-o", "BatchMode=yes", "-o", "ControlMaster=no", "-o", "ControlPath=" + controlFile, "-o", "ProxyCommand=false", "-T"})
	checked := false
	return &session{
		Client: client,
		run: func(ctx context.Context, line string, timeout time.Duration) error {
			if !checked && d.onlySFTP(ctx, program, shared) {
				return errors.New("the account cannot run commands: a forced command (ForceCommand, or command= in authorized_keys) starts SFTP instead")
			}
			checked = true
			_, err := command.RunIn(ctx, d.path, slices.Concat([]string{"ssh"}, shared, []string{"-n", "--", d.Host, line}), timeout)
			return err
		},
		end: func() { p.end(); d.remove() },
	}, nil
}

// onlySFTP reports whether the account starts sftp-server instead of any command. Since sftp-server
// exits without an error if it gets no input, the command would seem to have succeeded.
func (d *directory) onlySFTP(ctx context.Context, program string, arguments []string) bool {
	p, err := d.start(program, slices.Concat(arguments, []string{"--", d.Host, "true"}))
	if err != nil {
		return false
	}
	defer p.Close()
	_, err = sftp.New(ctx, p, d.timeout())
	return err == nil
}

// process is an ssh process, and the stream to the remote program.
type process struct {
	command *exec.Cmd
	stdin   io.WriteCloser
	stdout  io.ReadCloser
	stderr  head
	ended   chan struct{}
}

func (d *directory) start(program string, arguments []string) (*process, error) {
	p := &process{command: exec.Command(program, arguments...), ended: make(chan struct{})}
	p.command.Dir = d.path
	p.command.Env = command.Environment()
	if d.askpass != nil {
		p.command.Env = append(p.command.Env, d.askpass.Environment()...)
	}
	p.command.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no terminal for prompts, and an own process group
	p.command.Stderr = &p.stderr
	p.command.WaitDelay = exitWait
	var err error
	if p.stdin, err = p.command.StdinPipe(); err != nil {
		return nil, err
	}
	// StdoutPipe would not do: Wait closes it while it may still be read.
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
		p.kill() // its child processes
		close(p.ended)
	}()
	return p, nil
}

// kill kills ssh and its child processes. It must not be called long after ssh exited, when its
// group id may be reused.
func (p *process) kill() { _ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL) }

func (p *process) Read(data []byte) (int, error)  { return p.stdout.Read(data) }
func (p *process) Write(data []byte) (int, error) { return p.stdin.Write(data) }

// Close kills ssh unless it has exited, and waits for it.
func (p *process) Close() error {
	select {
	case <-p.ended:
	default:
		p.kill()
		<-p.ended
	}
	return p.stdout.Close()
}

// end lets ssh exit, so that it closes the connection properly.
func (p *process) end() {
	p.stdin.Close()
	p.wait()
	p.Close()
}

// wait waits up to exitWait until ssh exits.
func (p *process) wait() {
	select {
	case <-p.ended:
	case <-time.After(exitWait):
	}
}

// head keeps the first maxStderr bytes written to it.
type head struct {
	mu   sync.Mutex
	data bytes.Buffer // guarded by mu
}

func (h *head) Write(data []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.data.Write(data[:min(len(data), maxStderr-h.data.Len())])
	return len(data), nil
}

func (h *head) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.data.String()
}

// explain turns ssh's error output, after err, into an error that says what to do.
func (d *directory) explain(ctx context.Context, p *process, err error) error {
	<-p.ended
	text := p.stderr.String()
	// The text may contain messages of the server.
	e := &loginError{output: printable.Line(command.Redact(text), maxReason), hostKey: hostKeyProblemOf(text)}
	has := func(words string) bool { return strings.Contains(text, words) }
	lost, wasLost := errors.AsType[*sftp.LostError](err)
	switch {
	case ctx.Err() != nil:
		return err
	case has("UNPROTECTED PRIVATE KEY FILE"):
		e.problem = fmt.Sprintf("other users can read the private key %s, so ssh does not use it: chmod 600", d.PrivateKeyPath)
	case has("incorrect passphrase"):
		e.problem = "the passphrase does not open the private key"
	case has("Permission denied") && d.AuthMethod == byPassword:
		e.problem = fmt.Sprintf("the server refuses the password of %s (or all passwords: check PasswordAuthentication and PermitRootLogin in its sshd_config): %s", d.User, e.output)
	case has("Permission denied"):
		e.problem = fmt.Sprintf("the server refuses the private key for %s: check that its public key is in authorized_keys there, and whether the key needs a passphrase: %s", d.User, e.output)
	case has("subsystem request failed"):
		e.problem = "the server has no SFTP: add a Subsystem sftp to its sshd_config (Debian: openssh-sftp-server)"
	case e.output != "":
		e.problem, e.retry = "ssh: "+e.output, isConnectionError(text)
	case wasLost:
		noise, isNoise := errors.AsType[*sftp.NoiseError](lost.Err)
		if isNoise {
			e.problem = fmt.Sprintf("the account of %s sends %v: its shell's startup files must not print anything without a terminal, and it needs a shell or ForceCommand internal-sftp", d.User, noise)
		} else {
			e.problem, e.retry = lost.Err.Error(), true
		}
	default:
		return err
	}
	return e
}

// isConnectionError reports whether ssh's error output says that the connection failed, or was lost
// before the login.
func isConnectionError(text string) bool {
	return slices.ContainsFunc([]string{"connect to host", "Connection refused", "Connection timed out", "Connection reset", "Connection closed by",
		"kex_exchange_identification", "banner exchange", "Broken pipe", "not responding"},
		func(words string) bool { return strings.Contains(text, words) })
}
