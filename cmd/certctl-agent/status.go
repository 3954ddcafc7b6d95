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

Shows the state of the running daemon. It asks the daemon over the socket in the state
directory and needs no API key, no agent id and no network.

  -json     print the whole answer as JSON
  -metrics  print it in Prometheus' text format
  -check    liveness probe: exit 1 only if no daemon runs or its loop is stuck, not
            in an outage of the control plane
  -ready    readiness probe: exit 1 also after five intervals without contact

Examples:
  certctl-agent status
  certctl-agent status -check -state-dir /var/lib/certctl/keys/.state

Exit status: 0 the daemon runs (and the probe succeeded), 1 otherwise, 2 usage.

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
		return config.NewUsageError("%s exclude each other", strings.Join(chosen, " and "))
	}
	snapshot, err := ask(ctx, cfg.StateDir)
	if err != nil {
		return err
	}
	switch {
	case check:
		return nil // the daemon has answered, so its loop runs
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

// ask asks the daemon of a state directory. It tries the socket of each instance, since it does not
// know the daemon's agent id and server.
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
