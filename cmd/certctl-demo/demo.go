package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

const (
	certificateID = "cert-demo"
	targetID      = "target-demo"
	commonName    = "demo.example.org"
)

// demo is one run of the demonstration.
type demo struct {
	out       io.Writer
	agentLog  io.Writer // nil: not shown
	agentPath string
	target    string // product, or "" for the default
	started   time.Time

	dir     string
	plane   *devplane.Plane
	agentID string
	server  *liveserver.Server
	agent   *exec.Cmd
	exited  chan error
	log     bytes.Buffer // the agent's; read it only after the agent has exited
	served  string       // fingerprint of the served certificate
}

// say prints one line of the timeline.
func (d *demo) say(what, format string, args ...any) {
	fmt.Fprintf(d.out, "%6.2fs  %-12s %s\n", time.Since(d.started).Seconds(), what, fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context) (err error) {
	if d.dir, err = os.MkdirTemp("", "certctl-demo-"); err != nil {
		return err
	}
	// The server's unprivileged workers must be able to read their files.
	if err := os.Chmod(d.dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.cleanUp()) }()

	steps := []struct {
		name string
		run  func(context.Context) error
	}{
		{"start the control plane and the live server", d.start},
		{"first heartbeat", d.firstHeartbeat},
		{"key and CSR", d.enrol},
		{"deployment", d.deployment},
		{"discovery", d.discovery},
		{"renewal under load", d.renewal},
		{"failed deployment", d.rollback},
		{"retirement", d.retirement},
		{"no secret left the host", d.secrets},
	}
	for _, step := range steps {
		if err := step.run(ctx); err != nil {
			return fmt.Errorf("%s: %w\n%s", step.name, err, d.tail())
		}
	}
	return nil
}

// start starts everything except the agent.
func (d *demo) start(ctx context.Context) error {
	var err error
	if d.plane, err = devplane.New(devplane.Options{Listen: "127.0.0.1:0", Dir: d.dir}); err != nil {
		return err
	}
	d.say("control plane", "%s, TLS 1.3, in memory", d.plane.URL)
	if err := d.startServer(ctx); err != nil {
		return err
	}
	d.say("live server", "%s on %s serves a self-signed test certificate:", d.server.Name, d.server.Endpoint.Address)
	if d.served, err = d.fingerprint(ctx); err != nil {
		return err
	}
	d.say("", "before  sha256 %s", d.served)

	d.agentID = d.plane.RegisterAgent("demo")
	d.plane.AddTarget(devplane.Target{ID: targetID, Agent: d.agentID, Type: d.server.Type, Config: d.server.Config})
	d.plane.AddCertificate(devplane.Certificate{ID: certificateID, CommonName: commonName,
		SANs: []string{commonName, "127.0.0.1"}, Targets: []string{targetID}})
	return d.plantCertificates()
}

// startServer starts the requested product. The default is nginx, or the built-in server if nginx
// is not installed.
func (d *demo) startServer(ctx context.Context) error {
	ca, err := testca.New()
	if err != nil {
		return err
	}
	before, err := ca.Issue(testca.Template{CommonName: "before.example.org", Names: []string{"127.0.0.1"}})
	if err != nil {
		return err
	}
	pair := liveserver.Pair{Certificate: before.PEM(), Key: before.KeyPEM()}
	dir := filepath.Join(d.dir, "server")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	product := d.target
	if product == "" {
		product = "nginx"
	}
	starter := liveserver.Starters()[product]
	if starter == nil {
		return fmt.Errorf("unknown live server %q", product)
	}
	d.server, err = starter(ctx, dir, pair)
	if d.target == "" && errors.Is(err, liveserver.ErrMissing) {
		d.say("live server", "nginx is not installed: using the built-in TLS server")
		self, err := os.Executable()
		if err != nil {
			return err
		}
		d.server, err = liveserver.StartBuiltin(ctx, dir, pair, self+" server-order")
		return err
	}
	return err
}

// plantCertificates writes unmanaged certificates to disk, for discovery.
func (d *demo) plantCertificates() error {
	ca, err := testca.New()
	if err != nil {
		return err
	}
	disk := filepath.Join(d.dir, "disk", "etc")
	if err := os.MkdirAll(disk, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"intranet", "legacy"} {
		issued, err := ca.Issue(testca.Template{CommonName: name + ".example.org"})
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(disk, name+".pem"), issued.LeafPEM(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) startAgent() error {
	commands := []string{brokenReload}
	for _, key := range []string{"validate_command", "reload_command"} {
		if line, ok := d.server.Config[key].(string); ok {
			commands = append(commands, line)
		}
	}
	key := filepath.Join(d.dir, "api-key")
	if err := os.WriteFile(key, []byte(d.plane.APIKey+"\n"), 0o600); err != nil {
		return err
	}
	config := filepath.Join(d.dir, "agent.env")
	if err := os.WriteFile(config, nil, 0o600); err != nil {
		return err
	}
	overlays := filepath.Join(d.dir, "targets.d")
	if err := os.Mkdir(overlays, 0o755); err != nil {
		return err
	}
	d.agent = exec.Command(d.agentPath)
	d.agent.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"CERTCTL_CONFIG=" + config, // not the one of this host
		"CERTCTL_SERVER_URL=" + d.plane.URL,
		"CERTCTL_SERVER_CA_BUNDLE_PATH=" + d.plane.CAFile(),
		"CERTCTL_API_KEY_FILE=" + key,
		"CERTCTL_AGENT_ID=" + d.agentID,
		"CERTCTL_AGENT_NAME=demo",
		"CERTCTL_KEY_DIR=" + d.keyDir(),
		"CERTCTL_TARGETS_DIR=" + overlays,
		"CERTCTL_DISCOVERY_DIRS=" + filepath.Join(d.dir, "disk"),
		"CERTCTL_ALLOWED_PATHS=" + filepath.Join(d.dir, "server"),
		"CERTCTL_ALLOWED_COMMANDS=" + strings.Join(commands, ";"),
		"CERTCTL_HEARTBEAT_INTERVAL=1s",
		"CERTCTL_POLL_INTERVAL=500ms",
		"CERTCTL_STARTUP_JITTER=false",
		"CERTCTL_LOG_FORMAT=text",
	}
	output := io.Writer(&d.log)
	if d.agentLog != nil {
		output = io.MultiWriter(output, d.agentLog)
	}
	d.agent.Stdout, d.agent.Stderr = output, output
	if err := d.agent.Start(); err != nil {
		return fmt.Errorf("start the agent: %w; run `make build` first", err)
	}
	d.exited = make(chan error, 1)
	go func() { d.exited <- d.agent.Wait() }()
	return nil
}

func (d *demo) keyDir() string { return filepath.Join(d.dir, "keys") }

// wait waits until done returns true for the control plane. It fails if the agent exits.
func (d *demo) wait(ctx context.Context, what string, done func() bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("nothing happened for 30 s"))
	defer cancel()
	waited := make(chan error, 1)
	go func() { waited <- d.plane.Wait(ctx, done) }()
	select {
	case err := <-waited:
		if err != nil {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		return nil
	case err := <-d.exited:
		d.exited <- err
		return fmt.Errorf("waiting for %s: the agent has exited: %v", what, err)
	}
}

// waitDeployment waits for the end of the nth deployment.
func (d *demo) waitDeployment(ctx context.Context, n int) (devplane.Job, error) {
	var job devplane.Job
	err := d.wait(ctx, "the deployment's end", func() bool {
		jobs := d.plane.Deployments(certificateID)
		if len(jobs) < n {
			return false
		}
		job = jobs[n-1]
		return job.Status == api.StatusCompleted || job.Status == api.StatusFailed
	})
	return job, err
}

func (d *demo) fingerprint(ctx context.Context) (string, error) {
	probe, err := tlsprobe.Probe(ctx, d.server.Endpoint)
	if err != nil {
		return "", err
	}
	return probe.Fingerprint, nil
}

// tail stops the agent and returns the end of its log, for an error.
func (d *demo) tail() string {
	if d.agent == nil {
		return ""
	}
	d.stopAgent()
	lines := strings.Split(strings.TrimSpace(d.log.String()), "\n")
	if len(lines) > 15 {
		lines = lines[len(lines)-15:]
	}
	return "the agent's last lines:\n  " + strings.Join(lines, "\n  ")
}

func (d *demo) stopAgent() {
	if d.agent == nil || d.agent.ProcessState != nil {
		return
	}
	_ = d.agent.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-d.exited:
		d.exited <- err
	case <-time.After(10 * time.Second):
		_ = d.agent.Process.Kill()
		d.exited <- <-d.exited
	}
}

// cleanUp stops everything and removes all files.
func (d *demo) cleanUp() error {
	if d.agent != nil && d.agent.Process != nil {
		d.stopAgent()
	}
	if d.server != nil {
		d.server.Stop()
	}
	if d.plane != nil {
		d.plane.Close()
	}
	return os.RemoveAll(d.dir)
}
