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

// TestHTTPD checks that an httpd without mod_info, which prints nothing, is run again with it.
func TestHTTPD(t *testing.T) {
	configuration := "# In file: /a.conf\n#  2:\nSSLCertificateFile /c.pem\n#  3:\nSSLCertificateKeyFile k.pem\nServerRoot: \"/srv\"\n"
	want := Pair{Cert: "/c.pem", Key: "/srv/k.pem", Where: "/a.conf:3"}
	tests := []struct {
		name   string
		answer func(loads string) (string, error)
		says   string // part of the error; "" if want is expected
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
		}, "requires mod_info"},
		{"httpd fails", func(loads string) (string, error) {
			if loads != "" {
				t.Error("httpd is run again")
			}
			return "", errors.New("exit status 1: Syntax error")
		}, "Syntax error"},
	}
	validate, reload := words("httpd -f /x -t"), words("true")
	if _, err := HTTPD(t.Context(), nil, "/c.pem", validate, reload); err == nil || !strings.Contains(err.Error(), "cannot be asked") {
		t.Errorf("no query: %v", err)
	}
	for _, test := range tests {
		query := func(_ context.Context, command policy.Command) ([]byte, error) {
			line, loads := command.Argv, ""
			if line[3] == "-C" {
				line, loads = slices.Concat(line[:3], line[5:]), line[4]
			}
			if got := strings.Join(line, " "); got != "httpd -f /x -t -D DUMP_RUN_CFG -D DUMP_CONFIG" {
				t.Errorf("%s: ran %s", test.name, got)
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

// httpdDump returns the output of an httpd whose configuration has these lines.
func httpdDump(lines string) string {
	var dump strings.Builder
	dump.WriteString("Syntax OK\n# In file: /etc/apache2/f.conf\n")
	for line := range strings.Lines(lines) {
		dump.WriteString("  #  7:\n  " + line)
	}
	return dump.String() + "\nServerRoot: \"/etc/apache2\"\nMain DocumentRoot: \"/var/www\"\nDefine: DUMP_CONFIG\n"
}

func TestHTTPDPairs(t *testing.T) {
	tests := []struct {
		name, text string
		want       string // key, or part of the error
	}{
		{"a virtual host", "<VirtualHost *:443>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem\n</VirtualHost>", "/k.pem"},
		{"case, quotes", "<virtualhost *:443>\nsslCERTIFICATEfile \"/c.pem\"\nSSLCertificateKeyFile  '/k k.pem' \n</VIRTUALHOST>", "/k k.pem"},
		{"whole server", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem", "/k.pem"},
		{"relative to ServerRoot", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile conf/k.pem", "/etc/apache2/conf/k.pem"},
		{"two pairs", "SSLCertificateFile /rsa\nSSLCertificateKeyFile /rsa.key\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem", "/k.pem"},
		{"sections in a virtual host", "<VirtualHost *:443>\nSSLCertificateFile /c.pem\n<Directory />\n</Directory>\nSSLCertificateKeyFile /k.pem\n</VirtualHost>", "/k.pem"},
		{"two virtual hosts that differ", "<VirtualHost a>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k1\n</VirtualHost>\n<VirtualHost b>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k2\n</VirtualHost>", "several keys"},
		{"key of another virtual host", "<VirtualHost a>\nSSLCertificateFile /c.pem\n</VirtualHost>\n<VirtualHost b>\nSSLCertificateKeyFile /k2\n</VirtualHost>", "/c.pem"},
		{"key of the whole server", "<VirtualHost a>\nSSLCertificateFile /c.pem\n</VirtualHost>\nSSLCertificateKeyFile /k.pem", "/k.pem"},
		{"certificate of the whole server", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem\n<VirtualHost a>\nSSLEngine on\n</VirtualHost>", "/k.pem"},
		{"another certificate than the whole server", "SSLCertificateFile /x.pem\nSSLCertificateKeyFile /x.key\n<VirtualHost a>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem\n</VirtualHost>", "/k.pem"},
		{"the second of the whole server", "SSLCertificateFile /x.pem\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /x.key\nSSLCertificateKeyFile /k.pem\n<VirtualHost a>\nSSLCertificateFile /y.pem\nSSLCertificateKeyFile /y.key\n</VirtualHost>", "/k.pem"},
		{"an unknown variable in the key", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile /etc/${X}/k.pem", "a variable"},
		{"an unknown variable in the certificate", "SSLCertificateFile ${X}.pem\nSSLCertificateKeyFile /k.pem", "does not use"}, // httpd takes it as relative to ServerRoot
		{"an unknown variable in both", "SSLCertificateFile /${X}.pem\nSSLCertificateKeyFile /${X}.key", "a variable"},
		{"a variable in another certificate", "SSLCertificateFile /tls/${X}.pem\nSSLCertificateKeyFile /${X}.key", "does not use"},
		{"in a token", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile pkcs11:object=x;pin-value=secret-pin", "cannot be used"},
		{"in the same file", "SSLCertificateFile /c.pem", "/c.pem"},
		{"in the same file, after a pair", "SSLCertificateFile /rsa\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /rsa.key", "/c.pem"},
		{"never closed", "<VirtualHost a>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem", "/k.pem"},
		{"nothing of the kind", "SSLEngine on", "does not use"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			pairs, ok := httpdPairs(httpdDump(test.text), "/c.pem")
			if !ok {
				t.Fatal("this is not a configuration")
			}
			found, err := KeyFor("/c.pem", pairs)
			if strings.HasPrefix(test.want, "/") {
				if err != nil || found.Key != test.want || found.Where != "/etc/apache2/f.conf:7" {
					t.Errorf("got %+v, %v, want %q", found, err, test.want)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %+v, %v, want an error with %q", found, err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret-pin") {
				t.Errorf("the error shows a secret: %v", err)
			}
		})
	}
	if _, ok := httpdPairs("Syntax OK\nServerRoot: \"/etc/apache2\"\n", "/c.pem"); ok {
		t.Error("output without a configuration is accepted")
	}
}

func TestHTTPDWords(t *testing.T) {
	for line, want := range map[string][]string{
		"": nil, "  # x": nil, "a b": {"a", "b"}, ` a  "b \"c\\" 'd e'f `: {"a", `b "c\`, "d e", "f"}, `a "b`: {"a", "b"}, `a #b`: {"a", "#b"}, `a "`: {"a", ""},
	} {
		if got := httpdWords(line); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", line, got, want)
		}
	}
}

func FuzzHTTPDPairs(f *testing.F) {
	for _, seed := range []string{"<VirtualHost a>\nSSLCertificateFile \"/c\" \n</VirtualHost>", "SSLCertificateKeyFile ${A}${B}\nSSLCertificateFile /${", "</VirtualHost>\n</VirtualHost>", "# In file: \n#1:\nServerRoot: \"", `SSLCertificateFile "`} {
		f.Add(seed)
		f.Add(httpdDump(seed))
	}
	f.Fuzz(func(t *testing.T, dump string) {
		pairs, _ := httpdPairs(dump, "/c")
		for _, pair := range pairs {
			if !strings.Contains(pair.Where, ":") || pair.Key == "" {
				t.Errorf("%q: invented the pair %+v", dump, pair)
			}
		}
	})
}
