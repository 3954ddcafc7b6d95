package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
)

// BenchmarkRenewals renews all certificates of one agent at once. The agent is a separate process,
// and each certificate has its own target. The control plane runs in this process, on the same
// processors.
func BenchmarkRenewals(b *testing.B) {
	limit := devplane.Options{RateLimit: true}
	for _, test := range []struct {
		name         string
		options      devplane.Options
		certificates int
	}{
		{"300 at 50 requests a second", limit, 300},
		{"300 without a limit", devplane.Options{}, 300},
		{"2000 without a limit", devplane.Options{}, 2000},
	} {
		b.Run(test.name, func(b *testing.B) {
			for b.Loop() {
				benchmarkRenewals(b, test.options, test.certificates)
			}
		})
	}
}

func benchmarkRenewals(b *testing.B, options devplane.Options, certificates int) {
	plane := devplane.Start(b, options)
	f := newFigureAgent(b, plane)
	dir := b.TempDir()
	reload, reloads := filepath.Join(dir, "reload"), filepath.Join(dir, "reloads")
	if err := os.WriteFile(reload, fmt.Appendf(nil, "#!/bin/sh\necho >>%s\n", reloads), 0o700); err != nil {
		b.Fatal(err)
	}
	for i := range certificates {
		name := fmt.Sprintf("site-%d", i)
		target := plane.AddTarget(devplane.Target{Agent: f.id, Type: "NGINX", Config: map[string]any{
			"cert_path": filepath.Join(dir, name+".pem"), "key_path": filepath.Join(dir, name+".key"),
			"reload_command": reload, "validate_command": "true"}})
		certificate := plane.AddCertificate(devplane.Certificate{CommonName: name + ".test", Targets: []string{target}})
		plane.StartRenewal(certificate)
	}
	started := time.Now()
	agent, lines := f.start(b)
	go func() {
		for lines.Scan() {
			if strings.Contains(lines.Text(), `"level":"ERROR"`) {
				b.Log(lines.Text())
			}
		}
	}()
	ctx, cancel := context.WithTimeout(b.Context(), 2*time.Minute)
	defer cancel()
	completed := 0
	for completed < certificates && ctx.Err() == nil {
		time.Sleep(50 * time.Millisecond)
		completed = 0
		for _, job := range plane.Jobs() {
			if job.Type == api.TypeDeployment && job.Status == api.StatusCompleted {
				completed++
			}
		}
	}
	took := time.Since(started)
	if completed != certificates {
		b.Errorf("%d of %d certificates were deployed", completed, certificates)
	}
	b.ReportMetric(took.Seconds(), "s")
	b.ReportMetric(float64(completed)/took.Seconds(), "certificates/s")
	b.ReportMetric(float64(residentKiB(b, agent.Process.Pid, "VmHWM:"))/1024, "MiB-peak")
	ran, err := os.ReadFile(reloads)
	if err != nil {
		b.Error(err)
	}
	b.ReportMetric(float64(len(ran)), "reloads")
	refused, requests := 0, 0
	for _, request := range plane.Requests() {
		requests++
		if request.Status == 429 {
			refused++
		}
	}
	b.ReportMetric(float64(requests), "requests")
	b.ReportMetric(100*float64(refused)/float64(requests), "%-refused")
	_ = agent.Process.Signal(os.Interrupt)
	_ = agent.Wait()
	b.ReportMetric((agent.ProcessState.UserTime() + agent.ProcessState.SystemTime()).Seconds(), "s-processor")
}
