// Package policy is what this host lets its control plane do: which files may be
// written, which commands may run, and where private keys may be sent.
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

// Policy is what the control plane may make this host write and run. It comes
// from the agent's own configuration, never from the control plane.
type Policy struct {
	// Paths are the directories below which files may be written
	// (CERTCTL_ALLOWED_PATHS). Nil: anywhere but where a file would give the
	// host away.
	Paths []string

	// Commands are the command lines that may run, word by word
	// (CERTCTL_ALLOWED_COMMANDS); a last word "*" stands for any further
	// words. Nil: any command that command.Split accepts.
	Commands [][]string

	// Hosts are where private keys may be sent (CERTCTL_ALLOWED_HOSTS), beside
	// this host itself. Nil: anywhere.
	Hosts []HostRule

	// Protected are the agent's own configuration, state and key directories
	// and files. Nothing may be written there, whatever Paths says.
	Protected []string
}

type Command struct {
	Argv    []string
	Timeout time.Duration

	// Env is NAME=value, on top of what commands are given anyway. It may hold a
	// secret, and no record of a deployment has it.
	Env []string `json:"-"`
}

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

// Look returns a Look at the files of this host as they are from now on.
func (p *Policy) Look() *Look { return &Look{policy: p, seen: make(map[string]place)} }

// Look checks several paths, and looks only once at each file that nobody may
// write: there are some hundreds. It is for the destinations of one deployment and
// not to be kept, since what it remembers goes out of date. Within a deployment that
// does no harm: only root or the agent's user can make, move or mount these files,
// and they own the host without that. It remembers nothing of the path that is
// checked, which others may be able to change.
type Look struct {
	policy *Policy
	seen   map[string]place // by name, as it is on a list, and of each directory above
}

// place is where a path leads.
type place struct {
	real string      // without symlinks, as far as it exists
	info fs.FileInfo // nil: there is nothing, or it cannot be looked at
}

// CheckPath reports whether a file may be written at path, which must be
// absolute, clean and free of symlinks: the caller resolves them, since only
// it knows the directory that it will write to.
func (l *Look) CheckPath(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsFunc(path, printable.IsControl) {
		return fmt.Errorf("%s is no absolute path in its shortest form", printable.Quote(path))
	}
	p := l.policy
	above := ancestors(path)
	if own := l.firstHolding(p.Protected, path, above); own != "" {
		return fmt.Errorf("%s is in %s, which is the agent's own: nothing is installed there", path, own)
	}
	if p.Paths == nil {
		if why := l.fatal(path, above); why != "" {
			return fmt.Errorf("%s is refused because it is in, or is, %s: to allow it all the same, name its directory in CERTCTL_ALLOWED_PATHS", path, why)
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

// fatalPaths are files and directories with which a writer owns the host, or
// breaks it. The list cannot be complete, and need not be: files that are there
// are replaced only where they hold certificates or keys. It is for new ones,
// and for the host's own trust in others.
func fatalPaths() []string {
	return []string{
		// the agent, the kernel, and root
		"/etc/certctl", "/proc", "/sys", "/dev", "/boot", "/efi", "/root", "/var/root",
		// programs and libraries; of /usr, Fatal knows more
		"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/usr/local/bin", "/usr/local/sbin", "/usr/local/lib", "/usr/local/lib32",
		"/usr/local/lib64", "/usr/local/libexec", "/usr/local/games", "/opt/homebrew/bin", "/opt/homebrew/sbin", "/opt/homebrew/lib",
		"/etc/ld.so.preload", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.cache", "/etc/ld.so.nohwcap", "/etc/alternatives",
		// what is started, and when
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
		// who may do what
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
		// whom the host trusts
		"/etc/ca-certificates", "/etc/ca-certificates.conf", "/var/lib/ca-certificates", "/usr/local/share/ca-certificates",
		"/etc/ssl/cert.pem", "/etc/ssl/ca-bundle.pem", "/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/ca-bundle.crt", "/etc/ssl/certs/ca-bundle.trust.crt",
		"/etc/ssl/certs/java", "/etc/ssl/openssl.cnf", "/etc/pki/ca-trust", "/etc/pki/trust", "/etc/pki/java", "/etc/pki/nssdb", "/etc/pki/tls/cert.pem",
		"/etc/pki/tls/openssl.cnf", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/pki/tls/certs/ca-bundle.trust.crt", "/usr/local/etc/ssl/cert.pem",
		"/usr/local/etc/openssl/cert.pem", "/usr/local/etc/openssl@3/cert.pem",
	}
}

// trustDirs are where OpenSSL looks for the certificates that it trusts, under
// names that isHashName knows. Under other names servers have theirs there.
func trustDirs() []string {
	return []string{"/etc/ssl/certs", "/etc/pki/tls/certs", "/usr/local/etc/ssl/certs"}
}

// isHashName reports whether openssl rehash makes such names: 8 hexadecimal
// digits, a dot, and a number, after an r for a revocation list.
func isHashName(name string) bool {
	hash, number, ok := strings.Cut(name, ".")
	number = strings.TrimPrefix(number, "r")
	return ok && len(hash) == 8 && strings.Trim(strings.ToLower(hash), "0123456789abcdef") == "" &&
		number != "" && strings.Trim(number, "0123456789") == ""
}

// fatalNames are the same as fatalPaths, wherever they are: what is read from a
// home directory by a shell, by sshd, or by whatever else runs commands.
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

// Fatal says where path, on another host, is, or what it is, that with a file
// there a writer owns that host or breaks it; "" if it is no such place.
func Fatal(path string) string { return new(Policy).Look().fatal(path, nil) }

// fatal says why path is on the lists above, or "".
func (l *Look) fatal(path string, above []fs.FileInfo) string {
	// Case is ignored since file systems exist that ignore it.
	lower := strings.ToLower(filepath.ToSlash(path))
	for _, name := range fatalNames() {
		if strings.Contains(lower+"/", "/"+strings.ToLower(name)+"/") {
			return name
		}
	}
	// All of it belongs to the distribution but for one directory.
	if below("/usr", lower) && !below("/usr/local", lower) {
		return "/usr"
	}
	if isHashName(filepath.Base(path)) {
		if dir := l.firstHolding(trustDirs(), path, above); dir != "" {
			return "what OpenSSL trusts in " + dir
		}
	}
	return l.firstHolding(fatalPaths(), path, above)
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

// firstHolding is the first of dirs that path, with the given ancestors, is in,
// or is. It errs on the side of finding one: names are compared without case, and
// what is there also by identity, which sees through bind mounts and through file
// systems that take several spellings for one name.
func (l *Look) firstHolding(dirs []string, path string, above []fs.FileInfo) string {
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

// at finds out where a clean path leads, from the directory above it on, which
// most of a list have in common.
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

// look is at for a path whose directory has no symlinks.
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
