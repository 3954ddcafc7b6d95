package app

import (
	"context"
	"sync"
	"time"

	"certctl-agent/internal/status"
)

// metricsInterval is how old the metrics file may be: node_exporter is usually
// scraped twice a minute.
const metricsInterval = 15 * time.Second

// Serve runs the agent, with the status socket, the metrics file and other beside
// it. It calls ready when the socket is there. What it returns is what the agent's
// Run returns.
func (a *App) Serve(ctx context.Context, ready func(), other func(running context.Context)) error {
	server, err := status.Listen(a.state.Path, a.Agent.Snapshot, a.opts.Log)
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
	if a.opts.Config.MetricsFile != "" {
		beside.Go(func() { a.writeMetrics(running) })
	}
	beside.Go(func() { other(running) })
	ready()
	return a.Agent.Run(ctx)
}

// writeMetrics keeps the file for node_exporter's textfile collector.
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
