package conformance

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/command"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/tlsprobe"
)

// RunCommand runs a command.
func RunCommand(ctx context.Context, c policy.Command) error {
	_, err := command.Run(ctx, c.Argv, c.Timeout)
	return err
}

// QueryCommand runs a command and returns its output.
func QueryCommand(ctx context.Context, c policy.Command) ([]byte, error) {
	return command.Query(ctx, c.Argv, c.Timeout, c.Env...)
}

// startWait bounds how long a server may take to start and to stop.
const startWait = 15 * time.Second

// Serve starts a real server, which must stay in the foreground, waits until it listens on address,
// and stops it (SIGTERM, then SIGKILL) after the test.
func Serve(t testing.TB, address string, argv ...string) *os.Process {
	t.Helper()
	var output bytes.Buffer
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(startWait):
			_ = cmd.Process.Kill()
			<-ended
		}
		if t.Failed() && output.Len() > 0 {
			t.Logf("output of %s:\n%s", argv[0], output.String())
		}
	})
	for deadline := time.Now().Add(startWait); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return cmd.Process
		}
		select {
		case <-ended:
			t.Fatalf("%q exited at once:\n%s", argv, output.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%q does not listen on %s: %v", argv, address, err)
		}
	}
}

// Verified returns a configuration that verifies at address. It allows half a minute for a server
// on a busy machine.
func Verified(address string) map[string]any {
	return map[string]any{
		"post_deploy_verify":             map[string]any{"enabled": true, "endpoint": address, "server_name": "localhost", "timeout": "5s"},
		"post_deploy_verify_attempts":    100,
		"post_deploy_verify_backoff":     "10ms",
		"post_deploy_verify_max_backoff": "300ms",
	}
}

// Serves fails the test unless endpoint serves the certificate with this fingerprint before
// startWait is over.
func Serves(t testing.TB, endpoint tlsprobe.Endpoint, fingerprint string) {
	t.Helper()
	var got tlsprobe.Result
	var err error
	for deadline := time.Now().Add(startWait); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got, err = tlsprobe.Probe(t.Context(), endpoint); err == nil && got.Fingerprint == fingerprint {
			return
		}
	}
	t.Errorf("%s serves %s (%v), want %s", endpoint.Address, got.Fingerprint, err, fingerprint)
}
