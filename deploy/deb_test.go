package deploy_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/config"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
)

// epoch is the time of all files in packages that tests build.
const epoch = "1700000000"

// makeDeb builds the package of a version and returns its path.
func makeDeb(t *testing.T, version string) string {
	t.Helper()
	dist := t.TempDir()
	makeTarget(t, "deb", dist, "VERSION="+version, "SOURCE_DATE_EPOCH="+epoch)
	return onlyDeb(t, dist)
}

// packDeb packs an existing binary into a directory, where the package must be the only one then.
func packDeb(t *testing.T, dist, binary, version string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "deb/build.sh", binary, runtime.GOARCH, version, dist)
	cmd.Env = append(cmd.Environ(), "SOURCE_DATE_EPOCH="+epoch)
	if out, err := tryOutput(cmd); err != nil {
		t.Fatalf("deb/build.sh: %v\n%s", err, out)
	}
	return onlyDeb(t, dist)
}

func onlyDeb(t *testing.T, dir string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(found) != 1 {
		t.Fatalf("made %v, want one package", found)
	}
	return found[0]
}

func TestDebPackage(t *testing.T) {
	dpkg := needs.Need(t, "dpkg-deb")
	deb := makeDeb(t, "v1.2.3-rc1")
	if got, want := filepath.Base(deb), "certctl-agent_1.2.3~rc1_"+runtime.GOARCH+".deb"; got != want {
		t.Errorf("the package is %s, want %s", got, want)
	}
	binary := filepath.Join(filepath.Dir(deb), "linux-"+runtime.GOARCH, "certctl-agent")
	if again := packDeb(t, t.TempDir(), binary, "v1.2.3-rc1"); readFile(t, again) != readFile(t, deb) {
		t.Error("two packages of the same binary differ")
	}
	control := t.TempDir()
	output(t, dpkg, "--control", deb, control)
	if got := readFile(t, filepath.Join(control, "conffiles")); got != "/etc/certctl/agent.env\n" {
		t.Errorf("conffiles: %q", got)
	}
	// Mode and owner, then size and time, then the name.
	content := make(map[string]string)
	for line := range strings.SplitSeq(output(t, dpkg, "--contents", deb), "\n") {
		if fields := strings.Fields(line); len(fields) >= 6 {
			content[fields[5]] = fields[0] + " " + fields[1]
		}
	}
	for name, want := range map[string]string{
		"./usr/bin/certctl-agent":                                       "-rwxr-xr-x root/root",
		"./etc/certctl/":                                                "drwxr-xr-x root/root",
		"./etc/certctl/agent.env":                                       "-rw------- root/root",
		"./etc/certctl/targets.d/":                                      "drwxr-xr-x root/root",
		"./lib/systemd/system/certctl-agent.service":                    "-rw-r--r-- root/root",
		"./lib/systemd/system/certctl-agent-unprivileged.service":       "-rw-r--r-- root/root",
		"./usr/lib/sysusers.d/certctl-agent.conf":                       "-rw-r--r-- root/root",
		"./usr/lib/tmpfiles.d/certctl-agent.conf":                       "-rw-r--r-- root/root",
		"./usr/share/man/man8/certctl-agent.8.gz":                       "-rw-r--r-- root/root",
		"./usr/share/doc/certctl-agent/copyright":                       "-rw-r--r-- root/root",
		"./usr/share/doc/certctl-agent/changelog.gz":                    "-rw-r--r-- root/root",
		"./usr/share/doc/certctl-agent/README.md":                       "-rw-r--r-- root/root",
		"./usr/share/doc/certctl-agent/docs/operations.md":              "-rw-r--r-- root/root",
		"./usr/share/doc/certctl-agent/docs/targets/nginx.md":           "-rw-r--r-- root/root",
		"./usr/share/doc/certctl-agent/examples/50-certctl-agent.rules": "-rw-r--r-- root/root",
		"./usr/share/doc/certctl-agent/examples/credential.conf":        "-rw-r--r-- root/root",
	} {
		if content[name] != want {
			t.Errorf("%s is %q in the package, want %q", name, content[name], want)
		}
	}
}

// TestDebChangelog checks that the sections which the package's changelog points to exist.
func TestDebChangelog(t *testing.T) {
	runbook := readFile(t, "../docs/operations.md")
	named := regexp.MustCompile(`See "([^"]+)" in docs/operations\.md`).FindAllStringSubmatch(readFile(t, "deb/build.sh"), -1)
	for _, match := range named {
		if !regexp.MustCompile(`(?m)^#+ ` + regexp.QuoteMeta(match[1]) + `$`).MatchString(runbook) {
			t.Errorf("docs/operations.md has no section %q", match[1])
		}
	}
	if len(named) == 0 {
		t.Error("the changelog points to no section")
	}
}

// TestDebVersions checks that Debian sorts the versions of git describe in their order.
func TestDebVersions(t *testing.T) {
	dpkg := needs.Need(t, "dpkg")
	previous, dist := "", t.TempDir()
	for _, version := range []string{"cf697b2-dirty", "v1.2.3-rc1", "v1.2.3", "v1.2.3-4-gcf697b2", "v1.2.4"} {
		// Any file will do as the binary; this one needs no build.
		name := filepath.Base(packDeb(t, dist, "deb/copyright", version))
		this := strings.Split(name, "_")[1]
		if previous != "" {
			output(t, dpkg, "--compare-versions", previous, "lt", this)
		}
		previous = this
	}
}

func TestShippedConfiguration(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.env")
	writeFile(t, file, readFile(t, "deb/agent.env"), 0o600)
	settings := map[string]string{"CERTCTL_CONFIG": file, "CERTCTL_API_KEY": "key", "CERTCTL_AGENT_ID": "agent-1"}
	cfg, err := config.Load(nil, func(name string) string { return settings[name] }, config.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Warnings) > 0 {
		t.Errorf("warnings: %v", cfg.Warnings)
	}
	policy := policy.Policy{Paths: cfg.AllowedPaths, Commands: cfg.AllowedCommands, Hosts: cfg.AllowedHosts}
	if policy.CheckHost("web1.example.org", 22) == nil || policy.CheckHost("203.0.113.1", 22) == nil || policy.CheckHost("localhost", 22) != nil {
		t.Error("the shipped list of hosts allows other hosts, or refuses this one")
	}
	for _, path := range []string{
		"/etc/nginx/tls/key.pem", "/etc/apache2/ssl/cert.pem", "/etc/haproxy/certs/site.pem", "/etc/traefik/certs/cert.pem",
		"/etc/caddy/certs/cert.pem", "/etc/envoy/certs/cert.pem", "/etc/postfix/certs/cert.pem", "/etc/dovecot/certs/key.pem",
	} {
		if err := policy.CheckPath(path); err != nil {
			t.Errorf("a usual path is refused: %v", err)
		}
	}
	for _, path := range []string{"/etc/nginx/nginx.conf", "/etc/ssl/certs/ca-certificates.crt", "/etc/passwd", "/var/www/html/index.html"} {
		if policy.CheckPath(path) == nil {
			t.Errorf("%s may be written", path)
		}
	}
	for _, line := range []string{
		"nginx -t", "nginx -s reload", "systemctl reload nginx", "apachectl configtest", "apachectl graceful", "systemctl reload apache2",
		"haproxy -c -f /etc/haproxy/haproxy.cfg", "systemctl reload haproxy", "systemctl reload caddy",
		"postfix check", "postfix reload", "doveconf -n", "doveadm reload",
	} {
		if _, err := policy.Command(line, time.Second); err != nil {
			t.Errorf("a usual command is refused: %v", err)
		}
	}
	for _, line := range []string{"systemctl reload sshd", "systemctl restart nginx", "nginx -c /tmp/evil.conf -s reload", "sh -c reboot"} {
		if _, err := policy.Command(line, time.Second); err == nil {
			t.Errorf("%q may be run", line)
		}
	}
}

func TestRelease(t *testing.T) {
	needs.Long(t, "it builds with an empty cache")
	t.Parallel()
	dist := t.TempDir()
	makeTarget(t, "release", dist, "VERSION=v1.2.3", "COMMIT=0123456789ab", "PLATFORMS=linux/"+runtime.GOARCH)
	name := "certctl-agent_v1.2.3_linux_" + runtime.GOARCH
	dir := filepath.Join(dist, "release")
	sums := output(t, "sh", "-c", `cd "$1" && sha256sum -c SHA256SUMS`, "sh", dir)
	for _, file := range []string{name + ".tar.gz", name + ".spdx"} {
		if !strings.Contains(sums, file+": OK") {
			t.Errorf("SHA256SUMS lacks %s: %s", file, sums)
		}
	}
	output(t, "tar", "-C", dir, "-xzf", filepath.Join(dir, name+".tar.gz"))
	for _, file := range []string{"LICENSE", "docs/operations.md", "agent.env", "certctl-agent.8", "systemd/certctl-agent.service", "systemd/examples/credential.conf"} {
		if _, err := os.Stat(filepath.Join(dir, name, file)); err != nil {
			t.Error(err)
		}
	}
	got := output(t, filepath.Join(dir, name, "certctl-agent"), "version")
	if !strings.Contains(got, "v1.2.3") || !strings.Contains(got, "0123456789ab") {
		t.Errorf("version: %s", got)
	}
	sbom := readFile(t, filepath.Join(dir, name+".spdx"))
	for _, want := range []string{
		"SPDXVersion: SPDX-2.3", "PackageName: certctl-agent", "PackageVersion: v1.2.3", "PackageName: stdlib\n",
		"PackageVersion: " + runtime.Version(), "STATIC_LINK SPDXRef-std", "CGO_ENABLED=0",
	} {
		if !strings.Contains(sbom, want) {
			t.Errorf("the SBOM lacks %q:\n%s", want, sbom)
		}
	}
}
