package winrm_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/winrm"
)

// renegotiating is the configuration of an httpd that requests a client certificate like Windows:
// by TLS renegotiation, after it has seen the request.
const renegotiating = `ServerRoot %[1]s
ServerName localhost
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
PidFile %[1]s/httpd.pid
ErrorLog %[1]s/error.log
DocumentRoot /usr/lib/apache2
Mutex pthread
StartServers 1
%[3]s
Listen 127.0.0.1:%[2]d
SSLEngine on
SSLCertificateFile %[1]s/serving.pem
SSLCACertificateFile %[1]s/ca.pem
<Location /wsman>
	SSLVerifyClient require
	ErrorDocument 404 "to %%{SSL_CLIENT_S_DN_CN}"
</Location>
`

// TestRenegotiation checks that a server that asks late gets the certificate.
func TestRenegotiation(t *testing.T) {
	httpd := needs.Need(t, "apache2")
	if _, err := os.Stat("/usr/lib/apache2/modules/mod_ssl.so"); err != nil {
		needs.Missing(t, "Debian's modules of apache2 are not installed")
	}
	ca := testca.Must(t)
	dir, port := t.TempDir(), needs.FreePort(t)
	serving, err := ca.Issue(testca.Template{Names: []string{"127.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	client, err := ca.Issue(testca.Template{CommonName: "deployer"})
	if err != nil {
		t.Fatal(err)
	}
	account := ""
	if os.Geteuid() == 0 {
		account = "User www-data\nGroup www-data"
	}
	for name, data := range map[string][]byte{
		"ca.pem": ca.PEM(), "serving.pem": append(serving.KeyPEM(), serving.PEM()...), "httpd.conf": fmt.Appendf(nil, renegotiating, dir, port, account),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	command := exec.CommandContext(t.Context(), httpd, "-f", filepath.Join(dir, "httpd.conf"), "-D", "FOREGROUND")
	command.Cancel = func() error { return command.Process.Signal(os.Interrupt) }
	command.WaitDelay = 10 * time.Second
	output := new(bytes.Buffer)
	command.Stderr = output
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { command.Wait() })
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if conn, err := dial(t.Context(), fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			conn.Close()
			break
		}
		if time.Since(begun) > time.Minute {
			log, _ := os.ReadFile(filepath.Join(dir, "error.log"))
			t.Fatalf("httpd does not start: %s%s", output, log)
		}
	}
	pair := client.TLS()
	c, err := winrm.New(winrm.Options{Dial: dial, Host: "127.0.0.1", Port: port, HTTPS: true, CAFile: filepath.Join(dir, "ca.pem"),
		Auth: winrm.Certificate, Certificate: &pair})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Run(t.Context(), []string{"command"}, nil); err == nil || !strings.Contains(err.Error(), "unexpected answer 404 Not Found: to deployer") {
		t.Errorf("error = %v, want httpd's, which names the client", err)
	}
}
