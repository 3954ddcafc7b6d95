package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/app"
	"certctl-agent/internal/testing/testca"
)

// planned runs the command with a target's configuration and returns its exit
// code and what it printed.
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

// planHost is a host with an old certificate in place, and settings of the agent
// on it. Nothing of the agent's own exists.
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
		"was 0640", "content changes", "the new key", "true -t", "allowed", "web.example:443", "nobody has compared key_path",
	} {
		if !strings.Contains(out, says) {
			t.Errorf("it lacks %q", says)
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

// Everything that is wrong is said at once, and a deployment would be refused.
func TestPlanRefused(t *testing.T) {
	dir, settings := planHost(t)
	settings["CERTCTL_ALLOWED_COMMANDS"] = "nginx -t"
	for name, test := range map[string]struct {
		config string
		says   []string
	}{
		"values":        {`{"cert_path": 5, "key_file_mode": "0644", "port": "x"}`, []string{"port: "}},
		"more values":   {`{"cert_path": 5, "key_file_mode": "0644"}`, []string{"cert_path: ", "key_file_mode: "}},
		"commands":      {`{"cert_path": "/c", "validate_command": "true", "reload_command": "reboot"}`, []string{"validate_command: ", "reload_command: ", "CERTCTL_ALLOWED_COMMANDS", "REFUSED"}},
		"masked":        {`{"cert_path": "********"}`, []string{"sent it masked", "target.json"}},
		"files":         {`{"cert_path": "/etc/shadow", "key_path": "/nowhere/key.pem", "validate_command": "nginx -t", "reload_command": "nginx -t"}`, []string{"/etc/shadow", "/nowhere"}},
		"not an object": {`[]`, []string{"a JSON object"}},
	} {
		code, out := planned(t, settings, test.config, "-type", "NGINX")
		if code != exitFailure {
			t.Errorf("%s: exit code %d", name, code)
		}
		for _, says := range test.says {
			if !strings.Contains(out, says) {
				t.Errorf("%s: it lacks %q:\n%s", name, says, out)
			}
		}
	}
	for args, want := range map[string]int{"": exitUsage, "-type ACME": exitFailure, "-type F5": exitFailure, "-type NGINX -cert " + dir + "/none": exitFailure} {
		if code, out := planned(t, settings, "{}", strings.Fields(args)...); code != want {
			t.Errorf("%q: exit code %d, want %d: %s", args, code, want, out)
		}
	}
}

// treeOf is every name below dir with its time.
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
