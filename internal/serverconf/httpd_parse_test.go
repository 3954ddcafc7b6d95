package serverconf

import (
	"slices"
	"strings"
	"testing"
)

// httpdDump is an answer of httpd whose configuration has these lines.
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
		{"an unknown variable in the certificate", "SSLCertificateFile ${X}.pem\nSSLCertificateKeyFile /k.pem", "does not use"}, // relative to ServerRoot, for all that httpd knows
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
				t.Fatal("this is no configuration")
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
		t.Error("an answer without a configuration is taken for one")
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
	for _, seed := range []string{"<VirtualHost a>\nSSLCertificateFile \"/c\" \n</VirtualHost>", "SSLCertificateKeyFile ${A}${B}\nSSLCertificateFile /${", "</VirtualHost>\n</VirtualHost>", "# In file: \n#1:\nServerRoot: \""} {
		f.Add(seed)
		f.Add(httpdDump(seed))
	}
	f.Fuzz(func(t *testing.T, dump string) {
		pairs, _ := httpdPairs(dump, "/c")
		for _, pair := range pairs {
			if !strings.Contains(pair.Where, ":") || pair.Key == "" {
				t.Errorf("%q: a pair from nowhere: %+v", dump, pair)
			}
		}
	})
}
