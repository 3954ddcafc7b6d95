// Package needs is for tests that need a real program, such as nginx, or root. They skip if that is
// missing, or fail with CERTCTL_E2E=1.
package needs

import (
	"cmp"
	"net"
	"os"
	"os/exec"
	"testing"
)

// Need returns the path of program, or calls Missing if it is not installed. Besides PATH it
// searches the directories for daemons.
func Need(t testing.TB, program string) string {
	t.Helper()
	for _, candidate := range []string{program, "/usr/sbin/" + program, "/usr/local/sbin/" + program, "/sbin/" + program} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path
		}
	}
	Missing(t, program+" is not installed")
	return ""
}

// Missing skips the test because the machine lacks something. With CERTCTL_E2E=1 it fails the test.
func Missing(t testing.TB, reason string) {
	t.Helper()
	if Everything() {
		t.Fatal(reason + ", and CERTCTL_E2E=1 lets no test skip")
	} else {
		t.Skip(reason)
	}
}

// Everything reports whether CERTCTL_E2E=1 asks for every test at full length, as CI does.
func Everything() bool { return os.Getenv("CERTCTL_E2E") == "1" }

// Long skips a test that takes minutes on a fresh machine, unless CERTCTL_E2E=1.
func Long(t testing.TB, reason string) {
	t.Helper()
	if !Everything() {
		t.Skip(reason + ": set CERTCTL_E2E=1 to run it")
	}
}

// Root calls Missing unless the test runs as root. The purpose completes "… needs root".
func Root(t testing.TB, purpose string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, purpose+" needs root")
	}
}

// MemoryDir returns a temporary directory, in memory if possible, for tests that need no real disk.
// It is below /dev, where the policy allows files only if Policy.Paths includes it.
// CERTCTL_TEST_MEMORY names another place.
func MemoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("CERTCTL_TEST_MEMORY"), "/dev/shm"), "certctl-test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// FreePort returns an unused TCP port of 127.0.0.1. It is not reserved, so the server under test
// should bind it soon.
func FreePort(t testing.TB) int {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("find a free port: %v", err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}
