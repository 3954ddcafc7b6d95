package windows

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/winrm"
)

const masked = "********"

// set is a change of the configuration and of the overlay.
type set struct {
	job, overlay map[string]any
	says         string // "": no error
}

func (f *fixture) try(config map[string]any, s set, overlay map[string]any) {
	f.t.Helper()
	merge := func(base, change map[string]any) map[string]any {
		merged := maps.Clone(base)
		maps.Copy(merged, change)
		maps.DeleteFunc(merged, func(_ string, value any) bool { return value == nil })
		return merged
	}
	f.overlay(merge(overlay, s.overlay))
	_, err := f.Connector(f.typ, merge(config, s.job))
	if (err == nil) != (s.says == "") || err != nil && !strings.Contains(err.Error(), s.says) {
		f.t.Errorf("%v, overlay %v: got %v, want an error with %q", s.job, s.overlay, err, s.says)
	}
	if err != nil && strings.Contains(err.Error(), password) {
		f.t.Errorf("the error shows the password: %v", err)
	}
}

func TestConfigIIS(t *testing.T) {
	f := newFixture(t, "IIS")
	logon := func(more ...any) map[string]any {
		values := map[string]any{"winrm_host": "203.0.113.1", "winrm_username": "u", "winrm_password": password}
		for i := 0; i < len(more); i += 2 {
			values[more[i].(string)] = more[i+1]
		}
		return map[string]any{"winrm": values}
	}
	config := map[string]any{"site_name": "O'Brien \"& Söhne\" $(x)", "cert_store": "WebHosting", "mode": "winrm"}
	for _, s := range []set{
		{},
		{job: map[string]any{"mode": nil}, says: "mode: local needs an agent that runs on Windows"},
		{job: map[string]any{"mode": "local"}, says: "set mode to winrm"},
		{job: map[string]any{"mode": "ssh"}, says: "expected winrm"},
		{job: map[string]any{"site_name": "a\nb"}, says: "site_name"},
		{job: map[string]any{"site_name": strings.Repeat("x", maxSite+1)}, says: "site_name"},
		{job: map[string]any{"cert_store": "Root"}, says: "what the host trusts"},
		{job: map[string]any{"cert_store": "CA"}, says: "what the host trusts"},
		{job: map[string]any{"cert_store": `..\My`}, says: "expected the name of a certificate store"},
		{job: map[string]any{"cert_store": "M*"}, says: "expected the name of a certificate store"},
		{job: map[string]any{"hostname": "a:443"}, says: "hostname"},
		{job: map[string]any{"hostname": strings.Repeat("x", 250)}},
		{job: map[string]any{"hostname": strings.Repeat("x", 250), "site_name": strings.Repeat("\"", 120)}, says: "hostname: together with the names"},
		{job: map[string]any{"binding_info": "a b"}, says: "host name of a binding"},
		{job: map[string]any{"binding_info": "*.example.org", "sni": true}},
		{job: map[string]any{"sni": true}, says: "sni: needs hostname"},
		{job: map[string]any{"port": 70000}, says: "port"},
		{job: map[string]any{"ip_address": "::1"}},
		{job: map[string]any{"ip_address": "fe80::1%eth0"}, says: "ip_address"},
		{job: map[string]any{"ip_address": "localhost"}, says: "ip_address"},
		{job: map[string]any{"exec_deadline": 60}, says: "exec_deadline"},
		{job: map[string]any{"post_deploy_verify": map[string]any{"enabled": true}}, says: "post_deploy_verify.endpoint"},
		{job: logon(), overlay: map[string]any{"winrm": nil}},
		{job: logon("winrm_password", masked), overlay: map[string]any{"winrm": nil}, says: "winrm.winrm_password: the control plane sent it masked"},
		{job: logon("winrm_password", ""), overlay: map[string]any{"winrm": nil}, says: "winrm.winrm_password: is required"},
		{job: logon("winrm_insecure", true), overlay: map[string]any{"winrm": nil}, says: "winrm.winrm_insecure"},
		{job: logon("winrm_https", false), overlay: map[string]any{"winrm": nil}, says: "winrm.winrm_https"},
		{job: logon("winrm_port", 5985), overlay: map[string]any{"winrm": nil}, says: "winrm.winrm_port"},
		{overlay: logon("winrm_insecure", true)},
		{overlay: logon("winrm_https", false)},
		{overlay: logon("winrm_https", false, "winrm_auth", "basic"), says: "winrm.winrm_https: without HTTPS"},
		{overlay: logon("winrm_auth", "kerberos"), says: "expected ntlm, basic or certificate"},
		{overlay: logon("winrm_auth", "certificate"), says: "winrm.winrm_cert_path: is required"},
		{overlay: logon("winrm_timeout", "soon"), says: "winrm.winrm_timeout: expected a whole number of seconds"},
		{overlay: logon("winrm_timeout", 30)},
		{overlay: logon("winrm_timeout", "2m")},
		{overlay: logon("winrm_host", "a/b"), says: "winrm.winrm_host: expected a host name"},
		{overlay: logon("winrm_host", "a b"), says: "winrm.winrm_host: expected a host name"},
		{overlay: logon("winrm_host", "u@a"), says: "winrm.winrm_host: expected a host name"},
		{overlay: logon("winrm_host", "[fe80::1%eth0]"), says: "winrm.winrm_host: expected a host name"},
		{overlay: logon("winrm_host", "[2001:db8::1]")},
		{overlay: logon("winrm_host", ""), says: "winrm.winrm_host: is required"},
		{overlay: logon("winrm_port", 99999), says: "port"},
		{job: map[string]any{"ca_bundle": "/etc/ssl/other.pem"}, says: "ca_bundle: an overlay sets the host"},
		{job: map[string]any{"server_fingerprint": strings.Repeat("ab", 32)}, says: "server_fingerprint: an overlay sets the host"},
		{overlay: map[string]any{"server_fingerprint": strings.Repeat("ab", 32)}},
		{overlay: map[string]any{"server_fingerprint": "ab"}, says: "ingerprint"},
	} {
		f.try(config, s, logon())
	}
}

func TestConfigWinCertStore(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	secret := filepath.Join(t.TempDir(), "password")
	must(t, os.WriteFile(secret, []byte(password+"\n"), 0o600))
	logon := map[string]any{"winrm_host": "203.0.113.1", "winrm_username": "u", "winrm_password": password}
	config := map[string]any{"mode": "winrm", "winrm_password": masked}
	for _, s := range []set{
		{},
		{overlay: map[string]any{"winrm_password": nil}, says: "winrm_password"},
		{overlay: map[string]any{"winrm_password": nil, "winrm_password_file": secret}},
		{job: map[string]any{"winrm_host": "203.0.113.9"}, overlay: map[string]any{"winrm_host": nil}, says: "winrm_host: an overlay has the password"},
		{job: map[string]any{"winrm_host": "203.0.113.9"}, overlay: map[string]any{"winrm_host": nil, "winrm_password": nil, "winrm_password_file": secret}, says: "winrm_host: an overlay has the password"},
		{job: map[string]any{"winrm_username": "Administrator"}, overlay: map[string]any{"winrm_username": nil}, says: "winrm_username: an overlay has the password"},
		{job: map[string]any{"winrm_auth": "basic"}, says: "winrm_auth: an overlay has the password"},
		{overlay: map[string]any{"winrm_auth": "basic"}},
		{job: map[string]any{"winrm_https": false}, says: "winrm_https"},
		{job: map[string]any{"winrm_https": false}, overlay: map[string]any{"winrm_port": 5985}, says: "winrm_https"},
		{job: map[string]any{"winrm_port": 5985}, says: "winrm_port"},
		{job: map[string]any{"winrm_insecure": true}, says: "winrm_insecure"},
		{overlay: map[string]any{"winrm_port": 5985}},
		{job: map[string]any{"winrm_auth": "certificate", "winrm_cert_path": "/a", "winrm_key_path": "/b"}, says: "only an overlay may set it"},
		{job: map[string]any{"store_location": "Everywhere"}, says: "store_location"},
		{job: map[string]any{"store_name": "Disallowed"}, says: "store_name"},
		{job: map[string]any{"store_name": "TrustedAppRoot"}, says: "what the host trusts"},
		{job: map[string]any{"store_name": "Windows Live ID Token Issuer"}, says: "what the host trusts"},
		{job: map[string]any{"store_name": "Remote Desktop"}},
		{job: map[string]any{"store_name": ""}},
		{job: map[string]any{"key_readers": "IIS APPPOOL\\www, S-1-5-20"}},
		{job: map[string]any{"key_readers": []string{"a"}, "store_location": "CurrentUser"}, says: "key_readers"},
		{job: map[string]any{"key_readers": []string{""}}, says: "key_readers"},
		{job: map[string]any{"friendly_name": "a\x07b"}, says: "friendly_name"},
		{job: map[string]any{"post_script": "Restart-Service x"}, says: "post_script"},
		{job: map[string]any{"post_script": ""}},
	} {
		f.try(config, s, logon)
	}
}

// TestOptions: the request that a configuration results in.
func TestOptions(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	for _, test := range []struct {
		more  map[string]any
		https bool
		port  int
	}{
		{nil, true, 5986},
		{map[string]any{"winrm_port": 5985}, false, 5985},
		{map[string]any{"winrm_port": 443}, true, 443},
		{map[string]any{"winrm_https": false}, false, 5985},
		{map[string]any{"winrm_https": true, "winrm_port": 5985}, true, 5985},
	} {
		overlay := map[string]any{"winrm_host": "[2001:db8::1]", "winrm_username": "u", "winrm_password": password, "winrm_timeout": 7}
		maps.Copy(overlay, test.more)
		f.overlay(overlay)
		_, err := f.Connector(f.typ, f.config)
		must(t, err)
		o := f.network.options[len(f.network.options)-1]
		if o.HTTPS != test.https || o.Port != test.port || o.Host != "2001:db8::1" || o.Auth != winrm.NTLM || o.Timeout != 7*time.Second || o.Password.Reveal() != password {
			t.Errorf("%v: got %+v", test.more, o)
		}
	}
}

func TestBindings(t *testing.T) {
	for _, test := range [][4]string{
		{"*", "443", "", "*:443:"},
		{"0.0.0.0", "443", "", "*:443:"},
		{"192.0.2.1", "8443", "WWW.example.org", "192.0.2.1:8443:www.example.org"},
		{"2001:DB8::1", "443", "", "[2001:db8::1]:443:"},
		{"[2001:db8::1]", "443", "", "[2001:db8::1]:443:"},
	} {
		c := iisConfig{SiteName: "x", CertStore: "My", IPAddress: test[0], Hostname: test[2]}
		must(t, json.Unmarshal([]byte(test[1]), &c.Port))
		must(t, c.check())
		if got := c.binding(); got != test[3] {
			t.Errorf("got %s, want %s", got, test[3])
		}
	}
}

// The policy is checked before anything is sent, and an overlay that sets
// the host allows that host.
func TestAllowedHosts(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	f.Policy.Hosts = []policy.HostRule{}
	if _, err := f.Connector(f.typ, f.config); err != nil {
		t.Errorf("a host that an overlay names: %v", err)
	}
	f.overlay(map[string]any{})
	config := map[string]any{"mode": "winrm", "winrm_host": "203.0.113.1", "winrm_username": "u", "winrm_password": password}
	_, err := f.Connector(f.typ, config)
	conformance.WantError(t, err, "winrm_host", "203.0.113.1:5986", "CERTCTL_ALLOWED_HOSTS")
	rule, err := policy.ParseHostRule("203.0.113.0/30:5986")
	must(t, err)
	f.Policy.Hosts = []policy.HostRule{rule}
	if _, err := f.Connector(f.typ, config); err != nil {
		t.Errorf("a host in the list: %v", err)
	}
	dial := f.network.options[len(f.network.options)-1].Dial
	_, err = dial(t.Context(), "203.0.113.1:5985")
	conformance.WantError(t, err, "is not the host of the target")
}

// A client certificate is read if an overlay names it.
func TestClientCertificate(t *testing.T) {
	f := newFixture(t, "WinCertStore")
	m := f.material()
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	must(t, os.WriteFile(cert, conformance.PEM(m.Leaf), 0o600))
	must(t, os.WriteFile(key, m.Key(), 0o644))
	f.overlay(map[string]any{"winrm_host": "win1.example.org", "winrm_auth": "certificate", "winrm_cert_path": cert, "winrm_key_path": key})
	_, err := f.Connector(f.typ, f.config)
	conformance.WantError(t, err, "winrm_cert_path", key)
	must(t, os.Chmod(key, 0o600))
	_, err = f.Connector(f.typ, f.config)
	must(t, err)
	if o := f.network.options[len(f.network.options)-1]; o.Auth != winrm.Certificate || o.Certificate == nil {
		t.Error("the certificate is not given to the client")
	}
}
