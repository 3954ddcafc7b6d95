package f5

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/testing/bigip"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/vendorapi"
)

func TestNew(t *testing.T) {
	for _, test := range []struct {
		key   string
		value any
		says  string // "": no error
	}{
		{"", nil, ""},
		{"host", "2001:db8::1", ""},
		{"host", "[2001:db8::1]", ""},
		{"host", "bigip.example.org/mgmt", "host"},
		{"host", "a b", "host"},
		{"host", "fe80::1%eth0", "host"},
		{"port", 70000, "port"},
		{"password", "********", "overlay"},
		{"ssl_profile", "www", ""},
		{"ssl_profile", "site/www", ""},
		{"ssl_profile", "/Tenant/app/www", ""},
		{"ssl_profile", "/www", "ssl_profile"},
		{"ssl_profile", "/Common/../www", "ssl_profile"},
		{"ssl_profile", "/Common/w w", "ssl_profile"},
		{"ssl_profile", "www?expandSubcollections=true", "ssl_profile"},
		{"ssl_profile", "/Common/" + strings.Repeat("x/", 200) + "y", "ssl_profile"},
		{"partition", "Tenant", "files of that partition and of Common"}, // the profile is in another one
		{"partition", "a/b", "partition"},
		{"profile_type", "server-ssl", ""},
		{"profile_type", "http", "client-ssl or server-ssl"},
		{"device_group", "pair", ""},
		{"device_group", "/Common/pair", ""},
		{"device_group", "pair force-full-load-push", "device_group"},
		{"timeout", 45, ""},
		{"timeout", "2m", ""},
		{"timeout", "soon", "timeout"},
		{"save_config", "no", ""},
		{"post_deploy_verify", map[string]any{"enabled": true}, "post_deploy_verify.endpoint"},

		// With these a control plane could choose which device is trusted.
		{"insecure", true, "insecure: it decides which device is trusted with the private key, so only the target's overlay may set it"},
		{"ca_bundle", "/tmp/evil.pem", "ca_bundle: it decides which device"},
		{"server_fingerprint", strings.Repeat("ab", 32), "server_fingerprint: it decides which device"},
		{"password_file", "/etc/shadow", "password_file"},
	} {
		host := conformance.NewHost(t, nil)
		err := host.Try(t, Type(), map[string]any{"host": "bigip.example.org", "username": "certctl", "password": "hunter2", "ssl_profile": profileName}, test.key, test.value, test.says)
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error shows the password: %v", err)
		}
	}
}

// TestOverlay: the overlay overrides the job, and its password is only sent where this host
// allows.
func TestOverlay(t *testing.T) {
	rule, err := policy.ParseHostRule("bigip.example.org")
	must(t, err)
	for _, test := range []struct {
		overlay map[string]any
		hosts   []policy.HostRule
		says    string
	}{
		{map[string]any{"insecure": true}, nil, ""},
		{map[string]any{"server_fingerprint": strings.Repeat("AB:", 31) + "AB"}, nil, ""},
		{map[string]any{"server_fingerprint": "AB"}, nil, "64 hexadecimal digits"},
		{map[string]any{"insecure": true, "ca_bundle": "/etc/ca.pem"}, nil, "set only one of"},
		{map[string]any{"password": "hunter2"}, nil, "put host, ca_bundle or server_fingerprint into the overlay too"},
		{map[string]any{"password": "hunter2", "host": "bigip.example.org"}, nil, ""},
		{map[string]any{"password": "hunter2", "ca_bundle": "/etc/ca.pem"}, nil, ""},
		{map[string]any{"password": "hunter2"}, []policy.HostRule{rule}, ""},
		{map[string]any{}, []policy.HostRule{}, "CERTCTL_ALLOWED_HOSTS"},
		{map[string]any{"host": "bigip.example.org"}, []policy.HostRule{}, ""},
	} {
		host := conformance.NewHost(t, nil)
		host.Policy.Hosts = test.hosts
		overlay(t, host.Overlays, test.overlay)
		_, err := host.Connector(Type(), map[string]any{"host": "bigip.example.org", "username": "certctl", "password": "x", "ssl_profile": profileName})
		if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%v: got %v, want an error with %q", test.overlay, err, test.says)
		}
	}
}

// TestTrust: TLS with each way to authenticate the device.
func TestTrust(t *testing.T) {
	f := newFixture(t, "17.1.1")
	m := f.material()
	overlay(t, f.Overlays, map[string]any{})
	_, err := f.deploy(m)
	conformance.WantError(t, err, "x509: ", "put ca_bundle or server_fingerprint into the target's overlay")
	overlay(t, f.Overlays, map[string]any{"server_fingerprint": strings.Repeat("ab", 32)})
	_, err = f.deploy(m)
	conformance.WantError(t, err, "the server's certificate has the SHA-256 fingerprint")
	if n := len(f.Calls()); n != 0 {
		t.Errorf("a device that is not believed got %d calls", n)
	}
	overlay(t, f.Overlays, map[string]any{"insecure": true})
	if result := f.mustDeploy(m); !slices.ContainsFunc(result.Warnings, func(w string) bool { return strings.Contains(w, "insecure is set") }) {
		t.Errorf("warnings %q", result.Warnings)
	}
	f.holds(m)
}

// TestVersions: the versions of BIG-IP answer and refuse differently.
func TestVersions(t *testing.T) {
	for _, version := range []string{"13.1.0", "14.1.5", "15.1.10", "16.1.4", "17.1.1"} {
		f := remote(t, version)
		for range 2 {
			m := f.material()
			f.mustDeploy(m)
			f.holds(m)
			if result := f.mustDeploy(m); !result.Unchanged {
				t.Errorf("%s: deployed again", version)
			}
		}
	}
	// 13.1 requires an RSA pair beside an ECDSA one.
	f := remote(t, "13.1.0")
	pair, err := f.ca.Issue(testca.Template{})
	must(t, err)
	f.Profile(clientSSL, "/Common/ec", "")
	if err := f.Install("/Common/ec", pair.LeafPEM(), pair.KeyPEM(), clientSSL+" /Common/ec"); err != nil {
		t.Fatal(err)
	}
}

// TestEntries: in a profile with several pairs the one of the same key type is
// replaced, and all others stay as they are, down to their passphrases.
func TestEntries(t *testing.T) {
	f := remote(t, "17.1.1")
	pair, err := f.ca.Issue(testca.Template{})
	must(t, err)
	must(t, f.Install("/Common/old", pair.LeafPEM(), pair.KeyPEM(), clientSSL+" "+profileName))
	before := f.running()[clientSSL+" "+profileName]
	m := f.material()
	_, err = f.deploy(m, unverified()...)
	conformance.WantError(t, err, "the previous certificate is back in place")
	if after := f.running()[clientSSL+" "+profileName]; after != before {
		t.Errorf("undone: %s, was %s", after, before)
	}
	f.mustDeploy(m)
	f.holds(m)
	state := f.running()
	if got := state[clientSSL+" "+profileName]; !strings.Contains(got, `{"Name":"default","Cert":"/Common/default.crt"`) || strings.Contains(got, "old.crt") || !strings.Contains(got, `"Name":"old","Cert":"`+leafPath(m)) {
		t.Errorf("the profile is %s", got)
	}
	if state["ssl-key /Common/old.key"] == "" {
		t.Error("someone else's file was removed")
	}
	// Without a chain, the old one is cleared.
	m.Chain = nil
	if result := f.mustDeploy(m); result.Unchanged {
		t.Error("another chain was not installed")
	}
	f.holds(m)
	if got := f.running()[clientSSL+" "+profileName]; strings.Contains(got, `"CA":"/`) {
		t.Errorf("a chain is left: %s", got)
	}
	if result := f.mustDeploy(m); !result.Unchanged {
		t.Error("deployed again")
	}
}

// TestPassphrase: a passphrase is kept, restored and removed together with its
// key.
func TestPassphrase(t *testing.T) {
	f := remote(t, "15.1.10")
	f.Passphrase(profileName, "default", "of-the-rsa-key")
	key, err := pemutil.ParseKey([]byte(f.running()["ssl-key /Common/default.key"]))
	must(t, err)
	pair, err := f.ca.Issue(testca.Template{Key: key})
	must(t, err)
	profile := func() string { return f.running()[clientSSL+" "+profileName] }
	kept := `"default","Cert":"/Common/default.crt","Key":"/Common/default.key","CA":"","Passphrase":"$M$`
	f.mustDeploy(f.material()) // ECDSA
	if got := profile(); !strings.Contains(got, kept) {
		t.Errorf("beside another: %s", got)
	}
	before := profile()
	m := f.material()
	m.Leaf, m.Chain, m.KeyPEM = pair.Leaf, nil, pair.KeyPEM()
	_, err = f.deploy(m, unverified()...)
	conformance.WantError(t, err, "back in place")
	if got := profile(); got != before {
		t.Errorf("undone: %s, was %s", got, before)
	}
	f.mustDeploy(m)
	f.holds(m)
	if got := profile(); strings.Contains(got, "$M$") || strings.Contains(got, "/Common/default.key") || strings.Count(got, `"Name"`) != 2 {
		t.Errorf("replaced: %s", got)
	}
}

// TestInherits: an undo makes the profile inherit again.
func TestInherits(t *testing.T) {
	f := remote(t, "17.1.1")
	before := f.running()
	if !strings.Contains(before[clientSSL+" "+profileName], `"Inherit":true`) {
		t.Fatal("it does not inherit")
	}
	_, err := f.deploy(f.material(), unverified()...)
	conformance.WantError(t, err, "back in place")
	if after := f.running(); !maps.Equal(before, after) {
		t.Errorf("undone: %v", after)
	}
	if saved, _ := f.InSync(); !saved {
		t.Error("what was undone is not saved")
	}
}

func TestServerSSL(t *testing.T) {
	f := remote(t, "16.1.4")
	f.config["profile_type"] = serverSSL
	before := f.running()
	m := f.material()
	_, err := f.deploy(m, unverified()...)
	conformance.WantError(t, err, "there was no certificate before")
	if after := f.running(); !maps.Equal(before, after) {
		t.Errorf("undone: %v", after)
	}
	for range 2 {
		f.mustDeploy(m)
		want := fmt.Sprintf(`"Cert":"%s.crt","Key":"%[1]s.key","CA":%q`, leafPath(m), chainPath(m))
		if got := f.running()[serverSSL+" "+profileName]; !strings.Contains(got, want) {
			t.Errorf("the profile is %s, want %s", got, want)
		}
		if result := f.mustDeploy(m); !result.Unchanged {
			t.Error("deployed again")
		}
		m = f.material()
	}
	before = f.running()
	_, err = f.deploy(m, unverified()...)
	conformance.WantError(t, err, "the previous certificate is back in place")
	if after := f.running(); !maps.Equal(before, after) {
		t.Errorf("undone: %v", after)
	}
	pair, err := f.ca.Issue(testca.Template{})
	must(t, err)
	f.OnCall(func(c bigip.Call) bigip.Fault {
		if c.Is("POST", "/mgmt/tm/sys/config") {
			f.OnCall(nil)
			if err := f.Install("/Common/other", pair.LeafPEM(), pair.KeyPEM(), serverSSL+" "+profileName); err != nil {
				t.Error(err)
			}
		}
		return bigip.None
	})
	_, err = f.deploy(m, unverified()...)
	conformance.WantError(t, err, "someone else has changed the profile since, so it was left alone")
	if got := f.running()[serverSSL+" "+profileName]; !strings.Contains(got, "/Common/other.crt") {
		t.Errorf("someone else's change is lost: %s", got)
	}
}

// TestPartitions: files are in the target's partition, also for a profile in a
// folder.
func TestPartitions(t *testing.T) {
	f := remote(t, "17.1.1")
	f.Profile(clientSSL, "/Tenant/www", "")
	m := f.material()
	f.mustDeploy(m, "ssl_profile", "www", "partition", "Tenant")
	state := f.running()
	in := strings.Replace(leafPath(m), "/Common/", "/Tenant/", 1)
	if state["ssl-key "+in+".key"] == "" || state["ssl-key "+leafPath(m)+".key"] != "" || !strings.Contains(state[clientSSL+" /Tenant/www"], in) {
		t.Errorf("got %v", state)
	}
	_, err := f.deploy(m, "ssl_profile", "/Common/none")
	conformance.WantError(t, err, "client-ssl profile /Common/none does not exist: create it on the device")
}

// TestRetention: unused older files of this target are removed, except
// the newest. Files of others are not touched.
func TestRetention(t *testing.T) {
	f := remote(t, "17.1.1")
	pair, err := f.ca.Issue(testca.Template{})
	must(t, err)
	strangers := []string{"/Common/certctl-target-1-0123456789abcdef-0123456789abcdef", // of target-1-0123456789abcdef
		"/Common/certctl-target-10-0123456789abcdef", "/Common/certctl-target-1-mine", "/Common/certctl-target-1-0123456789abcdef-old", "/Common/www"}
	for _, path := range strangers {
		must(t, f.Install(path, pair.LeafPEM(), pair.KeyPEM(), ""))
	}
	var all []*connector.Material
	for range 5 {
		m := f.material()
		f.mustDeploy(m, "backup_retention", 2)
		f.holds(m)
		all = append(all, m)
	}
	kept := func() (kept []bool) {
		state := f.running()
		for _, m := range all {
			kept = append(kept, state["ssl-key "+leafPath(m)+".key"] != "")
		}
		return kept
	}
	if got := kept(); !slices.Equal(got, []bool{false, false, true, true, true}) {
		t.Errorf("kept %v, want the newest two beside the current one", got)
	}
	// A file in use elsewhere stays.
	f.Profile(clientSSL, "/Common/other", "")
	state := f.running()
	must(t, f.Install(leafPath(all[2]), []byte(state["ssl-cert "+leafPath(all[2])+".crt"]), []byte(state["ssl-key "+leafPath(all[2])+".key"]), clientSSL+" /Common/other"))
	result := f.mustDeploy(all[4], "backup_retention", -1)
	if got := kept(); !result.Unchanged || !slices.Equal(got, []bool{false, false, true, false, true}) || len(result.Warnings) > 0 {
		t.Errorf("kept %v, %+v", got, result)
	}
	f.holds(all[4])
	for _, path := range strangers {
		if state := f.running(); state["ssl-key "+path+".key"] == "" || state["ssl-cert "+path+".crt"] == "" {
			t.Errorf("%s was removed", path)
		}
	}
}

// TestUnchanged: an installed pair is left alone, no matter who installed it, and the
// agent sends no changes.
func TestUnchanged(t *testing.T) {
	f := remote(t, "17.1.1")
	m := f.material()
	m.Chain = nil
	must(t, f.Install("/Common/by-hand", conformance.PEM(m.Leaf), m.Key(), clientSSL+" "+profileName))
	if result := f.mustDeploy(m, "device_group", bigip.Group); !result.Unchanged {
		t.Error("it was deployed again")
	}
	for _, call := range f.Calls() {
		if call.Method != "GET" && !strings.HasPrefix(call.Path, "/mgmt/shared/auth") {
			t.Errorf("%s %s was called", call.Method, call.Path)
		}
	}
	f.clean()
}

// TestSave: a failed save or sync is a warning and the next deployment tries again,
// or a failure if that is configured.
func TestSave(t *testing.T) {
	for _, must := range []bool{false, true} {
		for _, what := range []string{"save", "sync"} {
			synctest.Test(t, func(t *testing.T) {
				f := remote(t, "17.1.1")
				f.config["device_group"] = bigip.Group
				f.mustDeploy(f.material())
				before := f.running()
				if must {
					f.config["save_config"] = true
				}
				word := "tmsh save sys config"
				if what == "save" {
					f.SaveFails("01070640:3: the disk is full")
				} else {
					word = "tmsh run cm config-sync to-group pair"
					f.SyncTakes(0, true)
				}
				m := f.material()
				result, err := f.deploy(m)
				if must {
					conformance.WantError(t, err, word)
					if conformance.Broken(err) != (what == "sync") { // the other unit may have the new certificate
						t.Errorf("%s: %v", what, err)
					}
					if after := f.running(); !maps.Equal(before, after) {
						t.Errorf("%s: the device changed", what)
					}
				} else if err != nil || !strings.Contains(strings.Join(result.Warnings, " "), word) {
					t.Errorf("%s: got %v, %q", what, err, result.Warnings)
				}
				f.SaveFails("")
				f.SyncTakes(3, false)
				result, err = f.deploy(m)
				if err != nil || result.Unchanged == must || len(result.Warnings) > 0 {
					t.Errorf("%s, then again: %+v, %v", what, result, err)
				}
				f.holds(m)
				if _, synced := f.InSync(); !synced {
					t.Errorf("%s: the other unit is not in sync", what)
				}
			})
		}
	}
	f := remote(t, "17.1.1")
	m := f.material()
	result := f.mustDeploy(m, "save_config", false)
	if saved, _ := f.InSync(); saved || !strings.Contains(strings.Join(result.Warnings, " "), "after a restart it has the old certificate again") {
		t.Errorf("saved %v, %q", saved, result.Warnings)
	}
}

// TestSync: only the target's group counts, and the warning has the device's
// recommendation.
func TestSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := remote(t, "17.1.1")
		f.config["device_group"] = bigip.Group
		f.OtherPending()
		if result := f.mustDeploy(f.material()); len(result.Warnings) > 0 {
			t.Errorf("warnings %q", result.Warnings)
		}
		f.OnCall(func(c bigip.Call) bigip.Fault { // someone keeps changing it
			if c.Is("GET", "/mgmt/tm/cm/sync-status") {
				f.Unsynced()
			}
			return bigip.None
		})
		result := f.mustDeploy(f.material())
		if said := strings.Join(result.Warnings, " "); !strings.Contains(said, "the sync status is Changes Pending; Recommended action: Synchronize bigip1.example.org to group pair") {
			t.Errorf("warnings %q", said)
		}
	})
}

// TestRestart: the agent notices that a device lost an unsaved change.
func TestRestart(t *testing.T) {
	f := remote(t, "17.1.1")
	m := f.material()
	f.OnCall(func(c bigip.Call) bigip.Fault {
		if c.Is("POST", "/mgmt/tm/sys/config") {
			return bigip.Reboot
		}
		return bigip.None
	})
	_, err := f.deploy(m)
	conformance.WantError(t, err, "the profile lost the new certificate: the device may have just restarted", "deploy again")
	f.OnCall(nil)
	f.mustDeploy(m)
	f.holds(m)
}

// TestChunks: a chain that is larger than one request.
func TestChunks(t *testing.T) {
	f := remote(t, "17.1.1")
	m := f.material()
	for len(m.Chain) < 1100 {
		m.Chain = append(m.Chain, m.Chain[0])
	}
	f.mustDeploy(m)
	f.holds(m)
	chunks := 0
	for _, call := range f.Calls() {
		if call.Is("POST", "/mgmt/shared/file-transfer/uploads/certctl-target-1.chain") {
			chunks++
		}
	}
	if got := f.running()["ssl-cert "+chainPath(m)]; chunks != 2 || got != string(conformance.PEM(m.Chain...)) {
		t.Errorf("%d chunks, and the chain has %d bytes", chunks, len(got))
	}
}

// TestOthers: someone else changes the profile after Read's last call, or while
// files are sent.
func TestOthers(t *testing.T) {
	for _, moment := range []string{"GET /mgmt/tm/sys/file/ssl-key", "POST /mgmt/shared/file-transfer/uploads/certctl-target-1.key"} {
		f := remote(t, "17.1.1")
		pair, err := f.ca.Issue(testca.Template{})
		must(t, err)
		f.OnCall(func(c bigip.Call) bigip.Fault {
			if c.Method+" "+c.Path == moment {
				f.OnCall(nil)
				must(t, f.Install("/Common/other", pair.LeafPEM(), pair.KeyPEM(), clientSSL+" "+profileName))
			}
			return bigip.None
		})
		_, err = f.deploy(f.material())
		conformance.WantError(t, err, "someone else changed the profile meanwhile")
		if got := f.running()[clientSSL+" "+profileName]; !strings.Contains(got, "/Common/other.crt") {
			t.Errorf("%s: someone else's change is lost: %s", moment, got)
		}
		f.clean()
	}
}

// TestLeastRole: the resource group on the page is sufficient and minimal.
func TestLeastRole(t *testing.T) {
	page, err := os.ReadFile("../../../docs/targets/f5.md")
	must(t, err)
	_, rest, ok := strings.Cut(string(page), "\"resources\": ")
	list, _, end := strings.Cut(rest, "]")
	var rules []bigip.Rule
	if !ok || !end || json.Unmarshal([]byte(list+"]"), &rules) != nil {
		t.Fatal("docs/targets/f5.md has no resource group")
	}
	f := remote(t, "17.1.1")
	f.Trust("certctl", "pass-of-certctl", rules...)
	f.Profile(clientSSL, "/Common/www", "")
	f.config["ssl_profile"] = "www"
	f.config["username"], f.config["password"], f.config["device_group"] = "certctl", "pass-of-certctl", bigip.Group
	for range 2 {
		m := f.material()
		result := f.mustDeploy(m, "backup_retention", -1)
		if len(result.Warnings) > 0 {
			t.Errorf("warnings %q", result.Warnings)
		}
		if saved, synced := f.InSync(); !saved || !synced {
			t.Errorf("saved %v, synced %v", saved, synced)
		}
	}
	before := f.running()
	_, err = f.deploy(f.material(), unverified()...)
	conformance.WantError(t, err, "back in place")
	after := f.running()
	// It may not run rm, so each upload is overwritten with one byte.
	for name, data := range after {
		if strings.HasPrefix(name, "upload ") && data != "\n" {
			t.Errorf("%s holds %q", name, data)
		}
	}
	if !maps.Equal(before, after) {
		t.Errorf("undone: %v", slices.Sorted(maps.Keys(after)))
	}
	// A failed transaction, and files that someone replaced.
	f.OnCall(func(c bigip.Call) bigip.Fault {
		if c.Is("PATCH", "/mgmt/tm/transaction/") {
			f.OnCall(nil)
			return bigip.Fail
		}
		return bigip.None
	})
	m := f.material()
	_, err = f.deploy(m)
	conformance.WantError(t, err, "change the profile: 500")
	f.mustDeploy(m)
	pair, err := f.ca.Issue(testca.Template{})
	must(t, err)
	must(t, f.Install(leafPath(m), pair.LeafPEM(), pair.KeyPEM(), ""))
	f.mustDeploy(m)
	if got := f.running()["ssl-key "+leafPath(m)+".key"]; got != string(m.Key()) {
		t.Error("a key that was replaced stays")
	}
	used := make(map[bigip.Rule]bool)
	for _, call := range f.Calls() {
		for _, rule := range rules {
			if rule.Matches(call.Method, call.Path) {
				used[rule] = true
			}
		}
	}
	for _, rule := range rules {
		if !used[rule] {
			t.Errorf("%s %s is not needed", rule.Method, rule.Mask)
		}
	}
	f.Trust("certctl", "pass-of-certctl", rules[1:]...)
	_, err = f.deploy(f.material())
	conformance.WantError(t, err, "the account may not "+rules[0].Method)
}

// TestSecrets looks for the password, the token and the keys in all that the
// agent stores or prints, after deployments that succeed, fail and are undone.
func TestSecrets(t *testing.T) {
	f := remote(t, "17.1.1")
	var said []string
	var keys []string
	for _, more := range [][]any{nil, unverified(), {"password", bigip.Password + "x"}, {"ssl_profile", "/Common/none"}} {
		for _, fault := range []bigip.Fault{bigip.None, bigip.Fail, bigip.Echo, bigip.Mute} {
			f.OnCall(func(c bigip.Call) bigip.Fault {
				if c.Is("PATCH", "/mgmt/tm/transaction/") || c.Is("POST", "/mgmt/tm/util") || c.Is("POST", "/mgmt/shared/authn") && more == nil {
					return fault
				}
				return bigip.None
			})
			m := f.material()
			keys = append(keys, strings.Split(string(m.KeyPEM), "\n")[1])
			result, err := f.deploy(m, more...)
			said = append(said, fmt.Sprint(err), strings.Join(result.Warnings, "\n"))
		}
	}
	said = append(said, f.Log())
	files := 0
	must(t, filepath.WalkDir(f.StateDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s is %v", path, info.Mode())
		}
		data, err := os.ReadFile(path)
		said = append(said, string(data))
		files++
		return err
	}))
	if files == 0 {
		t.Error("nothing is kept")
	}
	all := strings.Join(said, "\n")
	for _, secret := range append(keys, bigip.Password, "TOKEN0", "SECRET") {
		if strings.Contains(all, secret) {
			t.Errorf("%q shows in:\n%s", secret, all)
		}
	}
}

// TestScrub: the password is not in the error, however the device quotes
// the request.
func TestScrub(t *testing.T) {
	d := newDevice(&config{Password: secret.New(`p"s\<&>w`)}, "", nil, 0)
	for _, body := range []string{
		strings.Repeat("x", 297) + `p"s\<&>w`,
		`{"message": "bad: {\"password\": \"p\\\"s\\\\\\u003c\\u0026\\u003ew\"}"}`,
		`{"password": "p\"s\\\u003c\u0026\u003ew"`,
	} {
		if got := d.message([]byte(body)); strings.Contains(got, "p\"s") || strings.Contains(got, `p\"s`) || strings.Contains(got, "w\"") {
			t.Errorf("%s shows %s", body, got)
		}
	}
}

// TestHostile: names of files in errors are bounded, and so are attempts to
// remove files.
func TestHostile(t *testing.T) {
	f := newFixture(t, "17.1.1")
	deletes := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasPrefix(r.URL.Path, "/mgmt/shared/authn"):
			fmt.Fprint(w, `{"token": {"token": "T"}}`)
		case strings.Contains(r.URL.Path, "/profile/"):
			fmt.Fprintf(w, `{"certKeyChain": [{"name": "a", "cert": "/Common/a.crt", "key": "/Common/a\u001b[2J%s"}]}`, strings.Repeat("x", 4000))
		case r.Method == http.MethodDelete:
			deletes++
			http.Error(w, `{"message": "`+strings.Repeat("no ", 300)+`"}`, http.StatusBadRequest)
		case strings.HasSuffix(r.URL.Path, "/ssl-key"), strings.HasSuffix(r.URL.Path, "/ssl-cert"):
			var items []string
			for i := range 2000 {
				items = append(items, fmt.Sprintf(`{"fullPath": "/Common/certctl-target-1-%016x.key"}`, i))
			}
			fmt.Fprint(w, `{"items": [`+strings.Join(items, ",")+`]}`)
		default:
			http.Error(w, "{}", http.StatusInternalServerError)
		}
	}))
	defer server.Close()
	c, err := f.Connector(f.typ, f.config)
	must(t, err)
	c.(*target).device.base = server.URL
	c.(*target).device.api = vendorapi.New(vendorapi.Options{Message: c.(*target).device.message})
	plan, err := c.Plan(t.Context(), f.material())
	must(t, err)
	_, _, err = plan.Changes[0].Read(t.Context())
	if err == nil || len(err.Error()) > 1000 || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("got %.2000q", err)
	}
	err = plan.Changes[0].Finish(t.Context())
	if err == nil || len(err.Error()) > 4000 || deletes > maxSwept {
		t.Errorf("%d deletes, and %d bytes of errors", deletes, len(err.Error()))
	}
}

// TestEndless: an endless profile does not block the agent.
func TestEndless(t *testing.T) {
	f := newFixture(t, "17.1.1")
	calls := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if calls++; r.Method == http.MethodPost {
			fmt.Fprint(w, `{"token": {"token": "T"}}`)
			return
		}
		entry := `{"name": "a", "cert": "/Common/a.crt", "key": "/Common/a.key"}`
		fmt.Fprint(w, `{"keyType": "other", "certKeyChain": [`+strings.Repeat(entry+",", 10_000)+entry+`]}`)
	}))
	defer server.Close()
	c, err := f.Connector(f.typ, f.config)
	must(t, err)
	c.(*target).device.base = server.URL
	c.(*target).device.api = vendorapi.New(vendorapi.Options{})
	plan, err := c.Plan(t.Context(), f.material())
	must(t, err)
	_, _, err = plan.Changes[0].Read(t.Context())
	conformance.WantError(t, err, "10001 entries")
	if calls > 3 {
		t.Errorf("%d calls", calls)
	}
}

// TestTwoTargets: an RSA and an ECDSA certificate in one profile are two targets,
// and each undoes its own part.
func TestTwoTargets(t *testing.T) {
	f := remote(t, "17.1.1")
	f.mustDeploy(f.material())
	key, err := pemutil.ParseKey([]byte(f.running()["ssl-key /Common/default.key"]))
	must(t, err)
	pair, err := f.ca.Issue(testca.Template{Key: key})
	must(t, err)
	f.OnCall(func(c bigip.Call) bigip.Fault {
		if c.Is("POST", "/mgmt/tm/sys/config") {
			f.OnCall(nil)
			if err := f.Install("/Common/rsa", pair.LeafPEM(), pair.KeyPEM(), clientSSL+" "+profileName); err != nil {
				t.Error(err)
			}
		}
		return bigip.None
	})
	m := f.material()
	_, err = f.deploy(m, unverified()...)
	conformance.WantError(t, err, "back in place")
	if got := f.running()[clientSSL+" "+profileName]; !strings.Contains(got, "/Common/rsa.crt") || strings.Contains(got, leafPath(m)) {
		t.Errorf("the profile is %s", got)
	}
}
