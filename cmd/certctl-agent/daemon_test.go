package main

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

// TestConfigurationProblems: the daemon refuses to start before it sends anything, and names the
// flag and variable of every problem.
func TestConfigurationProblems(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	noCertificate := h.write("empty.pem", "nothing here\n", 0o644)
	// A server that would receive plain http.
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	tests := []struct {
		name string
		env  map[string]string
		args []string
		want []string // one line each
	}{
		{"plain http", map[string]string{"CERTCTL_SERVER_URL": "http://" + plain.Addr().String()}, nil,
			[]string{"-server (CERTCTL_SERVER_URL, from environment): is plain http://, and the control plane is HTTPS-only: write https://; see docs/upgrade-to-tls.md"}},
		{"plain http by flag", nil, []string{"-server", "http://" + plain.Addr().String()},
			[]string{"-server (CERTCTL_SERVER_URL, from flag): is plain http://"}},
		{"credentials", map[string]string{"CERTCTL_SERVER_URL": "https://u:hunter2@127.0.0.1/"}, nil,
			[]string{"-server (CERTCTL_SERVER_URL, from environment): contains credentials"}},
		{"no key", map[string]string{"CERTCTL_API_KEY": ""}, nil,
			[]string{"-api-key (CERTCTL_API_KEY): is required"}},
		{"no id", map[string]string{"CERTCTL_AGENT_ID": ""}, nil,
			[]string{"-agent-id (CERTCTL_AGENT_ID): is required: register an agent first, with certctl-agent register or POST /api/v1/agents"}},
		{"no bundle", map[string]string{"CERTCTL_SERVER_CA_BUNDLE_PATH": h.path("missing.pem")}, nil,
			[]string{"-ca-bundle (CERTCTL_SERVER_CA_BUNDLE_PATH, from environment): open " + h.path("missing.pem") + ": no such file"}},
		{"bundle without certificate", map[string]string{"CERTCTL_SERVER_CA_BUNDLE_PATH": noCertificate}, nil,
			[]string{"-ca-bundle (CERTCTL_SERVER_CA_BUNDLE_PATH, from environment): " + noCertificate + " contains no PEM certificate"}},
		{"all at once", map[string]string{"CERTCTL_SERVER_URL": "http://" + plain.Addr().String(), "CERTCTL_API_KEY": "",
			"CERTCTL_AGENT_ID": "", "CERTCTL_SERVER_CA_BUNDLE_PATH": noCertificate, "CERTCTL_POLL_INTERVAL": "30", "CERTCTL_KEY_ALGORITHM": "dsa"},
			[]string{"-max-deploys", "none"},
			[]string{"-server (CERTCTL_SERVER_URL", "-api-key (CERTCTL_API_KEY)", "-agent-id (CERTCTL_AGENT_ID)", "-ca-bundle (CERTCTL_SERVER_CA_BUNDLE_PATH",
				"-poll-interval (CERTCTL_POLL_INTERVAL, from environment): \"30\" has no unit", "-key-algorithm (CERTCTL_KEY_ALGORITHM", "-max-deploys (CERTCTL_MAX_DEPLOYS, from flag)"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			code, output := h.runWith(test.env, test.args...)
			if code != exitFailure {
				t.Errorf("exit code %d, want 1", code)
			}
			lines := strings.Split(strings.TrimSpace(output), "\n")
			if len(lines) != len(test.want) {
				t.Errorf("%d lines, want %d", len(lines), len(test.want))
			}
			for _, want := range test.want {
				if !slices.ContainsFunc(lines, func(line string) bool { return strings.Contains(line, want) }) {
					t.Errorf("no line says %q", want)
				}
			}
			if strings.Contains(output, "hunter2") {
				t.Error("the password of the URL is shown")
			}
			if t.Failed() {
				t.Log(output)
			}
		})
	}
	if n := h.plane.Connections(); n != 0 {
		t.Errorf("%d connections to the control plane, want none", n)
	}
	plain.(*net.TCPListener).SetDeadline(time.Now().Add(time.Millisecond))
	if conn, err := plain.Accept(); err == nil {
		conn.Close()
		t.Error("the agent connected by plain http")
	}
	if _, err := os.Stat(h.path("keys")); err == nil {
		t.Error("a refused start created the key directory")
	}
}

// TestLegacyValues: the agent accepts values that existing fleets use.
func TestLegacyValues(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	agent := h.startWith(map[string]string{"CERTCTL_LOG_LEVEL": "verbose", "CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY": "maybe",
		"CERTCTL_SERVER_URL": h.plane.URL + "/", "CERTCTL_DISCOVERY_DIRS": " , "},
		"-api-key", h.plane.APIKey)
	agent.waitLog("first heartbeat accepted")
	for _, want := range [][]string{
		{`"WARN"`, "CERTCTL_LOG_LEVEL", "verbose", "the default, info, is used"},
		{`"WARN"`, "CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY", "maybe", "the default, false, is used"},
		{`"WARN"`, "-api-key on the command line shows the key in the process list"},
	} {
		if agent.logged(want...) == "" {
			t.Errorf("no line says %q", want)
		}
	}
	agent.stop()

	agent = h.startWith(map[string]string{"CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY": "YES", "CERTCTL_SERVER_CA_BUNDLE_PATH": ""})
	agent.waitLog("first heartbeat accepted")
	agent.waitLog(`"WARN"`, "insecure-skip-verify is on")
	agent.stop()
}

// TestLog: the log is JSON lines on stdout, and stderr is silent.
func TestLog(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	agent := h.startWith(map[string]string{"CERTCTL_LOG_LEVEL": "DEBUG"})
	agent.waitLog("first heartbeat accepted")
	agent.stop()
	for line := range strings.Lines(agent.output.String()) {
		var record struct{ Time, Level, Msg string }
		if err := json.Unmarshal([]byte(line), &record); err != nil || record.Time == "" || record.Level == "" || record.Msg == "" {
			t.Errorf("%q is not a log line: %v", line, err)
		}
	}
	agent = h.startWith(map[string]string{"CERTCTL_LOG_FORMAT": "text"})
	agent.waitLog("level=INFO", `msg="first heartbeat accepted"`)
	agent.stop()
}

func TestSignals(t *testing.T) {
	t.Parallel()
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		h := newHost(t, devplane.Options{})
		agent := h.start()
		agent.waitLog("first heartbeat accepted")
		agent.signal(signal)
		agent.wantExit(exitOK)
		agent.waitLog("stopping", signal.String())
		agent.waitLog("stopped", "asked to")
	}
}

// TestServiceManager: systemd learns of start, reload and end, and that the agent
// is alive.
func TestServiceManager(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: h.path("notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	manager.SetReadDeadline(time.Now().Add(patience))
	agent := h.startWith(map[string]string{"NOTIFY_SOCKET": h.path("notify"), "WATCHDOG_USEC": "200000"})
	wait := func(notice string) {
		t.Helper()
		for got := make([]byte, 1<<10); ; {
			n, err := manager.Read(got)
			if err != nil {
				t.Fatalf("the agent never says %s: %v", notice, err)
			}
			if strings.HasPrefix(string(got[:n]), notice) {
				return
			}
		}
	}
	wait("READY=1")
	wait("STATUS=in contact")
	wait("WATCHDOG=1")
	agent.signal(syscall.SIGHUP)
	wait("RELOADING=1")
	wait("READY=1")
	agent.signal(syscall.SIGTERM)
	wait("STOPPING=1")
	agent.wantExit(exitOK)
}

// TestCommandTimeouts: neither a command of the target that hangs nor a server
// that is asked for its configuration holds a job up.
func TestCommandTimeouts(t *testing.T) {
	t.Parallel()
	for held, want := range map[string]string{"reload": api.StatusFailed, "nginx": api.StatusCompleted} {
		t.Run(held, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, devplane.Options{})
			h.write("nginx", "#!/bin/sh\n[ \"$1\" = -t ] && exit\n"+h.script("nginx"), 0o755)
			h.env["CERTCTL_ALLOWED_COMMANDS"] += ";" + h.path("nginx") + " *"
			defer h.hold(held)()
			settings := h.nginx("")
			settings["command_timeout"], settings["validate_command"] = "300ms", h.path("nginx")+" -t"
			certificate := h.plane.AddCertificate(devplane.Certificate{CommonName: "www.example.org",
				Targets: []string{h.plane.AddTarget(devplane.Target{Agent: h.agentID, Type: "NGINX", Config: settings})}})
			h.plane.StartIssuance(certificate)
			agent := h.start()
			agent.waitLog("not done after 300ms")
			h.waitDeployment(certificate, 1, want)
			agent.stop()
		})
	}
}

// TestAcceptNewHostKeys: a host behind ssh whose key is not known is believed only
// if that is configured, and remembered.
func TestAcceptNewHostKeys(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	issued, err := testca.Must(t).Issue(testca.Template{})
	if err != nil {
		t.Fatal(err)
	}
	server, err := liveserver.StartSSH(t.Context(), t.TempDir(), liveserver.Pair{Certificate: issued.PEM(), Key: issued.KeyPEM()})
	if errors.Is(err, liveserver.ErrMissing) {
		needs.Missing(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	defer server.Stop()
	delete(server.Config, "host_key")
	h.env["CERTCTL_ALLOWED_COMMANDS"] = "" // any, there
	certificate := h.plane.AddCertificate(devplane.Certificate{CommonName: "localhost", SANs: []string{"localhost"},
		Targets: []string{h.plane.AddTarget(devplane.Target{Agent: h.agentID, Type: server.Type, Config: server.Config})}})
	agent := h.start()
	h.plane.StartIssuance(certificate)
	if job := h.waitDeployment(certificate, 1, api.StatusFailed); !strings.Contains(job.Error, "is not known. Compare it on the server") {
		t.Errorf("the job failed: %s", job.Error)
	}
	agent.stop()
	agent = h.startWith(map[string]string{"CERTCTL_SSH_ACCEPT_NEW_HOST_KEYS": "true"})
	h.plane.Redeploy(certificate)
	h.waitDeployment(certificate, 2, api.StatusCompleted)
	agent.waitLog("accepted an unknown host key permanently", h.path("keys", ".state"))
	agent.stop()
}

// TestStopDuringDeployment stops an agent during a deployment: the deployment ends within the grace
// or is rolled back, and its outcome is not lost.
func TestStopDuringDeployment(t *testing.T) {
	t.Parallel()
	t.Run("within the grace", func(t *testing.T) {
		t.Parallel()
		h := newHost(t, devplane.Options{})
		certificate := h.certificate()
		release := h.hold("validate")
		agent := h.start()
		h.plane.StartIssuance(certificate)
		h.waitHeld("validate")
		agent.signal(syscall.SIGTERM)
		agent.waitLog("stopping")
		release()
		agent.wantExit(exitOK)
		h.waitDeployment(certificate, 1, api.StatusCompleted)
		if got := h.pair(certificate); got != h.latest(certificate) {
			t.Errorf("%s is deployed, want the latest version", got)
		}
	})
	t.Run("after the grace", func(t *testing.T) {
		t.Parallel()
		h := newHost(t, devplane.Options{})
		h.env["CERTCTL_SHUTDOWN_GRACE"] = "200ms"
		certificate := h.deployed()
		before := h.pair(certificate)
		release := h.hold("validate")
		agent := h.start()
		h.plane.StartRenewal(certificate)
		h.waitHeld("validate")
		agent.stop()
		agent.waitLog("the shutdown grace is over")
		if got := h.pair(certificate); got != before {
			t.Errorf("%s is deployed, want the old certificate", got)
		}
		release()
		// No poll returns the job again: the agent has kept it.
		agent = h.start()
		h.waitDeployment(certificate, 2, api.StatusCompleted)
		agent.waitLog("unfinished job resumed")
		agent.stop()
		if got := h.pair(certificate); got != h.latest(certificate) {
			t.Errorf("%s is deployed, want the latest version", got)
		}
	})
	t.Run("second signal", func(t *testing.T) {
		t.Parallel()
		h := newHost(t, devplane.Options{})
		certificate := h.deployed()
		before := h.pair(certificate)
		release := h.hold("validate")
		agent := h.start()
		h.plane.StartRenewal(certificate)
		h.waitHeld("validate")
		agent.signal(syscall.SIGTERM)
		agent.waitLog("stopping")
		agent.signal(syscall.SIGTERM)
		if got := agent.wait(); got != -1 {
			t.Errorf("exit code %d, want an end by the signal", got)
		}
		// The next start finds the journal, before it polls.
		late := h.plane.Inject(devplane.Fault{Call: devplane.CallHeartbeat, Delay: time.Second})
		agent = h.start()
		agent.waitLog("ready")
		if got := h.pair(certificate); got != before {
			t.Errorf("%s is deployed, want the old certificate", got)
		}
		late()
		release()
		h.waitDeployment(certificate, 2, api.StatusCompleted)
		agent.stop()
		if got := h.pair(certificate); got != h.latest(certificate) {
			t.Errorf("%s is deployed, want the latest version", got)
		}
	})
}

// TestReload changes everything that SIGHUP reads again: API key, CA bundle, overlays, and the
// files to scan.
func TestReload(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	certificate := h.certificate()
	other := testca.Must(t)
	bundle := h.write("bundle.pem", string(other.PEM()), 0o644)
	h.env["CERTCTL_API_KEY"], h.env["CERTCTL_SERVER_CA_BUNDLE_PATH"] = "", bundle
	h.env["CERTCTL_DISCOVERY_DIRS"] = h.path("disk")
	if err := os.Mkdir(h.path("disk"), 0o755); err != nil {
		t.Fatal(err)
	}
	h.write("agent.env", "CERTCTL_API_KEY=old-key-0123456789\n", 0o600)

	agent := h.start()
	agent.waitLog("try failed", "heartbeat", "CERTCTL_SERVER_CA_BUNDLE_PATH")
	h.write("bundle.pem", string(h.plane.CAPEM()), 0o644)
	agent.signal(syscall.SIGHUP)
	agent.waitLog("reloaded")
	agent.waitLog("try failed", "heartbeat", "401", "the API key is wrong or expired")
	h.write("agent.env", "CERTCTL_API_KEY="+h.plane.APIKey+"\n", 0o600)
	agent.signal(syscall.SIGHUP)
	agent.waitLog("first heartbeat accepted")

	// An invalid configuration does not replace a valid one.
	h.write("agent.env", "CERTCTL_API_KEY="+h.plane.APIKey+"\nCERTCTL_MAX_DEPLOYS=many\n", 0o600)
	agent.signal(syscall.SIGHUP)
	agent.waitLog("reload failed: the old configuration stays in use", "CERTCTL_MAX_DEPLOYS")
	h.write("agent.env", "CERTCTL_API_KEY="+h.plane.APIKey+"\n", 0o600)
	h.waitMore(devplane.CallHeartbeat, 2)

	// The next scan is hours away.
	issued, err := other.Issue(testca.Template{CommonName: "found.example.org"})
	if err != nil {
		t.Fatal(err)
	}
	h.write("disk/found.pem", string(issued.LeafPEM()), 0o644)
	h.write("agent.env", "CERTCTL_API_KEY="+h.plane.APIKey+"\nCERTCTL_LOG_LEVEL=verbose\n", 0o600)
	agent.signal(syscall.SIGHUP)
	agent.waitLog(`"WARN"`, "CERTCTL_LOG_LEVEL", "verbose")
	h.wait("the discovery report", func() bool { return len(h.plane.Discoveries()) > 0 })
	if got := h.plane.Discoveries()[0].SourcePath; got != h.path("disk", "found.pem") {
		t.Errorf("discovered %s", got)
	}

	// From here on nothing less than an error is logged.
	h.write("agent.env", "CERTCTL_API_KEY="+h.plane.APIKey+"\nCERTCTL_LOG_LEVEL=error\n", 0o600)
	agent.signal(syscall.SIGHUP)
	h.waitMore(devplane.CallHeartbeat, 2)

	// A changed overlay applies to the next deployment.
	h.write("targets.d/default.json", `{"cert_path": "`+h.path("tls", "by-overlay.pem")+`"}`, 0o600)
	h.plane.StartIssuance(certificate)
	h.waitDeployment(certificate, 1, api.StatusCompleted)
	if _, err := os.Stat(h.path("tls", "by-overlay.pem")); err != nil {
		t.Error(err)
	}
	agent.stop()
	if agent.logged("deployment completed") != "" {
		t.Error("the log level of before the reload is in use")
	}
}

// TestKeyFileRotation: a new API key needs no signal.
func TestKeyFileRotation(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	file := h.write("api-key", h.plane.APIKey+"\n", 0o600)
	h.env["CERTCTL_API_KEY"], h.env["CERTCTL_API_KEY_FILE"] = "", file
	agent := h.start()
	agent.waitLog("first heartbeat accepted")
	const rotated = "rotated-key-that-must-not-be-seen"
	h.plane.SetAPIKey(rotated)
	agent.waitLog("try failed", "401")
	h.write("next", rotated+"\n", 0o600)
	if err := os.Rename(h.path("next"), file); err != nil {
		t.Fatal(err)
	}
	agent.waitLog("API key read from its file again")
	beats := len(h.plane.Heartbeats())
	h.wait("a heartbeat with the rotated key", func() bool { return len(h.plane.Heartbeats()) > beats })
	agent.stop()
	if strings.Contains(agent.output.String(), rotated) {
		t.Error("the rotated key is in the log")
	}
}

func TestSecondAgent(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	agent := h.start()
	agent.waitLog("first heartbeat accepted")
	before := h.plane.Connections()
	id := h.plane.RegisterAgent("other")
	for name, second := range map[string]struct {
		env  map[string]string
		want string
	}{
		"the same agent":               {nil, "another agent uses this key directory: " + h.path("keys") + " is in use by agent " + h.agentID + ", process "},
		"the same state directory":     {map[string]string{"CERTCTL_KEY_DIR": h.path("other-keys"), "CERTCTL_STATE_DIR": h.path("keys", ".state")}, "another agent is running with this state directory"},
		"another agent, the same keys": {map[string]string{"CERTCTL_AGENT_ID": id, "CERTCTL_STATE_DIR": h.path("other-state")}, "another agent uses this key directory"},
	} {
		code, output := h.runWith(second.env)
		if code != exitFailure || !strings.Contains(output, second.want) {
			t.Errorf("%s: exit code %d\n%s", name, code, output)
		}
	}
	if n := h.plane.Connections() - before; n != 0 {
		t.Errorf("the second agents made %d connections", n)
	}
	for _, command := range []string{"status", "check"} {
		if code, output := h.run(command); code != exitOK {
			t.Errorf("%s beside the first agent: exit code %d\n%s", command, code, output)
		}
	}
	// Another agent id with its own key directory has its own state.
	other := h.startWith(map[string]string{"CERTCTL_AGENT_ID": id, "CERTCTL_KEY_DIR": h.path("other-keys")})
	other.waitLog("first heartbeat accepted")
	other.stop()
	agent.stop()
}

// TestKeyDirOfOthers: the agent neither writes to a directory that others use nor changes its mode,
// and check reports that.
func TestKeyDirOfOthers(t *testing.T) {
	t.Parallel()
	h := newHost(t, devplane.Options{})
	h.env["CERTCTL_KEY_DIR"] = h.path("tls")
	h.write("tls/site.conf", "x", 0o644)
	want := `holds "site.conf", which is not the agent's`
	if code, output := h.run(); code != exitFailure || !strings.Contains(output, want) {
		t.Errorf("exit code %d\n%s", code, output)
	}
	if code, found := h.check(nil, "key directory"); code != exitFailure || !strings.Contains(found, want) {
		t.Errorf("check: exit code %d\n%s", code, found)
	}
	info, err := os.Stat(h.path("tls"))
	if err != nil {
		t.Fatal(err)
	}
	if list, err := os.ReadDir(h.path("tls")); err != nil || len(list) != 1 || info.Mode().Perm() != 0o755 {
		t.Errorf("mode %v, %d files, %v", info.Mode(), len(list), err)
	}
}
