package windows

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/testing/winrmhost"
	"certctl-agent/internal/transaction"
)

// live is a fixture whose host is reached over WinRM.
type live struct {
	*fixture
	server *winrmhost.Host
}

// newLive runs the model behind a WinRM service, with or without HTTPS.
func newLive(t *testing.T, kind string, https bool, o winrmhost.Options) *live {
	t.Helper()
	l := &live{fixture: newFixture(t, kind)}
	o.Domain, o.User, o.Password = "WIN1", "certctl", password
	o.Handler = func(command []string, stdin []byte) (stdout, stderr []byte, exit int) {
		stdout, stderr, exit, err := l.windows.Run(command, stdin)
		if err != nil {
			return nil, []byte(err.Error()), 1
		}
		return stdout, stderr, exit
	}
	logon := map[string]any{"winrm_host": "127.0.0.1", "winrm_username": `WIN1\certctl`, "winrm_password": password}
	more := map[string]any{}
	if https {
		certificate, err := l.ca.TLSCertificate("127.0.0.1")
		must(t, err)
		o.Certificate = &certificate
		file := filepath.Join(t.TempDir(), "ca.pem")
		must(t, os.WriteFile(file, l.ca.PEM(), 0o600))
		more["ca_bundle"] = file
	}
	var err error
	l.server, err = winrmhost.Start(o)
	must(t, err)
	t.Cleanup(l.server.Close)
	logon["winrm_port"], logon["winrm_https"] = l.server.Port, https
	if kind == "IIS" {
		l.typ, more["winrm"] = IIS(), logon
	} else {
		l.typ = WinCertStore()
		maps.Copy(more, logon)
	}
	l.overlay(more)
	return l
}

// TestLive: both types, over HTTPS and plain HTTP, with output in UTF-16.
func TestLive(t *testing.T) {
	for _, kind := range []string{"IIS", "WinCertStore"} {
		for _, https := range []bool{true, false} {
			l := newLive(t, kind, https, winrmhost.Options{})
			l.server.SetUTF16(!https)
			first, second := l.material(), l.material()
			l.mustDeploy(first)
			if result := l.mustDeploy(first); !result.Unchanged {
				t.Errorf("%s: the second deployment changes something", kind)
			}
			before := l.windows.State()
			if _, err := l.deploy(second, unverified()...); err == nil || conformance.Broken(err) {
				t.Errorf("%s: got %v, want a deployment that is undone", kind, err)
			}
			if after := l.windows.State(); !maps.Equal(before, after) {
				t.Errorf("%s: from %v to %v", kind, before, after)
			}
			l.mustDeploy(second)
			if !l.holds(`LocalMachine\My`, thumbprint(second.Leaf)) {
				t.Errorf("%s: the certificate is not there", kind)
			}
			if n := l.server.Shells(); n > 0 {
				t.Errorf("%s: %d shells are left", kind, n)
			}
			if counts := l.server.Counts(); counts.Failed > 0 {
				t.Errorf("%s: %d logons failed", kind, counts.Failed)
			}
		}
	}
}

// TestWrongPassword: a wrong password is only tried once in a deployment, since more tries could
// lock the account.
func TestWrongPassword(t *testing.T) {
	l := newLive(t, "WinCertStore", true, winrmhost.Options{LockAfter: 2})
	logon := l.logon()
	logon["winrm_password"] = "another"
	l.overlay(logon)
	l.refuses(l.material(), []string{"the host refuses the logon", `WIN1\\certctl`, "4625"})
	if counts := l.server.Counts(); counts.Failed != 1 || counts.Locked {
		t.Errorf("the password was tried %d times", counts.Failed)
	}
}

// TestDroppedShell: whatever is lost in whichever call, the deployment ends with
// the complete old or new state, or says that the target needs attention, and the next
// one converges.
func TestDroppedShell(t *testing.T) {
	for _, test := range []struct {
		action  string
		trouble winrmhost.Trouble
	}{
		{"Create", winrmhost.Trouble{Drop: true}},
		{"Create", winrmhost.Trouble{Code: 995, Reason: "Der E/A-Vorgang wurde abgebrochen"}},
		{"Command", winrmhost.Trouble{Lose: true}},
		{"Send", winrmhost.Trouble{Drop: true}},
		{"Send", winrmhost.Trouble{Lose: true}},
		{"Receive", winrmhost.Trouble{Status: 503, Body: "<b>busy</b>"}},
		{"Receive", winrmhost.Trouble{Lose: true}},
	} {
		l := newLive(t, "IIS", false, winrmhost.Options{})
		first := l.material()
		l.mustDeploy(first)
		var runs atomic.Int32
		l.Before = func(s transaction.Step) error {
			if s.Op == "change" {
				l.server.SetTrouble(func(action string) *winrmhost.Trouble {
					if action == test.action && runs.Add(1) == 1 {
						return &test.trouble
					}
					return nil
				})
			}
			return nil
		}
		m := l.material()
		_, err := l.deploy(m)
		l.Before = nil
		l.server.SetTrouble(nil)
		if err != nil && (conformance.Broken(err) || l.bound(site, binding) != thumbprint(first.Leaf)) || err == nil && l.bound(site, binding) != thumbprint(m.Leaf) {
			t.Errorf("%+v: %v, and the binding has %s", test, err, l.bound(site, binding))
		}
		if runs.Load() == 0 {
			t.Errorf("%s was not called", test.action)
		}
		l.mustDeploy(m)
		if l.bound(site, binding) != thumbprint(m.Leaf) || l.holds(`LocalMachine\My`, thumbprint(first.Leaf)) {
			t.Errorf("%+v: the next deployment did not converge", test)
		}
	}
}

// TestClock: the error names a clock that is too wrong for NTLM.
func TestClock(t *testing.T) {
	l := newLive(t, "WinCertStore", true, winrmhost.Options{Clock: time.Hour, HideClock: true})
	l.refuses(l.material(), []string{"clock", "1h0m0s ahead"})
}

// logon is an overlay that does not authenticate the host.
func (l *live) logon() map[string]any {
	return map[string]any{"winrm_host": "127.0.0.1", "winrm_port": l.server.Port, "winrm_username": `WIN1\certctl`, "winrm_password": password, "winrm_insecure": true}
}

// TestTrust: nothing is sent to a host that is not trusted.
func TestTrust(t *testing.T) {
	l := newLive(t, "WinCertStore", true, winrmhost.Options{})
	logon := l.logon()
	delete(logon, "winrm_insecure")
	l.overlay(logon)
	l.refuses(l.material(), []string{"TLS handshake", "unknown authority"})
	logon["server_fingerprint"] = strings.Repeat("ab", 32)
	l.overlay(logon)
	l.refuses(l.material(), []string{"TLS handshake", "server_fingerprint"})
	if counts := l.server.Counts(); counts.Logons+counts.Failed > 0 {
		t.Errorf("logged on to a host that nothing vouches for: %+v", counts)
	}
	l.overlay(l.logon())
	l.mustDeploy(l.material())
}

// TestBasicAndCertificate: the other two ways to log on.
func TestBasicAndCertificate(t *testing.T) {
	l := newLive(t, "WinCertStore", true, winrmhost.Options{Basic: true})
	logon := l.logon()
	logon["winrm_auth"], logon["winrm_username"] = "basic", "certctl"
	l.overlay(logon)
	l.mustDeploy(l.material())

	ca := testca.Must(t)
	l = newLive(t, "WinCertStore", true, winrmhost.Options{ClientCA: ca.Pool()})
	client, err := ca.Issue(testca.Template{CommonName: "certctl"})
	must(t, err)
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	must(t, os.WriteFile(cert, client.PEM(), 0o600))
	must(t, os.WriteFile(key, client.KeyPEM(), 0o600))
	logon = l.logon()
	logon["winrm_auth"], logon["winrm_cert_path"], logon["winrm_key_path"] = "certificate", cert, key
	delete(logon, "winrm_password")
	l.overlay(logon)
	l.mustDeploy(l.material())
}
