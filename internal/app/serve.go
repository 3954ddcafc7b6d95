package app

import (
	"context"
	"sync"
	"time"

	"certctl-agent/internal/status"
)

// metricsInterval is how often the metrics file is written: node_exporter is usually scraped twice
// a minute.
const metricsInterval = 15 * time.Second

// Serve runs the agent together with the status socket, the metrics file and other. It calls ready
// when the socket exists. It returns the result of agent.Run.
func (a *App) Serve(ctx context.Context, ready func(), other func(running context.Context)) error {
	server, err := status.Listen(a.state.Path, a.Agent.Snapshot, a.opts.Log)
	if err != nil {
		return err
	}
	// The other goroutines end after the loop, not with ctx.
	running, end := context.WithCancel(context.WithoutCancel(ctx))
	var beside sync.WaitGroup
	defer beside.Wait()
	defer end()
	defer server.Close()
	beside.Go(server.Serve)
	if a.opts.Config.MetricsFile != "" {
		beside.Go(func() { a.writeMetrics(running) })
	}
	beside.Go(func() { other(running) })
	ready()
	return a.Agent.Run(ctx)
}

// writeMetrics keeps the metrics file up to date.
func (a *App) writeMetrics(running context.Context) {
	file := a.opts.Config.MetricsFile
	tick := time.Tick(metricsInterval)
	failing := false
	for {
		ctx, cancel := context.WithTimeout(running, metricsInterval)
		snapshot, err := a.Agent.Snapshot(ctx)
		cancel()
		if err == nil {
			err = status.WriteMetricsFile(file, snapshot)
		}
		if running.Err() != nil {
			return
		}
		if err != nil && !failing {
			a.opts.Log.Warn("the metrics file could not be written", "file", file, "error", err)
		}
		failing = err != nil
		select {
		case <-tick:
		case <-running.Done():
			return
		}
	}
}
