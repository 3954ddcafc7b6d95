package liveserver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"certctl-agent/internal/tlsprobe"
)

const nginxConf = `pid %[1]s/nginx.pid;
error_log stderr warn;
worker_processes 2;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/tmp;
	proxy_temp_path %[1]s/tmp;
	fastcgi_temp_path %[1]s/tmp;
	uwsgi_temp_path %[1]s/tmp;
	scgi_temp_path %[1]s/tmp;
	ssl_certificate_key %[4]s;
	server {
		listen 127.0.0.1:%[2]s ssl;
		server_name localhost;
		ssl_certificate %[3]s;
		return 200 "ok\n";
	}
}
`

// StartNGINX starts nginx with one TLS server.
func StartNGINX(ctx context.Context, dir string, pair Pair) (*Server, error) {
	nginx, err := program("nginx")
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	certPath, keyPath, err := writePair(dir, pair)
	if err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, dir, port, certPath, keyPath), 0o644); err != nil {
		return nil, err
	}
	command := nginx + " -p " + dir + " -c " + conf
	s := &Server{
		Name: "nginx",
		Type: "NGINX",
		Config: map[string]any{
			"cert_path":        certPath,
			"key_path":         keyPath,
			"validate_command": command + " -t -q",
			"reload_command":   command + " -s reload",
			"host":             "127.0.0.1",
			"port":             port,
		},
		Endpoint: tlsprobe.Endpoint{Address: "127.0.0.1:" + port},
		CertPath: certPath,
	}
	if err := s.run(nginx, "-p", dir, "-c", conf, "-g", "daemon off;"); err != nil {
		return nil, err
	}
	return s, s.ready(ctx)
}
