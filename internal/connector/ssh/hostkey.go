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

// fingerprint returns the key's fingerprint in ssh's format.
func (k hostKey) fingerprint() string {
	blob, err := base64.StdEncoding.DecodeString(k.data)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(blob)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// line returns the key as a line of a known_hosts file (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).
func (k hostKey) line(alias string) string { return alias + " " + k.kind + " " + k.data }

// parseHostKeys parses lines of a .pub file, of ssh-keyscan or of a known_hosts file.
func parseHostKeys(text string) (keys []hostKey, err error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		i := slices.IndexFunc(fields, func(field string) bool { return keyType(field) != "" })
		if i != 1 && i != 2 || keyType(fields[i]) != fields[i-1] {
			return nil, errors.New("expected the server's public key on one line, as in its /etc/ssh/ssh_host_ed25519_key.pub: ssh-ed25519 AAAA…")
		}
		keys = append(keys, hostKey{fields[i-1], fields[i]})
	}
	if len(keys) == 0 {
		return nil, errors.New("it contains no public key")
	}
	return keys, nil
}

// keyType returns the type in an encoded public key, or "" if text is not one.
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

// hostKeyProblem is a problem with a server's key.
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

// remembered is the file of the keys that this agent trusted on first use.
const remembered = "ssh_known_hosts"

func (t *target) rememberedPath() string {
	if t.host.StateDir == "" {
		return ""
	}
	return filepath.Join(t.host.StateDir, remembered)
}

// writeKnownHosts writes the trusted keys to the private directory. ssh itself finds those of the
// agent's user.
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

// pinned reports whether the configuration determines the trusted keys.
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

// unknown handles a server key that is unknown or has changed. It remembers an unknown key if this
// host allows that. Otherwise the error has all that the operator needs to decide.
func (d *directory) unknown(ctx context.Context, program string, address netip.Addr, login *loginError) error {
	key, alias, err := d.offered(ctx, program, address)
	if err != nil {
		return fmt.Errorf("%s; getting its key failed too: %w", login.output, err)
	}
	e := &loginError{output: login.output, hostKey: login.hostKey}
	switch {
	case login.hostKey == hostKeyChanged:
		e.problem = fmt.Sprintf("the server's host key has changed to %s %s: the connection may be intercepted. If the key was replaced, replace the old lines by this one: %s",
			key.kind, key.fingerprint(), key.line(alias))
		return e
	case !d.pinned() && d.host.AcceptNewHostKeys && d.rememberedPath() != "":
		// ssh reports a known host's key of a new type as changed, so this key is the first one.
		return d.remember(key, alias)
	}
	e.problem = fmt.Sprintf("the server's host key %s %s is not known. Compare it on the server (ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub), then add this line to %s: %s",
		key.kind, key.fingerprint(), d.where(), key.line(alias))
	return e
}

// where names the place to add a known_hosts line.
func (d *directory) where() string {
	switch {
	case d.KnownHosts != "":
		return string(d.KnownHosts)
	case len(d.keys) > 0:
		return "host_key"
	}
	return "~/.ssh/known_hosts of the agent's user, or set host_key"
}

// offered returns the server's key, without logging in, and the name under which ssh looks for it.
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

// remember adds a key to the remembered ones.
func (d *directory) remember(key hostKey, alias string) error {
	// The leading newline ends a partial line that a power cut may have left.
	line := "\n" + key.line(alias) + "\n"
	file, err := os.OpenFile(d.rememberedPath(), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("remember the server's host key: %w", err)
	}
	_, err = file.WriteString(line)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return fmt.Errorf("remember the server's host key: %w", err)
	}
	d.host.Log.Warn("accepted an unknown host key permanently, since CERTCTL_SSH_ACCEPT_NEW_HOST_KEYS is set",
		"host", alias, "fingerprint", key.fingerprint(), "file", d.rememberedPath())
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return err
	}
	defer root.Close()
	return d.writeKnownHosts(root)
}
