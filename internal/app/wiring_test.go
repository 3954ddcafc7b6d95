package app_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/buildinfo"
	"certctl-agent/internal/config"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/status"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

// host is an agent as the daemon builds it, and its control plane, in a bubble of
// testing/synctest. Every draw is the middle of its range, so that intervals are
// exactly what is configured.
type host struct {
	t        *testing.T
	dir      string
	plane    *devplane.Plane
	agent    string
	settings map[string]string
	options  app.Options
	app      *app.App // the last one that ran

	mu  sync.Mutex // guards what follows
	ran []string   // command lines
	log []string   // messages
}

// inBubble runs a test of a host in a bubble.
func inBubble(t *testing.T, test func(t *testing.T, h *host)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(100 * 365 * 24 * time.Hour) // past the times of files, which are real
		h := &host{t: t, dir: needs.MemoryDir(t)}
		var err error
		if h.plane, err = devplane.New(devplane.Options{Dir: h.dir}); err != nil {
			t.Fatal(err)
		}
		defer h.plane.Close()
		h.agent = h.plane.RegisterAgent("host")
		for _, name := range []string{"tls", "disk", "targets.d"} {
			if err := os.Mkdir(h.path(name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		h.settings = map[string]string{
			"CERTCTL_SERVER_URL":            h.plane.URL,
			"CERTCTL_SERVER_CA_BUNDLE_PATH": h.plane.CAFile(),
			"CERTCTL_API_KEY":               h.plane.APIKey,
			"CERTCTL_AGENT_ID":              h.agent,
			"CERTCTL_KEY_DIR":               h.path("keys"),
			"CERTCTL_STATE_DIR":             h.path("state"),
			"CERTCTL_TARGETS_DIR":           h.path("targets.d"),
			"CERTCTL_ALLOWED_PATHS":         h.path("tls"),
			"CERTCTL_STARTUP_JITTER":        "false",
		}
		h.options = app.Options{Log: slog.New(slog.NewTextHandler(h, nil)), Notify: silent{}, Seams: app.Seams{
			Dial: h.plane.Dial,
			Run:  func(_ context.Context, c policy.Command) error { h.note(&h.ran, strings.Join(c.Argv, " ")); return nil },
			Rand: func(n int64) int64 { return n / 2 },
		}}
		test(t, h)
	})
}

func (h *host) note(list *[]string, what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*list = append(*list, what)
}

func (h *host) Write(line []byte) (int, error) {
	h.note(&h.log, string(line))
	return len(line), nil
}

func (h *host) logged(text string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, line := range h.log {
		n += strings.Count(line, text)
	}
	return n
}

func (h *host) runs(line string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(h.ran), func(ran string) bool { return ran != line }))
}

func (h *host) path(elements ...string) string {
	return filepath.Join(append([]string{h.dir}, elements...)...)
}

func (h *host) write(name string, data []byte) {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Dir(h.path(name)), 0o700); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(h.path(name), data, 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// config is h.settings, loaded.
func (h *host) config() *config.Config {
	h.t.Helper()
	cfg, err := config.Load(nil, func(name string) string { return h.settings[name] }, config.Options{DefaultFile: h.path("none")})
	if err != nil {
		h.t.Fatal(err)
	}
	return cfg
}

// run starts an agent, has test look at it, and stops it. What Run returned is the
// result.
func (h *host) run(test func()) error {
	h.t.Helper()
	h.options.Config = h.config()
	var err error
	if h.app, err = app.Open(h.t.Context(), h.options); err != nil {
		h.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(h.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.app.Agent.Run(ctx) }()
	test()
	stop()
	err = <-ended
	if err := h.app.Close(); err != nil {
		h.t.Error(err)
	}
	return err
}

// target adds an NGINX target with its files in the directory tls.
func (h *host) target(name string, more map[string]any) string {
	settings := map[string]any{
		"cert_path":        h.path("tls", name+".pem"),
		"key_path":         h.path("tls", name+".key"),
		"validate_command": "validate " + name,
		"reload_command":   "reload " + name,
	}
	maps.Copy(settings, more)
	return h.plane.AddTarget(devplane.Target{ID: name, Agent: h.agent, Type: "NGINX", Config: settings})
}

// plant makes a certificate for discovery to find.
func (h *host) plant(names ...string) {
	h.t.Helper()
	issued, err := testca.Must(h.t).Issue(testca.Template{})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, name := range names {
		h.write(name, issued.LeafPEM())
	}
}

func (h *host) certificate(targets ...string) string {
	return h.plane.AddCertificate(devplane.Certificate{CommonName: "www.example.org", SANs: []string{"www.example.org"}, Targets: targets})
}

// deployments waits for n deployments of a certificate, and returns the last one.
func (h *host) deployments(certificate string, n int) devplane.Job {
	h.t.Helper()
	for range 600 {
		if jobs := h.plane.Deployments(certificate); len(jobs) >= n {
			if last := jobs[n-1]; last.Status == api.StatusCompleted || last.Status == api.StatusFailed {
				return last
			}
		}
		time.Sleep(time.Second)
	}
	h.t.Fatalf("deployment %d did not end: %+v\n%s", n, h.plane.Jobs(), h.log)
	return devplane.Job{}
}

// TestIntervals: each interval is the configured one.
func TestIntervals(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		maps.Copy(h.settings, map[string]string{
			"CERTCTL_HEARTBEAT_INTERVAL": "4m",
			"CERTCTL_POLL_INTERVAL":      "6m",
			"CERTCTL_DISCOVERY_DIRS":     h.path("disk"),
			"CERTCTL_DISCOVERY_INTERVAL": "15m",
		})
		h.plant("disk/cert.pem")
		begun := time.Now()
		if err := h.run(func() { time.Sleep(time.Hour - time.Second) }); err != nil {
			t.Error(err)
		}
		for call, every := range map[string]time.Duration{devplane.CallHeartbeat: 4 * time.Minute, devplane.CallWork: 6 * time.Minute, devplane.CallDiscoveries: 15 * time.Minute} {
			if got, want := h.plane.Count(call), int(time.Hour/every); got != want {
				t.Errorf("%d calls of %s in an hour, want %d", got, call, want)
			}
		}
		if got := h.plane.Requests()[0].Time.Sub(begun); got != 0 {
			t.Errorf("the first call came after %v, want none of the jitter that is off", got)
		}
	})
	inBubble(t, func(t *testing.T, h *host) {
		h.settings["CERTCTL_STARTUP_JITTER"] = "true"
		begun := time.Now()
		if err := h.run(func() { time.Sleep(time.Hour) }); err != nil {
			t.Error(err)
		}
		if got := h.plane.Requests()[0].Time.Sub(begun); got < time.Second {
			t.Errorf("the first call came after %v, want a delay", got)
		}
	})
}

// TestDiscoverySettings: what is scanned is what is configured, and never the
// agent's own directories, wherever these are.
func TestDiscoverySettings(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		store, err := os.ReadFile("../pkcs12/testdata/secret.p12")
		if err != nil {
			t.Fatal(err)
		}
		h.plant("disk/a.pem", "disk/left/out.pem", "disk/b.bak", "disk/keys/own.pem", "disk/state/own.pem",
			"disk/keys/keys/.state/own.pem", "disk/state/state/own.pem")
		h.write("disk/c.p12", store)
		h.write("passwords", []byte("correct horse\n"))
		maps.Copy(h.settings, map[string]string{
			"CERTCTL_KEY_DIR":                  h.path("disk", "keys", "keys"),
			"CERTCTL_STATE_DIR":                h.path("disk", "state", "state"),
			"CERTCTL_DISCOVERY_DIRS":           h.path("disk"),
			"CERTCTL_DISCOVERY_EXCLUDE":        "*.bak," + h.path("disk", "left"),
			"CERTCTL_DISCOVERY_PASSWORDS_FILE": h.path("passwords"),
		})
		if err := h.run(func() { time.Sleep(time.Minute) }); err != nil {
			t.Error(err)
		}
		var found []string
		for _, d := range h.plane.Discoveries() {
			found = append(found, strings.TrimPrefix(d.SourcePath, h.path("disk")+"/"))
		}
		slices.Sort(found)
		if want := []string{"a.pem", "c.p12", "keys/own.pem", "state/own.pem"}; !slices.Equal(found, want) {
			t.Errorf("found %q, want %q", found, want)
		}
		for _, report := range h.plane.Reports() {
			if report.AgentID != h.agent || !slices.Equal(report.Directories, []string{h.path("disk")}) {
				t.Errorf("a report of %s about %q", report.AgentID, report.Directories)
			}
		}
		if _, err := os.Stat(filepath.Join(h.config().InstanceStateDir(), "discovery.index")); err != nil {
			t.Errorf("the scan keeps no index: %v", err)
		}
	})
}

// TestDiscoveryRate: the daemon's scans keep to the configured rate, rest, and
// their reports are tried again.
func TestDiscoveryRate(t *testing.T) {
	for _, test := range []struct {
		name, rate string
		files      int
		least      time.Duration
	}{
		{"rate", "2", 20, 9 * time.Second},
		// Only rests take virtual time.
		{"rests", "0", 3000, 100 * time.Millisecond},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *host) {
				h.plant("disk/cert.pem")
				for i := range test.files {
					h.write(fmt.Sprint("disk/", i), []byte("x"))
				}
				h.settings["CERTCTL_DISCOVERY_DIRS"] = h.path("disk")
				h.settings["CERTCTL_DISCOVERY_MAX_RATE"] = test.rate
				h.plane.Inject(devplane.Fault{Call: devplane.CallDiscoveries, Times: 1, Status: http.StatusInternalServerError})
				if err := h.run(func() { time.Sleep(time.Hour) }); err != nil {
					t.Error(err)
				}
				reports := h.plane.Reports()
				if len(reports) != 1 {
					t.Fatalf("%d reports, want 1, after one that was refused for the moment", len(reports))
				}
				if took := time.Duration(reports[0].ScanDurationMS) * time.Millisecond; took < test.least {
					t.Errorf("the scan took %v, want at least %v", took, test.least)
				}
			})
		})
	}
}

// TestRetention keeps as many backups as are configured.
func TestRetention(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		h.settings["CERTCTL_DEPLOY_BACKUP_RETENTION"] = "1"
		certificate := h.certificate(h.target("web", nil))
		err := h.run(func() {
			h.plane.StartIssuance(certificate)
			for n := 1; n <= 4; n++ {
				if job := h.deployments(certificate, n); job.Status != api.StatusCompleted {
					t.Fatalf("deployment %d: %s", n, job.Error)
				}
				h.plane.StartRenewal(certificate)
			}
		})
		if err != nil {
			t.Error(err)
		}
		sets, err := os.ReadDir(filepath.Join(h.config().InstanceStateDir(), "backups", "web"))
		if err != nil || len(sets) != 1 {
			t.Errorf("%d backup sets, want 1 (%v)", len(sets), err)
		}
	})
}

// TestReloadAfterRollback: a reload that failed after a rollback is tried until
// the server runs on the files that are in place.
func TestReloadAfterRollback(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		var broken atomic.Bool
		run := h.options.Run
		h.options.Run = func(ctx context.Context, c policy.Command) error {
			if err := run(ctx, c); err != nil || !broken.Load() || c.Argv[0] != "reload" {
				return err
			}
			return errors.New("the server does not answer")
		}
		certificate := h.certificate(h.target("web", nil))
		err := h.run(func() {
			h.plane.StartIssuance(certificate)
			h.deployments(certificate, 1)
			broken.Store(true)
			h.plane.StartRenewal(certificate)
			if job := h.deployments(certificate, 2); job.Status != api.StatusFailed {
				t.Errorf("the job ended %s", job.Status)
			}
			broken.Store(false)
			before := h.runs("reload web")
			time.Sleep(time.Hour)
			if got := h.runs("reload web") - before; got != 1 {
				t.Errorf("%d reloads once the server answers again, want 1", got)
			}
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// pulse counts signs of life.
type pulse struct {
	silent
	beats int
}

func (p *pulse) Watchdog() { p.beats++ }

func TestWatchdog(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		p := new(pulse)
		h.options.Notify, h.options.Watchdog = p, 10*time.Second
		if err := h.run(func() { time.Sleep(time.Minute + time.Second) }); err != nil {
			t.Error(err)
		}
		if p.beats != 6 {
			t.Errorf("%d signs of life in a minute, want 6", p.beats)
		}
	})
}

// TestGoneOnACSR: a 410 there makes the agent ask by a heartbeat at once.
func TestGoneOnACSR(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		h.settings["CERTCTL_HEARTBEAT_INTERVAL"] = "1h"
		h.plane.Inject(devplane.Fault{Call: devplane.CallCSR, Status: http.StatusGone})
		h.plane.Inject(devplane.Fault{Call: devplane.CallHeartbeat, Skip: 1, Status: http.StatusGone})
		h.plane.StartIssuance(h.certificate(h.target("web", nil)))
		if err := h.run(func() { time.Sleep(time.Minute) }); !errors.Is(err, api.ErrRetired) {
			t.Errorf("Run: %v, want that the agent is retired", err)
		}
	})
}

// TestDeploySettings: as many deployments as are configured run at once, and when the
// agent stops, for as long as is configured.
func TestDeploySettings(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		h.settings["CERTCTL_MAX_DEPLOYS"], h.settings["CERTCTL_SHUTDOWN_GRACE"] = "2", "7s"
		var running atomic.Int64
		h.options.Run = func(ctx context.Context, c policy.Command) error {
			if c.Argv[0] == "reload" { // after the rollback
				return nil
			}
			running.Add(1)
			<-ctx.Done()
			return context.Cause(ctx)
		}
		for i := range 6 {
			// In directories of their own, or they would wait for each other.
			name := fmt.Sprint("web", i)
			if err := os.Mkdir(h.path("tls", name), 0o755); err != nil {
				t.Fatal(err)
			}
			h.plane.StartIssuance(h.certificate(h.target(name, map[string]any{
				"cert_path": h.path("tls", name, "cert.pem"), "key_path": h.path("tls", name, "key.pem")})))
		}
		var stopping time.Time
		err := h.run(func() {
			time.Sleep(5 * time.Second)
			if got := running.Load(); got != 2 {
				t.Errorf("%d deployments run at once, want 2", got)
			}
			stopping = time.Now()
		})
		if err != nil {
			t.Error(err)
		}
		if took := time.Since(stopping); took != 7*time.Second {
			t.Errorf("the stop took %v, want 7s", took)
		}
	})
}

// TestBudget: a call that the control plane refused for the moment waits for its turn
// in the client, and the agent ends that wait when it stops.
func TestBudget(t *testing.T) {
	for retryAfter, want := range map[string]int{"5": 2, "50": 1} {
		inBubble(t, func(t *testing.T, h *host) {
			h.plane.Inject(devplane.Fault{Call: devplane.CallCSR, Times: 1, Status: http.StatusTooManyRequests, RetryAfter: retryAfter})
			h.plane.StartIssuance(h.certificate(h.target("web", nil)))
			var stopping time.Time
			if err := h.run(func() { time.Sleep(20 * time.Second); stopping = time.Now() }); err != nil {
				t.Error(err)
			}
			if got := h.plane.Count(devplane.CallCSR); got != want || h.logged("CSR not accepted yet") > 0 {
				t.Errorf("Retry-After %s: %d CSRs, want %d\n%s", retryAfter, got, want, h.log)
			}
			if took := time.Since(stopping); took > 0 {
				t.Errorf("Retry-After %s: the stop took %v", retryAfter, took)
			}
		})
	}
}

// TestVerifyDeployment: the control plane is told what is served, unless that is
// switched off.
func TestVerifyDeployment(t *testing.T) {
	for setting, want := range map[string]int{"": 1, "false": 0} {
		inBubble(t, func(t *testing.T, h *host) {
			h.settings["CERTCTL_VERIFY_DEPLOYMENT"] = setting
			h.options.Probe = func(context.Context, tlsprobe.Endpoint) (tlsprobe.Result, error) {
				return tlsprobe.Result{}, errors.New("nobody is there")
			}
			certificate := h.certificate(h.target("web", map[string]any{"host": "www.example.org", "port": 443}))
			h.plane.StartIssuance(certificate)
			if err := h.run(func() { h.deployments(certificate, 1); time.Sleep(time.Minute) }); err != nil {
				t.Error(err)
			}
			if got := len(h.plane.Verifications()); got != want {
				t.Errorf("CERTCTL_VERIFY_DEPLOYMENT=%s: %d verifications, want %d", setting, got, want)
			}
		})
	}
}

func TestKeyAlgorithm(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		h.settings["CERTCTL_KEY_ALGORITHM"] = "ecdsa-p384"
		certificate := h.certificate(h.target("web", nil))
		h.plane.StartIssuance(certificate)
		if err := h.run(func() { h.deployments(certificate, 1) }); err != nil {
			t.Error(err)
		}
		if key, ok := h.plane.Versions(certificate)[0].PublicKey().(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P384() {
			t.Errorf("the key is a %T of %+v", key, key)
		}
	})
}

// TestSnapshot: status says which agent this is, and what holds now.
func TestSnapshot(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		h.settings["CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY"] = "true"
		look := func(machine string) (s status.Snapshot) {
			h.options.MachineID = machine
			err := h.run(func() {
				time.Sleep(time.Second)
				var err error
				if s, err = h.app.Agent.Snapshot(t.Context()); err != nil {
					t.Error(err)
				}
			})
			if err != nil {
				t.Error(err)
			}
			return s
		}
		has := func(s status.Snapshot, text string) bool {
			return slices.ContainsFunc(s.Warnings, func(warning string) bool { return strings.Contains(warning, text) })
		}
		const clone, skip = "this state was written on another machine", "insecure-skip-verify is on"
		s := look("one")
		if s.AgentID != h.agent || s.Server != h.plane.URL || s.Version != buildinfo.Version() || s.Commit != buildinfo.Commit() {
			t.Errorf("the snapshot is of %s at %s, version %s, commit %s", s.AgentID, s.Server, s.Version, s.Commit)
		}
		if !has(s, skip) || has(s, clone) || h.logged(clone) > 0 {
			t.Errorf("the warnings are %q", s.Warnings)
		}
		if s = look("another"); !has(s, clone) || h.logged(clone) != 1 {
			t.Errorf("on another machine the warnings are %q, and the log has\n%s", s.Warnings, h.log)
		}
		if beat := h.plane.Heartbeats()[0]; beat.Version != buildinfo.Version() || beat.OS == "" || beat.Architecture == "" || beat.Hostname == "" {
			t.Errorf("a heartbeat says %+v", beat)
		}
	})
}

// TestProtected: nothing is installed where the agent has what is its own.
func TestProtected(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		h.write("etc/agent.env", nil)
		h.write("secret/api-key", []byte("key-0123456789\n"))
		bundle, err := os.ReadFile(h.plane.CAFile())
		if err != nil {
			t.Fatal(err)
		}
		h.write("ca/ca.pem", bundle)
		maps.Copy(h.settings, map[string]string{
			"CERTCTL_CONFIG":                h.path("etc", "agent.env"),
			"CERTCTL_API_KEY":               "",
			"CERTCTL_API_KEY_FILE":          h.path("secret", "api-key"),
			"CERTCTL_SERVER_CA_BUNDLE_PATH": h.path("ca", "ca.pem"),
			"CERTCTL_ALLOWED_PATHS":         h.dir,
		})
		for path, own := range map[string]bool{"tls/cert.pem": false, "keys/cert.pem": true, "state/cert.pem": true, "targets.d/web.json": true,
			"etc/agent.env": true, "secret/api-key": true, "ca/ca.pem": true} {
			target := app.Target{Type: "HAProxy", ID: "web", Config: fmt.Appendf(nil, `{"pem_path": %q, "reload_command": "true"}`, h.path(path))}
			preview, err := app.NewPreview(t.Context(), h.config(), target)
			if err != nil {
				t.Fatal(err)
			}
			refused := slices.ContainsFunc(preview.Problems, func(problem string) bool { return strings.Contains(problem, "which belongs to the agent") })
			if refused != own {
				t.Errorf("%s: the agent's own: %v, want %v; problems %q", path, refused, own, preview.Problems)
			}
		}
	})
}

// TestAllowedHosts: private keys go to no other host than the allowed ones.
func TestAllowedHosts(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		h.settings["CERTCTL_ALLOWED_HOSTS"] = "f5.example.org"
		for name, refused := range map[string]bool{"f5.example.org": false, "other.example.org": true} {
			target := app.Target{Type: "F5", ID: "f5", Config: fmt.Appendf(nil, `{"host": %q, "username": "x", "password": "y", "ssl_profile": "z"}`, name)}
			preview, err := app.NewPreview(t.Context(), h.config(), target)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(fmt.Sprint(preview.Problems), "CERTCTL_ALLOWED_HOSTS allows"); got != refused {
				t.Errorf("%s: refused %v, want %v: %q", name, got, refused, preview.Problems)
			}
		}
	})
}

// TestOverlaysAreRequired: a job does not run without the overlays that this host's
// owner has named.
func TestOverlaysAreRequired(t *testing.T) {
	inBubble(t, func(t *testing.T, h *host) {
		h.settings["CERTCTL_TARGETS_DIR"] = h.path("missing")
		certificate := h.certificate(h.target("web", nil))
		h.plane.StartIssuance(certificate)
		err := h.run(func() {
			if job := h.deployments(certificate, 1); job.Status != api.StatusFailed || !strings.Contains(job.Error, h.path("missing")) {
				t.Errorf("the job ended %s: %s", job.Status, job.Error)
			}
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// TestHostOfConnectors: connectors get this host's proxy and environment.
func TestHostOfConnectors(t *testing.T) {
	const proxy = "127.0.0.1:1" // where nobody listens
	for _, test := range []struct {
		target devplane.Target
		want   string // in the job's error
		not    string
	}{
		{devplane.Target{Type: "AzureKeyVault", Config: map[string]any{"vault_url": "https://example.vault.azure.net", "certificate_name": "web"}}, proxy, "kubeconfig_path"},
		{devplane.Target{Type: "KubernetesSecrets", Config: map[string]any{"namespace": "web", "secret_name": "tls"}}, "", "kubeconfig_path: is required"},
	} {
		inBubble(t, func(t *testing.T, h *host) {
			maps.Copy(h.settings, map[string]string{
				"HTTPS_PROXY": "http://" + proxy, "NO_PROXY": "plane.test",
				"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443",
			})
			test.target.Agent = h.agent
			certificate := h.certificate(h.plane.AddTarget(test.target))
			h.plane.StartIssuance(certificate)
			err := h.run(func() {
				if job := h.deployments(certificate, 1); job.Status != api.StatusFailed || !strings.Contains(job.Error, test.want) || strings.Contains(job.Error, test.not) {
					t.Errorf("the job for %s ended %s: %s", test.target.Type, job.Status, job.Error)
				}
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestStateDirOfConnectors: deployments and previews read what a connector has noted in the state
// directory, before they ask the network.
func TestStateDirOfConnectors(t *testing.T) {
	const want = "read the note of the certificate in ACM"
	inBubble(t, func(t *testing.T, h *host) {
		maps.Copy(h.settings, map[string]string{
			"HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": "plane.test", // where nobody listens
			"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "example",
		})
		settings := map[string]any{"region": "eu-central-1"}
		certificate := h.certificate(h.plane.AddTarget(devplane.Target{Agent: h.agent, Type: "AWSACM", Config: settings}))
		err := h.run(func() {
			// The notes are in a directory of this name.
			if err := os.WriteFile(filepath.Join(h.config().InstanceStateDir(), "acm"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			h.plane.StartIssuance(certificate)
			if job := h.deployments(certificate, 1); job.Status != api.StatusFailed || !strings.Contains(job.Error, want) {
				t.Errorf("the job ended %s: %s", job.Status, job.Error)
			}
			preview, err := app.NewPreview(t.Context(), h.config(), app.Target{Type: "AWSACM", ID: "acm", Config: []byte(`{"region": "eu-central-1"}`)})
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(fmt.Sprint(preview.Problems), want) {
				t.Errorf("preview: %q", preview.Problems)
			}
		})
		if err != nil {
			t.Error(err)
		}
	})
}
