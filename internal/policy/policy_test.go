package policy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/testing/needs"
)

func TestCommandAllowList(t *testing.T) {
	allowed := [][]string{{"nginx", "-t"}, {"systemctl", "reload", "*"}}
	tests := []struct {
		line    string
		allowed [][]string
		ok      bool
	}{
		{"nginx -t", allowed, true},
		{"nginx  -t ", allowed, true},
		{"nginx -t -c /evil", allowed, false},
		{"nginx", allowed, false},
		{"systemctl reload nginx", allowed, true},
		{"systemctl reload", allowed, true},
		{"systemctl stop nginx", allowed, false},
		{"systemctl reload-or-restart x", allowed, false},
		{"anything at all", nil, true},
		{"nginx -t", [][]string{}, false},
		{"nginx -t", [][]string{{}}, false},
		{"nginx * x", [][]string{{"nginx", "*", "y"}}, false},
		{"a b", [][]string{{"*"}}, true},
	}
	for _, test := range tests {
		p := &Policy{Commands: test.allowed}
		c, err := p.Command(test.line, time.Second)
		if (err == nil) != test.ok {
			t.Errorf("%q under %q: got %v", test.line, test.allowed, err)
		}
		if err != nil && !strings.Contains(err.Error(), "CERTCTL_ALLOWED_COMMANDS") {
			t.Errorf("%q: %v does not name the setting", test.line, err)
		}
		if err == nil && c.Timeout != time.Second {
			t.Errorf("%q: timeout %v", test.line, c.Timeout)
		}
	}
	if _, err := (&Policy{}).Command("nginx; reboot", 0); err == nil {
		t.Error("a semicolon: got no error")
	}
}

func TestAllowedPaths(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(base, "real/tls"), 0o755))
	must(t, os.MkdirAll(filepath.Join(base, "real/keys"), 0o755))
	must(t, os.Symlink("real", filepath.Join(base, "link")))
	p := &Policy{
		Paths:     []string{filepath.Join(base, "link"), filepath.Join(base, "later")},
		Protected: []string{filepath.Join(base, "link/keys"), filepath.Join(base, "real/agent.env")},
	}
	tests := []struct {
		path string
		says string // "" is allowed
	}{
		{base + "/real/tls/cert.pem", ""},
		{base + "/later/not/there/yet", ""},
		{base + "/link/tls/cert.pem", "CERTCTL_ALLOWED_PATHS"}, // symlinks not resolved
		{base + "/realm/cert.pem", "CERTCTL_ALLOWED_PATHS"},
		{base + "/real", ""},
		{"/etc/passwd", "CERTCTL_ALLOWED_PATHS"},
		{base + "/real/keys/x.key", "belongs to the agent"},
		{base + "/real/KEYS/x.key", "belongs to the agent"},
		{base + "/real/agent.env", "belongs to the agent"},
		{base + "/real/../x", "shortest form"},
		{"real/tls", "shortest form"},
		{base + "/real//tls", "shortest form"},
		{base + "/real/tls/", "shortest form"},
		{base + "/real/a\nb", "shortest form"},
	}
	for _, test := range tests {
		err := p.CheckPath(test.path)
		if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: got %v, want %q", test.path, err, test.says)
		}
	}
	if err := (&Policy{Paths: []string{}}).CheckPath("/srv/x"); err == nil {
		t.Error("an empty list allows a path")
	}
	if err := (&Policy{Paths: []string{"/"}}).CheckPath("/srv/x"); err != nil {
		t.Errorf("everything is allowed, but got %v", err)
	}
}

// If the owner of an allowed directory replaces it by a symlink, nothing is allowed behind that.
func TestAllowedPathsThroughForeignLink(t *testing.T) {
	needs.Root(t, "making another user's symlink")
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	home, etc := filepath.Join(base, "home"), filepath.Join(base, "etc")
	must(t, os.Mkdir(home, 0o755))
	must(t, os.Mkdir(etc, 0o755))
	must(t, os.Symlink(etc, filepath.Join(home, "tls")))
	p := &Policy{Paths: []string{filepath.Join(home, "tls")}}
	if err := p.CheckPath(filepath.Join(etc, "x")); err != nil {
		t.Errorf("root's own link: %v", err)
	}
	must(t, os.Chown(home, 1000, -1))
	if err := p.CheckPath(filepath.Join(etc, "x")); err == nil {
		t.Error("a link in another user's directory: got no error")
	}
	must(t, os.Chown(home, 0, -1))
	must(t, os.Lchown(filepath.Join(home, "tls"), 1000, -1))
	if err := p.CheckPath(filepath.Join(etc, "x")); err == nil {
		t.Error("another user's link: got no error")
	}
	must(t, os.Lchown(filepath.Join(home, "tls"), 0, -1))
	must(t, os.Chmod(home, 0o777))
	if err := p.CheckPath(filepath.Join(etc, "x")); err == nil {
		t.Error("a link in a world-writable directory: got no error")
	}
}

func TestFatalPaths(t *testing.T) {
	p := &Policy{}
	for _, path := range []string{"/etc/certctl/agent.env", "/etc/passwd", "/etc/PASSWD", "/etc/shadow-", "/proc/sys/kernel/core_pattern", "/sys/x", "/dev/sda", "/boot/x",
		"/etc/systemd/system/x.service", "/usr/lib/systemd/system/x", "/etc/cron.d/x", "/var/spool/cron/crontabs/root", "/etc/sudoers.d/x", "/etc/sudoers",
		"/etc/profile.d/x.sh", "/home/joe/.bashrc", "/root/.ssh/authorized_keys", "/home/joe/.SSH/x", "/srv/authorized_keys", "/etc/ld.so.preload", "/usr/bin/x",
		"/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/0f6fa695.0", "/etc/pki/tls/certs/0f6fa695.r1", "/etc/ssl/cert.pem", "/etc/pki/tls/certs/ca-bundle.crt",
		"/etc/pki/ca-trust/source/anchors/x.pem", "/usr/local/share/ca-certificates/x.crt", "/usr/share/ca-certificates/x.crt", "/etc/pki/rpm-gpg/x",
		"/etc/apt/sources.list.d/x", "/etc/dpkg/dpkg.cfg.d/x", "/var/lib/dpkg/status", "/etc/yum.repos.d/x.repo", "/etc/dbus-1/system.d/x.conf",
		"/etc/tmpfiles.d/x.conf", "/etc/logrotate.d/x", "/root/x.pem", "/usr/lib/x86_64-linux-gnu/libc.so.6", "/lib/libx.so", "/usr/local/lib/libx.so",
		"/etc/init.d/x", "/etc/network/if-up.d/x", "/etc/NetworkManager/dispatcher.d/x", "/etc/udev/rules.d/x.rules", "/etc/modprobe.d/x.conf",
		"/etc/security/limits.d/x.conf", "/etc/default/x", "/etc/nologin", "/sbin/x", "/home/joe/.config/systemd/user/x.service", "/home/joe/.local/bin/x",
		"/home/joe/.forward", "/Library/LaunchDaemons/x.plist", "/Users/joe/Library/LaunchAgents/x.plist", "/USR/share/x", "/usr/x"} {
		if err := p.CheckPath(path); err == nil || !strings.Contains(err.Error(), "CERTCTL_ALLOWED_PATHS") {
			t.Errorf("%s: got %v", path, err)
		}
	}
	for _, path := range []string{"/etc/nginx/tls/cert.pem", "/etc/ssl/private/key.pem", "/srv/x", "/etc/certctl2/x", "/etc/passwords", "/home/joe/ssh/x",
		"/etc/ssl/certs/www.pem", "/etc/ssl/certs/0f6fa695.pem", "/etc/ssl/certs/www.12345678.0", "/etc/pki/tls/private/www.key", "/etc/pki/nginx/www.pem",
		"/etc/letsencrypt/archive/www/privkey1.pem", "/etc/haproxy/certs/example.so.pem", "/etc/docker/certs.d/registry/client.cert",
		"/etc/kubernetes/pki/apiserver.crt", "/usr/local/etc/nginx/tls/cert.pem", "/usr/local/nginx/conf/cert.pem", "/opt/homebrew/etc/nginx/cert.pem",
		"/var/lib/postgresql/15/main/server.key", "/var/lib/docker/volumes/tls/_data/cert.pem", "/home/joe/.config/traefik/cert.pem", "/roots/x.pem",
		"/etc/postfix/certs/cert.pem", "/etc/dovecot/private/key.pem", "/etc/NetworkManager/certs/wifi.pem"} {
		if err := p.CheckPath(path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := (&Policy{Paths: []string{"/etc"}}).CheckPath("/etc/certctl/tls/cert.pem"); err != nil {
		t.Errorf("allowed by the host's owner, but got %v", err)
	}
}

// Protected paths are found behind symlinks, whether they exist yet or not, and under other names
// such as hard links.
func TestProtectedElsewhere(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	join := func(name string) string { return filepath.Join(base, name) }
	must(t, os.MkdirAll(join("real/keys"), 0o755))
	must(t, os.Mkdir(join("tls"), 0o755))
	must(t, os.Symlink("real", join("link")))
	must(t, os.Symlink("link/keys", join("chain")))
	must(t, os.Symlink("nowhere/at/all", join("dangling")))
	must(t, os.WriteFile(join("agent.env"), nil, 0o600))
	must(t, os.Link(join("agent.env"), join("tls/other.pem")))
	tests := []struct {
		protected, path string
		refused         bool
	}{
		{"chain", "real/keys/x", true},
		{"chain/sub/dir", "real/keys/sub/dir/x", true},
		{"chain/sub/dir", "real/keys/sub/x", false},
		{"link/later/dir", "real/later/dir/x", true},
		{"link/later/dir", "real/LATER/dir/x", true},
		{"dangling", "nowhere/at/all/x", true},
		{"dangling/sub", "nowhere/at/all/sub", true},
		{"dangling/sub", "nowhere/at/all/other", false},
		{"agent.env", "tls/other.pem", true}, // one file with two names
		{"agent.env", "tls/third.pem", false},
		{"agent.env/below/a/file", "agent.env/below/a/file", true},
		{"link/../real/keys", "real/keys/x", true},
	}
	for _, test := range tests {
		p := &Policy{Paths: []string{"/"}, Protected: []string{join(test.protected)}}
		if err := p.CheckPath(join(test.path)); (err != nil) != test.refused {
			t.Errorf("%s while %s is protected: got %v", test.path, test.protected, err)
		}
	}
}

// A Look remembers the forbidden paths, but nothing about the checked path.
func TestLook(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	join := func(name string) string { return filepath.Join(base, name) }
	must(t, os.Mkdir(join("keys"), 0o755))
	must(t, os.WriteFile(join("keys/own"), nil, 0o600))
	p := &Policy{Paths: []string{"/"}, Protected: []string{join("keys/own"), join("later")}}
	look := p.Look()
	must(t, look.CheckPath(join("cert.pem")))
	must(t, os.Link(join("keys/own"), join("cert.pem")))
	if look.CheckPath(join("cert.pem")) == nil {
		t.Error("a destination was accepted after it became a protected file")
	}
	must(t, os.Mkdir(join("elsewhere"), 0o755))
	must(t, os.Symlink("elsewhere", join("later")))
	if err := look.CheckPath(join("elsewhere/x")); err != nil {
		t.Errorf("a protected path was looked at again: %v", err)
	}
	if p.CheckPath(join("elsewhere/x")) == nil {
		t.Error("the next Look does not see a new protected path")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
