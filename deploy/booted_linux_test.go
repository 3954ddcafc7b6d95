package deploy_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/devplane"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/tlsprobe"
)

const (
	unit         = "certctl-agent.service"
	unprivileged = "certctl-agent-unprivileged.service"
	envFile      = "/etc/certctl/agent.env"
	keyDir       = "/var/lib/certctl/keys"
	webCert      = "cert-web" // the certificate that the machine's nginx serves
)

// booted is a machine with the package installed, and its control plane.
type booted struct {
	*machine
	plane   *devplane.Plane
	agentID string
	port    int // of nginx
}

// TestBooted installs the package in a Debian booted by systemd and takes it through the life of a
// service. All steps use one machine: each starts with the state that the previous one left.
func TestBooted(t *testing.T) {
	needs.Long(t, "it makes and boots a Debian")
	t.Parallel()
	m := boot(t)
	b := &booted{machine: m, plane: devplane.Start(t, devplane.Options{}), port: needs.FreePort(t)}
	for _, step := range []struct {
		name string
		run  func(*booted, *testing.T)
	}{
		{"install", (*booted).install},
		{"register and start", (*booted).start},
		{"deploy to nginx", (*booted).deploy},
		{"commands in the sandbox", (*booted).commands},
		{"the sandbox holds", (*booted).sandbox},
		{"reload with a new key", (*booted).reload},
		{"key as a credential", (*booted).credential},
		{"kill -9", (*booted).killed},
		{"stuck", (*booted).stuck},
		{"upgrade", (*booted).upgrade},
		{"unprivileged", (*booted).unprivileged},
		{"stop", (*booted).stop},
		{"retire", (*booted).retire},
		{"remove and purge", (*booted).remove},
	} {
		begin := time.Now()
		if !t.Run(step.name, func(t *testing.T) { step.run(b, t) }) {
			journal, _ := m.try("journalctl", "--no-pager", "--lines=60", "--output=short-monotonic")
			t.Fatalf("the machine's journal:\n%s", journal)
		}
		t.Logf("%-24s %v", step.name, time.Since(begin).Round(10*time.Millisecond))
	}
	if problems := b.plane.Problems(); len(problems) > 0 {
		t.Errorf("against the protocol: %s", strings.Join(problems, "\n"))
	}
}

func (b *booted) installDeb(t *testing.T, version string) {
	t.Helper()
	writeFile(t, b.path("/root/agent.deb"), readFile(t, makeDeb(t, version)), 0o644)
	b.run(t, "dpkg", "--install", "/root/agent.deb")
}

func (b *booted) install(t *testing.T) {
	b.installDeb(t, "v1.0.0")
	for name, want := range map[string]string{
		"/var/lib/certctl": "700 root:root",
		envFile:            "600 root:root",
	} {
		if got := b.run(t, "stat", "--format=%a %U:%G", name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if state := b.show(unit, "ActiveState"); state != "inactive" {
		t.Errorf("before it is configured the service is %s", state)
	}
	b.run(t, "id", "certctl-agent")
	if out := b.run(t, "systemd-analyze", "verify", "--man=no", unit, unprivileged); strings.Contains(out, "certctl") {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	// Nothing is configured: it fails, says why, and is restarted.
	b.try("systemctl", "start", unit)
	if log := b.journal(t); !strings.Contains(log, "CERTCTL_API_KEY") {
		t.Errorf("without a configuration the journal says:\n%s", log)
	}
	b.run(t, "systemctl", "stop", unit)
}

// journal returns the service's output. journald may be late.
func (b *booted) journal(t *testing.T) string {
	t.Helper()
	b.run(t, "journalctl", "--sync")
	return b.run(t, "journalctl", "--unit="+unit, "--no-pager", "--output=cat")
}

// set changes values in agent.env, as an operator does with an editor.
func (b *booted) set(t *testing.T, values map[string]string) {
	t.Helper()
	file := b.path(envFile)
	lines := strings.Split(strings.TrimSuffix(readFile(t, file), "\n"), "\n")
	for name, value := range values {
		kept := lines[:0]
		for _, line := range lines {
			if !strings.HasPrefix(line, name+"=") {
				kept = append(kept, line)
			}
		}
		lines = append(kept, name+"="+value)
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, file, strings.Join(lines, "\n")+"\n", info.Mode().Perm())
}

func (b *booted) start(t *testing.T) {
	writeFile(t, b.path("/etc/certctl/ca.pem"), string(b.plane.CAPEM()), 0o644)
	b.set(t, map[string]string{
		"CERTCTL_SERVER_URL": b.plane.URL, "CERTCTL_API_KEY": b.plane.APIKey,
		"CERTCTL_SERVER_CA_BUNDLE_PATH": "/etc/certctl/ca.pem",
		"CERTCTL_STARTUP_JITTER":        "false", "CERTCTL_HEARTBEAT_INTERVAL": "500ms", "CERTCTL_POLL_INTERVAL": "200ms",
	})
	out := b.run(t, "certctl-agent", "register", "-config", envFile, "-name", "machine", "-write", envFile)
	b.agentID, _, _ = strings.Cut(out, "\n")
	if _, err := api.ParseID(b.agentID); err != nil || !strings.Contains(readFile(t, b.path(envFile)), b.agentID) {
		t.Fatalf("register printed %q; agent.env:\n%s", b.agentID, readFile(t, b.path(envFile)))
	}
	// Steps below cause failures: shorten the pauses after them.
	for _, name := range []string{unit, unprivileged} {
		writeFile(t, b.path("/etc/systemd/system/"+name+".d/test.conf"), "[Service]\nWatchdogSec=5s\nRestartSec=300ms\n", 0o644)
	}
	b.run(t, "systemctl", "daemon-reload")
	b.run(t, "systemctl", "enable", "--now", unit) // returns after READY=1
	if state := b.show(unit, "SubState"); state != "running" {
		t.Fatalf("the service is %s", state)
	}
	b.waitContact(t, b.agentID)
	// The control plane has answered; agent and systemd may not have processed that yet.
	eventually(t, "a STATUS line that says so", func() bool {
		return strings.HasPrefix(b.show(unit, "StatusText"), "in contact")
	})
	b.run(t, "certctl-agent", "status", "-check")
	b.run(t, "certctl-agent", "check", "-config", envFile)
}

// waitContact waits for the next accepted heartbeat.
func (b *booted) waitContact(t *testing.T, agent string) {
	t.Helper()
	accepted := func() (n int) {
		for _, beat := range b.plane.Heartbeats() {
			if beat.Agent == agent {
				n++
			}
		}
		return n
	}
	before := accepted()
	b.wait(t, "a heartbeat", func() bool { return accepted() > before })
}

func (b *booted) wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := b.plane.Wait(ctx, done); err != nil {
		t.Fatalf("waiting for %s: %v", what, err)
	}
}

// setTarget gives nginx a target of the control plane.
func (b *booted) setTarget(dir, validate, reload string) {
	b.plane.AddTarget(devplane.Target{ID: "target-web", Agent: b.agentID, Type: "NGINX", Config: map[string]any{
		"host": "127.0.0.1", "port": b.port,
		"cert_path": dir + "/cert.pem", "key_path": dir + "/key.pem",
		"validate_command": validate, "reload_command": reload,
		"post_deploy_verify": map[string]any{"enabled": true, "endpoint": fmt.Sprintf("127.0.0.1:%d", b.port), "server_name": "web.example.org"},
	}})
}

// renew renews the certificate and waits until nginx serves the new one.
func (b *booted) renew(t *testing.T) {
	t.Helper()
	before := len(b.plane.Deployments(webCert))
	b.plane.StartRenewal(webCert)
	var job devplane.Job
	b.wait(t, "the deployment", func() bool {
		jobs := b.plane.Deployments(webCert)
		if len(jobs) > before {
			job = jobs[len(jobs)-1]
		}
		return job.Status == api.StatusCompleted || job.Status == api.StatusFailed
	})
	if job.Status != api.StatusCompleted {
		t.Fatalf("the deployment is %s: %s", job.Status, job.Error)
	}
	versions := b.plane.Versions(webCert)
	want := pemutil.Fingerprint(versions[len(versions)-1].Leaf)
	// nginx's old workers may still accept a connection.
	eventually(t, "nginx to serve the new certificate", func() bool { return b.served(t) == want })
}

func (b *booted) served(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	result, err := tlsprobe.Probe(ctx, tlsprobe.Endpoint{Address: fmt.Sprintf("127.0.0.1:%d", b.port), ServerName: "web.example.org"})
	if err != nil {
		t.Fatal(err)
	}
	return result.Fingerprint
}

// serveFrom configures nginx with a self-made certificate in dir.
func (b *booted) serveFrom(t *testing.T, dir string) {
	t.Helper()
	old, err := testca.Must(t).Issue(testca.Template{CommonName: "web.example.org"})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"cert.pem": old.PEM(), "key.pem": old.KeyPEM()} {
		writeFile(t, b.path(filepath.Join(dir, name)), string(data), 0o600)
	}
	writeFile(t, b.path("/etc/nginx/conf.d/web.conf"), fmt.Sprintf(
		"server { listen 127.0.0.1:%d ssl; ssl_certificate %s/cert.pem; ssl_certificate_key %[2]s/key.pem; }\n", b.port, dir), 0o644)
	b.run(t, "systemctl", "reload-or-restart", "nginx")
}

func (b *booted) deploy(t *testing.T) {
	b.serveFrom(t, "/etc/nginx/tls")
	b.setTarget("/etc/nginx/tls", "nginx -t", "systemctl reload nginx")
	b.plane.AddCertificate(devplane.Certificate{ID: webCert, CommonName: "web.example.org", SANs: []string{"web.example.org"}, Targets: []string{"target-web"}})
	b.renew(t)
	for _, name := range []string{"/etc/nginx/tls/key.pem", keyDir + "/" + webCert + ".key"} {
		if got := b.run(t, "stat", "--format=%a %U:%G", name); got != "600 root:root" {
			t.Errorf("%s is %s", name, got)
		}
	}
	b.setTarget("/etc/nginx/tls", "nginx -t", "nginx -s reload")
	b.renew(t)
	b.wait(t, "the verification", func() bool { return len(b.plane.Verifications()) >= 2 })
	for _, v := range b.plane.Verifications() {
		if !v.Verified {
			t.Errorf("not verified: %+v", v)
		}
	}
	if out := b.run(t, "certctl-agent", "status"); !strings.Contains(out, "web.example.org") {
		t.Errorf("status does not list the certificate:\n%s", out)
	}
}

// commands runs the commands of targets as the unit does, with the same user, capabilities, file
// system and system calls.
func (b *booted) commands(t *testing.T) {
	writeFile(t, b.path("/etc/haproxy/haproxy.cfg"), fmt.Sprintf("global\n user haproxy\n group haproxy\n chroot /var/lib/haproxy\n daemon\n"+
		"defaults\n timeout client 1s\n timeout server 1s\n timeout connect 1s\nlisten web\n bind 127.0.0.1:%d\n", needs.FreePort(t)), 0o644)
	writeFile(t, b.path("/etc/apache2/ports.conf"), fmt.Sprintf("Listen 127.0.0.1:%d\n", needs.FreePort(t)), 0o644)
	b.run(t, "systemctl", "start", "apache2", "haproxy", "postfix", "dovecot")
	commands := []string{
		"nginx -t", "nginx -s reload",
		"apachectl configtest", "apachectl graceful", "systemctl reload apache2",
		"haproxy -c -f /etc/haproxy/haproxy.cfg", "systemctl reload haproxy",
		"postfix check", "postfix reload",
		"doveconf -n", "doveadm reload",
	}
	sandbox := readFile(t, "systemd/certctl-agent.service")
	for i, command := range commands {
		var lines []string
		for line := range strings.SplitSeq(sandbox, "\n") {
			switch name, _, _ := strings.Cut(line, "="); name {
			case "Type":
				line = "Type=oneshot"
			case "ExecStart":
				line = "ExecStart=/usr/bin/env " + command
			case "Restart", "RestartSec", "WatchdogSec", "StateDirectory", "NotifyAccess":
				continue
			}
			lines = append(lines, line)
		}
		writeFile(t, b.path(fmt.Sprintf("/run/systemd/system/probe%d.service", i)), strings.Join(lines, "\n"), 0o644)
	}
	b.run(t, "systemctl", "daemon-reload")
	for i, command := range commands {
		probe := fmt.Sprintf("probe%d", i)
		if _, err := b.try("systemctl", "start", probe); err != nil {
			log, _ := b.try("journalctl", "--unit="+probe, "--no-pager", "--output=cat")
			t.Errorf("%s: %s", command, log)
		}
	}
	b.run(t, "systemctl", "stop", "apache2", "haproxy", "postfix", "dovecot")
}

// sandbox checks what a process of the service may do.
func (b *booted) sandbox(t *testing.T) {
	pid := b.show(unit, "MainPID")
	for _, test := range []struct {
		path     string
		writable bool
	}{
		{"/etc/nginx/tls", true}, {"/var/www", true}, {"/srv", true}, {keyDir, true},
		{"/etc/certctl", false}, {"/etc/systemd/system", false}, {"/etc/cron.d", false}, {"/etc/passwd", false},
		{"/usr/bin", false}, {"/boot", false}, {"/root", false},
	} {
		// In the mount namespace of the service; access(2) says EROFS.
		_, err := b.try("nsenter", "--target", pid, "--mount", "test", "-w", test.path)
		if got := err == nil; got != test.writable {
			t.Errorf("%s: writable is %v, want %v", test.path, got, test.writable)
		}
	}
	// The host can still replace files that are mounted read-only in the service, and the service
	// sees the new ones: targets name owners of files.
	b.run(t, "useradd", "new-user")
	b.run(t, "nsenter", "--target", pid, "--mount", "getent", "passwd", "new-user")
}

func (b *booted) reload(t *testing.T) {
	pid := b.show(unit, "MainPID")
	b.plane.SetAPIKey("rotated-key")
	b.set(t, map[string]string{"CERTCTL_API_KEY": "rotated-key"})
	b.run(t, "systemctl", "reload", unit)
	b.waitContact(t, b.agentID)
	if now := b.show(unit, "MainPID"); now != pid {
		t.Errorf("process %s became %s: a reload must not restart", pid, now)
	}
}

func (b *booted) credential(t *testing.T) {
	b.plane.SetAPIKey("key-in-a-credential")
	dropIn := b.path("/etc/systemd/system/" + unit + ".d/credential.conf")
	writeFile(t, b.path("/etc/certctl/api-key"), "key-in-a-credential\n", 0o600)
	writeFile(t, dropIn, readFile(t, "systemd/examples/credential.conf"), 0o644)
	b.set(t, map[string]string{"CERTCTL_API_KEY": ""})
	b.run(t, "systemctl", "daemon-reload")
	b.run(t, "systemctl", "restart", unit)
	b.waitContact(t, b.agentID)

	b.set(t, map[string]string{"CERTCTL_API_KEY": "key-in-a-credential"})
	if err := os.Remove(dropIn); err != nil {
		t.Fatal(err)
	}
	b.run(t, "systemctl", "daemon-reload")
	b.run(t, "systemctl", "restart", unit)
}

// restarted waits until systemd has restarted the service.
func (b *booted) restarted(t *testing.T, signal, want string) {
	t.Helper()
	before := b.show(unit, "MainPID")
	b.run(t, "kill", "-"+signal, before)
	eventually(t, "a restart after "+signal, func() bool {
		now := b.show(unit, "MainPID")
		return now != before && now != "0" && b.show(unit, "SubState") == "running"
	})
	b.waitContact(t, b.agentID)
	if log := b.journal(t); !strings.Contains(log, want) {
		t.Errorf("the journal lacks %q:\n%s", want, log)
	}
}

func (b *booted) killed(t *testing.T) { b.restarted(t, "KILL", "status=9/KILL") }

func (b *booted) stuck(t *testing.T) { b.restarted(t, "STOP", "Watchdog timeout") }

func (b *booted) upgrade(t *testing.T) {
	pid := b.show(unit, "MainPID")
	b.installDeb(t, "v1.1.0")
	if now := b.show(unit, "MainPID"); now == pid || now == "0" {
		t.Errorf("main process is %s after the upgrade and was %s", now, pid)
	}
	b.waitContact(t, b.agentID)
	beats := b.plane.Heartbeats()
	if got := beats[len(beats)-1].Version; !strings.Contains(got, "1.1.0") {
		t.Errorf("version %q after the upgrade", got)
	}
	if !strings.Contains(readFile(t, b.path(envFile)), b.agentID) {
		t.Error("the upgrade has replaced agent.env")
	}
}

// unprivileged follows the steps in the unit's comment.
func (b *booted) unprivileged(t *testing.T) {
	b.run(t, "install", "-d", "-o", "certctl-agent", "-g", "certctl-agent", "-m", "0750", "/etc/nginx/certctl")
	b.run(t, "chgrp", "certctl-agent", envFile)
	b.run(t, "chmod", "0640", envFile)
	b.run(t, "install", "-m", "0644", "/usr/share/doc/certctl-agent/examples/50-certctl-agent.rules", "/etc/polkit-1/rules.d/")
	b.serveFrom(t, "/etc/nginx/certctl")
	b.run(t, "chown", "-R", "certctl-agent:", "/etc/nginx/certctl")

	b.run(t, "systemctl", "start", unprivileged)
	if state := b.show(unit, "ActiveState"); state != "inactive" {
		t.Errorf("beside it the other service is %s", state)
	}
	b.waitContact(t, b.agentID)
	if got := b.run(t, "stat", "--format=%U", "/proc/"+b.show(unprivileged, "MainPID")); got != "certctl-agent" {
		t.Errorf("it runs as %s", got)
	}
	b.setTarget("/etc/nginx/certctl", "/usr/bin/true", "/usr/bin/systemctl reload nginx.service")
	b.renew(t)
	for _, name := range []string{"/etc/nginx/certctl/key.pem", keyDir + "/" + webCert + ".key"} {
		if got := b.run(t, "stat", "--format=%a %U", name); got != "600 certctl-agent" {
			t.Errorf("%s is %s", name, got)
		}
	}
	// The polkit rule allows one verb for one unit.
	for _, command := range [][]string{{"restart", "nginx.service"}, {"reload", "dbus.service"}} {
		if out, err := b.try("setpriv", "--reuid=certctl-agent", "--regid=certctl-agent", "--clear-groups", "systemctl", "--no-ask-password", command[0], command[1]); err == nil {
			t.Errorf("systemctl %s is allowed: %s", strings.Join(command, " "), out)
		}
	}

	// And back: root's files belong to root again.
	b.run(t, "systemctl", "start", unit)
	if state := b.show(unprivileged, "ActiveState"); state != "inactive" {
		t.Errorf("beside it the unprivileged service is %s", state)
	}
	b.waitContact(t, b.agentID)
	b.serveFrom(t, "/etc/nginx/tls")
	b.setTarget("/etc/nginx/tls", "nginx -t", "systemctl reload nginx")
	b.renew(t)
}

func (b *booted) stop(t *testing.T) {
	b.run(t, "systemctl", "stop", unit)
	if result, code := b.show(unit, "Result"), b.show(unit, "ExecMainStatus"); result != "success" || code != "0" {
		t.Errorf("stopped with %s, exit code %s", result, code)
	}
	b.run(t, "systemctl", "start", unit)
	b.waitContact(t, b.agentID)
}

func (b *booted) retire(t *testing.T) {
	pid := b.show(unit, "MainPID")
	b.plane.Retire(b.agentID)
	eventually(t, "the agent to end", func() bool { return b.show(unit, "ActiveState") == "inactive" })
	if result, code := b.show(unit, "Result"), b.show(unit, "ExecMainStatus"); result != "success" || code != "0" {
		t.Errorf("ended with %s, exit code %s", result, code)
	}
	calls := b.plane.Count("")
	time.Sleep(time.Second) // three times RestartSec=; no event reports that nothing happens
	if state, now := b.show(unit, "ActiveState"), b.show(unit, "ExecMainPID"); state != "inactive" || now != pid {
		t.Errorf("a retired agent is %s, process %s, and was %s", state, now, pid)
	}
	if now := b.plane.Count(""); now != calls {
		t.Errorf("%d calls after the end", now-calls)
	}
}

func (b *booted) remove(t *testing.T) {
	b.plane.Unretire(b.agentID)
	b.run(t, "systemctl", "start", unit)
	b.run(t, "dpkg", "--remove", "certctl-agent")
	if state := b.show(unit, "ActiveState"); state != "inactive" {
		t.Errorf("a removed service is %s", state)
	}
	key := b.path(keyDir + "/" + webCert + ".key")
	for _, name := range []string{key, b.path(envFile), b.path(keyDir + "/.state")} {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("removing took away: %v", err)
		}
	}
	// After another installation it continues as before.
	b.run(t, "dpkg", "--install", "/root/agent.deb")
	b.run(t, "systemctl", "start", unit)
	b.waitContact(t, b.agentID)

	out := b.run(t, "dpkg", "--purge", "certctl-agent")
	if !strings.Contains(out, keyDir) {
		t.Errorf("purge does not say that keys are left:\n%s", out)
	}
	if _, err := os.Stat(key); err != nil {
		t.Errorf("purging took away: %v", err)
	}
	for _, name := range []string{b.path(envFile), b.path(keyDir + "/.state"), b.path("/etc/systemd/system/multi-user.target.wants/" + unit)} {
		if _, err := os.Lstat(name); !os.IsNotExist(err) {
			t.Errorf("purging has left %s (%v)", name, err)
		}
	}
}
