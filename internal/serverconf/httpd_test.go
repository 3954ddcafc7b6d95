package serverconf

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/policy"
)

func TestHTTPDCall(t *testing.T) {
	tests := []struct{ validate, reload, want string }{
		{"apachectl configtest", "apachectl graceful", "apachectl"},
		{"/usr/sbin/apache2 -t -f /etc/x.conf -D TLS", "true", "/usr/sbin/apache2 -f /etc/x.conf -D TLS"},
		{"true", "httpd -d/srv -k graceful -e debug", "httpd -d/srv"},
		{"sudo -n apache2ctl -t", "true", "sudo -n apache2ctl"},
		{"httpd.worker -t", "true", "httpd.worker"},
		{"systemctl is-active apache2", "systemctl reload apache2", ""},
	}
	for _, test := range tests {
		got, err := httpdCall(words(test.validate), words(test.reload))
		if strings.Join(got.Argv, " ") != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%q and %q: got %q, %v, want %q", test.validate, test.reload, got, err, test.want)
		}
	}
}

// An httpd without mod_info prints nothing, and is asked again with it.
func TestHTTPD(t *testing.T) {
	configuration := "# In file: /a.conf\n#  2:\nSSLCertificateFile /c.pem\n#  3:\nSSLCertificateKeyFile k.pem\nServerRoot: \"/srv\"\n"
	want := Pair{Cert: "/c.pem", Key: "/srv/k.pem", Where: "/a.conf:3"}
	tests := []struct {
		name   string
		answer func(loads string) (string, error)
		says   string // in the error; "": want
	}{
		{"mod_info is in use", func(string) (string, error) { return configuration, nil }, ""},
		{"mod_info is where Apache's own layout has it", func(loads string) (string, error) {
			switch loads {
			case "":
				return "ServerRoot: \"/srv\"\n", nil
			case "LoadModule info_module modules/mod_info.so":
				return configuration, nil
			}
			return "", errors.New("exit status 1: cannot open shared object file")
		}, ""},
		{"no mod_info", func(loads string) (string, error) {
			if loads == "" {
				return "ServerRoot: \"/srv\"\n", nil
			}
			return "", errors.New("exit status 1: cannot open shared object file")
		}, "takes mod_info"},
		{"httpd fails", func(loads string) (string, error) {
			if loads != "" {
				t.Error("httpd is asked again")
			}
			return "", errors.New("exit status 1: Syntax error")
		}, "Syntax error"},
	}
	validate, reload := words("httpd -f /x -t"), words("true")
	if _, err := HTTPD(t.Context(), nil, "/c.pem", validate, reload); err == nil || !strings.Contains(err.Error(), "cannot be asked") {
		t.Errorf("nobody to ask: %v", err)
	}
	for _, test := range tests {
		query := func(_ context.Context, command policy.Command) ([]byte, error) {
			line, loads := command.Argv, ""
			if line[3] == "-C" {
				line, loads = slices.Concat(line[:3], line[5:]), line[4]
			}
			if got := strings.Join(line, " "); got != "httpd -f /x -t -D DUMP_RUN_CFG -D DUMP_CONFIG" {
				t.Errorf("%s: asked by %s", test.name, got)
			}
			answer, err := test.answer(loads)
			return []byte(answer), err
		}
		found, err := HTTPD(t.Context(), query, "/c.pem", validate, reload)
		if test.says == "" && (err != nil || found != want) {
			t.Errorf("%s: got %+v, %v, want %+v", test.name, found, err, want)
		}
		if test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: got %v, want an error with %q", test.name, err, test.says)
		}
	}
}
