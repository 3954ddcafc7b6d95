package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"certctl-agent/internal/buildinfo"
)

// agentBinary is the agent that these tests start. TestMain builds it.
var agentBinary string

// plainBinary is the agent without the race detector, for measuring memory.
var plainBinary = sync.OnceValues(func() (string, error) {
	if !raceEnabled {
		return agentBinary, nil
	}
	return build(filepath.Dir(agentBinary), false)
})

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "certctl-agent-test-")
		if err == nil {
			defer os.RemoveAll(dir)
			agentBinary, err = build(dir, raceEnabled)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// inProcess runs the program in this process.
func inProcess(t *testing.T, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out, errs bytes.Buffer
	code = run(ctx, process{args: args, getenv: func(name string) string { return env[name] },
		stdin: strings.NewReader(""), stdout: &out, stderr: &errs})
	return code, out.String(), errs.String()
}

func TestUsageErrors(t *testing.T) {
	t.Parallel()
	tests := []struct {
		args []string
		want string
	}{
		{[]string{"-nonsense"}, "-nonsense"},
		{[]string{"-server"}, "-server"},
		{[]string{"frobnicate"}, `"frobnicate"`},
		{[]string{""}, `""`},
		{[]string{"-server", "https://x", "extra"}, `"extra"`},
		{[]string{"status", "extra"}, `"extra"`},
		{[]string{"status", "-check", "-nonsense"}, "-nonsense"},
		{[]string{"status", "-check", "-json"}, "-check"},
		{[]string{"check", "extra"}, `"extra"`},
		{[]string{"version", "extra"}, `"extra"`},
		{[]string{"version", "-nonsense"}, "-nonsense"},
		{[]string{"scan"}, "CERTCTL_DISCOVERY_DIRS"},
		{[]string{"scan", "-soon", "x"}, "-soon"},
		{[]string{"register", "-name", strings.Repeat("é", 129)}, "129"},
	}
	for _, test := range tests {
		code, stdout, stderr := inProcess(t, nil, test.args...)
		if code != exitUsage || !strings.Contains(stderr, test.want) || stdout != "" {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q; want 2 and %s on stderr", test.args, code, stdout, stderr, test.want)
		}
		if strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "certctl-agent: ") {
			t.Errorf("%q: stderr is %q, not one line", test.args, stderr)
		}
	}
}

// TestHelp: help does not show the current settings, which contain secrets here.
func TestHelp(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	keyFile, config := filepath.Join(dir, "key"), filepath.Join(dir, "agent.env")
	for path, text := range map[string]string{keyFile: "secret-in-key-file", config: "CERTCTL_API_KEY=secret-in-config\nHTTPS_PROXY=http://u:secret-in-proxy@proxy.example\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{"CERTCTL_CONFIG": config, "CERTCTL_API_KEY": "secret-in-environment", "CERTCTL_API_KEY_FILE": keyFile,
		"HTTPS_PROXY": "http://u:secret-in-proxy@proxy.example"}
	for _, command := range []string{"", "check", "register", "scan", "status", "version"} {
		for _, flag := range []string{"-h", "-help", "--help"} {
			args := []string{"-api-key", "secret-in-flag", flag}
			if command != "" {
				args = append([]string{command}, args...)
			}
			if command == "version" {
				args = []string{command, flag}
			}
			code, stdout, stderr := inProcess(t, env, args...)
			if code != exitOK || stderr != "" {
				t.Errorf("%q: exit code %d, stderr %q", args, code, stderr)
			}
			for _, want := range []string{"Usage:", "Exit status", "certctl-agent " + command} {
				if !strings.Contains(stdout, want) {
					t.Errorf("%q: %q is missing in\n%s", args, want, stdout)
				}
			}
			if command != "" && !strings.Contains(stdout, "Examples:") {
				t.Errorf("%q: no examples", args)
			}
			if strings.Contains(stdout, "secret-in") {
				t.Errorf("%q shows a secret:\n%s", args, stdout)
			}
		}
	}
}

// TestHelpOfRegister: its own flags come before those of the daemon.
func TestHelpOfRegister(t *testing.T) {
	t.Parallel()
	_, help, _ := inProcess(t, nil, "register", "-h")
	own, daemon, found := strings.Cut(help, "Flags of the daemon:")
	if !found || !strings.Contains(daemon, "-ca-bundle") {
		t.Errorf("the flags of the daemon are missing in\n%s", help)
	}
	for _, flag := range []string{"name", "bootstrap-token-file", "write"} {
		if !strings.Contains(own, "\n  -"+flag+" ") {
			t.Errorf("-%s is missing among its own flags in\n%s", flag, own)
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	code, stdout, stderr := inProcess(t, nil, "version")
	want := fmt.Sprintf("certctl-agent %s\ncommit %s\n%s %s/%s\n", buildinfo.Version(), cmp.Or(buildinfo.Commit(), "unknown"),
		runtime.Version(), runtime.GOOS, runtime.GOARCH)
	if code != exitOK || stdout != want || stderr != "" {
		t.Errorf("exit code %d, stdout %q, stderr %q; want 0 and %q", code, stdout, stderr, want)
	}
	code, stdout, _ = inProcess(t, nil, "version", "-json")
	var document map[string]string
	if err := json.Unmarshal([]byte(stdout), &document); err != nil || code != exitOK || document["version"] != buildinfo.Version() ||
		document["commit"] != buildinfo.Commit() || document["go"] != runtime.Version() || document["platform"] != runtime.GOOS+"/"+runtime.GOARCH {
		t.Errorf("-json: exit code %d, %v, %s", code, err, stdout)
	}
}
