// Package app wires the agent together, for the daemon and for tests in virtual time.
package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"certctl-agent/internal/agent"
	"certctl-agent/internal/api"
	"certctl-agent/internal/budget"
	"certctl-agent/internal/buildinfo"
	"certctl-agent/internal/command"
	"certctl-agent/internal/config"
	"certctl-agent/internal/connector"
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
	"certctl-agent/internal/secret"
	"certctl-agent/internal/statedir"
	"certctl-agent/internal/status"
	"certctl-agent/internal/tlsprobe"
	"certctl-agent/internal/transaction"
)

// Options configure an App.
type Options struct {
	Config    *config.Config
	Log       *slog.Logger
	Notify    agent.Notifier
	MachineID string        // identifies this host; see statedir.Open
	Watchdog  time.Duration // interval of Notify.Watchdog; 0: none

	Seams
}

// Seams are functions that tests replace. Nil means the real one.
type Seams struct {
	Dial  func(ctx context.Context, network, address string) (net.Conn, error) // to the control plane
	Plane func(Plane) Plane                                                    // wraps the client
	Run   func(ctx context.Context, c policy.Command) error
	Query func(ctx context.Context, c policy.Command) (stdout []byte, err error)
	Probe func(ctx context.Context, e tlsprobe.Endpoint) (tlsprobe.Result, error)
	Rand  pace.Rand
}

// Plane is the control plane as the running agent uses it.
type Plane interface {
	agent.Plane
	enroll.Plane
	deploy.Plane
	discovery.Plane
}

// App is an agent with everything that it needs.
type App struct {
	Agent     *agent.Agent
	Keys      *keystore.Store
	Ledger    *ledger.Ledger
	Recovered transaction.Recovery // what Open did about transactions of an earlier run

	opts      Options
	state     *statedir.Dir
	abandoned []string // warnings about the state of an earlier agent id
	installed *installed.List
	policy    *policy.Policy
	engine    *transaction.Engine
	key       atomic.Pointer[func() secret.String] // returns the API key; Reload replaces it
	budget    *budget.Budget                       // of the client
	client    *controlplane.Client
	plane     Plane // the client, perhaps wrapped by a test

	closers []func() error
}

// Open opens the files on disk, rolls back or finishes interrupted transactions, and builds the
// agent. It sends nothing.
func Open(ctx context.Context, opts Options) (*App, error) {
	a := &App{opts: opts.withDefaults(), policy: newPolicy(opts.Config)}
	if err := a.open(ctx); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

func (opts Options) withDefaults() Options {
	if opts.Plane == nil {
		opts.Plane = func(p Plane) Plane { return p }
	}
	if opts.Run == nil {
		opts.Run = func(ctx context.Context, c policy.Command) error {
			_, err := command.Run(ctx, c.Argv, c.Timeout)
			return err
		}
	}
	if opts.Query == nil {
		opts.Query = query
	}
	if opts.Rand == nil {
		opts.Rand = pace.Global
	}
	return opts
}

// query runs a command that changes nothing.
func query(ctx context.Context, c policy.Command) ([]byte, error) {
	return command.Query(ctx, c.Argv, c.Timeout, c.Env...)
}

func (a *App) open(ctx context.Context) error {
	// The key directory first: the state directory is inside it.
	if err := a.openKeys(); err != nil {
		return err
	}
	if err := a.openState(); err != nil {
		return err
	}
	if err := a.openTransactions(ctx); err != nil {
		return err
	}
	a.connect()
	return a.build()
}

// openKeys opens and locks the key directory, which removes leftovers of a crash.
func (a *App) openKeys() (err error) {
	cfg := a.opts.Config
	a.Keys, err = keystore.Open(keystore.Owner{Agent: cfg.AgentID, StateDir: cfg.StateDir}, cfg.KeyDir, a.opts.Log)
	if err != nil {
		return err
	}
	a.onClose(a.Keys.Close)
	return nil
}

// openState opens the state directory, the ledger and the list of installed
// certificates.
func (a *App) openState() (err error) {
	cfg, log := a.opts.Config, a.opts.Log
	if a.state, err = statedir.Open(cfg.InstanceStateDir(), cfg.AgentID, a.opts.MachineID); err != nil {
		return err
	}
	a.onClose(func() error { a.state.Close(); return nil })
	if a.state.Cloned {
		log.Warn(clonedWarning, "state_dir", a.state.Path)
	}
	a.abandoned = AbandonedWarnings(cfg)
	for _, warning := range a.abandoned {
		log.Warn("earlier state", "warning", warning)
	}
	if a.Ledger, err = ledger.Open(a.state.Root, log); err != nil {
		return err
	}
	a.onClose(a.Ledger.Close)
	if a.installed, err = installed.Open(a.state.Root); err != nil {
		log.Error("the list of served certificates is empty now", "error", err)
	}
	return nil
}

// openTransactions rolls back or finishes the interrupted transactions of an earlier run.
func (a *App) openTransactions(ctx context.Context) (err error) {
	a.engine, err = transaction.Open(transaction.Options{
		State:     a.state.Root,
		StatePath: a.state.Path,
		Policy:    a.policy,
		Run:       a.opts.Run,
		Retention: a.opts.Config.BackupRetention,
		Log:       a.opts.Log,
	})
	if err != nil {
		return err
	}
	a.onClose(a.engine.Close)
	if a.Recovered, err = a.engine.Recover(ctx); err != nil {
		return fmt.Errorf("recover from the last run: %w", err)
	}
	return nil
}

// connect creates the client. The agent observes every call.
func (a *App) connect() {
	cfg := a.opts.Config
	a.key.Store(new(cfg.KeyFunc(a.opts.Log)))
	opts := clientOptions(cfg)
	opts.Key = func() secret.String { return (*a.key.Load())() }
	opts.Observe = func(seen api.Observation) { a.Agent.Observe(seen) } // build sets Agent before the first call
	opts.Dial = a.opts.Dial
	a.budget = budget.New(a.opts.Rand)
	opts.Budget = a.budget
	a.client = controlplane.New(opts)
	a.onClose(func() error { a.client.Close(); return nil })
	a.plane = a.opts.Plane(a.client)
}

func (a *App) build() error {
	scanner, err := a.scanner()
	if err != nil {
		return err
	}
	cfg := a.opts.Config
	a.Agent = agent.New(agent.Options{
		AgentID: cfg.AgentID,
		Plane:   a.plane,
		Enroller: enroll.New(enroll.Options{
			Keys:      a.Keys,
			Plane:     a.plane,
			Algorithm: cfg.KeyAlgorithm,
			Log:       a.opts.Log,
		}),
		Deployer: deploy.New(deploy.Options{
			Plane:    a.plane,
			Keys:     a.Keys,
			Engine:   a.engine,
			Types:    all.Types(),
			Overlays: Overlays(cfg),
			Verify:   cfg.VerifyDeployment,
			Probe:    a.opts.Probe,
			Host: connector.Host{
				Policy:            a.policy,
				Log:               a.opts.Log,
				Query:             a.opts.Query,
				Getenv:            cfg.Getenv,
				Proxy:             cfg.Proxy.For,
				StateDir:          cfg.InstanceStateDir(),
				AcceptNewHostKeys: cfg.SSHAcceptNewHostKeys,
			},
		}),
		Scanner:           scanner,
		Ledger:            a.Ledger,
		Installed:         a.installed,
		Notify:            a.opts.Notify,
		Log:               a.opts.Log,
		Describe:          a.describe,
		Repair:            a.engine.Repair,
		Budget:            a.budget,
		HeartbeatInterval: cfg.HeartbeatInterval,
		PollInterval:      cfg.PollInterval,
		DiscoveryInterval: cfg.DiscoveryInterval,
		StartupJitter:     cfg.StartupJitter,
		MaxDeploys:        cfg.MaxDeploys,
		ShutdownGrace:     cfg.ShutdownGrace,
		WatchdogInterval:  a.opts.Watchdog,
		Rand:              a.opts.Rand,
		Base: status.Snapshot{
			Version:  buildinfo.Version(),
			Commit:   buildinfo.Commit(),
			AgentID:  cfg.AgentID,
			Server:   cfg.Server.String(),
			Warnings: a.standingWarnings(),
		},
	})
	return nil
}

// scanner returns nil if discovery is off.
func (a *App) scanner() (agent.Scanner, error) {
	cfg := a.opts.Config
	if len(cfg.DiscoveryDirs) == 0 {
		return nil, nil
	}
	opts := ScanOptions(cfg)
	opts.Skip = []string{cfg.KeyDir, cfg.StateDir}
	opts.State, opts.Index = a.state.Root, "discovery.index"
	opts.Log = a.opts.Log
	opts.Gentle = true // it has hours
	scanner, err := discovery.New(opts)
	if err != nil {
		return nil, err
	}
	return discovery.NewReporter(discovery.ReporterOptions{
		Scanner:  scanner,
		Plane:    a.plane,
		AgentID:  cfg.AgentID,
		Dirs:     cfg.DiscoveryDirs,
		Interval: cfg.DiscoveryInterval,
		Log:      a.opts.Log,
	}), nil
}

const clonedWarning = "this state was written on another machine: if this host is a copy of it, both now act as the same agent: register this host under its own id; if the host was only moved, remove the file \"machine\" in the state directory"

func (a *App) standingWarnings() []string {
	warnings := slices.Concat(a.opts.Config.Warnings, a.abandoned)
	if a.state.Cloned {
		warnings = append(warnings, clonedWarning)
	}
	return warnings
}

func (a *App) describe(ctx context.Context) api.Heartbeat {
	if a.state.Cloned {
		a.opts.Log.Warn("sending a heartbeat although the state was written on another machine", "agent_id", a.opts.Config.AgentID)
	}
	return NewHeartbeat(ctx, a.client)
}

// Reload takes the API key and the CA bundle from a new configuration and starts a scan. The other
// settings need a restart.
func (a *App) Reload(fresh *config.Config) {
	a.key.Store(new(fresh.KeyFunc(a.opts.Log)))
	a.client.Reload(fresh.Roots)
	a.Agent.Rescan()
}

func (a *App) onClose(f func() error) { a.closers = append(a.closers, f) }

// Close closes everything that Open opened, in reverse order. The agent must have ended.
func (a *App) Close() error {
	var errs []error
	for _, f := range slices.Backward(a.closers) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}
