package ssh

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector/conformance"
)

const aPrivateKey = "-----BEGIN OPENSSH PRIVATE KEY-----"

const aKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJyuQh3pYc5V6TtMEYDKPqZGJSmGwTSxAhvmSSJ4nNfa"

func TestNew(t *testing.T) {
	base := map[string]any{"host": "web1.example.org", "user": "deploy", "cert_path": "/tls/c", "key_path": "/tls/k", "private_key": aPrivateKey}
	for _, test := range []struct {
		changes map[string]any
		says    string // "": no error
	}{
		{nil, ""},
		{map[string]any{"host": "[2001:db8::1]", "port": "2222", "timeout": "90s", "sudo": "true", "host_key": aKey}, ""},
		{map[string]any{"host_key": "web1.example.org " + aKey + " a comment\n" + aKey}, ""},
		{map[string]any{"auth_method": "password", "password": "x", "private_key": ""}, ""},
		{map[string]any{"reload_command": "/usr/bin/systemctl reload nginx@a.service --job-mode=fail"}, ""},
		{map[string]any{"host": "-oProxyCommand=id"}, "host"},
		{map[string]any{"host": "web1 id"}, "host"},
		{map[string]any{"host": "fe80::1%eth0.7"}, ""},
		{map[string]any{"host": "fe80::1%$(id)"}, "host"},
		{map[string]any{"host": "fe80::1%eth0\nProxyCommand id"}, "host"},
		{map[string]any{"host": "web1%eth0"}, "host"},
		{map[string]any{"host": "fe80::1%"}, "host"},
		{map[string]any{"user": "-oProxyCommand=id"}, "user"},
		{map[string]any{"user": "a b"}, "user"},
		{map[string]any{"port": 0}, ""}, // the default
		{map[string]any{"port": 65536}, "port"},
		{map[string]any{"auth_method": "agent"}, "auth_method"},
		{map[string]any{"auth_method": "password"}, "password"},
		{map[string]any{"auth_method": "password", "password": "a\nb"}, "password"},
		{map[string]any{"private_key": ""}, "private_key_path: is required"},
		{map[string]any{"private_key": "/id"}, "as PEM"},
		{map[string]any{"private_key_path": "/root/.ssh/id_ed25519"}, "private_key_path: it makes the agent log in with a key of this host"},
		{map[string]any{"private_key_path": "********"}, "private_key_path"},
		{map[string]any{"host_key": "********"}, "host_key"},
		{map[string]any{"host_key": "ssh-ed25519 AAAA"}, "host_key"},
		{map[string]any{"host_key": "ssh-rsa " + strings.Fields(aKey)[1]}, "host_key"},
		{map[string]any{"host_key": "* * " + aKey}, "host_key"},
		{map[string]any{"host_key": aKey, "known_hosts": "/k"}, "known_hosts is set too"},
		{map[string]any{"ssh_config": "/tmp/config"}, "only the target's overlay"},
		{map[string]any{"key_path": "/tls/c"}, "same file"},
		{map[string]any{"chain_path": "/tls/k"}, "same file"},
		{map[string]any{"key_mode": "0644"}, "key_mode"},
		{map[string]any{"timeout": "soon"}, "timeout"},
		{map[string]any{"reload_command": "systemctl reload ~nginx"}, `not "~"`},
		{map[string]any{"validate_command": "nginx -t # all"}, "validate_command"},
		{map[string]any{"reload_command": "a\nb"}, "reload_command"},
	} {
		host := conformance.NewHost(t, nil)
		config := maps.Clone(base)
		maps.Copy(config, test.changes)
		_, err := host.Connector(Type(), config)
		if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%v: got %v, want an error with %q", test.changes, err, test.says)
		}
	}
}

// TestOverlay: only the overlay may use files of this host.
func TestOverlay(t *testing.T) {
	const overlayKey = `{"private_key_path": "/id"`
	const overlayPassword = `{"auth_method": "password", "password": "x"`
	for _, test := range []struct {
		overlay string
		changes map[string]any
		says    string // "": no error
	}{
		{overlayKey + `}`, nil, ""},
		{overlayKey + `}`, map[string]any{"private_key_path": "/root/.ssh/id_ed25519", "host_key": aKey}, ""}, // the overlay wins
		{overlayKey + `}`, map[string]any{"private_key": aPrivateKey}, "private_key: private_key_path is set too"},
		{overlayPassword + `}`, nil, ""},
		{overlayPassword + `}`, map[string]any{"host_key": aKey}, "must be there too"},
		{overlayPassword + `}`, map[string]any{"known_hosts": "/tmp/mine"}, "must be there too"},
		{overlayPassword + `, "host_key": "` + aKey + `"}`, map[string]any{"host_key": "ssh-rsa AAAA"}, ""},
		{overlayPassword + `, "host_key": "` + aKey + `"}`, map[string]any{"known_hosts": "/tmp/mine"}, "must be there too"},
	} {
		host := conformance.NewHost(t, nil)
		must(t, os.WriteFile(filepath.Join(host.Overlays, conformance.TargetID+".json"), []byte(test.overlay), 0o600))
		config := map[string]any{"host": "web1.example.org", "user": "deploy", "cert_path": "/tls/c", "key_path": "/tls/k"}
		maps.Copy(config, test.changes)
		_, err := host.Connector(Type(), config)
		if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s, %v: got %v, want an error with %q", test.overlay, test.changes, err, test.says)
		}
	}
}

// TestKeyStaysThere: the agent reads another key only up to the first
// bytes that differ.
func TestKeyStaysThere(t *testing.T) {
	h := newThere(t)
	must(t, h.deploy(local(t, nil), h.Material(t, h.ca)))
	old := readFile(t, filepath.Join(h.dir, "key.pem"))
	read := new(recorder)
	must(t, h.deploy(local(t, read.wrap), h.Material(t, h.ca)))
	// After the first line, and the common start of keys of one type, come the 32
	// bytes of the private number (RFC 5915), and then the public part.
	secret := old[len("-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEI"):][:42]
	for at := 0; at+8 <= len(secret); at++ {
		if strings.Contains(read.String(), secret[at:at+8]) {
			t.Fatalf("bytes %d to %d of the old key came over the connection", at, at+8)
		}
	}
	if readFile(t, filepath.Join(h.dir, "key.pem")) == old {
		t.Error("the key was not replaced")
	}
	if left, err := os.ReadDir(h.dir); err != nil || len(left) != 3 {
		t.Errorf("left %v, %v", left, err)
	}
}
