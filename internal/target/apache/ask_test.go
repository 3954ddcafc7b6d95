package apache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/target"
)

func TestFindCall(t *testing.T) {
	tests := []struct{ validate, reload, want string }{
		{"apachectl configtest", "apachectl graceful", "apachectl"},
		{"/usr/sbin/apache2 -t -f /etc/x.conf -D TLS", "true", "/usr/sbin/apache2 -f /etc/x.conf -D TLS"},
		{"true", "httpd -d/srv -k graceful -e debug", "httpd -d/srv"},
		{"sudo -n apache2ctl -t", "true", "sudo -n apache2ctl"},
		{"httpd.worker -t", "true", "httpd.worker"},
		{"systemctl is-active apache2", "systemctl reload apache2", ""},
	}
	for _, test := range tests {
		got, err := findCall(strings.Fields(test.validate), strings.Fields(test.reload))
		if strings.Join(got, " ") != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%q and %q: got %q, %v, want %q", test.validate, test.reload, got, err, test.want)
		}
	}
}

func TestIncludedFiles(t *testing.T) {
	got := includedFiles("Included configuration files:\n  (*) /etc/apache2/apache2.conf\n    (146) /etc/apache2/sites enabled/a.conf\n      (9) /etc/apache2/tls\n    (150) /etc/apache2/tls\nnonsense (1) /x\n")
	want := []string{"/etc/apache2/apache2.conf", "/etc/apache2/sites enabled/a.conf", "/etc/apache2/tls"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestAskServer(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "a.conf")
	if err := os.WriteFile(conf, []byte("SSLCertificateFile /c.pem\nSSLCertificateKeyFile k.pem\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	answers := map[string]string{"DUMP_INCLUDES": "  (*) " + conf + "\n", "DUMP_RUN_CFG": "ServerRoot: \"/srv\"\n"}
	c := &Connector{validate: &target.Command{Argv: []string{"apachectl", "configtest"}}, reload: &target.Command{Argv: []string{"true"}}}
	c.config.CertPath = "/c.pem"
	if _, err := c.askServer(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be asked") {
		t.Errorf("nobody to ask: %v", err)
	}
	c.params.Query = func(_ context.Context, command target.Command) ([]byte, error) {
		answer, ok := answers[command.Argv[len(command.Argv)-1]]
		if !ok {
			return nil, errors.New("exit status 1")
		}
		return []byte(answer), nil
	}
	found, err := c.askServer(t.Context())
	if want := (target.ServerPair{Cert: "/c.pem", Key: "/srv/k.pem", Where: conf + ":2"}); err != nil || found != want {
		t.Errorf("got %+v, %v, want %+v", found, err, want)
	}
	answers["DUMP_INCLUDES"] = "  (*) " + conf + ".missing\n"
	if _, err := c.askServer(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	for _, what := range []string{"DUMP_RUN_CFG", "DUMP_INCLUDES"} {
		delete(answers, what)
		if _, err := c.askServer(t.Context()); err == nil || !strings.Contains(err.Error(), "exit status 1") {
			t.Errorf("no answer to %s: %v", what, err)
		}
	}
}
