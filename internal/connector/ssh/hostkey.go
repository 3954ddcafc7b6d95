package ssh

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/command"
	"certctl-agent/internal/hostfile"
)

// A hostKey is the public key of a server.
type hostKey struct {
	kind string // ssh-ed25519
	data string // base64
}

// fingerprint is the form in which ssh shows a key.
func (k hostKey) fingerprint() string {
	blob, err := base64.StdEncoding.DecodeString(k.data)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(blob)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// line is the key in a file of known hosts (sshd(8), SSH_KNOWN_HOSTS FILE
// FORMAT).
func (k hostKey) line(alias string) string { return alias + " " + k.kind + " " + k.data }

// parseHostKeys takes lines of a .pub file, of ssh-keyscan or of known_hosts.
func parseHostKeys(text string) (keys []hostKey, err error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		i := slices.IndexFunc(fields, func(field string) bool { return keyType(field) != "" })
		if i != 1 && i != 2 || keyType(fields[i]) != fields[i-1] {
			return nil, errors.New("expected the server's public key as one line, such as /etc/ssh/ssh_host_ed25519_key.pub there holds: ssh-ed25519 AAAA…")
		}
		keys = append(keys, hostKey{fields[i-1], fields[i]})
	}
	if len(keys) == 0 {
		return nil, errors.New("there is no public key in it")
	}
	return keys, nil
}

// keyType is the type that a key says to be of, "" if it is none.
func keyType(text string) string {
	blob, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(blob) < 4 {
		return ""
	}
	size := binary.BigEndian.Uint32(blob)
	if size == 0 || size > 64 || int(size) > len(blob)-4 {
		return ""
	}
	return string(blob[4 : 4+size])
}

// What is wrong with a server's key.
type hostKeyProblem int

const (
	hostKeyFine hostKeyProblem = iota
	hostKeyUnknown
	hostKeyChanged
)

func hostKeyProblemOf(text string) hostKeyProblem {
	switch {
	case strings.Contains(text, "HOST IDENTIFICATION HAS CHANGED"), strings.Contains(text, "REVOKED HOST KEY"):
		return hostKeyChanged
	case strings.Contains(text, "host key is known for"), strings.Contains(text, "Host key verification failed"):
		return hostKeyUnknown
	}
	return hostKeyFine
}

// remembered is the file of the keys that this agent accepted by itself.
const remembered = "ssh_known_hosts"

func (t *target) rememberedPath() string {
	if t.host.StateDir == "" {
		return ""
	}
	return filepath.Join(t.host.StateDir, remembered)
}

// writeKnownHosts writes the keys that count into the private directory. Those
// of the agent's user ssh finds itself.
func (d *directory) writeKnownHosts(root *os.Root) error {
	var known bytes.Buffer
	switch {
	case d.KnownHosts != "":
		data, _, err := hostfile.Read(string(d.KnownHosts), maxKnownHosts)
		if err != nil {
			return fmt.Errorf("known_hosts: %w", err)
		}
		known.Write(data)
	case len(d.keys) > 0:
		for _, key := range d.keys {
			fmt.Fprintln(&known, key.line(d.alias()))
		}
	case d.rememberedPath() != "":
		data, _, err := hostfile.Read(d.rememberedPath(), maxKnownHosts)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		known.Write(data)
	}
	return root.WriteFile(knownFile, known.Bytes(), 0o600)
}

// pinned reports whether the configuration says which keys count.
func (d *directory) pinned() bool { return d.KnownHosts != "" || len(d.keys) > 0 }

func (d *directory) knownHostsOptions() []string {
	if d.pinned() {
		return []string{"-o", "UserKnownHostsFile=" + knownFile, "-o", "GlobalKnownHostsFile=none"}
	}
	return []string{
		"-o", "UserKnownHostsFile=~/.ssh/known_hosts ~/.ssh/known_hosts2 " + knownFile,
		"-o", "GlobalKnownHostsFile=/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2",
	}
}

// unknown is asked when the server's key is not known, or another one is. It
// remembers a key where this host allows that; else the error has what a person
// needs to decide.
func (d *directory) unknown(ctx context.Context, program string, address netip.Addr, login *loginError) error {
	key, alias, err := d.offered(ctx, program, address)
	if err != nil {
		return fmt.Errorf("%s; and its key could not be had: %w", login.said, err)
	}
	e := &loginError{said: login.said, hostKey: login.hostKey}
	switch {
	case login.hostKey == hostKeyChanged:
		e.problem = fmt.Sprintf("the server offers another host key than the one that is known, %s %s: somebody may be in between. If it was replaced, put this line in place of the old ones: %s",
			key.kind, key.fingerprint(), key.line(alias))
		return e
	case !d.pinned() && d.host.AcceptNewHostKeys && d.rememberedPath() != "":
		// A key of another kind than those that are known, ssh calls a changed one.
		return d.remember(key, alias)
	}
	e.problem = fmt.Sprintf("the server's host key is not known. It offers %s %s: compare that with the server's own (ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub), then add this line to %s: %s",
		key.kind, key.fingerprint(), d.where(), key.line(alias))
	return e
}

// where is where a line has to be added.
func (d *directory) where() string {
	switch {
	case d.KnownHosts != "":
		return string(d.KnownHosts)
	case len(d.keys) > 0:
		return "host_key"
	}
	return "~/.ssh/known_hosts of the agent's user, or set host_key"
}

// offered asks the server for its key, and goes no further. The key comes with
// the name under which ssh looks for it.
func (d *directory) offered(ctx context.Context, program string, address netip.Addr) (key hostKey, alias string, err error) {
	arguments := slices.Concat([]string{program}, d.arguments(address, "no"), []string{
		"-o", "UserKnownHostsFile=" + offeredFile, "-o", "GlobalKnownHostsFile=none", "-o", "HashKnownHosts=no",
		"-o", "PreferredAuthentications=none", "-o", "PubkeyAuthentication=no", "-o", "PasswordAuthentication=no", "-o", "KbdInteractiveAuthentication=no",
		"-o", "BatchMode=yes", "-o", "ControlMaster=no", "-o", "ControlPath=none", "-n", "-T", "--", d.Host, "exit"})
	_, runErr := command.RunIn(ctx, d.path, arguments, d.timeout())
	data, _, err := hostfile.Read(filepath.Join(d.path, offeredFile), maxKnownHosts)
	os.Remove(filepath.Join(d.path, offeredFile))
	if err != nil {
		return hostKey{}, "", errors.Join(runErr, err)
	}
	keys, err := parseHostKeys(string(data))
	if err != nil {
		return hostKey{}, "", err
	}
	return keys[0], strings.Fields(string(data))[0], nil
}

// remember adds a key to those that this agent accepted by itself.
func (d *directory) remember(key hostKey, alias string) error {
	// An empty line ends what a power cut left of the last one.
	line := "\n" + key.line(alias) + "\n"
	file, err := os.OpenFile(d.rememberedPath(), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("remember the server's host key: %w", err)
	}
	_, err = file.WriteString(line)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return fmt.Errorf("remember the server's host key: %w", err)
	}
	d.host.Log.Warn("a host key that was not known is accepted from now on, since CERTCTL_SSH_ACCEPT_NEW_HOST_KEYS says so",
		"host", alias, "fingerprint", key.fingerprint(), "file", d.rememberedPath())
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return err
	}
	defer root.Close()
	return d.writeKnownHosts(root)
}
