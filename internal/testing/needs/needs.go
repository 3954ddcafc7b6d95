// Package needs serves tests that need a real program, such as nginx: they skip
// where it is missing, except where CERTCTL_E2E=1 says that all must be there.
package needs

import (
	"net"
	"os"
	"os/exec"
	"testing"
)

// Need returns the path of program, or skips the test (Missing) where it is not
// installed. Beside PATH the directories of daemons are looked at, which are
// not on an ordinary user's.
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

// Missing skips the test for want of something that this machine could have,
// and fails it under CERTCTL_E2E=1: there nothing is passed over in silence.
func Missing(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("CERTCTL_E2E") == "1" {
		t.Fatal(reason + ", and CERTCTL_E2E=1 lets no test skip")
	} else {
		t.Skip(reason)
	}
}

// MemoryDir is a temporary directory, in memory where there is one: for tests of
// what is on a disk, or in which order, and not of how long that takes. It is
// below /dev, where the policy allows files only if it is told so.
func MemoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "certctl-test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// FreePort returns a TCP port of 127.0.0.1 on which nothing listened a moment
// ago. Nothing reserves it: the server under test should bind it soon.
func FreePort(t testing.TB) int {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("find a free port: %v", err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}
