package deploy_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/needs"
)

// maxImage is the largest size of the image, in bytes: a static linux/amd64 binary (11.3 MB) and
// the roots of public CAs. It notices a package that makes the linker keep every method.
const maxImage = 12_500_000

// container is the output of docker inspect for the agent's container.
type container struct {
	State struct {
		Status   string
		Pid      int
		ExitCode int
		Health   struct{ Status string }
	}
	RestartCount int
	Config       struct{ Image string }
}

// TestDocker builds the image and runs it with the shipped compose file. An override sets the
// test's network and shorter pauses.
func TestDocker(t *testing.T) {
	needs.Long(t, "it builds an image")
	// CI cannot install an engine like a package, so the test may skip even there.
	docker, err := exec.LookPath("docker")
	if err != nil {
		t.Skip("docker is not installed: the image is not tested")
	}
	compose, err := exec.LookPath("docker-compose")
	if err != nil {
		t.Skip("docker-compose is not installed: the image is not tested")
	}
	if out, err := tryOutput(exec.CommandContext(t.Context(), docker, "info")); err != nil {
		t.Skip("no Docker engine answers, the image is not tested: " + out)
	}
	t.Parallel()
	version := "test-" + strconv.Itoa(os.Getpid())
	image := "certctl-agent:" + version
	t.Cleanup(func() { tryOutput(exec.Command(docker, "rmi", "--force", image)) })
	makeTarget(t, "docker", t.TempDir(), "VERSION="+version)
	checkImage(t, docker, image)

	plane := devplane.Start(t, devplane.Options{})
	agentID := plane.RegisterAgent("container")
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "compose.yaml"), readFile(t, "docker/compose.yaml"), 0o644)
	writeFile(t, filepath.Join(dir, "agent.env"), fmt.Sprintf("CERTCTL_SERVER_URL=%s\nCERTCTL_AGENT_ID=%s\n"+
		"CERTCTL_SERVER_CA_BUNDLE_PATH=/ca.pem\nCERTCTL_STARTUP_JITTER=false\nCERTCTL_HEARTBEAT_INTERVAL=300ms\nCERTCTL_POLL_INTERVAL=200ms\n",
		plane.URL, agentID), 0o644)
	writeFile(t, filepath.Join(dir, "ca.pem"), string(plane.CAPEM()), 0o644)
	// User 1000 must be able to read the file, which belongs to the test's user.
	writeFile(t, filepath.Join(dir, "api-key"), plane.APIKey+"\n", 0o444)
	writeFile(t, filepath.Join(dir, "override.yaml"), `version: "3.8"
services:
  agent:
    network_mode: host
    volumes: ["./ca.pem:/ca.pem:ro"]
    healthcheck: {interval: 1s, timeout: 5s, start_period: 0s, retries: 3, test: ["CMD", "/certctl-agent", "status", "-check"]}
`, 0o644)
	run := func(args ...string) (string, error) {
		cmd := exec.Command(compose, append([]string{"-p", "certctl-" + version, "-f", "compose.yaml", "-f", "override.yaml"}, args...)...)
		cmd.Dir = dir
		cmd.Env = append(cmd.Environ(), "CERTCTL_VERSION="+version)
		return tryOutput(cmd)
	}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := run("logs", "--no-color")
			t.Logf("the container's log:\n%s", logs)
		}
		run("down", "--volumes", "--timeout", "5")
	})
	if out, err := run("up", "--detach"); err != nil {
		t.Fatalf("docker-compose up: %v\n%s", err, out)
	}
	id, err := run("ps", "-q", "agent")
	if err != nil {
		t.Fatal(id, err)
	}
	look := func() container {
		var found []container
		if err := json.Unmarshal([]byte(output(t, docker, "inspect", id)), &found); err != nil || len(found) != 1 {
			t.Fatalf("docker inspect %s: %v", id, err)
		}
		return found[0]
	}

	eventually(t, "the container to be healthy", func() bool { return look().State.Health.Status == "healthy" })
	if len(plane.Heartbeats()) == 0 {
		eventually(t, "a heartbeat", func() bool { return len(plane.Heartbeats()) > 0 })
	}

	// With a read-only root it writes to the key volume and /certs.
	plane.AddTarget(devplane.Target{ID: "target-1", Agent: agentID, Type: "Traefik", Config: map[string]any{"cert_dir": "/certs"}})
	cert := plane.AddCertificate(devplane.Certificate{CommonName: "web.example.org", SANs: []string{"web.example.org"}, Targets: []string{"target-1"}})
	plane.StartIssuance(cert)
	eventually(t, "the deployment", func() bool {
		jobs := plane.Deployments(cert)
		if len(jobs) > 0 && jobs[0].Status == api.StatusFailed {
			t.Fatalf("the deployment failed: %s", jobs[0].Error)
		}
		return len(jobs) > 0 && jobs[0].Status == api.StatusCompleted
	})
	listing := output(t, "sh", "-c", `"$1" cp "$2:/certs" - | tar -tv --numeric-owner`, "sh", docker, id)
	for _, want := range []string{"certs/cert.pem", "certs/key.pem"} {
		if !slices.ContainsFunc(strings.Split(listing, "\n"), func(line string) bool {
			return strings.Contains(line, " 1000/1000 ") && strings.HasSuffix(line, want)
		}) {
			t.Errorf("%s is not there, or not of user 1000:\n%s", want, listing)
		}
	}

	// Docker restarts a crashed container, but not after docker kill, which it takes as intended.
	if os.Getuid() == 0 {
		if err := syscall.Kill(look().State.Pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a restart after a crash", func() bool {
			c := look()
			return c.RestartCount == 1 && c.State.Status == "running"
		})
	}

	plane.Retire(agentID)
	eventually(t, "the container to end", func() bool { return look().State.Status == "exited" })
	before := look()
	if before.State.ExitCode != 0 {
		t.Errorf("a retired agent exits %d", before.State.ExitCode)
	}
	time.Sleep(time.Second) // Docker's first restart would come after 100 ms
	if after := look(); after.State.Status != "exited" || after.RestartCount != before.RestartCount {
		t.Errorf("a retired agent is %s after %d restarts, and had %d", after.State.Status, after.RestartCount, before.RestartCount)
	}
	logs, _ := run("logs", "--no-color")
	if strings.Contains(logs, plane.APIKey) {
		t.Error("the log has the API key")
	}
}

func checkImage(t *testing.T, docker, image string) {
	t.Helper()
	var found []struct {
		Size         int64
		Architecture string
		Config       struct {
			User        string
			Entrypoint  []string
			Volumes     map[string]any
			Healthcheck struct{ Test []string }
			Env         []string
		}
	}
	if err := json.Unmarshal([]byte(output(t, docker, "image", "inspect", image)), &found); err != nil || len(found) != 1 {
		t.Fatalf("docker image inspect: %v", err)
	}
	got := found[0]
	t.Logf("the image has %.2f MB", float64(got.Size)/1e6)
	if got.Size > maxImage {
		t.Errorf("the image has %d bytes, %d are allowed", got.Size, maxImage)
	}
	if got.Config.User != "1000:1000" || !slices.Equal(got.Config.Entrypoint, []string{"/certctl-agent"}) {
		t.Errorf("user %q, entry point %v", got.Config.User, got.Config.Entrypoint)
	}
	if want := []string{"CMD", "/certctl-agent", "status", "-check"}; !slices.Equal(got.Config.Healthcheck.Test, want) {
		t.Errorf("health check %v, want %v", got.Config.Healthcheck.Test, want)
	}
	if _, there := got.Config.Volumes["/var/lib/certctl/keys"]; !there {
		t.Errorf("volumes %v", got.Config.Volumes)
	}
}
