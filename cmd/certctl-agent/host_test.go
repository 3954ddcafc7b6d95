package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/devplane"
)

// patience is how long a wait may take on a busy machine; normally it takes milliseconds.
const patience = 40 * time.Second

// build compiles the agent into a directory.
func build(dir string, race bool) (string, error) {
	path := filepath.Join(dir, fmt.Sprintf("certctl-agent-race-%t", race))
	cmd := exec.Command("go", "build", "-buildvcs=false", fmt.Sprintf("-race=%t", race), "-o", path, ".")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the agent: %w\n%s", err, out)
	}
	return path, nil
}

// host is a machine with an agent and its control plane. At the end of the test it checks that no
// secret has left it and that the agent has followed the protocol.
type host struct {
	t       *testing.T
	dir     string
	binary  string
	plane   *devplane.Plane
	agentID string
	env     map[string]string
	pause   string // of the agent's commands; see holdCommand

	// excused reports whether the test expects a protocol violation.
	excused func(problem string) bool

	mu      sync.Mutex // guards outputs
	outputs []*output
}

// newHost creates a host and a control plane. Environment variables configure the agent, with
// allow-lists for one NGINX target.
func newHost(t *testing.T, options devplane.Options) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir(), binary: agentBinary}
	if options.APIKey == "" {
		options.APIKey = "key-that-must-not-be-seen-4242"
	}
	h.plane = devplane.Start(t, options)
	h.agentID = h.plane.RegisterAgent("host")
	for _, dir := range []string{"tls", "targets.d"} {
		if err := os.Mkdir(h.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.pause = h.path("pause")
	h.write("agent.env", "", 0o600)
	h.write("validate.sh", h.script("validate"), 0o644)
	h.write("reload.sh", h.script("reload"), 0o644)
	h.env = map[string]string{
		"PATH":                          os.Getenv("PATH"),
		"GORACE":                        "atexit_sleep_ms=0", // a second at each end without it
		"CERTCTL_CONFIG":                h.path("agent.env"), // not the one of this machine
		"CERTCTL_SERVER_URL":            h.plane.URL,
		"CERTCTL_SERVER_CA_BUNDLE_PATH": h.plane.CAFile(),
		"CERTCTL_API_KEY":               h.plane.APIKey,
		"CERTCTL_AGENT_ID":              h.agentID,
		"CERTCTL_KEY_DIR":               h.path("keys"),
		"CERTCTL_TARGETS_DIR":           h.path("targets.d"),
		"CERTCTL_ALLOWED_PATHS":         h.path("tls"),
		"CERTCTL_ALLOWED_COMMANDS":      h.command("validate") + ";" + h.command("reload"),
		"CERTCTL_HEARTBEAT_INTERVAL":    "150ms",
		"CERTCTL_POLL_INTERVAL":         "100ms",
		"CERTCTL_STARTUP_JITTER":        "false",
	}
	t.Cleanup(h.audit)
	t.Cleanup(func() { os.RemoveAll(h.pause + "-validate"); os.RemoveAll(h.pause + "-reload") })
	return h
}

func (h *host) path(elements ...string) string {
	return filepath.Join(append([]string{h.dir}, elements...)...)
}

func (h *host) write(name, content string, mode fs.FileMode) string {
	h.t.Helper()
	path := h.path(name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		h.t.Fatal(err)
	}
	return path
}

func (h *host) read(elements ...string) string {
	h.t.Helper()
	data, err := os.ReadFile(h.path(elements...))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(data)
}

// command is the command line of a script.
func (h *host) command(name string) string { return "/bin/sh " + h.path(name+".sh") }

// script is a command of the target. It records that it ran, and does not end while it is held.
func (h *host) script(name string) string {
	return fmt.Sprintf("echo %[1]s >>%[2]s/ran\nwhile [ -e %[3]s-%[1]s ]; do : >%[3]s-%[1]s/reached; sleep 0.02; done 2>/dev/null\nexit 0\n",
		name, h.dir, h.pause)
}

// hold keeps a script from ending until release is called.
func (h *host) hold(name string) (release func()) {
	h.t.Helper()
	if err := os.Mkdir(h.pause+"-"+name, 0o755); err != nil {
		h.t.Fatal(err)
	}
	return func() { os.RemoveAll(h.pause + "-" + name) }
}

// waitHeld waits until a held script runs.
func (h *host) waitHeld(name string) {
	h.t.Helper()
	h.waitFor("the "+name+" command", func() bool {
		_, err := os.Stat(h.pause + "-" + name + "/reached")
		return err == nil
	})
}

// ran counts the runs of a script.
func (h *host) ran(name string) int {
	data, _ := os.ReadFile(h.path("ran"))
	return strings.Count(string(data), name+"\n")
}

// waitFor waits for a condition on disk.
func (h *host) waitFor(what string, done func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("timed out waiting for %s\n%s", what, h.allOutput())
		}
	}
}

// wait waits for a condition at the control plane.
func (h *host) wait(what string, done func() bool) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	if err := h.plane.Wait(ctx, done); err != nil {
		h.t.Fatalf("timed out waiting for %s: %v\n%s", what, err, h.allOutput())
	}
}

// waitJob waits for the end of a job and fails the test if its status is not want.
func (h *host) waitJob(id, want string) devplane.Job {
	h.t.Helper()
	var job devplane.Job
	h.wait("the end of "+id, func() bool {
		job, _ = h.plane.Job(id)
		return job.Status == api.StatusCompleted || job.Status == api.StatusFailed
	})
	if job.Status != want {
		h.t.Fatalf("job %s ended %s (%s), want %s\n%s", id, job.Status, job.Error, want, h.allOutput())
	}
	return job
}

// waitMore waits until a call was answered n more times than now.
func (h *host) waitMore(call string, n int) {
	h.t.Helper()
	before := h.plane.Count(call)
	h.wait(fmt.Sprintf("%d more %s calls", n, call), func() bool { return h.plane.Count(call) >= before+n })
}

// target adds a target and returns its id. Its files are in the directory tls, with a prefix.
func (h *host) target(prefix string) string {
	return h.plane.AddTarget(devplane.Target{Agent: h.agentID, Type: "NGINX", Config: h.nginx(prefix)})
}

func (h *host) nginx(prefix string) map[string]any {
	return map[string]any{
		"cert_path":        h.path("tls", prefix+"cert.pem"),
		"key_path":         h.path("tls", prefix+"key.pem"),
		"validate_command": h.command("validate"),
		"reload_command":   h.command("reload"),
	}
}

// deployed runs an agent until a certificate is issued and deployed, and returns its id.
func (h *host) deployed() (certificate string) {
	h.t.Helper()
	certificate = h.certificate()
	agent := h.start()
	h.plane.StartIssuance(certificate)
	h.waitDeployment(certificate, 1, api.StatusCompleted)
	agent.stop()
	return certificate
}

// certificate adds a certificate for one target.
func (h *host) certificate() string {
	return h.plane.AddCertificate(devplane.Certificate{CommonName: "www.example.org",
		SANs: []string{"www.example.org"}, Targets: []string{h.target("")}})
}

// waitDeployment waits for the end of the nth deployment of a certificate.
func (h *host) waitDeployment(certificate string, n int, want string) devplane.Job {
	h.t.Helper()
	h.wait("a deployment job", func() bool { return len(h.plane.Deployments(certificate)) >= n })
	return h.waitJob(h.plane.Deployments(certificate)[n-1].ID, want)
}

// pair checks that the target's certificate and key match and that the key directory has the key
// too. It returns the fingerprint.
func (h *host) pair(certificate string) string {
	h.t.Helper()
	chain, err := pemutil.ParseCertificates([]byte(h.read("tls", "cert.pem")))
	if err != nil {
		h.t.Fatal(err)
	}
	key, err := pemutil.ParseKey([]byte(h.read("tls", "key.pem")))
	if err != nil {
		h.t.Fatal(err)
	}
	if !pemutil.SamePublicKey(chain[0].PublicKey, key.Public()) {
		h.t.Errorf("certificate and key do not match")
	}
	held := slices.ContainsFunc(h.keyFiles(certificate), func(name string) bool {
		key, err := pemutil.ParseKey([]byte(h.read("keys", name)))
		return err == nil && pemutil.SamePublicKey(chain[0].PublicKey, key.Public())
	})
	if !held {
		h.t.Errorf("the key of the deployed certificate is not among %v", h.keyFiles(certificate))
	}
	return pemutil.Fingerprint(chain[0])
}

// keyFiles returns the files of one certificate in the key directory.
func (h *host) keyFiles(certificate string) []string {
	h.t.Helper()
	found, err := filepath.Glob(h.path("keys", certificate+".*"))
	if err != nil {
		h.t.Fatal(err)
	}
	for i, path := range found {
		found[i] = filepath.Base(path)
	}
	return found
}

// latest returns the fingerprint of the latest version of a certificate.
func (h *host) latest(certificate string) string {
	versions := h.plane.Versions(certificate)
	return pemutil.Fingerprint(versions[len(versions)-1].Leaf)
}

// environment returns h.env with changes; an empty value removes a variable.
func (h *host) environment(changes map[string]string) []string {
	all := maps.Clone(h.env)
	maps.Copy(all, changes)
	var list []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if all[name] != "" {
			list = append(list, name+"="+all[name])
		}
	}
	return list
}

// output is the combined output of a process.
type output struct {
	mu      sync.Mutex // guards the fields below
	data    bytes.Buffer
	changed chan struct{}
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.changed)
	o.changed = make(chan struct{})
	return o.data.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.data.String()
}

func (h *host) newOutput() *output {
	o := &output{changed: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.outputs = append(h.outputs, o)
	return o
}

func (h *host) allOutput() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all strings.Builder
	for i, o := range h.outputs {
		fmt.Fprintf(&all, "--- output %d\n%s", i+1, o)
	}
	return all.String()
}

// child is a running agent.
type child struct {
	h      *host
	cmd    *exec.Cmd
	output *output
	exited chan struct{}
}

// start starts the daemon.
func (h *host) start(args ...string) *child { h.t.Helper(); return h.startWith(nil, args...) }

// startWith is like start, with changes to the environment.
func (h *host) startWith(changes map[string]string, args ...string) *child {
	h.t.Helper()
	c := &child{h: h, cmd: exec.Command(h.binary, args...), output: h.newOutput(), exited: make(chan struct{})}
	c.cmd.Env = h.environment(changes)
	c.cmd.Dir = h.dir
	c.cmd.Stdout, c.cmd.Stderr = c.output, c.output
	if err := c.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() {
		c.cmd.Wait()
		close(c.exited)
	}()
	h.t.Cleanup(func() {
		c.cmd.Process.Kill()
		<-c.exited
	})
	return c
}

// run runs a command and returns its exit code and output.
func (h *host) run(args ...string) (code int, output string) {
	h.t.Helper()
	return h.runWith(nil, args...)
}

func (h *host) runWith(changes map[string]string, args ...string) (code int, output string) {
	h.t.Helper()
	c := h.startWith(changes, args...)
	code = c.wait()
	return code, c.output.String()
}

// wait waits for the end and returns the exit code, -1 after a signal.
func (c *child) wait() int {
	c.h.t.Helper()
	select {
	case <-c.exited:
		return c.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		c.h.t.Fatalf("the agent does not end\n%s", c.output)
		return 0
	}
}

func (c *child) signal(s os.Signal) {
	c.h.t.Helper()
	if err := c.cmd.Process.Signal(s); err != nil {
		c.h.t.Fatal(err)
	}
}

// stop stops the daemon as a service manager does.
func (c *child) stop() {
	c.h.t.Helper()
	c.signal(syscall.SIGTERM)
	c.wantExit(exitOK)
}

// kill ends the daemon as a crash does.
func (c *child) kill() {
	c.h.t.Helper()
	c.signal(syscall.SIGKILL)
	c.wait()
}

func (c *child) wantExit(want int) {
	c.h.t.Helper()
	if got := c.wait(); got != want {
		c.h.t.Fatalf("exit code %d, want %d\n%s", got, want, c.output)
	}
}

// waitLog waits for a line that contains all texts, and returns it.
func (c *child) waitLog(texts ...string) string {
	c.h.t.Helper()
	deadline := time.After(patience)
	for {
		c.output.mu.Lock()
		changed := c.output.changed
		c.output.mu.Unlock()
		if line := c.logged(texts...); line != "" {
			return line
		}
		select {
		case <-changed:
		case <-c.exited:
			if line := c.logged(texts...); line != "" {
				return line
			}
			c.h.t.Fatalf("the agent ended before it logged %q\n%s", texts, c.output)
		case <-deadline:
			c.h.t.Fatalf("the agent does not log %q\n%s", texts, c.output)
		}
	}
}

// logged returns the first line that contains all texts, or "".
func (c *child) logged(texts ...string) string {
	for line := range strings.Lines(c.output.String()) {
		missing := slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) })
		if !missing && strings.HasSuffix(line, "\n") {
			return line
		}
	}
	return ""
}

// audit checks the output, requests and reports of this host's agents.
func (h *host) audit() {
	places := map[string]string{"output": h.allOutput()}
	for i, request := range h.plane.Requests() {
		header, _ := json.Marshal(request.Header)
		places[fmt.Sprintf("request %d, %s", i, request.Call)] = request.Path + string(header) + string(request.Body)
	}
	for _, job := range h.plane.Jobs() {
		places["error of "+job.ID] = job.Error
	}
	secrets := append(h.keyMaterial(), "PRIVATE KEY", h.plane.APIKey)
	for place, text := range places {
		for _, secret := range secrets {
			if strings.Contains(text, secret) {
				h.t.Errorf("%s contains a secret (%.12s…)", place, secret)
			}
		}
	}
	if strings.Contains(places["output"], "DATA RACE") || strings.Contains(places["output"], "panic") {
		h.t.Errorf("a race or a panic:\n%s", places["output"])
	}
	for _, problem := range h.plane.Problems() {
		if h.excused == nil || !h.excused(problem) {
			h.t.Errorf("protocol violation: %s", problem)
		}
	}
	if h.t.Failed() {
		h.t.Logf("the agents printed:\n%.20000s", places["output"])
	}
}

// keyMaterial returns lines of base64 of every key on this host.
func (h *host) keyMaterial() (lines []string) {
	err := filepath.WalkDir(h.dir, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && !entry.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if !strings.Contains(block.Type, "PRIVATE KEY") {
				continue
			}
			block.Headers = nil
			encoded := strings.Split(strings.TrimSpace(string(pem.EncodeToMemory(block))), "\n")
			lines = append(lines, encoded[1:len(encoded)-1]...)
		}
		return nil
	})
	if err != nil {
		h.t.Error(err)
	}
	// The last line of a block may be too short, and the first line is the same for all keys of a
	// type: it has the curve's name.
	return slices.DeleteFunc(lines, func(line string) bool { return len(line) < 40 })
}
