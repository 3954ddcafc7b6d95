package liveserver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"certctl-agent/internal/tlsprobe"
)

const apacheConf = `ServerRoot %[1]s
ServerName localhost
Define MODULES %[2]s
Define TLS tls
LoadModule mpm_event_module ${MODULES}/mod_mpm_event.so
LoadModule authz_core_module ${MODULES}/mod_authz_core.so
LoadModule ssl_module ${MODULES}/mod_ssl.so
PidFile %[1]s/httpd.pid
ErrorLog %[1]s/error.log
DocumentRoot %[1]s
Mutex pthread
StartServers 2
MinSpareThreads 25
ThreadsPerChild 25
GracefulShutdownTimeout 5
%[4]s
Listen 127.0.0.1:%[3]s
<VirtualHost 127.0.0.1:%[3]s>
	ServerName localhost
	SSLEngine on
	SSLCertificateFile "${TLS}/%[6]s"
	%[5]s
</VirtualHost>
`

// apacheModules is Debian's directory of httpd's modules.
const apacheModules = "/usr/lib/apache2/modules"

// StartApache starts httpd with one TLS server.
func StartApache(ctx context.Context, dir string, pair Pair) (*Server, error) {
	return startApache(ctx, dir, pair, writePair, `SSLCertificateKeyFile "${TLS}/key.pem"`)
}

// StartApacheInOneFile is StartApache with the key in the certificate's file, where httpd looks for
// it by default.
func StartApacheInOneFile(ctx context.Context, dir string, pair Pair) (*Server, error) {
	return startApache(ctx, dir, pair, writeOneFile, "")
}

func startApache(ctx context.Context, dir string, pair Pair, write writer, keyFile string) (*Server, error) {
	httpd, err := program("apache2")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(apacheModules, "mod_ssl.so")); err != nil {
		return nil, fmt.Errorf("the modules of apache2 in %s: %w", apacheModules, ErrMissing)
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	certPath, keyPath, err := write(dir, pair)
	if err != nil {
		return nil, err
	}
	user := ""
	if os.Geteuid() == 0 {
		user = "User www-data\nGroup www-data"
	}
	conf := filepath.Join(dir, "httpd.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, apacheConf, dir, apacheModules, port, user, keyFile, filepath.Base(certPath)), 0o644); err != nil {
		return nil, err
	}
	command := httpd + " -f " + conf
	s := &Server{
		Name: "Apache httpd",
		Type: "Apache",
		Config: map[string]any{
			"cert_path":        certPath,
			"key_path":         keyPath,
			"validate_command": command + " -t",
			"reload_command":   command + " -k graceful",
			"host":             "127.0.0.1",
			"port":             port,
		},
		Endpoint: tlsprobe.Endpoint{Address: "127.0.0.1:" + port},
		CertPath: certPath,
	}
	if err := s.run(httpd, "-f", conf, "-D", "FOREGROUND"); err != nil {
		return nil, err
	}
	return s, s.ready(ctx)
}
