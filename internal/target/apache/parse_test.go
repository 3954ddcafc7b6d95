package apache

import (
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/target"
)

func TestRead(t *testing.T) {
	tests := []struct {
		name, text string
		want       string // key, or part of the error
	}{
		{"a virtual host", "<VirtualHost *:443>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem\n</VirtualHost>", "/k.pem"},
		{"case, quotes, indentation", "  <virtualhost *:443>\n\tsslCERTIFICATEfile \"/c.pem\"\r\n SSLCertificateKeyFile  '/k k.pem' \n</VirtualHost>", "/k k.pem"},
		{"whole server", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem", "/k.pem"},
		{"relative to ServerRoot", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile conf/k.pem", "/etc/apache2/conf/k.pem"},
		{"a variable", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile ${TLS}/k.pem", "/etc/tls/k.pem"},
		{"an unknown variable", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile /etc/${X}/k.pem", "cannot be used"},
		{"continued line", "SSLCertificateFile \\\n /c.pem\nSSLCertificateKeyFile /k.\\\npem", "/k.pem"},
		{"two pairs", "SSLCertificateFile /rsa\nSSLCertificateKeyFile /rsa.key\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem", "/k.pem"},
		{"sections in a virtual host", "<VirtualHost *:443>\n<IfModule mod_ssl.c>\nSSLCertificateFile /c.pem\n</IfModule>\n<Directory />\n</Directory>\nSSLCertificateKeyFile /k.pem\n</VirtualHost>", "/k.pem"},
		{"defined", "<IfDefine TLS>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem\n</IfDefine>", "/k.pem"},
		{"not defined", "<IfDefine !TLS>\n<IfModule x>\n</IfModule>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /x\n</IfDefine>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem", "/k.pem"},
		{"alternatives", "SSLCertificateFile /c.pem\n<IfVersion >2>\nSSLCertificateKeyFile /k1\n</IfVersion>\n<IfVersion <2>\nSSLCertificateKeyFile /k2\n</IfVersion>", "several keys"},
		{"two virtual hosts that differ", "<VirtualHost a>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k1\n</VirtualHost>\n<VirtualHost b>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k2\n</VirtualHost>", "several keys"},
		{"key of another virtual host", "<VirtualHost a>\nSSLCertificateFile /c.pem\n</VirtualHost>\n<VirtualHost b>\nSSLCertificateKeyFile /k2\n</VirtualHost>", "names no key"},
		{"comment", "# SSLCertificateFile /c.pem\n#SSLCertificateKeyFile /k.pem", "names no key"},
		{"in a macro", "<Macro V $n>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /$n.key\n</Macro>", "cannot be used"},
		{"in a token", "SSLCertificateFile /c.pem\nSSLCertificateKeyFile pkcs11:object=x;pin-value=secret-pin", "cannot be used"},
		{"in the same file", "SSLCertificateFile /c.pem", "names no key"},
		{"never closed", "<VirtualHost a>\nSSLCertificateFile /c.pem\nSSLCertificateKeyFile /k.pem", "/k.pem"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := newReader("ServerRoot: \"/etc/apache2\"\nDefine: DUMP_RUN_CFG\nDefine: TLS=/etc/tls\n")
			r.read("f", test.text)
			found, err := target.KeyFor("/c.pem", r.pairs)
			if strings.HasPrefix(test.want, "/") {
				if err != nil || found.Key != test.want || !strings.HasPrefix(found.Where, "f:") {
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
}

func TestSplit(t *testing.T) {
	for line, want := range map[string][]string{
		"": nil, "  # x": nil, "a b": {"a", "b"}, ` a  "b \"c\\" 'd e'f `: {"a", `b "c\`, "d e", "f"}, `a "b`: {"a", "b"}, `a #b`: {"a", "#b"}, `a "`: {"a", ""},
	} {
		if got := split(line); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", line, got, want)
		}
	}
}

func FuzzRead(f *testing.F) {
	for _, seed := range []string{"<VirtualHost a>\nSSLCertificateFile \"/c\" \n</VirtualHost>", "<IfDefine X>\n<a>\n</b>\n</>\n", "a\\\nb\\", "SSLCertificateKeyFile ${A}${B}", "</VirtualHost>\n</VirtualHost>"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r := newReader("Define: A=${B}\nDefine: B=${A}${A}\n")
		r.read("f", text)
		for _, pair := range r.pairs {
			if pair.Where == "" {
				t.Errorf("%q: a pair from nowhere", text)
			}
		}
	})
}
