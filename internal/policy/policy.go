// Package policy limits what the control plane can do on this host: which files it may write, which
// commands it may run, and where it may send private keys.
package policy

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/command"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/printable"
)

// Policy comes from the agent's own configuration, never from the control plane.
type Policy struct {
	// Paths are the directories below which files may be written (CERTCTL_ALLOWED_PATHS). Nil:
	// everywhere, except where a file would give control of the host (see fatalPaths).
	Paths []string

	// Commands are the command lines that may run, split into words (CERTCTL_ALLOWED_COMMANDS). A
	// last word "*" allows any further words. Nil: any command that command.Split accepts.
	Commands [][]string

	// Hosts are where private keys may be sent (CERTCTL_ALLOWED_HOSTS), besides this host. Nil:
	// anywhere.
	Hosts []HostRule

	// Protected are the agent's own files and directories: configuration, state and keys. Nothing
	// may be written there, whatever Paths says.
	Protected []string
}

// Command is a command that may run.
type Command struct {
	Argv    []string
	Timeout time.Duration

	// Env is added to the environment, as NAME=value. It may contain a secret and is not recorded.
	Env []string `json:"-"`
}

// Command parses a command line and checks whether it may run.
func (p *Policy) Command(line string, timeout time.Duration) (Command, error) {
	argv, err := command.Split(line)
	if err != nil {
		return Command{}, err
	}
	if p.Commands != nil && !slices.ContainsFunc(p.Commands, func(allowed []string) bool { return matches(allowed, argv) }) {
		return Command{}, fmt.Errorf("%s is not among the commands that CERTCTL_ALLOWED_COMMANDS allows", printable.Quote(line))
	}
	return Command{Argv: argv, Timeout: timeout}, nil
}

func matches(allowed, argv []string) bool {
	if last := len(allowed) - 1; last >= 0 && allowed[last] == "*" {
		return len(argv) >= last && slices.Equal(allowed[:last], argv[:last])
	}
	return len(allowed) > 0 && slices.Equal(allowed, argv)
}

// CheckPath is Look.CheckPath for a single path.
func (p *Policy) CheckPath(path string) error { return p.Look().CheckPath(path) }

// Look returns a Look for the destinations of one deployment.
func (p *Policy) Look() *Look { return &Look{policy: p, seen: make(map[string]place)} }

// Look checks several paths, and looks at each of the some hundred forbidden paths only once. It
// must not outlive a deployment, since what it remembers becomes outdated. Within a deployment that
// is safe: only root or the agent's user can create, move or mount these paths, and both control
// the host anyway. It remembers nothing about the checked paths, which other users may change.
type Look struct {
	policy *Policy
	seen   map[string]place // forbidden paths and the directories above them, by name
}

// place is where a path leads.
type place struct {
	real string      // without symlinks, as far as it exists
	info fs.FileInfo // nil: it does not exist, or cannot be read
}

// CheckPath checks whether a file may be written at path, which must be absolute, clean and free of
// symlinks. The caller resolves them, since only it knows the directory that it will write to.
func (l *Look) CheckPath(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsFunc(path, printable.IsControl) {
		return fmt.Errorf("%s is not an absolute path in its shortest form", printable.Quote(path))
	}
	p := l.policy
	above := ancestors(path)
	if own := l.firstContaining(p.Protected, path, above); own != "" {
		return fmt.Errorf("%s is in %s, which belongs to the agent: nothing is installed there", path, own)
	}
	if p.Paths == nil {
		if why := l.fatal(path, above); why != "" {
			return fmt.Errorf("%s is refused because it is in, or is, %s: to allow it anyway, add its directory to CERTCTL_ALLOWED_PATHS", path, why)
		}
		return nil
	}
	for _, dir := range p.Paths {
		if real, err := hostfile.Follow(filepath.Clean(dir), hostfile.TrustedLink); err == nil && below(real, path) {
			return nil
		}
	}
	return fmt.Errorf("%s is in none of the directories that CERTCTL_ALLOWED_PATHS allows (%s)", path, strings.Join(p.Paths, ", "))
}

// fatalPaths returns the files and directories that give a writer control of the host, or let it
// break the host. The list cannot be complete, and need not be: existing files are replaced only if
// they hold certificates or keys. The list protects against new files, and protects the host's
// trust store.
func fatalPaths() []string {
	return []string{
		// the agent, the kernel, and root
		"/etc/certctl", "/proc", "/sys", "/dev", "/boot", "/efi", "/root", "/var/root",
		// programs and libraries; for /usr see Fatal
		"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/usr/local/bin", "/usr/local/sbin", "/usr/local/lib", "/usr/local/lib32",
		"/usr/local/lib64", "/usr/local/libexec", "/usr/local/games", "/opt/homebrew/bin", "/opt/homebrew/sbin", "/opt/homebrew/lib",
		"/etc/ld.so.preload", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.cache", "/etc/ld.so.nohwcap", "/etc/alternatives",
		// services and scheduled jobs
		"/etc/systemd", "/usr/local/lib/systemd", "/run/systemd", "/var/lib/systemd", "/etc/init", "/etc/init.d", "/etc/rc.d", "/etc/rc.local",
		"/etc/rc.conf", "/etc/rc0.d", "/etc/rc1.d", "/etc/rc2.d", "/etc/rc3.d", "/etc/rc4.d", "/etc/rc5.d", "/etc/rc6.d", "/etc/rcS.d", "/etc/inittab",
		"/etc/conf.d", "/etc/default", "/etc/sysconfig", "/etc/local.d", "/etc/runit", "/etc/sv", "/etc/s6", "/etc/inetd.conf", "/etc/xinetd.d",
		"/etc/crontab", "/etc/anacrontab", "/etc/cron.d", "/etc/cron.hourly", "/etc/cron.daily", "/etc/cron.weekly", "/etc/cron.monthly",
		"/etc/cron.yearly", "/etc/cron.allow", "/etc/cron.deny", "/etc/at.allow", "/etc/at.deny", "/etc/periodic", "/etc/crontabs", "/var/spool/cron",
		"/var/spool/at", "/var/spool/anacron", "/var/at", "/etc/logrotate.d", "/etc/logrotate.conf", "/etc/newsyslog.d", "/etc/newsyslog.conf",
		"/etc/tmpfiles.d", "/run/tmpfiles.d", "/etc/sysusers.d", "/run/sysusers.d", "/etc/update-motd.d", "/etc/letsencrypt/renewal-hooks",
		"/etc/letsencrypt/renewal", "/etc/letsencrypt/cli.ini", "/etc/kubernetes/manifests", "/etc/xdg", "/etc/X11", "/etc/skel",
		"/Library/LaunchDaemons", "/Library/LaunchAgents", "/Library/StartupItems", "/Library/PrivilegedHelperTools", "/Library/Extensions",
		"/Library/SystemExtensions", "/Library/Security", "/Library/Keychains", "/Library/Apple", "/System", "/etc/emond.d", "/etc/paths", "/etc/paths.d",
		// devices, modules, kernel settings, network
		"/etc/udev", "/run/udev", "/etc/modprobe.d", "/etc/modules", "/etc/modules-load.d", "/etc/depmod.d", "/etc/binfmt.d", "/run/binfmt.d", "/etc/sysctl.d",
		"/etc/sysctl.conf", "/etc/kernel", "/etc/initramfs-tools", "/etc/dracut.conf.d", "/etc/grub.d", "/etc/fstab", "/etc/crypttab",
		"/etc/network", "/etc/NetworkManager/dispatcher.d", "/etc/NetworkManager/conf.d", "/etc/NetworkManager/system-connections",
		"/etc/NetworkManager/NetworkManager.conf", "/etc/networkd-dispatcher", "/etc/netplan", "/etc/dhcp", "/etc/dhcpcd.conf", "/etc/ppp", "/etc/acpi",
		"/etc/hosts", "/etc/hosts.allow", "/etc/hosts.deny", "/etc/hosts.equiv", "/etc/resolv.conf", "/etc/cni", "/etc/cloud", "/var/lib/cloud",
		"/etc/libvirt/hooks", "/etc/docker/daemon.json", "/etc/containers/systemd", "/etc/containers/policy.json",
		// users and permissions
		"/etc/sudoers", "/etc/sudoers.d", "/etc/sudo.conf", "/var/lib/sudo", "/var/db/sudo", "/etc/doas.conf", "/etc/doas.d", "/etc/polkit-1",
		"/run/polkit-1", "/var/lib/polkit-1", "/etc/dbus-1", "/run/dbus", "/etc/pam.d", "/etc/pam.conf", "/etc/security", "/etc/selinux",
		"/etc/apparmor.d", "/etc/audit", "/etc/ssh", "/var/empty", "/etc/nologin", "/run/nologin", "/etc/securetty", "/etc/login.defs", "/etc/login.access",
		"/etc/passwd", "/etc/passwd-", "/etc/shadow", "/etc/shadow-", "/etc/group", "/etc/group-", "/etc/gshadow", "/etc/gshadow-",
		"/etc/subuid", "/etc/subgid", "/etc/master.passwd", "/etc/pwd.db", "/etc/spwd.db", "/etc/shells", "/etc/nsswitch.conf", "/etc/krb5.keytab",
		"/var/db/dslocal",
		// shells
		"/etc/profile", "/etc/profile.d", "/etc/environment", "/etc/environment.d", "/etc/bashrc", "/etc/bash.bashrc", "/etc/bash_completion.d",
		"/etc/inputrc", "/etc/zsh", "/etc/zshrc", "/etc/zshenv", "/etc/zprofile", "/etc/zlogin", "/etc/zlogout", "/etc/csh.cshrc", "/etc/csh.login",
		"/etc/csh.logout", "/etc/ksh.kshrc", "/etc/mkshrc", "/etc/fish",
		// packages
		"/etc/apt", "/var/lib/apt", "/var/cache/apt", "/etc/dpkg", "/var/lib/dpkg", "/etc/yum", "/etc/yum.conf", "/etc/yum.repos.d", "/etc/dnf",
		"/etc/rpm", "/var/lib/rpm", "/etc/zypp", "/etc/pacman.conf", "/etc/pacman.d", "/var/lib/pacman", "/etc/apk", "/var/cache/apk", "/etc/pki/rpm-gpg",
		"/etc/snap", "/var/lib/snapd",
		// the host's trust store
		"/etc/ca-certificates", "/etc/ca-certificates.conf", "/var/lib/ca-certificates", "/usr/local/share/ca-certificates",
		"/etc/ssl/cert.pem", "/etc/ssl/ca-bundle.pem", "/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/ca-bundle.crt", "/etc/ssl/certs/ca-bundle.trust.crt",
		"/etc/ssl/certs/java", "/etc/ssl/openssl.cnf", "/etc/pki/ca-trust", "/etc/pki/trust", "/etc/pki/java", "/etc/pki/nssdb", "/etc/pki/tls/cert.pem",
		"/etc/pki/tls/openssl.cnf", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/pki/tls/certs/ca-bundle.trust.crt", "/usr/local/etc/ssl/cert.pem",
		"/usr/local/etc/openssl/cert.pem", "/usr/local/etc/openssl@3/cert.pem",
	}
}

// trustDirs returns the directories where OpenSSL looks for trusted certificates, by hash name (see
// isHashName). Servers keep their own certificates there, under other names.
func trustDirs() []string {
	return []string{"/etc/ssl/certs", "/etc/pki/tls/certs", "/usr/local/etc/ssl/certs"}
}

// isHashName reports whether a name is like those of openssl rehash: 8 hexadecimal digits, a dot,
// an r if it is a revocation list, and a number.
func isHashName(name string) bool {
	hash, number, ok := strings.Cut(name, ".")
	number = strings.TrimPrefix(number, "r")
	return ok && len(hash) == 8 && strings.Trim(strings.ToLower(hash), "0123456789abcdef") == "" &&
		number != "" && strings.Trim(number, "0123456789") == ""
}

// fatalNames returns names that are as dangerous as fatalPaths in any directory: files that a
// shell, sshd or another program that runs commands reads from a home directory.
func fatalNames() []string {
	return []string{
		".ssh", "authorized_keys", "authorized_keys2", ".profile", ".bashrc", ".bashrc.d", ".bash_profile", ".bash_login", ".bash_logout", ".bash_aliases",
		".zshrc", ".zshenv", ".zprofile", ".zlogin", ".zlogout", ".kshrc", ".mkshrc", ".cshrc", ".tcshrc", ".login", ".logout", ".inputrc",
		".pam_environment", ".rhosts", ".shosts", ".netrc", ".forward", ".procmailrc", ".k5login", ".k5users", ".gnupg", ".git", ".gitconfig", ".vimrc",
		".xinitrc", ".xprofile", ".xsession", ".xsessionrc", "LaunchAgents",
		".config/systemd", ".config/autostart", ".config/environment.d", ".config/fish", ".config/git", ".local/bin", ".local/lib", ".local/share/systemd",
		".local/share/dbus-1",
	}
}

// Fatal returns the dangerous place that path, on another host, is or is in, or "" if it is
// harmless.
func Fatal(path string) string { return new(Policy).Look().fatal(path, nil) }

// fatal returns the entry of the lists above that path matches, or "".
func (l *Look) fatal(path string, above []fs.FileInfo) string {
	// Some file systems ignore case.
	lower := strings.ToLower(filepath.ToSlash(path))
	for _, name := range fatalNames() {
		if strings.Contains(lower+"/", "/"+strings.ToLower(name)+"/") {
			return name
		}
	}
	// All of /usr belongs to the distribution, except /usr/local.
	if below("/usr", lower) && !below("/usr/local", lower) {
		return "/usr"
	}
	if isHashName(filepath.Base(path)) {
		if dir := l.firstContaining(trustDirs(), path, above); dir != "" {
			return "what OpenSSL trusts in " + dir
		}
	}
	return l.firstContaining(fatalPaths(), path, above)
}

// ancestors returns path and the directories above it, as far as they exist.
func ancestors(path string) (found []fs.FileInfo) {
	for at := path; ; at = filepath.Dir(at) {
		if info, err := os.Stat(at); err == nil {
			found = append(found, info)
		}
		if at == filepath.Dir(at) {
			return found
		}
	}
}

// firstContaining returns the first of dirs that path is or is in, or "". Above are path's
// ancestors. When in doubt it finds a match: it compares names without case, and existing files
// also by identity, which detects bind mounts and file systems with several spellings of a name.
func (l *Look) firstContaining(dirs []string, path string, above []fs.FileInfo) string {
	lower := strings.ToLower(path)
	for _, dir := range dirs {
		at := l.at(filepath.Clean(dir))
		if below(strings.ToLower(at.real), lower) || below(strings.ToLower(dir), lower) {
			return dir
		}
		if at.info != nil && slices.ContainsFunc(above, func(a fs.FileInfo) bool { return os.SameFile(a, at.info) }) {
			return dir
		}
	}
	return ""
}

// at returns where a clean path leads. It starts from the parent directory, which many paths share.
func (l *Look) at(path string) place {
	found, ok := l.seen[path]
	if ok {
		return found
	}
	found.real = path
	if dir := filepath.Dir(path); dir == path {
		found.info, _ = os.Lstat(path)
	} else if above := l.at(dir); above.info == nil {
		found.real = filepath.Join(above.real, filepath.Base(path))
	} else {
		found = look(filepath.Join(above.real, filepath.Base(path)))
	}
	l.seen[path] = found
	return found
}

// look is like at, for a path whose directory has no symlinks.
func look(path string) place {
	info, err := os.Lstat(path)
	if err != nil {
		return place{real: path}
	}
	if info.Mode().Type() != fs.ModeSymlink {
		return place{real: path, info: info}
	}
	real := hostfile.Real(path)
	if info, err = os.Stat(real); err != nil {
		return place{real: real}
	}
	return place{real: real, info: info}
}

// below reports whether path is dir or in it.
func below(dir, path string) bool {
	rest, ok := strings.CutPrefix(path, dir)
	return ok && (rest == "" || dir == string(filepath.Separator) || rest[0] == filepath.Separator)
}
