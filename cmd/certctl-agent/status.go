package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/config"
	"certctl-agent/internal/status"
)

const statusHelp = `Usage: certctl-agent status [-json | -metrics | -check | -ready] [-state-dir DIR]

Asks the running daemon over its socket in the state directory. It needs nothing
else: no API key, no agent id, no network.

  -json     print the whole answer as JSON
  -metrics  print it in Prometheus' text format
  -check    liveness probe: exit 1 only when there is no daemon or its loop is
            stuck; an outage of the control plane is no reason to restart
  -ready    readiness probe: exit 1 also without contact for five intervals

Examples:
  certctl-agent status
  certctl-agent status -check -state-dir /var/lib/certctl/keys/.state

Exit status: 0 running (and, for the probes, well), 1 not, 2 usage.

`

func runStatus(ctx context.Context, p process) error {
	var asJSON, asMetrics, check, ready bool
	cfg, err := config.Load(p.args, p.getenv, config.Options{
		Flags: func(f *flag.FlagSet) {
			f.BoolVar(&asJSON, "json", false, "print JSON")
			f.BoolVar(&asMetrics, "metrics", false, "print metrics")
			f.BoolVar(&check, "check", false, "liveness probe")
			f.BoolVar(&ready, "ready", false, "readiness probe")
		},
		Ignore: func(setting string) bool { return setting != "state-dir" && setting != "key-dir" },
	})
	if err != nil {
		return err
	}
	if chosen := setFlags(map[string]bool{"-json": asJSON, "-metrics": asMetrics, "-check": check, "-ready": ready}); len(chosen) > 1 {
		return config.NewUsageError("%s exclude one another", strings.Join(chosen, " and "))
	}
	snapshot, err := ask(ctx, cfg.StateDir)
	if err != nil {
		return err
	}
	switch {
	case check:
		return nil // it has answered, so its loop turns
	case ready:
		return status.Ready(snapshot)
	case asJSON:
		return printJSON(p.stdout, snapshot)
	case asMetrics:
		return status.WriteMetrics(p.stdout, snapshot)
	}
	return status.Render(p.stdout, snapshot)
}

func setFlags(flags map[string]bool) []string {
	maps.DeleteFunc(flags, func(_ string, set bool) bool { return !set })
	return slices.Sorted(maps.Keys(flags))
}

// ask finds the daemon of a state directory. Which agent id and server it runs
// for is not known here, so each instance's socket is tried.
func ask(ctx context.Context, stateDir string) (status.Snapshot, error) {
	instances, err := os.ReadDir(stateDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return status.Snapshot{}, err
	}
	var failures []error
	for _, instance := range instances {
		dir := filepath.Join(stateDir, instance.Name())
		if _, err := os.Stat(filepath.Join(dir, status.SocketName)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		snapshot, err := status.Get(ctx, dir)
		if err == nil {
			return snapshot, nil
		}
		failures = append(failures, err)
	}
	if len(failures) == 0 {
		return status.Snapshot{}, fmt.Errorf("no agent is running with the state directory %s", stateDir)
	}
	return status.Snapshot{}, fmt.Errorf("no agent answers in %s: %w", stateDir, errors.Join(failures...))
}
