package liveserver

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"path/filepath"

	"certctl-agent/internal/tlsprobe"
)

const dovecotConf = `base_dir = %[1]s/run
state_dir = %[1]s/state
log_path = /dev/stderr
listen = 127.0.0.1
protocols = imap pop3
ssl = yes
ssl_cert = <%[6]s
ssl_key = <%[7]s
mail_location = maildir:%[1]s/mail
passdb {
  driver = static
  args = nopassword=y
}
userdb {
  driver = static
  args = uid=nobody gid=nogroup home=%[1]s/mail
}
service imap-login {
  inet_listener imap {
    port = %[2]s
  }
  inet_listener imaps {
    port = %[3]s
    ssl = yes
  }
}
service pop3-login {
  inet_listener pop3 {
    port = %[4]s
  }
  inet_listener pop3s {
    port = %[5]s
    ssl = yes
  }
}
`

// Without root, Dovecot can neither change its user nor chroot.
const dovecotUser = `default_internal_user = %[1]s
default_internal_group = %[2]s
default_login_user = %[1]s
service anvil {
  chroot =
}
service imap-login {
  chroot =
}
service pop3-login {
  chroot =
}
`

// StartDovecot starts Dovecot with imap and pop3 (STARTTLS), and imaps and pop3s (implicit TLS).
func StartDovecot(ctx context.Context, dir string, pair Pair) (*Server, error) {
	return startDovecot(ctx, dir, pair, writePair)
}

// StartDovecotInOneFile is StartDovecot with key and certificate in one file.
func StartDovecotInOneFile(ctx context.Context, dir string, pair Pair) (*Server, error) {
	return startDovecot(ctx, dir, pair, writeOneFile)
}

func startDovecot(ctx context.Context, dir string, pair Pair, write writer) (*Server, error) {
	programs := make(map[string]string)
	for _, name := range []string{"dovecot", "doveconf", "doveadm"} {
		path, err := program(name)
		if err != nil {
			return nil, err
		}
		programs[name] = path
	}
	ports, err := freePorts(4)
	if err != nil {
		return nil, err
	}
	certPath, keyPath, err := write(dir, pair)
	if err != nil {
		return nil, err
	}
	text := fmt.Sprintf(dovecotConf, dir, ports[0], ports[1], ports[2], ports[3], certPath, keyPath)
	if os.Geteuid() != 0 {
		self, err := user.Current()
		if err != nil {
			return nil, err
		}
		group, err := user.LookupGroupId(self.Gid)
		if err != nil {
			return nil, err
		}
		text += fmt.Sprintf(dovecotUser, self.Username, group.Name)
	}
	conf := filepath.Join(dir, "dovecot.conf")
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	s := &Server{
		Name: "Dovecot",
		Type: "Dovecot",
		Config: map[string]any{
			"cert_path":        certPath,
			"key_path":         keyPath,
			"validate_command": programs["doveconf"] + " -c " + conf + " -n",
			"reload_command":   programs["doveadm"] + " -c " + conf + " reload",
			"host":             "127.0.0.1",
			"port":             ports[0],
			"post_deploy_verify": map[string]any{
				"enabled": true, "endpoint": "127.0.0.1:" + ports[0], "starttls": tlsprobe.IMAP,
			},
		},
		Endpoint: tlsprobe.Endpoint{Address: "127.0.0.1:" + ports[0], StartTLS: tlsprobe.IMAP},
		Others: []tlsprobe.Endpoint{
			{Address: "127.0.0.1:" + ports[1]},
			{Address: "127.0.0.1:" + ports[2], StartTLS: tlsprobe.POP3},
			{Address: "127.0.0.1:" + ports[3]},
		},
		CertPath: certPath,
	}
	if err := s.run(programs["dovecot"], "-F", "-c", conf); err != nil {
		return nil, err
	}
	return s, s.ready(ctx)
}
