package liveserver

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"certctl-agent/internal/tlsprobe"
)

// Clients without SNI also get the pair.
const caddyConf = `{
	"admin": {"listen": "127.0.0.1:%[1]s"},
	"logging": {"logs": {"default": {"level": "WARN"}}},
	"apps": {
		"http": {"servers": {"live": {
			"listen": ["127.0.0.1:%[2]s"],
			"automatic_https": {"disable": true},
			"tls_connection_policies": [{"certificate_selection": {"any_tag": ["live"]}}],
			"routes": [{"handle": [{"handler": "static_response", "body": "ok\n"}]}]
		}}},
		"tls": {"certificates": {"load_files": [{"certificate": %[3]q, "key": %[4]q, "tags": ["live"]}]}}
	}
}
`

// StartCaddy starts Caddy with one TLS server, on files.
func StartCaddy(ctx context.Context, dir string, pair Pair) (*Server, error) {
	caddy, err := program("caddy")
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	admin, err := FreePort()
	if err != nil {
		return nil, err
	}
	certPath, keyPath, err := writePair(dir, pair)
	if err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "caddy.json")
	if err := os.WriteFile(conf, fmt.Appendf(nil, caddyConf, admin, port, certPath, keyPath), 0o600); err != nil {
		return nil, err
	}
	s := &Server{
		Name: "Caddy",
		Type: "Caddy",
		Config: map[string]any{
			"mode":      "file",
			"cert_dir":  filepath.Dir(certPath),
			"cert_file": filepath.Base(certPath),
			"key_file":  filepath.Base(keyPath),
			"admin_api": "http://127.0.0.1:" + admin,
			"host":      "127.0.0.1",
			"port":      port,
		},
		Endpoint: tlsprobe.Endpoint{Address: "127.0.0.1:" + port},
		CertPath: certPath,
		Resets:   true,
	}
	command := exec.Command(caddy, "run", "--config", conf)
	// Keep Caddy's state here, so that the user's is not touched.
	command.Env = []string{"HOME=" + dir, "XDG_CONFIG_HOME=" + dir, "XDG_DATA_HOME=" + dir}
	if err := s.start(command); err != nil {
		return nil, err
	}
	return s, s.ready(ctx)
}
