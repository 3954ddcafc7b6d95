package target

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/command"
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

	// Protected are the agent's own configuration, state and key directories
	// and files. Nothing may be written there, whatever Paths says.
	Protected []string
}

// Command is a command that the policy allows.
type Command struct {
	Argv    []string
	Timeout time.Duration
}

// Command splits a command line and checks it.
func (p *Policy) Command(line string, timeout time.Duration) (Command, error) {
	argv, err := command.Split(line)
	if err != nil {
		return Command{}, err
	}
	if p.Commands != nil && !slices.ContainsFunc(p.Commands, func(allowed []string) bool { return matches(allowed, argv) }) {
		return Command{}, fmt.Errorf("%s is not among the commands that CERTCTL_ALLOWED_COMMANDS allows", clip(line))
	}
	return Command{Argv: argv, Timeout: timeout}, nil
}

func matches(allowed, argv []string) bool {
	if last := len(allowed) - 1; last >= 0 && allowed[last] == "*" {
		return len(argv) >= last && slices.Equal(allowed[:last], argv[:last])
	}
	return len(allowed) > 0 && slices.Equal(allowed, argv)
}

// CheckPath reports whether a file may be written at path, which must be
// absolute, clean and free of symlinks: the caller resolves them, since only
// it knows the directory that it will write to.
func (p *Policy) CheckPath(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsFunc(path, isControl) {
		return fmt.Errorf("%s is no absolute path in its shortest form", clip(path))
	}
	if own := firstHolding(p.Protected, path); own != "" {
		return fmt.Errorf("%s is in %s, which is the agent's own: nothing is installed there", path, own)
	}
	if p.Paths == nil {
		if why := fatal(path); why != "" {
			return fmt.Errorf("%s is refused because it is in, or is, %s: to allow it all the same, name its directory in CERTCTL_ALLOWED_PATHS", path, why)
		}
		return nil
	}
	for _, dir := range p.Paths {
		if real, err := follow(dir, trustedLink); err == nil && below(real, path) {
			return nil
		}
	}
	return fmt.Errorf("%s is in none of the directories that CERTCTL_ALLOWED_PATHS allows (%s)", path, strings.Join(p.Paths, ", "))
}

// fatalPaths are files and directories where whoever writes owns the host, or
// breaks it.
func fatalPaths() []string {
	return []string{
		"/etc/certctl", "/proc", "/sys", "/dev", "/boot", "/efi",
		"/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin",
		"/etc/systemd", "/lib/systemd", "/usr/lib/systemd", "/usr/local/lib/systemd", "/run/systemd",
		"/etc/init", "/etc/init.d", "/etc/rc.d", "/etc/rc.local", "/etc/inittab", "/etc/udev", "/etc/modprobe.d",
		"/Library/LaunchDaemons", "/Library/LaunchAgents", "/System",
		"/etc/crontab", "/etc/anacrontab", "/etc/cron.d", "/etc/cron.hourly", "/etc/cron.daily", "/etc/cron.weekly",
		"/etc/cron.monthly", "/etc/cron.allow", "/etc/cron.deny", "/var/spool/cron", "/var/spool/at", "/var/at", "/usr/lib/cron",
		"/etc/sudoers", "/etc/sudoers.d", "/etc/sudo.conf", "/etc/doas.conf", "/etc/polkit-1", "/etc/pam.d", "/etc/pam.conf", "/etc/security",
		"/etc/passwd", "/etc/passwd-", "/etc/shadow", "/etc/shadow-", "/etc/group", "/etc/group-", "/etc/gshadow", "/etc/gshadow-",
		"/etc/subuid", "/etc/subgid", "/etc/master.passwd", "/etc/shells", "/etc/nsswitch.conf", "/etc/fstab",
		"/etc/ld.so.preload", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.cache", "/etc/ssh",
		"/etc/profile", "/etc/profile.d", "/etc/environment", "/etc/bashrc", "/etc/bash.bashrc", "/etc/zsh", "/etc/zshrc",
		"/etc/zshenv", "/etc/zprofile", "/etc/csh.cshrc", "/etc/csh.login", "/etc/fish",
	}
}

// fatalNames are the same, wherever they are: what a shell or sshd reads from
// a home directory.
func fatalNames() []string {
	return []string{
		".ssh", "authorized_keys", "authorized_keys2", ".profile", ".bashrc", ".bash_profile", ".bash_login", ".bash_logout",
		".zshrc", ".zshenv", ".zprofile", ".zlogin", ".zlogout", ".kshrc", ".mkshrc", ".cshrc", ".tcshrc", ".login", ".logout",
		".pam_environment", ".rhosts", ".shosts", "LaunchAgents",
	}
}

// fatal says why path is on the lists above, or "".
func fatal(path string) string {
	for element := range strings.SplitSeq(filepath.ToSlash(path), "/") {
		for _, name := range fatalNames() {
			// Case is ignored since file systems exist that ignore it.
			if strings.EqualFold(element, name) {
				return name
			}
		}
	}
	return firstHolding(fatalPaths(), path)
}

// firstHolding is the first of dirs that path is in, or is. It errs on the side
// of finding one: names are compared without case, and what is there also by
// identity, which sees through bind mounts and through file systems that take
// several spellings for one name.
func firstHolding(dirs []string, path string) string {
	var ancestors []fs.FileInfo
	for at := path; ; at = filepath.Dir(at) {
		if info, err := os.Stat(at); err == nil {
			ancestors = append(ancestors, info)
		}
		if at == filepath.Dir(at) {
			break
		}
	}
	for _, dir := range dirs {
		real := resolved(dir)
		if below(strings.ToLower(real), strings.ToLower(path)) || below(strings.ToLower(dir), strings.ToLower(path)) {
			return dir
		}
		info, err := os.Stat(real)
		if err == nil && slices.ContainsFunc(ancestors, func(a fs.FileInfo) bool { return os.SameFile(a, info) }) {
			return dir
		}
	}
	return ""
}

// below reports whether path is dir or in it.
func below(dir, path string) bool {
	rest, ok := strings.CutPrefix(path, dir)
	return ok && (rest == "" || dir == string(filepath.Separator) || rest[0] == filepath.Separator)
}

// resolved is path without symlinks, as far as it exists: the elements that do
// not are kept as they are.
func resolved(path string) string {
	real, err := Resolve(path)
	if err != nil {
		return filepath.Clean(path)
	}
	return real
}

// maxLinks is where Linux gives up too.
const maxLinks = 40

// Resolve follows the symlinks of path. What does not exist yet, at its end or
// behind a symlink that leads nowhere, is kept by name: that is where a file
// would be created.
func Resolve(path string) (string, error) {
	return follow(path, func(string) error { return nil })
}

// trustedLink refuses a symlink that others than root and the agent's own user
// could have made: it would let them choose which directory is allowed.
func trustedLink(path string) error {
	for _, at := range []string{path, filepath.Dir(path)} {
		info, err := os.Lstat(at)
		if err != nil {
			return err
		}
		uid, known := owner(info)
		shared := info.IsDir() && info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0
		if shared || known && uid != 0 && uid != os.Geteuid() {
			return fmt.Errorf("%s is a symlink that others could change", path)
		}
	}
	return nil
}

// follow is Resolve, but that each symlink is shown to may first.
func follow(path string, may func(link string) error) (string, error) {
	const separator = string(filepath.Separator)
	at, rest := separator, strings.Split(filepath.Clean(path), separator)
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		if name == ".." { // of a link: the parent of where the path has led so far
			at = filepath.Dir(at)
			continue
		}
		at = filepath.Join(at, name)
		link, err := os.Readlink(at)
		if errors.Is(err, fs.ErrPermission) {
			return "", err
		}
		if err != nil {
			continue // no symlink, or nothing there
		}
		if err := may(at); err != nil {
			return "", err
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("resolve %s: too many symlinks", path)
		}
		if at = filepath.Dir(at); filepath.IsAbs(link) {
			at = separator
		}
		rest = append(strings.Split(link, separator), rest...)
	}
	return at, nil
}
