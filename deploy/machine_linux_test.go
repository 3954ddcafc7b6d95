package deploy_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/testing/needs"
)

const suite = "bookworm"

// packages lists what the machine has in addition to a minimal Debian.
var packages = []string{
	"systemd", "systemd-sysv", "libpam-systemd", "dbus", "polkitd",
	"nginx-light", "apache2", "haproxy", "postfix", "dovecot-core",
}

// machine is a Debian with systemd as process 1, in a container that shares the host's network: the
// test's control plane is on loopback.
type machine struct {
	init int // pid of its process 1, as the host sees it
}

// debianRoot returns a directory with an installed Debian. Making it takes a minute or two, once per
// user and list of packages.
func debianRoot(t *testing.T) string {
	t.Helper()
	debootstrap := needs.Need(t, "debootstrap")
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	key := sha256.Sum256([]byte(suite + prepare + strings.Join(packages, ",")))
	cache = filepath.Join(cache, "certctl-agent-test")
	root := filepath.Join(cache, suite+"-"+hex.EncodeToString(key[:4]))
	if _, err := os.Stat(root); err == nil {
		return root
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	// Made under another name and renamed, so that a directory with this name is complete.
	making, err := os.MkdirTemp(cache, "making-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(making)
	if err := os.Chmod(making, 0o755); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	output(t, debootstrap, "--variant=minbase", "--include="+strings.Join(packages, ","), suite, making)
	output(t, "chroot", making, "sh", "-ec", prepare)
	t.Logf("debootstrap took %v", time.Since(start).Round(time.Second))
	if err := os.Rename(making, root); err != nil {
		t.Fatal(err)
	}
	return root
}

// prepare disables servers and timers of the machine, whose ports the host shares, and configures
// the servers without well-known ports.
const prepare = `
systemctl disable nginx apache2 haproxy postfix dovecot apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer
systemctl mask getty.target systemd-logind.service
rm -f /etc/nginx/sites-enabled/default /etc/apache2/sites-enabled/*
echo ServerName machine.test >>/etc/apache2/apache2.conf
[ -f /etc/postfix/main.cf ] || cp /usr/share/postfix/main.cf.debian /etc/postfix/main.cf
sed -i '/^smtp .*inet/d' /etc/postfix/master.cf
postconf -e inet_interfaces=loopback-only myhostname=machine.test
printf 'listen = 127.0.0.1\nprotocols =\n' >/etc/dovecot/local.conf
mkdir -p /etc/nginx/tls
rm -rf /var/cache/apt/archives/*.deb /var/lib/apt/lists/*
`

// boot starts the machine and halts it at the end of the test. It runs on an overlay, so nothing in
// it persists.
func boot(t *testing.T) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		needs.Missing(t, "a container with systemd needs root")
	}
	nspawn := needs.Need(t, "systemd-nspawn")
	needs.Need(t, "nsenter")
	root := debianRoot(t)

	args := []string{"--directory=" + root, "--volatile=overlay", "--register=no", "--console=pipe", "--machine=certctl-test-" + strconv.Itoa(os.Getpid())}
	var cgroups []string
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		// No service manager makes a cgroup for the machine, and its systemd must not use the host's.
		args = append(args, "--keep-unit")
		cgroups = makeCgroups(t)
	}
	join := `while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@"`
	cmd := exec.Command("sh", slices.Concat([]string{"-ec", join, "sh"}, cgroups, []string{"--", nspawn}, args, []string{"--boot"})...)
	var console syncBuffer
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &console, &console, time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m := &machine{}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) // nspawn asks process 1 to halt
		select {
		case <-ended:
		case <-time.After(patience):
			t.Errorf("the machine does not halt:\n%s", console.String())
			if m.init != 0 { // kill(0) would be this test's own group
				syscall.Kill(m.init, syscall.SIGKILL)
			}
			cmd.Process.Kill()
			<-ended
		}
		for _, cgroup := range cgroups {
			removeCgroup(cgroup)
		}
	})

	eventually(t, "process 1 of the machine", func() bool {
		select {
		case <-ended:
			t.Fatalf("systemd-nspawn ended:\n%s", console.String())
		default:
		}
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		for child := range strings.FieldsSeq(string(children)) {
			name, _ := os.ReadFile("/proc/" + child + "/comm")
			if strings.TrimSpace(string(name)) == "systemd" {
				m.init, _ = strconv.Atoi(child)
			}
		}
		return m.init != 0
	})
	eventually(t, "the machine to boot", func() bool {
		state, _ := m.try("systemctl", "is-system-running")
		return state == "running" || state == "degraded"
	})
	// The machine ends even if this process is killed.
	m.run(t, "systemd-run", "--quiet", "--on-active=10min", "systemctl", "poweroff")
	return m
}

// try runs a command in the machine.
func (m *machine) try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(m.init), "--all", name}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "SYSTEMD_PAGER="}
	return tryOutput(cmd)
}

func (m *machine) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := m.try(name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// path returns the host's path of a file of the machine.
func (m *machine) path(name string) string {
	return filepath.Join("/proc", strconv.Itoa(m.init), "root", name)
}

// show returns a property of a unit.
func (m *machine) show(unit, property string) string {
	value, _ := m.try("systemctl", "show", "--value", "--property="+property, unit)
	return value
}

// makeCgroups makes a cgroup in each hierarchy that systemd uses.
func makeCgroups(t *testing.T) []string {
	t.Helper()
	var made []string
	// Hybrid, and v2 alone. If none exists, nspawn manages without.
	for _, hierarchy := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(hierarchy, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(hierarchy, "certctl-test-"+strconv.Itoa(os.Getpid()))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatalf("make a cgroup for the machine: %v", err)
		}
		made = append(made, dir)
	}
	return made
}

// removeCgroup removes a cgroup and its children, one by one as rmdir requires.
func removeCgroup(dir string) {
	var groups []string
	filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			groups = append(groups, name)
		}
		return nil
	})
	for _, group := range slices.Backward(groups) {
		syscall.Rmdir(group)
	}
}

// syncBuffer is a bytes.Buffer that may be read while a program writes.
type syncBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}
