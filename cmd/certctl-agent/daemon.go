package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"certctl-agent/internal/agent"
	"certctl-agent/internal/api"
	"certctl-agent/internal/buildinfo"
	"certctl-agent/internal/command"
	"certctl-agent/internal/config"
	"certctl-agent/internal/connector/all"
	"certctl-agent/internal/controlplane"
	"certctl-agent/internal/deploy"
	"certctl-agent/internal/discovery"
	"certctl-agent/internal/enroll"
	"certctl-agent/internal/installed"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/ledger"
	"certctl-agent/internal/pace"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/sdnotify"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/statedir"
	"certctl-agent/internal/status"
	"certctl-agent/internal/survey"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/transaction"
)

// daemon is the running program: what the packages share.
type daemon struct {
	config *config.Config
	log    *slog.Logger
	level  *slog.LevelVar
	notify *sdnotify.Notifier

	state  *statedir.Dir
	keys   *keystore.Store
	ledger *ledger.Ledger
	served *installed.Inventory

	abandoned []string // warnings of state that an earlier agent id left
	files     *transaction.Engine
	plane     *controlplane.Client
	key       atomic.Pointer[func() secret.String] // where the client gets the API key; replaced by a reload
	agent     *agent.Agent

	hangups chan os.Signal // SIGHUP
	closers []func()
}

// runDaemon runs until a signal or the retirement of this agent.
func runDaemon(ctx context.Context, p process) error {
	cfg, err := config.Load(p.args, p.getenv, config.Options{})
	if errors.Is(err, flag.ErrHelp) {
		usage(p.stdout)
		return err
	}
	if err != nil {
		return err
	}
	d := &daemon{config: cfg, level: new(slog.LevelVar), notify: sdnotify.New(p.getenv("NOTIFY_SOCKET"))}
	d.log = newLogger(p.stdout, cfg.LogFormat, d.level)
	d.level.Set(cfg.LogLevel)
	defer d.close()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	signalled, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// After the first signal the second one has its default effect: the
	// process ends at once, and the journal has what the next start needs. What
	// runs learns of the first only when that is so.
	context.AfterFunc(signalled, func() {
		stop()
		cancel(context.Cause(signalled))
	})
	// From here on a SIGHUP waits until it can be served, and does not end the
	// process.
	d.hangups = make(chan os.Signal, 1)
	signal.Notify(d.hangups, syscall.SIGHUP)
	defer signal.Stop(d.hangups)

	d.log.Info("certctl-agent starts", "version", buildinfo.Version(), "commit", buildinfo.Commit(), "go", runtime.Version(),
		"pid", os.Getpid(), "agent_id", cfg.AgentID, "server", cfg.Server.String(), "config", cfg)
	for _, warning := range cfg.Warnings {
		d.log.Warn("configuration", "warning", warning)
	}
	if err := d.open(ctx, p); err != nil {
		if signalled.Err() != nil && errors.Is(err, context.Cause(signalled)) {
			d.log.Info("stopped", "reason", "asked to")
			return nil
		}
		return err
	}
	return d.serve(ctx)
}

// open opens everything on disk, and brings what a crash left half done to one
// side or the other. It sends nothing.
func (d *daemon) open(ctx context.Context, p process) error {
	cfg := d.config
	var err error
	// First: the state directory is made in it. Opening it removes leftovers of a
	// crash, under its lock.
	if d.keys, err = keystore.Open(keystore.Owner{Agent: cfg.AgentID, StateDir: cfg.StateDir}, cfg.KeyDir, d.log); err != nil {
		return err
	}
	d.onClose(func() { d.keys.Close() })
	if d.state, err = statedir.Open(cfg.InstanceStateDir(), cfg.AgentID, machineID()); err != nil {
		return err
	}
	d.onClose(d.state.Close)
	if d.state.Cloned {
		d.log.Warn(clonedWarning, "state_dir", d.state.Path)
	}
	d.abandoned = abandonedWarnings(cfg)
	for _, warning := range d.abandoned {
		d.log.Warn("earlier state", "warning", warning)
	}
	if d.ledger, err = ledger.Open(d.state.Root, d.log); err != nil {
		return err
	}
	d.onClose(func() { d.ledger.Close() })
	if d.served, err = installed.Open(d.state.Root); err != nil {
		d.log.Error("the list of served certificates starts anew", "error", err)
	}
	rules := d.policy()
	d.files, err = transaction.Open(transaction.Options{
		State:     d.state.Root,
		StatePath: d.state.Path,
		Policy:    rules,
		Run: func(ctx context.Context, c policy.Command) error {
			_, err := command.Run(ctx, c.Argv, c.Timeout)
			return err
		},
		Retention: cfg.BackupRetention,
		Log:       d.log,
	})
	if err != nil {
		return err
	}
	d.onClose(func() { d.files.Close() })
	if _, err := d.files.Recover(ctx); err != nil {
		return fmt.Errorf("recover from the last run: %w", err)
	}
	return d.build(rules, p)
}

const clonedWarning = "this state was written on another machine: if this one is a copy of it, both now act as the same agent; register this host under an id of its own, or remove the file \"machine\" in the state directory if the host was only moved"

// abandonedWarnings tell of deployments that were interrupted under another
// agent id or control plane. They are not undone here: such a record does not
// say which host it is of, and a key directory can come with a disk.
func abandonedWarnings(cfg *config.Config) []string {
	var warnings []string
	for _, dir := range statedir.Abandoned(cfg.InstanceStateDir()) {
		ids, err := transaction.Interrupted(dir)
		if err != nil || len(ids) == 0 {
			continue
		}
		list := printable.Clip(strings.Join(ids, ", "), maxAbandoned)
		warnings = append(warnings, fmt.Sprintf("deployments were interrupted under another agent id or server, and their files may not match (targets %s): "+
			"start the agent once with the earlier -agent-id and -server, which undoes them, or check these files and remove %s", list, dir))
	}
	return warnings
}

// maxAbandoned bounds the ids in one warning, in bytes.
const maxAbandoned = 1 << 10

// policy is what the control plane may make this host write and run.
func (d *daemon) policy() *policy.Policy {
	cfg := d.config
	protected := []string{cfg.KeyDir, cfg.StateDir, cfg.TargetsDir}
	for _, path := range []string{cfg.File, cfg.APIKeyFile, cfg.CABundle} {
		if path != "" {
			protected = append(protected, path)
		}
	}
	return &policy.Policy{Paths: cfg.AllowedPaths, Commands: cfg.AllowedCommands, Protected: protected}
}

// overlaysOf are this host's own words on its targets.
func overlaysOf(cfg *config.Config) *targetconf.Overlays {
	if cfg.TargetsDirNamed {
		return targetconf.RequireOverlays(cfg.TargetsDir)
	}
	return targetconf.OpenOverlays(cfg.TargetsDir)
}

// build makes the client and everything that needs it.
func (d *daemon) build(rules *policy.Policy, p process) error {
	cfg := d.config
	key := cfg.KeyFunc(d.log)
	d.key.Store(&key)
	d.plane = newClient(cfg, func() secret.String { return (*d.key.Load())() }, func(o api.Observation) { d.agent.Observe(o) })
	d.onClose(d.plane.Close)

	surveyor, err := d.surveyor()
	if err != nil {
		return err
	}
	d.agent = agent.New(agent.Options{
		AgentID: cfg.AgentID,
		Plane:   d.plane,
		Enroller: enroll.New(enroll.Options{
			Keys:      d.keys,
			Plane:     d.plane,
			Algorithm: cfg.KeyAlgorithm,
			Log:       d.log,
		}),
		Deployer: deploy.New(deploy.Options{
			Plane:    d.plane,
			Keys:     d.keys,
			Engine:   d.files,
			Types:    all.Types(),
			Overlays: overlaysOf(cfg),
			Policy:   rules,
			Verify:   cfg.VerifyDeployment,
			Log:      d.log,
			Query: func(ctx context.Context, c policy.Command) ([]byte, error) {
				return command.Query(ctx, c.Argv, c.Timeout)
			},
		}),
		Surveyor:          surveyor,
		Ledger:            d.ledger,
		Served:            d.served,
		Notify:            d.notify,
		Log:               d.log,
		Describe:          d.describe,
		Repair:            d.files.Repair,
		HeartbeatInterval: cfg.HeartbeatInterval,
		PollInterval:      cfg.PollInterval,
		DiscoveryInterval: cfg.DiscoveryInterval,
		StartupJitter:     cfg.StartupJitter,
		MaxDeploys:        cfg.MaxDeploys,
		ShutdownGrace:     cfg.ShutdownGrace,
		WatchdogInterval:  sdnotify.WatchdogInterval(p.getenv("WATCHDOG_USEC"), p.getenv("WATCHDOG_PID")),
		Rand:              pace.Global,
		Base: status.Snapshot{
			Version:  buildinfo.Version(),
			Commit:   buildinfo.Commit(),
			AgentID:  cfg.AgentID,
			Server:   cfg.Server.String(),
			Warnings: d.standingWarnings(),
		},
	})
	return nil
}

// surveyor scans and reports; nil: discovery is off.
func (d *daemon) surveyor() (agent.Surveyor, error) {
	cfg := d.config
	if len(cfg.DiscoveryDirs) == 0 {
		return nil, nil
	}
	scanner, err := discovery.New(discovery.Options{
		Dirs:      cfg.DiscoveryDirs,
		Exclude:   cfg.DiscoveryExclude,
		Skip:      []string{cfg.KeyDir, cfg.StateDir},
		Passwords: passwords(cfg),
		MaxRate:   cfg.DiscoveryMaxRate,
		State:     d.state.Root,
		Index:     "discovery.index",
		Log:       d.log,
	})
	if err != nil {
		return nil, err
	}
	return survey.New(survey.Options{
		Scanner:  scanner,
		Plane:    d.plane,
		AgentID:  cfg.AgentID,
		Dirs:     cfg.DiscoveryDirs,
		Interval: cfg.DiscoveryInterval,
		Log:      d.log,
	}), nil
}

// passwords are for PKCS#12 files.
func passwords(cfg *config.Config) func() ([]secret.String, error) {
	return func() ([]secret.String, error) { return cfg.DiscoveryPasswords, nil }
}

func (d *daemon) standingWarnings() []string {
	warnings := slices.Concat(d.config.Warnings, d.abandoned)
	if d.state.Cloned {
		warnings = append(warnings, clonedWarning)
	}
	return warnings
}

// serve runs the loop, with the status socket and SIGHUP beside it.
func (d *daemon) serve(ctx context.Context) error {
	server, err := status.Listen(d.state.Path, d.agent.Snapshot, d.log)
	if err != nil {
		return err
	}
	// What runs beside the loop ends after it, not with ctx.
	running, end := context.WithCancel(context.WithoutCancel(ctx))
	var beside sync.WaitGroup
	defer beside.Wait()
	defer end()
	defer server.Close()
	beside.Go(server.Serve)

	beside.Go(func() {
		for {
			select {
			case <-d.hangups:
				d.reload()
			case <-running.Done():
				return
			}
		}
	})

	if d.config.MetricsFile != "" {
		beside.Go(func() { d.writeMetrics(running) })
	}

	d.notify.Ready()
	d.log.Info("ready", "state_dir", d.state.Path, "key_dir", d.config.KeyDir)
	err = d.agent.Run(ctx)
	d.notify.Stopping()
	if errors.Is(err, api.ErrRetired) {
		d.log.Info("stopped", "reason", "retired")
		return nil
	}
	if err == nil {
		d.log.Info("stopped", "reason", "asked to")
	}
	return err
}

// metricsInterval is how old the metrics file may be: node_exporter is usually
// scraped twice a minute.
const metricsInterval = 15 * time.Second

// writeMetrics keeps the file for node_exporter's textfile collector.
func (d *daemon) writeMetrics(running context.Context) {
	tick := time.NewTicker(metricsInterval)
	defer tick.Stop()
	failing := false
	for {
		ctx, cancel := context.WithTimeout(running, metricsInterval)
		snapshot, err := d.agent.Snapshot(ctx)
		cancel()
		if err == nil {
			err = status.WriteMetricsFile(d.config.MetricsFile, snapshot)
		}
		if running.Err() != nil {
			return
		}
		if err != nil && !failing {
			d.log.Warn("the metrics file could not be written", "file", d.config.MetricsFile, "error", err)
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-running.Done():
			return
		}
	}
}

// reload reads API key, CA bundle and configuration file again, and scans now.
// What cannot change under a running agent is said.
func (d *daemon) reload() {
	d.notify.Reloading()
	defer d.notify.Ready()
	fresh, err := d.config.Reload()
	if err != nil {
		d.log.Error("reload failed: the old configuration stays in use", "error", err)
		return
	}
	for _, warning := range fresh.Warnings {
		d.log.Warn("configuration", "warning", warning)
	}
	key := fresh.KeyFunc(d.log)
	d.key.Store(&key)
	d.plane.Reload(fresh.APIKey, fresh.Roots)
	d.level.Set(fresh.LogLevel)
	d.agent.Rescan()
	d.log.Info("reloaded: API key, CA bundle, overlays and log level; other settings need a restart", "changed", d.config.Changed(fresh))
}

// describe is what a heartbeat says of this host.
func (d *daemon) describe(ctx context.Context) api.Heartbeat {
	if d.state.Cloned {
		d.log.Warn("heartbeat of an agent whose state was written on another machine", "agent_id", d.config.AgentID)
	}
	return newHeartbeat(ctx, d.plane)
}

// newHeartbeat says what this process is and runs on. A host that does not know
// its name reports none.
func newHeartbeat(ctx context.Context, plane *controlplane.Client) api.Heartbeat {
	hostname, _ := os.Hostname()
	return api.Heartbeat{
		Version:      buildinfo.Version(),
		Hostname:     hostname,
		OS:           runtime.GOOS,
		Architecture: runtime.GOARCH,
		IPAddress:    plane.LocalAddr(ctx),
	}
}

func (d *daemon) onClose(f func()) { d.closers = append(d.closers, f) }

// close releases what open opened, the last first.
func (d *daemon) close() {
	for i := len(d.closers) - 1; i >= 0; i-- {
		d.closers[i]()
	}
}

// newClient is the connection of the daemon and of the commands that talk to
// the control plane.
func newClient(cfg *config.Config, key func() secret.String, observe func(api.Observation)) *controlplane.Client {
	return controlplane.New(controlplane.Options{
		Server:             cfg.Server,
		AgentID:            cfg.AgentID,
		APIKey:             cfg.APIKey,
		KeyFunc:            key,
		Roots:              cfg.Roots,
		InsecureSkipVerify: cfg.InsecureSkipVerify,
		Proxy:              cfg.Proxy.ForRequest,
		UserAgent:          buildinfo.UserAgent(),
		Observe:            observe,
	})
}

// maxLogValue bounds one value of a log line. Ids and names of jobs come from
// the control plane, and may be megabytes.
const maxLogValue = 4 << 10

// newLogger logs JSON lines, or text for people.
func newLogger(w io.Writer, format string, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		switch text := a.Value; {
		case a.Key == "stack": // of our own code, on lines
		case text.Kind() == slog.KindString:
			a.Value = slog.StringValue(printable.Clip(text.String(), maxLogValue))
		case text.Kind() == slog.KindAny:
			if err, ok := text.Any().(error); ok {
				a.Value = slog.StringValue(printable.Clip(err.Error(), maxLogValue))
			}
		}
		return a
	}}
	if format == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

func usage(w io.Writer) {
	fmt.Fprint(w, `certctl-agent keeps this host's private keys and installs the certificates that
its certctl control plane issues for them.

Usage:
  certctl-agent [flags]             run the daemon
  certctl-agent COMMAND [flags]     see certctl-agent COMMAND -h

Commands:
`)
	for _, c := range subcommands() {
		fmt.Fprintf(w, "  %-10s %s\n", c.name, c.summary)
	}
	fmt.Fprint(w, `
A flag beats its environment variable beats the configuration file beats the default.
Exit status: 0 stopped or retired, 1 configuration or runtime failure, 2 usage.

Flags:
`)
	config.Usage(w)
}
