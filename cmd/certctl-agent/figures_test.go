package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/testing/devplane"
)

// figureAgent is the stripped binary, run as the daemon with an in-memory control plane. Benchmarks
// measure the process.
type figureAgent struct {
	id   string
	path string
	args []string
	env  []string
}

func newFigureAgent(b *testing.B, plane *devplane.Plane) figureAgent {
	b.Helper()
	path := filepath.Join(b.TempDir(), "certctl-agent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	id := plane.RegisterAgent("bench")
	config := filepath.Join(b.TempDir(), "agent.env")
	if err := os.WriteFile(config, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	return figureAgent{
		id:   id,
		path: path,
		args: []string{"-config", config, "-server", plane.URL, "-ca-bundle", plane.CAFile(), "-agent-id", id,
			"-key-dir", filepath.Join(b.TempDir(), "keys"), "-startup-jitter=false"},
		env: []string{"CERTCTL_API_KEY=" + plane.APIKey},
	}
}

func (f figureAgent) start(b *testing.B) (agent *exec.Cmd, lines *bufio.Scanner) {
	b.Helper()
	agent = exec.Command(f.path, f.args...)
	agent.Env = f.env
	output, err := agent.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		b.Fatal(err)
	}
	return agent, bufio.NewScanner(output)
}

// BenchmarkFirstLogLine measures the time from exec to the first log line.
func BenchmarkFirstLogLine(b *testing.B) {
	f := newFigureAgent(b, devplane.Start(b, devplane.Options{}))
	var took []time.Duration
	for b.Loop() {
		started := time.Now()
		agent, lines := f.start(b)
		if !lines.Scan() {
			b.Fatal("the agent logged nothing")
		}
		took = append(took, time.Since(started))
		_ = agent.Process.Kill()
		_ = agent.Wait()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/median")
}

// BenchmarkIdleMemory measures the resident memory of a connected, idle agent.
func BenchmarkIdleMemory(b *testing.B) {
	if _, err := os.Stat("/proc/self/status"); err != nil {
		b.Skip("resident memory is read from /proc")
	}
	f := newFigureAgent(b, devplane.Start(b, devplane.Options{}))
	for b.Loop() {
		agent, lines := f.start(b)
		for lines.Scan() && !strings.Contains(lines.Text(), "first heartbeat accepted") {
		}
		time.Sleep(3 * time.Second)
		b.ReportMetric(float64(residentKiB(b, agent.Process.Pid, "VmRSS:"))/1024, "MiB")
		_ = agent.Process.Kill()
		_ = agent.Wait()
	}
}

// residentKiB returns the resident memory of a process: VmRSS is the current value, VmHWM the peak.
func residentKiB(b *testing.B, pid int, field string) int {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == field {
			kib, err := strconv.Atoi(fields[1])
			if err != nil {
				b.Fatal(err)
			}
			return kib
		}
	}
	b.Fatal("no " + field)
	return 0
}
