package caddy

import (
	"flag"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"certctl-agent/internal/testing/needs"
)

var inNamespace = flag.Bool("in-namespace", false, "this process has its own network")

// tcpMigrateReq makes the kernel move queued connections from a listener
// that is being closed to another one on the same port
// (https://docs.kernel.org/networking/ip-sysctl.html). Caddy closes one at
// each reload; without the setting, those few are reset.
const tcpMigrateReq = "/proc/sys/net/ipv4/tcp_migrate_req"

// TestRotation runs in a child process with its own network, since a test must not
// change this setting on a host.
func TestRotation(t *testing.T) {
	needs.Need(t, "caddy")
	if !*inNamespace {
		rotateInChild(t)
		return
	}
	if err := loopbackUp(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tcpMigrateReq, []byte("1"), 0); err != nil {
		needs.Missing(t, "the kernel cannot hand waiting connections over: "+err.Error())
	}
	t.Run("api", func(t *testing.T) { startAPI(t).Rotate(t, 0) })
	t.Run("file", func(t *testing.T) { startFile(t).Rotate(t, 0) })
}

func rotateInChild(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	child := exec.CommandContext(t.Context(), self, "-test.run=^TestRotation$", "-test.v", "-in-namespace")
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Geteuid() != 0 {
		child.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		child.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		child.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	output := new(strings.Builder)
	child.Stdout, child.Stderr = output, output
	if err := child.Start(); err != nil {
		needs.Missing(t, "cannot create a network namespace: "+err.Error())
	}
	err = child.Wait()
	t.Logf("in its own network:\n%s", output)
	if err != nil {
		t.Error(err)
	} else if strings.Contains(output.String(), "--- SKIP") {
		needs.Missing(t, tcpMigrateReq+" cannot be set: it takes Linux 5.14")
	}
}

// loopbackUp brings up lo, see netdevice(7).
func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	request := struct {
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: syscall.IFF_UP | syscall.IFF_RUNNING}
	copy(request.name[:], "lo")
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return errno
	}
	return nil
}
