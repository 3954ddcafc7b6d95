package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/app"
	"certctl-agent/internal/connector/all"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

// planned runs the command with a target's configuration and returns its exit code and output.
func planned(t *testing.T, settings map[string]string, config string, args ...string) (int, string) {
	t.Helper()
	var out strings.Builder
	code := run(t.Context(), process{
		args:   append([]string{"plan", "-config", "-"}, args...),
		getenv: func(name string) string { return settings[name] },
		stdin:  strings.NewReader(config),
		stdout: &out,
		stderr: &out,
	})
	return code, out.String()
}

// planHost creates a host with an old certificate and settings for the agent, which has never run.
func planHost(t *testing.T) (dir string, settings map[string]string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ca := testca.Must(t)
	issued, err := ca.Issue(testca.Template{})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"tls/cert.pem": issued.LeafPEM(), "tls/key.pem": issued.KeyPEM(), "new.pem": issued.PEM()} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("cert.pem", filepath.Join(dir, "tls/link.pem")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "targets.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir, map[string]string{
		"CERTCTL_KEY_DIR":     filepath.Join(dir, "keys"),
		"CERTCTL_TARGETS_DIR": filepath.Join(dir, "targets.d"),
	}
}

func TestPlan(t *testing.T) {
	dir, settings := planHost(t)
	overlay := filepath.Join(dir, "targets.d", "t-web.json")
	if err := os.WriteFile(overlay, []byte(`{"key_path": "`+dir+`/tls/key.pem", "post_deploy_verify": {"enabled": true}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	before := treeOf(t, dir)
	config := fmt.Sprintf(`{"cert_path": "%s/tls/link.pem", "key_path": "********", "validate_command": "true -t", "reload_command": "true", "host": "web.example", "colour": "blue"}`, dir)
	code, out := planned(t, settings, config, "-type", "NGINX", "-target", "t-web", "-cert", filepath.Join(dir, "new.pem"))
	if code != exitOK {
		t.Errorf("exit code %d", code)
	}
	for _, says := range []string{
		"target t-web, type NGINX", "cert_path", dir + "/tls/link.pem → " + dir + "/tls/cert.pem", overlay, "default", "unknown to this type, ignored",
		"was 0640", "content changes", "the new key", "true -t", "allowed", "web.example:443", "reads its key from key_path",
	} {
		if !strings.Contains(out, says) {
			t.Errorf("%q is missing", says)
		}
	}
	if strings.Contains(out, "problems") {
		t.Error("it has problems")
	}
	if t.Failed() {
		t.Log(out)
	}
	if after := treeOf(t, dir); before != after {
		t.Errorf("it wrote: %s, then %s", before, after)
	}

	code, out = planned(t, settings, config, "-type", "NGINX", "-target", "t-web", "-json", "-cert", filepath.Join(dir, "tls/cert.pem"))
	var document app.Preview
	if err := json.Unmarshal([]byte(out), &document); err != nil || code != exitOK || document.Refused || len(document.Files) != 2 || document.Files[0].Changes || document.Verified != "web.example:443" {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
}

// TestPlanOfRefusedConnection: a person waits for a plan, so it does not retry for as long as a
// deployment would.
func TestPlanOfRefusedConnection(t *testing.T) {
	t.Parallel()
	dir, settings := planHost(t)
	port := needs.FreePort(t)
	for name, data := range map[string]string{
		"kubeconfig": fmt.Sprintf(`{"clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:%d"}}], "users": [{"name": "u", "user": {"token": "t"}}],
			"contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x"}`, port),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	address := fmt.Sprintf("127.0.0.1:%d", port)
	settings["CERTCTL_ALLOWED_HOSTS"] = address
	settings["AWS_ACCESS_KEY_ID"], settings["AWS_SECRET_ACCESS_KEY"] = "AKIAEXAMPLE", "secret"
	for typ, config := range map[string]string{
		"F5":                fmt.Sprintf(`{"host": "127.0.0.1", "port": %d, "username": "u", "password": "p", "ssl_profile": "www"}`, port),
		"KubernetesSecrets": fmt.Sprintf(`{"namespace": "n", "secret_name": "s", "kubeconfig_path": %q}`, filepath.Join(dir, "kubeconfig")),
		"AWSACM":            fmt.Sprintf(`{"region": "eu-central-1", "endpoint": "https://%s"}`, address),
	} {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			begun := time.Now()
			code, out := planned(t, settings, config, "-type", typ)
			if took := time.Since(begun); code != exitFailure || !strings.Contains(out, "connection refused") || took > 20*time.Second {
				t.Errorf("exit code %d after %v:\n%s", code, took, out)
			}
		})
	}
}

// TestPlanRefused: plan shows all problems at once, and a deployment would be refused.
func TestPlanRefused(t *testing.T) {
	dir, settings := planHost(t)
	settings["CERTCTL_ALLOWED_COMMANDS"] = "nginx -t"
	for name, test := range map[string]struct {
		config string
		says   []string
	}{
		"values":        {`{"cert_path": 5, "key_file_mode": "0644", "port": "x"}`, []string{"port: ", "cert_path: ", "key_file_mode: "}},
		"commands":      {`{"cert_path": "/etc/shadow", "validate_command": "true", "reload_command": "reboot"}`, []string{"validate_command: ", "reload_command: ", "CERTCTL_ALLOWED_COMMANDS", "REFUSED", "/etc/shadow is refused"}},
		"masked":        {`{"cert_path": "********"}`, []string{"sent it masked", "TARGET-ID.json"}},
		"files":         {`{"cert_path": "/etc/shadow", "key_path": "/nowhere/key.pem", "validate_command": "nginx -t", "reload_command": "nginx -t"}`, []string{"/etc/shadow", "/nowhere"}},
		"not an object": {`[]`, []string{"a JSON object"}},
	} {
		code, out := planned(t, settings, test.config, "-type", "NGINX")
		if code != exitFailure {
			t.Errorf("%s: exit code %d", name, code)
		}
		for _, says := range test.says {
			if !strings.Contains(out, says) {
				t.Errorf("%s: %q is missing:\n%s", name, says, out)
			}
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]int{"": exitUsage, "-type ACME": exitFailure, "-type F5": exitFailure, "-type NGINX -cert " + dir + "/none": exitFailure,
		"-type NGINX -cert -": exitUsage, "-type NGINX -cert " + dir + "/pipe": exitFailure,
		"-type NGINX -target ../evil": exitUsage, "-type NGINX -certificate a/b": exitUsage} {
		if code, out := planned(t, settings, "{}", strings.Fields(args)...); code != want {
			t.Errorf("%q: exit code %d, want %d: %s", args, code, want, out)
		}
	}
}

// TestPlanOfCertificate: plan refuses a certificate that a deployment would refuse, with and
// without a key on this host.
func TestPlanOfCertificate(t *testing.T) {
	dir, settings := planHost(t)
	config := `{"pem_path": "` + dir + `/tls/site.pem", "reload_command": "true"}`
	if err := os.Mkdir(settings["CERTCTL_KEY_DIR"], 0o700); err != nil {
		t.Fatal(err)
	}
	ca := testca.Must(t)
	key := filepath.Join(settings["CERTCTL_KEY_DIR"], "c-1.key")
	for name, test := range map[string]struct {
		template testca.Template
		id       string
		says     string // "": it would not be refused
	}{
		"good":                  {id: "c-1"},
		"of no id":              {},
		"of another key":        {id: "c-2", says: "none of this agent's private keys belongs to the certificate"},
		"expired":               {template: testca.Template{NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour)}, id: "c-1", says: "the certificate expired at"},
		"not valid for an hour": {template: testca.Template{NotBefore: time.Now().Add(time.Hour)}, id: "c-1", says: "is not valid before"},
	} {
		issued, err := ca.Issue(test.template)
		if err != nil {
			t.Fatal(err)
		}
		cert := filepath.Join(dir, "issued.pem")
		if err := errors.Join(os.WriteFile(cert, issued.PEM(), 0o600), os.WriteFile(key, issued.KeyPEM(), 0o600)); err != nil {
			t.Fatal(err)
		}
		before := treeOf(t, dir)
		code, out := planned(t, settings, config, "-type", "HAProxy", "-cert", cert, "-certificate", test.id)
		if refused := code == exitFailure; refused != (test.says != "") || !strings.Contains(out, test.says) {
			t.Errorf("%s: exit code %d, want it to say %q:\n%s", name, code, test.says, out)
		}
		if after := treeOf(t, dir); before != after {
			t.Errorf("%s: it wrote: %s, then %s", name, before, after)
		}
	}
	// A server may read its key in the key directory, but plan must know the certificate.
	config = `{"cert_dir": "` + filepath.Dir(key) + `", "key_file": "c-1.key"}`
	if code, out := planned(t, settings, config, "-type", "Traefik"); code != exitFailure || !strings.Contains(out, "name the certificate") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}

// TestPlanOfHostileValues: hostile values cannot forge lines, forbidden commands do not run, and
// the values of unknown keys are not shown.
func TestPlanOfHostileValues(t *testing.T) {
	dir, settings := planHost(t)
	script := filepath.Join(dir, "nginx")
	if err := os.WriteFile(script, []byte("#!/bin/sh\ntouch "+dir+"/ran\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	settings["CERTCTL_ALLOWED_COMMANDS"] = "true"
	config := `{"cert_path": "` + dir + `/tls/cert.pem", "key_path": "********", "validate_command": "` + script + ` -t", "reload_command": "true \n\u001b[2J\tREFUSED",
		"host": "\u001b]0;x\u0007\u202e", "pass\u001bword\nx": "hunter2", "post_deploy_verify": {"secret": "hunter3"}}`
	for _, format := range []string{"-json=false", "-json"} {
		code, out := planned(t, settings, config, "-type", "NGINX", format)
		if code != exitFailure || strings.ContainsAny(out, "\x1b\a\u202e") || strings.Contains(out, "hunter") {
			t.Errorf("exit code %d: %q", code, out)
		}
		if format != "-json" {
			for line := range strings.Lines(out) {
				if strings.HasPrefix(line, "\ufffd") || strings.HasPrefix(line, "x") {
					t.Errorf("a forged line: %q", line)
				}
			}
			continue
		}
		var document map[string]any
		if err := json.Unmarshal([]byte(out), &document); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"settings", "unknown_keys", "commands", "files", "changes", "warnings", "problems"} {
			if _, isList := document[name].([]any); !isList {
				t.Errorf("%s is %v, not a list", name, document[name])
			}
		}
	}
	config = `{"cert_path": "` + dir + `/tls/cert.pem", "key_path": "********", "validate_command": "` + script + ` -t", "reload_command": "true"}`
	code, out := planned(t, settings, config, "-type", "NGINX")
	if _, err := os.Stat(filepath.Join(dir, "ran")); err == nil || code != exitFailure || !strings.Contains(out, "not asked, because a command") {
		t.Errorf("a forbidden command ran: %v; exit code %d: %s", err == nil, code, out)
	}
}

// TestPlanOfUnreadableSettings: without the configuration file plan does not know what the daemon
// may write and run, so it fails.
func TestPlanOfUnreadableSettings(t *testing.T) {
	dir, settings := planHost(t)
	settings["CERTCTL_CONFIG"] = filepath.Join(dir, "agent.env")
	code, out := planned(t, settings, `{"pem_path": "`+dir+`/tls/site.pem", "reload_command": "true"}`, "-type", "HAProxy")
	if code != exitFailure || !strings.Contains(out, "CERTCTL_CONFIG") || strings.Contains(out, "allowed") {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// TestPlanOrder: configured settings come before defaults.
func TestPlanOrder(t *testing.T) {
	_, settings := planHost(t)
	_, out := planned(t, settings, `{"cert_dir": "/srv/tls"}`, "-type", "Envoy", "-json")
	var document app.Preview
	if err := json.Unmarshal([]byte(out), &document); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, s := range document.Settings {
		keys = append(keys, s.Key)
	}
	if want := []string{"cert_dir", "cert_filename", "command_timeout"}; len(keys) < 3 || !slices.Equal(keys[:3], want) {
		t.Errorf("got %v, want %v first", keys, want)
	}
}

// treeOf returns all names below dir with their times.
func treeOf(t *testing.T, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		fmt.Fprintln(&all, path, info.ModTime())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// TestPlanShowsDefaults: plan shows the defaults that the pages of the targets document.
func TestPlanShowsDefaults(t *testing.T) {
	dir, settings := planHost(t)
	code := regexp.MustCompile("`([^`]+)`")
	found := 0
	for _, typ := range all.Types() {
		shown := make(map[string]string)
		for _, mode := range []string{"", `, "mode": "file"`} { // Caddy's second one
			// With an invalid value plan fails before it asks a server.
			_, out := planned(t, settings, `{"cert_dir": "`+dir+`", "post_deploy_verify_attempts": "x"`+mode+`}`, "-type", typ.Name, "-json")
			var document app.Preview
			if err := json.Unmarshal([]byte(out), &document); err != nil {
				t.Fatal(err)
			}
			for _, s := range document.Settings {
				if s.Source == "default" {
					shown[s.Key] = strings.Trim(s.Value, `"`)
				}
			}
		}
		page, err := os.ReadFile(filepath.Join("../../docs/targets", strings.ToLower(typ.Name)+".md"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(page)) {
			cells := strings.Split(line, "|")
			if len(cells) != 5 {
				continue
			}
			keys, values := code.FindAllStringSubmatch(cells[1], -1), code.FindAllStringSubmatch(cells[3], -1)
			for i := range min(len(keys), len(values)) {
				if found++; shown[keys[i][1]] != values[i][1] {
					t.Errorf("%s: the page has the default %s of %s, plan shows %q", typ.Name, values[i][1], keys[i][1], shown[keys[i][1]])
				}
			}
		}
	}
	if found < 15 {
		t.Errorf("found only %d defaults in the pages", found)
	}
}
