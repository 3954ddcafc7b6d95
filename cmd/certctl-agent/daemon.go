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
	"syscall"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/buildinfo"
	"certctl-agent/internal/config"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/sdnotify"
)

type daemon struct {
	config  *config.Config
	log     *slog.Logger
	level   *slog.LevelVar
	notify  *sdnotify.Notifier
	hangups chan os.Signal // SIGHUP
	app     *app.App
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

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	signalled, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// A second signal ends the process at once: the next start recovers from the journal. So stop
	// first restores the default action, and then the context is cancelled.
	context.AfterFunc(signalled, func() {
		stop()
		cancel(context.Cause(signalled))
	})
	// From here on a SIGHUP does not end the process; it waits until serveHangups runs.
	d.hangups = make(chan os.Signal, 1)
	signal.Notify(d.hangups, syscall.SIGHUP)
	defer signal.Stop(d.hangups)

	d.log.Info("certctl-agent starting", "version", buildinfo.Version(), "commit", buildinfo.Commit(), "go", runtime.Version(),
		"pid", os.Getpid(), "agent_id", cfg.AgentID, "server", cfg.Server.String(), "config", cfg)
	for _, warning := range cfg.Warnings {
		d.log.Warn("configuration", "warning", warning)
	}
	d.app, err = app.Open(ctx, app.Options{
		Config:    cfg,
		Log:       d.log,
		Notify:    d.notify,
		MachineID: machineID(),
		Watchdog:  sdnotify.WatchdogInterval(p.getenv("WATCHDOG_USEC"), p.getenv("WATCHDOG_PID")),
	})
	if err != nil {
		if signalled.Err() != nil && errors.Is(err, context.Cause(signalled)) {
			d.log.Info("stopped", "reason", "asked to")
			return nil
		}
		return err
	}
	defer d.app.Close()
	return d.serve(ctx)
}

func (d *daemon) serve(ctx context.Context) error {
	err := d.app.Serve(ctx, func() {
		d.notify.Ready()
		d.log.Info("ready", "state_dir", d.config.InstanceStateDir(), "key_dir", d.config.KeyDir)
	}, d.serveHangups)
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

func (d *daemon) serveHangups(running context.Context) {
	for {
		select {
		case <-d.hangups:
			d.reload()
		case <-running.Done():
			return
		}
	}
}

// reload reads the API key, CA bundle and configuration file again and starts a scan. It logs which
// settings changed, also those that need a restart.
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
	d.app.Reload(fresh)
	d.level.Set(fresh.LogLevel)
	d.log.Info("reloaded: API key, CA bundle, overlays and log level; other settings need a restart", "changed", d.config.Changed(fresh))
}

// maxLogValue bounds a value in a log line, in bytes: a hostile control plane may send megabytes.
const maxLogValue = 4 << 10

// newLogger logs JSON lines, or text for people.
func newLogger(w io.Writer, format string, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		switch text := a.Value; {
		case a.Key == "stack": // trusted, and has several lines
		case text.Kind() == slog.KindString:
			a.Value = slog.StringValue(printable.Line(text.String(), maxLogValue))
		case text.Kind() == slog.KindAny:
			if err, ok := text.Any().(error); ok {
				a.Value = slog.StringValue(printable.Line(err.Error(), maxLogValue))
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
		fmt.Fprintf(w, "  %-15s %s\n", c.name, c.summary)
	}
	fmt.Fprint(w, `
Flags take precedence over environment variables, these over the configuration file,
and that over the defaults.
Exit status: 0 stopped or retired, 1 configuration or runtime failure, 2 usage.

Flags:
`)
	config.Usage(w)
}
