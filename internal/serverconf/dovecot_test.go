package serverconf

import (
	"testing"

	"certctl-agent/internal/targetconf"
)

const dovecot23 = `# 2.3.19.1: /etc/dovecot/dovecot.conf
mail_location = maildir:~/Maildir
service imap-login {
  inet_listener imaps {
    port = 993
    ssl = yes
  }
}
ssl_cert = </c.pem
ssl_client_cert = </client.pem
ssl_client_key = </client.key
ssl_key = </c.key
local 192.0.2.1 {
  protocol imap {
    ssl_key = </l.key
  }
  ssl_cert = </l.pem
}
local_name a.example {
  ssl_cert = </a.pem
  ssl_key = < /a.key
}
local_name b.example {
  ssl_cert = </b.pem
  ssl_key = -----BEGIN PRIVATE KEY-----
}
protocol pop3 {
  ssl_alt_cert = </alt.pem
  ssl_alt_key = <alt.key
}
`

// The output of doveconf -n of Dovecot 2.4: names of settings with _file, paths without <, and the
// settings of one prefix either with full names or in a block.
const dovecot24 = `# 2.4.1-4 (7d8c0e5759): /etc/dovecot/dovecot.conf
dovecot_config_version = 2.4.1
dovecot_storage_version = 2.4.1
protocols {
  imap = yes
}
service imap-login {
  inet_listener imaps {
    ssl = yes
  }
}
ssl_client_cert_file = /client.pem
ssl_client_key_file = /client.key
ssl_server {
  cert_file = /c.pem
  key_file = /c.key
  alt_cert_file = /alt.pem
  alt_key_file = /alt.key
}
local 192.0.2.1 {
  protocol imap {
    ssl_server_key_file = /l.key
  }
  ssl_server_cert_file = /l.pem
}
local_name a.example {
  ssl_server {
    cert_file = /a.pem
    key_file = /a.key
  }
}
local_name b.example {
  ssl_server_cert_file = /b.pem
  ssl_server_key_file = inline:-----BEGIN PRIVATE KEY-----
}
local_name v.example {
  ssl_server_cert_file = /v.pem
  ssl_server_key_file = /%{system:hostname}.key
}
local_name one.example {
  ssl_server {
    cert_file = "/one file.pem"
    key_file = "/one file.pem"
  }
}
local_name key.example {
  ssl_server {
    cert_file = /own.pem
  }
}
`

func TestDovecotPairs(t *testing.T) {
	tests := []struct {
		name string
		dump string
		cert targetconf.Path
		want string
	}{
		{"general", dovecot23, "/c.pem", "/c.key doveconf, ssl_key"},
		{"as a client", dovecot23, "/client.pem", "/client.key doveconf, ssl_client_key"},
		{"block", dovecot23, "/a.pem", "/a.key doveconf, local_name a.example, ssl_key"},
		{"blocks that differ", dovecot23, "/l.pem", "several keys"},
		{"key in the configuration itself", dovecot23, "/b.pem", "which key belongs to /b.pem"},
		{"one file", "ssl_cert = </c.pem\nssl_key = </c.pem\n", "/c.pem", "/c.pem doveconf, ssl_key"},
		{"certificate in the configuration itself", "ssl_cert = /c.pem\nssl_key = </c.key\n", "/c.pem", "does not use that file"},
		{"2.4", dovecot24, "/c.pem", "/c.key doveconf, ssl_server_key_file"},
		{"2.4, second certificate", dovecot24, "/alt.pem", "/alt.key doveconf, ssl_server_alt_key_file"},
		{"2.4, as a client", dovecot24, "/client.pem", "/client.key doveconf, ssl_client_key_file"},
		{"2.4, block", dovecot24, "/a.pem", "/a.key doveconf, local_name a.example, ssl_server_key_file"},
		{"2.4, blocks that differ", dovecot24, "/l.pem", "several keys"},
		{"2.4, key in the configuration itself", dovecot24, "/b.pem", "which key belongs to /b.pem"},
		{"2.4, variable", dovecot24, "/v.pem", "which key belongs to /v.pem"},
		{"2.4, one file", dovecot24, "/one file.pem", "/one file.pem doveconf, local_name one.example, ssl_server_key_file"},
		{"2.4, key from around the block", dovecot24, "/own.pem", "/c.key doveconf, local_name key.example, ssl_server_key_file"},
		{"2.4, not named", dovecot24, "/other.pem", "does not use that file"},
		{"relative path", dovecot23, "/alt.pem", "absolute path"},
		{"not named", dovecot23, "/other.pem", "names no key"},
		{"another key for some", dovecot23 + "protocol imap {\n  ssl_key = </other.key\n}\n", "/c.pem", "several keys"},
		{"nonsense", "}\n}\n{\n = \nssl_ = \nssl_server {\n {\n", "/c.pem", "names no key"},
	}
	for _, test := range tests {
		check(t, test.name, test.cert, dovecotPairs(test.dump), nil, test.want)
	}
}

func FuzzDovecotPairs(f *testing.F) {
	f.Add(dovecot23)
	f.Add(dovecot24)
	f.Add("ssl_server {\n}\n}\nssl_cert = <\n{ {\n")
	f.Fuzz(func(t *testing.T, dump string) {
		for _, pair := range dovecotPairs(dump) {
			if pair.Cert == "" || pair.Where == "" {
				t.Errorf("%q: invented the pair %+v", dump, pair)
			}
		}
	})
}
