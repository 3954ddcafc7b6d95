package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"path/filepath"

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
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(p.stdout, statusHelp)
		return err
	}
	if err != nil {
		return err
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
		encoder := json.NewEncoder(p.stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(snapshot)
	case asMetrics:
		return status.WriteMetrics(p.stdout, snapshot)
	}
	return status.Render(p.stdout, snapshot)
}

// ask finds the daemon of a state directory. Which agent id and server it runs
// for is not known here, so each instance's socket is tried.
func ask(ctx context.Context, stateDir string) (status.Snapshot, error) {
	sockets, err := filepath.Glob(filepath.Join(stateDir, "*", status.SocketName))
	if err != nil {
		return status.Snapshot{}, err
	}
	var failures []error
	for _, socket := range sockets {
		snapshot, err := status.Get(ctx, filepath.Dir(socket))
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
