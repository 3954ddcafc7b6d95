package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/testing/windowshost"
	"certctl-agent/internal/testing/winrmhost"
)

// TestWinRMSelfTest: the command logs on with the overlay's settings, lists what is missing, and
// shows no password.
func TestWinRMSelfTest(t *testing.T) {
	const password = "geheim-1234"
	windows := windowshost.New()
	certificate, err := testca.Must(t).TLSCertificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	server, err := winrmhost.Start(winrmhost.Options{User: "certctl", Password: password, Certificate: &certificate, LockAfter: 2,
		Handler: func(command []string, stdin []byte) (stdout, stderr []byte, exit int) {
			stdout, stderr, exit, err := windows.Run(command, stdin)
			if err != nil {
				t.Error(err)
			}
			return stdout, stderr, exit
		}})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	dir := t.TempDir()
	overlay := func(password string) {
		text := fmt.Sprintf(`{"winrm": {"winrm_username": "certctl", "winrm_password": %q, "winrm_port": %d, "winrm_insecure": true}}`, password, server.Port)
		if err := os.WriteFile(filepath.Join(dir, "default.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{"CERTCTL_TARGETS_DIR": dir, "CERTCTL_ALLOWED_HOSTS": "none.example.org"}
	selfTest := func(args ...string) (int, string) {
		t.Helper()
		code, stdout, stderr := inProcess(t, env, append([]string{"winrm-selftest"}, args...)...)
		if strings.Contains(stdout+stderr, password) {
			t.Errorf("the password shows:\n%s%s", stdout, stderr)
		}
		return code, strings.Join(strings.Fields(stdout+stderr), " ")
	}

	overlay(password)
	code, out := selfTest("127.0.0.1")
	for _, want := range []string{"ok PowerShell 5.1", `ok store LocalMachine\My can be written`, "ok IIS sites: Default Web Site"} {
		if code != exitOK || !strings.Contains(out, want) {
			t.Errorf("exit code %d, got %q, want %q in it", code, out, want)
		}
	}
	windows.Change(func(c *windowshost.Console) { c.Uninstall() })
	if code, out = selfTest("127.0.0.1"); code != exitFailure || !strings.Contains(out, "failure IIS IIS is not installed on the host") {
		t.Errorf("exit code %d, got %q", code, out)
	}
	code, out = selfTest("-json", "-type", "IIS", "127.0.0.1")
	var found []struct {
		What string
		OK   bool
	}
	if err := json.Unmarshal([]byte(out), &found); err != nil || code != exitFailure || len(found) < 8 || found[7].OK {
		t.Errorf("exit code %d, %v, got %v", code, err, found)
	}
	// The overlay of a target counts, and its configuration.
	config := filepath.Join(dir, "config")
	const strange = `{"winrm": {"winrm_username": "x", "winrm_password": "y", "winrm_auth": "by-%s"}}`
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "t-1.json"), fmt.Appendf(nil, strange, "overlay"), 0o600),
		os.WriteFile(config, fmt.Appendf(nil, strange, "config"), 0o600), os.Remove(filepath.Join(dir, "default.json"))); err != nil {
		t.Fatal(err)
	}
	for by, args := range map[string][]string{"by-overlay": {"-target", "t-1"}, "by-config": {"-config", config}} {
		if code, out = selfTest(append(args, "127.0.0.1")...); code != exitFailure || !strings.Contains(out, by) {
			t.Errorf("%q: exit code %d, got %q", args, code, out)
		}
	}
	overlay("wrong")
	if code, out = selfTest("127.0.0.1"); code != exitFailure || !strings.Contains(out, "the host refuses the logon") || server.Counts().Failed != 1 {
		t.Errorf("exit code %d, got %q, after %d logons that failed", code, out, server.Counts().Failed)
	}
	for _, args := range [][]string{nil, {"a", "b"}} {
		if code, out = selfTest(args...); code != exitUsage || !strings.Contains(out, "name one host") {
			t.Errorf("%q: exit code %d, got %q", args, code, out)
		}
	}
	if code, out = selfTest("-h"); code != exitOK || !strings.Contains(out, "Usage: certctl-agent winrm-selftest") {
		t.Errorf("-h: exit code %d, got %q", code, out)
	}
}
