package main

import (
	"maps"
	"net/http"
	"os"
	"strings"
	"testing"

	"certctl-agent/internal/testing/devplane"
)

func TestRegister(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	h.env["CERTCTL_AGENT_ID"] = ""
	token := h.write("token", h.plane.APIKey+"\n", 0o600)
	wrong := h.write("wrong", "wrong-token-0123\n", 0o600)
	const before = "# our agent\nCERTCTL_LOG_LEVEL=debug\n\nCERTCTL_AGENT_ID='old' \nCERTCTL_AGENT_NAME=\"x y\"\n"
	file := h.write("etc.env", before, 0o640)

	tests := []struct {
		name string
		env  map[string]string
		args []string
		code int
		want []string
	}{
		{"by API key", nil, []string{"-name", "web1"}, exitOK, []string{"agent-"}},
		{"by token file", map[string]string{"CERTCTL_API_KEY": ""}, []string{"-name", "web2", "-bootstrap-token-file", token}, exitOK, []string{"agent-"}},
		{"token before key", map[string]string{"CERTCTL_API_KEY": "wrong-key-0123"}, []string{"-name", "web3", "-bootstrap-token-file", token}, exitOK, []string{"agent-"}},
		{"wrong token", nil, []string{"-name", "web4", "-bootstrap-token-file", wrong}, exitFailure, []string{"401", "register sent the bootstrap token of " + wrong}},
		{"wrong key", map[string]string{"CERTCTL_API_KEY": "wrong-key-0123"}, []string{"-name", "web4"}, exitFailure, []string{"401", "register sent the API key: "}},
		{"neither", map[string]string{"CERTCTL_API_KEY": ""}, []string{"-name", "web4"}, exitFailure, []string{"401", "register sent neither: "}},
		{"name taken", nil, []string{"-name", "web1"}, exitFailure, []string{"409", `another agent is registered as "web1"`}},
		{"no token file", nil, []string{"-name", "web5", "-bootstrap-token-file", h.path("missing")}, exitFailure, []string{"bootstrap token", h.path("missing")}},
		{"file that others can write", nil, []string{"-name", "web6", "-bootstrap-token-file", h.write("open", "x\n", 0o600)}, exitFailure, []string{"can be written by others"}},
		{"plain http", map[string]string{"CERTCTL_SERVER_URL": "http://127.0.0.1"}, []string{"-name", "web7"}, exitFailure, []string{"CERTCTL_SERVER_URL", "docs/upgrade-to-tls.md"}},
		{"by configuration", map[string]string{"CERTCTL_AGENT_NAME": "from-environment"}, nil, exitOK, []string{"agent-"}},
	}
	if err := os.Chmod(h.path("open"), 0o666); err != nil {
		t.Fatal(err)
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			known := len(h.plane.Agents())
			code, output := h.runWith(test.env, append([]string{"register"}, test.args...)...)
			if code != test.code {
				t.Errorf("exit code %d, want %d\n%s", code, test.code, output)
			}
			for _, want := range test.want {
				if !strings.Contains(output, want) {
					t.Errorf("%q is missing in\n%s", want, output)
				}
			}
			if strings.Count(output, "\n") != 1 {
				t.Errorf("not one line: %q", output)
			}
			if made := len(h.plane.Agents()) - known; (made == 1) != (code == exitOK) {
				t.Errorf("%d agents were registered", made)
			}
			if code != exitOK {
				return
			}
			agents := h.plane.Agents()
			last := agents[len(agents)-1]
			if hostname, _ := os.Hostname(); last.Hostname != hostname {
				t.Errorf("registered with hostname %q", last.Hostname)
			}
		})
	}
	files := h.tree(".")
	code, output := h.run("register", "-name", "web9", "-write", file)
	if code != exitOK {
		t.Fatalf("exit code %d\n%s", code, output)
	}
	id, _, _ := strings.Cut(output, "\n")
	want := strings.Replace(before, "CERTCTL_AGENT_ID='old' ", "CERTCTL_AGENT_ID="+id, 1)
	if got := h.read("etc.env"); got != want {
		t.Errorf("the file is\n%s\nwant\n%s", got, want)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v; want as it was, 0640", info.Mode(), err)
	}
	files["./etc.env"] = want
	if !maps.Equal(files, h.tree(".")) {
		t.Error("another file was changed")
	}

	// If the file cannot be written, the id is not lost.
	code, output = h.run("register", "-name", "web10", "-write", h.path("missing", "agent.env"))
	if code != exitFailure || !strings.HasPrefix(output, "agent-") || !strings.Contains(output, "by hand") {
		t.Errorf("exit code %d\n%s", code, output)
	}
}

// TestRegisteredUnderBadID: an invalid id is not written anywhere.
func TestRegisteredUnderBadID(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	h.plane.Inject(devplane.Fault{Call: devplane.CallRegister, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		w.Write([]byte(`{"id":"x\nCERTCTL_SERVER_URL=https://evil.example"}`))
	})})
	file := h.write("etc.env", "", 0o600)
	code, output := h.run("register", "-name", "web", "-write", file)
	if code != exitFailure || h.read("etc.env") != "" || !strings.Contains(output, "unusable id") {
		t.Errorf("exit code %d, file %q\n%s", code, h.read("etc.env"), output)
	}
}
