package liveserver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"certctl-agent/internal/tlsprobe"
)

// crt names the directory rather than the file: HAProxy loads all files in it.
const haproxyConf = `global
	stats socket %[1]s/admin.sock mode 600 expose-fd listeners level user
	hard-stop-after 10s
	nbthread 2
defaults
	mode http
	timeout connect 5s
	timeout client 5s
	timeout server 5s
frontend tls
	bind 127.0.0.1:%[2]s ssl crt %[1]s/tls
	http-request return status 200
`

// haproxyReload triggers a reload and waits for its end, like systemctl reload. The master
// re-executes itself for a reload and would lose another SIGUSR2 meanwhile; it answers on its
// socket only once it handles signals again. Failed reloads count as well.
const haproxyReload = `#!%[1]s
use strict;
use IO::Socket::UNIX;
$SIG{PIPE} = "IGNORE"; # a master that executes itself anew closes the socket

sub reloads {
	my $master = IO::Socket::UNIX->new(Peer => "%[2]s") or return;
	$master->print("show proc\n");
	$master->flush;
	shutdown($master, 1);
	return join("", <$master>) =~ /master\s+(\d+) \[failed: (\d+)\]/ ? ($1, $2) : ();
}

my ($before, $failed);
for (1 .. 600) {
	my ($now, $then) = reloads();
	if (defined $now && !defined $before) {
		($before, $failed) = ($now, $then);
		kill "USR2", %[3]d or die "signal the master: $!";
	}
	exit($then > $failed) if defined $now && $now > $before;
	select(undef, undef, undef, 0.05);
}
die "HAProxy has not reloaded within 30 seconds\n";
`

// StartHAProxy starts HAProxy, a master with workers, with one TLS server.
func StartHAProxy(ctx context.Context, dir string, pair Pair) (*Server, error) {
	haproxy, err := program("haproxy")
	if err != nil {
		return nil, err
	}
	perl, err := program("perl")
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	pemPath := filepath.Join(dir, tlsDir, "site.pem")
	if err := os.Mkdir(filepath.Dir(pemPath), 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(pemPath, slices.Concat(pair.Certificate, pair.Key), 0o600); err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(conf, fmt.Appendf(nil, haproxyConf, dir, port), 0o644); err != nil {
		return nil, err
	}
	s := &Server{
		Name:     "HAProxy",
		Type:     "HAProxy",
		Endpoint: tlsprobe.Endpoint{Address: "127.0.0.1:" + port},
		CertPath: pemPath,
	}
	master := filepath.Join(dir, "master.sock")
	if err := s.run(haproxy, "-W", "-S", master, "-f", conf); err != nil {
		return nil, err
	}
	reload := filepath.Join(dir, "reload-haproxy")
	script := fmt.Appendf(nil, haproxyReload, perl, master, s.commands[0].Process.Pid)
	if err := os.WriteFile(reload, script, 0o755); err != nil {
		s.Stop()
		return nil, err
	}
	s.Config = map[string]any{
		"pem_path":         pemPath,
		"validate_command": haproxy + " -c -q -f " + conf,
		"reload_command":   reload,
		"host":             "127.0.0.1",
		"port":             port,
	}
	return s, s.ready(ctx)
}
