// Package needs is for tests that need a real program, such as nginx, or root. They skip if that is
// missing, or fail with CERTCTL_E2E=1.
package needs

import (
	"bytes"
	"cmp"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
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

// Unprivileged reports whether the test runs as an ordinary user, for whom permissions count. As
// root, it runs the test once more in a child process as such a user, fails if that fails, and
// reports false: the caller returns.
func Unprivileged(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		return true
	}
	binary, err := os.Executable()
	if runtime.GOOS == "linux" {
		binary, err = "/proc/self/exe", nil // its directory is closed to others
	}
	if err != nil {
		t.Fatal(err)
	}
	var pattern []string
	for part := range strings.SplitSeq(t.Name(), "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(part)+"$")
	}
	const nobody = 65534
	child := exec.CommandContext(t.Context(), binary, "-test.v", "-test.run="+strings.Join(pattern, "/"))
	child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := child.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name()+" ")) {
		t.Errorf("as an ordinary user: %v\n%s", err, out)
	}
	return false
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
