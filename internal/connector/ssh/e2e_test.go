package ssh

import (
	"encoding/json"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/netfault"
	"certctl-agent/internal/testing/testca"
)

// login is a server with configurations that can or cannot log in.
type login struct {
	*conformance.Host
	t      *testing.T
	ca     *testca.CA
	server *server
}

func newLogin(t *testing.T, s *server) *login {
	shortTemp(t) // leftovers of connections are checked there
	return &login{Host: conformance.NewHost(t, conformance.RunCommand), t: t, ca: testca.Must(t), server: s}
}

// deploy deploys with changes to the configuration, alternately keys and values; nil
// removes a key. The path of the private key is in the overlay.
func (l *login) deploy(changes ...any) error {
	l.t.Helper()
	config := l.server.config()
	for i := 0; i < len(changes); i += 2 {
		config[changes[i].(string)] = changes[i+1]
		if changes[i+1] == nil {
			delete(config, changes[i].(string))
		}
	}
	l.overlay("private_key_path", config["private_key_path"])
	delete(config, "private_key_path")
	_, err := l.Deploy(l.t.Context(), Type(), config, l.Material(l.t, l.ca))
	left, globErr := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	must(l.t, globErr)
	if len(left) > 0 {
		l.t.Errorf("the connection left %v", left)
	}
	return err
}

// overlay sets a key in the target's overlay; nil removes it.
func (l *login) overlay(key string, value any) {
	l.t.Helper()
	path := filepath.Join(l.Overlays, conformance.TargetID+".json")
	settings := make(map[string]any)
	if data, err := os.ReadFile(path); err == nil {
		must(l.t, json.Unmarshal(data, &settings))
	}
	settings[key] = value
	if value == nil {
		delete(settings, key)
	}
	data, err := json.Marshal(settings)
	must(l.t, err)
	must(l.t, os.WriteFile(path, data, 0o600))
}

// works fails the test unless a first deployment and a renewal succeed.
func (l *login) works(changes ...any) {
	l.t.Helper()
	for range 2 {
		os.Remove(filepath.Join(l.server.dir, "reloaded"))
		if err := l.deploy(changes...); err != nil {
			l.t.Fatal(err)
		}
		if _, without := find(changes, "reload_command"); !without && !l.server.reloaded() {
			l.t.Error("the reload command has not run")
		}
		checkFiles(l.t, l.server.certs, "cert.pem", "key.pem")
	}
}

func find(changes []any, key string) (any, bool) {
	for i := 0; i < len(changes); i += 2 {
		if changes[i] == key {
			return changes[i+1], true
		}
	}
	return nil, false
}

// refuses fails the test unless the deployment fails with an error that contains
// says, and changes nothing.
func (l *login) refuses(says string, changes ...any) {
	l.t.Helper()
	before := stateOf(l.server.certs)
	err := l.deploy(changes...)
	if err == nil || !strings.Contains(err.Error(), says) {
		l.t.Errorf("got %v, want an error with %q", err, says)
	}
	if after := stateOf(l.server.certs); !maps.Equal(before, after) {
		l.t.Errorf("%v\nthe files changed: from %v to %v", err, slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
	}
}

func TestOpenSSH(t *testing.T) {
	l := newLogin(t, openssh(t))
	t.Run("private key in a file", func(t *testing.T) { l.t = t; l.works() })
	t.Run("sftp only", func(t *testing.T) { l.t = t; l.works("reload_command", nil) })
	t.Run("private key itself", func(t *testing.T) {
		l.t = t
		l.works("private_key_path", nil, "private_key", strings.ReplaceAll(readFile(t, l.server.identity), "\n", "\r\n"))
	})
}

// TestHangs: the network stops in the middle of a deployment, but only
// that connection is lost.
func TestHangs(t *testing.T) {
	l := newLogin(t, openssh(t))
	l.works("reload_command", nil)
	failed := 0
	for after := 1000; after < 12_000; after += 1100 {
		proxy, err := netfault.New(l.server.address(), func(n int) netfault.Fault {
			if n > 0 {
				return netfault.Fault{}
			}
			return netfault.Fault{Then: netfault.Silence, After: after}
		})
		must(t, err)
		_, port, err := net.SplitHostPort(proxy.Addr())
		must(t, err)
		before := stateOf(l.server.certs)
		err = l.deploy("port", port, "timeout", 1, "reload_command", nil)
		if err == nil {
			checkFiles(t, l.server.certs, "cert.pem", "key.pem")
		} else if failed++; !maps.Equal(before, stateOf(l.server.certs)) {
			t.Errorf("silent after %d bytes: %v\nthe files changed", after, err)
		}
		proxy.Close()
	}
	if failed == 0 {
		t.Error("no deployment noticed")
	}
}

// TestSaysWhy: errors explain problems of the server.
func TestSaysWhy(t *testing.T) {
	l := newLogin(t, openssh(t))
	l.refuses("only letters, digits", "reload_command", "sh -c $HOME")
	l.refuses("refuses the private key", "private_key_path", keygen(t, filepath.Join(l.server.dir, "other"), "-t", "ed25519"))
	l.refuses("no such file", "private_key_path", filepath.Join(l.server.dir, "none"))
	l.refuses("refused", "port", needs.FreePort(t))
	l.refuses("does not exist", "cert_path", filepath.Join(l.server.dir, "none", "cert.pem"))
	l.Policy.Hosts = []policy.HostRule{}
	l.refuses("CERTCTL_ALLOWED_HOSTS", "host", "192.0.2.9")
	forced := newServer(t)
	forced.start(t, "ForceCommand "+sftpServer(t))
	l = newLogin(t, forced)
	l.works("reload_command", nil)
	l.refuses("cannot run commands", "reload_command", "true")
	l.refuses("cannot run commands", "validate_command", "true", "reload_command", nil)
	bare := newServer(t)
	bare.start(t, "Subsystem none /bin/false")
	newLogin(t, bare).refuses("has no SFTP")
	noisy := newServer(t)
	noisy.start(t, "ForceCommand echo Welcome to the machine")
	newLogin(t, noisy).refuses("startup files must not print anything")
}
