package mail

import (
	"testing"

	"certctl-agent/internal/target"
)

const dump = `# 2.3.19.1: /etc/dovecot/dovecot.conf
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

func TestDovecotPairs(t *testing.T) {
	tests := []struct {
		name string
		dump string
		cert target.Path
		want string
	}{
		{"general", dump, "/c.pem", "/c.key doveconf, ssl_key"},
		{"as a client", dump, "/client.pem", "/client.key doveconf, ssl_client_key"},
		{"block", dump, "/a.pem", "/a.key doveconf, local_name a.example, ssl_key"},
		{"blocks that differ", dump, "/l.pem", "several keys"},
		{"key in the configuration itself", dump, "/b.pem", "no file of its own"},
		{"relative path", dump, "/alt.pem", "absolute path"},
		{"not named", dump, "/other.pem", "names no key"},
		{"another key for some", dump + "protocol imap {\n  ssl_key = </other.key\n}\n", "/c.pem", "several keys"},
		{"nonsense", "}\n}\n{\n = \nssl_ = \n", "/c.pem", "names no key"},
	}
	for _, test := range tests {
		check(t, test.name, test.cert, dovecotPairs(test.dump), test.want)
	}
}
