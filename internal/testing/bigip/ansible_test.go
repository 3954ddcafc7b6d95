package bigip_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/testing/bigip"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

// TestAnsible runs F5's Ansible modules against the fake.
func TestAnsible(t *testing.T) {
	ansible := needs.Need(t, "ansible-playbook")
	d, err := bigip.New("15.1.2")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	defer d.Stop()
	at, err := url.Parse(d.URL())
	if err != nil {
		t.Fatal(err)
	}
	ca := testca.Must(t)
	first, err := ca.Issue(testca.Template{CommonName: "www", Intermediates: 1, OmitRoot: true})
	if err != nil {
		t.Fatal(err)
	}
	second, err := ca.Issue(testca.Template{CommonName: "www"})
	if err != nil {
		t.Fatal(err)
	}
	provider := map[string]any{"server": "127.0.0.1", "server_port": at.Port(), "user": bigip.Admin, "password": bigip.Password, "validate_certs": false, "no_f5_teem": true}
	task := func(module string, args map[string]any) map[string]any {
		args["provider"] = provider
		return map[string]any{"name": module, "f5networks.f5_modules." + module: args}
	}
	failing := func(module string, args map[string]any, says string) map[string]any {
		t := task(module, args)
		t["register"], t["failed_when"] = "refused", "not (refused.msg | default('')) is search('"+says+"')"
		return t
	}
	entry := func(name, chain string) []any {
		return []any{map[string]any{"cert": name, "key": name, "chain": chain}}
	}
	// JSON is valid YAML and preserves the line ends of PEM.
	playbook, err := json.Marshal([]any{map[string]any{"hosts": "localhost", "connection": "local", "gather_facts": false, "tasks": []any{
		task("bigip_ssl_certificate", map[string]any{"name": "www", "content": string(first.LeafPEM())}),
		task("bigip_ssl_certificate", map[string]any{"name": "chain", "content": string(testcaPEM(first))}),
		task("bigip_ssl_key", map[string]any{"name": "www", "content": string(first.KeyPEM())}),
		task("bigip_profile_client_ssl", map[string]any{"name": "www", "cert_key_chain": entry("www", "chain")}),
		failing("bigip_ssl_key", map[string]any{"name": "www", "content": string(second.KeyPEM())}, "01070317"),
		failing("bigip_ssl_key", map[string]any{"name": "www", "state": "absent"}, "01071349"),
		// A pair in use must be replaced in one transaction.
		task("bigip_ssl_key_cert", map[string]any{"key_name": "www", "key_content": string(second.KeyPEM()), "cert_name": "www", "cert_content": string(second.LeafPEM())}),
		task("bigip_ssl_key_cert", map[string]any{"key_name": "other", "key_content": string(first.KeyPEM()), "cert_name": "other", "cert_content": string(first.LeafPEM()), "partition": "Tenant"}),
		task("bigip_profile_server_ssl", map[string]any{"name": "back", "certificate": "www.crt", "key": "www.key"}),
		task("bigip_profile_client_ssl", map[string]any{"name": "www", "server_name": "www.example.org"}),
		task("bigip_config", map[string]any{"save": true}),
		task("bigip_configsync_action", map[string]any{"device_group": bigip.Group, "sync_device_to_group": true}),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "playbook.yml")
	if err := os.WriteFile(file, playbook, 0o600); err != nil {
		t.Fatal(err)
	}
	run := exec.CommandContext(t.Context(), ansible, "-i", "localhost,", file)
	run.Env = append(os.Environ(), "HOME="+dir, "ANSIBLE_HOME="+dir, "ANSIBLE_LOCAL_TEMP="+dir, "ANSIBLE_REMOTE_TEMP="+dir, "ANSIBLE_PIPELINING=1", "LC_ALL=C.UTF-8", "ANSIBLE_NOCOLOR=1")
	if out, err := run.CombinedOutput(); err != nil {
		for _, call := range d.Calls() {
			t.Log(call.Method, call.Path)
		}
		t.Fatalf("%v: %s", err, out)
	}
	state := d.State()
	for name, want := range map[string]string{
		"ssl-cert /Common/www.crt": string(second.LeafPEM()), "ssl-key /Common/www.key": string(second.KeyPEM()),
		"ssl-cert /Common/chain.crt": string(testcaPEM(first)),
		"ssl-key /Tenant/other.key":  string(first.KeyPEM()),
	} {
		for _, suffix := range []string{"", bigip.Saved, bigip.Peer} {
			if state[name+suffix] != want {
				t.Errorf("%s%s holds %q", name, suffix, state[name+suffix])
			}
		}
	}
	for name, want := range map[string]string{
		"client-ssl /Common/www":  `"Cert":"/Common/www.crt","Key":"/Common/www.key","CA":"/Common/chain.crt"`,
		"server-ssl /Common/back": `"Cert":"/Common/www.crt","Key":"/Common/www.key"`,
	} {
		if !strings.Contains(state[name], want) {
			t.Errorf("%s is %s", name, state[name])
		}
	}
	if saved, synced := d.InSync(); !saved || !synced || state["tokens"] != "" {
		t.Errorf("saved %v, synced %v, %s tokens left", saved, synced, fmt.Sprint(state["tokens"]))
	}
}

// testcaPEM returns the chain of a certificate.
func testcaPEM(i *testca.Issued) []byte { return i.PEM()[len(i.LeafPEM()):] }
