package liveserver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"certctl-agent/internal/tlsprobe"
)

// The directory, not the file: HAProxy loads everything that is in it.
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

// StartHAProxy starts HAProxy, a master with workers, with one TLS server.
func StartHAProxy(ctx context.Context, dir string, pair Pair) (*Server, error) {
	haproxy, err := program("haproxy")
	if err != nil {
		return nil, err
	}
	kill, err := program("kill")
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
	if err := s.run(haproxy, "-W", "-f", conf); err != nil {
		return nil, err
	}
	s.Config = map[string]any{
		"pem_path":         pemPath,
		"validate_command": haproxy + " -c -q -f " + conf,
		"reload_command":   fmt.Sprintf("%s -USR2 %d", kill, s.commands[0].Process.Pid),
		"host":             "127.0.0.1",
		"port":             port,
	}
	return s, s.ready(ctx)
}
