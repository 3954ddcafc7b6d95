package liveserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"certctl-agent/internal/tlsprobe"
)

// Postfix writes only below its directory, accepts no mail for anyone, and uses no other lookup
// tables.
const postfixMain = `compatibility_level = 3.6
config_directory = %[1]s/postfix
queue_directory = %[1]s/queue
data_directory = %[1]s/data
maillog_file = %[1]s/mail.log
maillog_file_prefixes = %[1]s
myhostname = localhost
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
mydestination =
local_recipient_maps =
alias_maps =
alias_database =
smtputf8_enable = no
smtpd_relay_restrictions = reject
smtpd_tls_security_level = may
pair_directory = %[1]s/tls
`

const (
	postfixTwoFiles = "smtpd_tls_cert_file = $pair_directory/cert.pem\nsmtpd_tls_key_file = ${pair_directory}/key.pem\n"
	postfixOneFile  = "smtpd_tls_chain_files = $pair_directory/all.pem\n"
)

const postfixMaster = `127.0.0.1:%[1]s inet n - n - - smtpd
127.0.0.1:%[2]s inet n - n - - smtpd
  -o smtpd_tls_security_level=encrypt
127.0.0.1:%[3]s inet n - n - - smtpd
  -o smtpd_tls_wrappermode=yes
postlog unix-dgram n - n - 1 postlogd
anvil unix - - n - 1 anvil
rewrite unix - - n - - trivial-rewrite
tlsmgr unix - - n 1000? 1 tlsmgr
cleanup unix n - n - 0 cleanup
`

// StartPostfix starts Postfix, which requires root, with smtp and submission (STARTTLS), and smtps
// (implicit TLS).
func StartPostfix(ctx context.Context, dir string, pair Pair) (*Server, error) {
	certPath, keyPath, err := writePair(dir, pair)
	if err != nil {
		return nil, err
	}
	return startPostfix(ctx, dir, certPath, keyPath, postfixTwoFiles)
}

// StartPostfixInOneFile is StartPostfix with key and certificate in one file, so that no smtpd can
// read a half-replaced pair.
func StartPostfixInOneFile(ctx context.Context, dir string, pair Pair) (*Server, error) {
	path, _, err := writeOneFile(dir, pair)
	if err != nil {
		return nil, err
	}
	return startPostfix(ctx, dir, path, path, postfixOneFile)
}

func startPostfix(ctx context.Context, dir, certPath, keyPath, tlsParameters string) (*Server, error) {
	postfix, err := program("postfix")
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("only root can start Postfix")
	}
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "postfix")
	if err := writePostfixDirs(dir, conf, tlsParameters, ports); err != nil {
		return nil, err
	}
	// This also creates the queue directories.
	if out, err := exec.CommandContext(ctx, postfix, "-c", conf, "check").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("postfix check: %w: %s", err, out)
	}
	daemons, err := exec.CommandContext(ctx, filepath.Join(filepath.Dir(postfix), "postconf"), "-c", conf, "-h", "daemon_directory").Output()
	if err != nil {
		return nil, fmt.Errorf("ask postconf for daemon_directory: %w", err)
	}
	s := &Server{
		Name: "Postfix",
		Type: "Postfix",
		Config: map[string]any{
			"cert_path":        certPath,
			"key_path":         keyPath,
			"validate_command": postfix + " -c " + conf + " check",
			"reload_command":   postfix + " -c " + conf + " reload",
			"host":             "127.0.0.1",
			"port":             ports[0],
			"post_deploy_verify": map[string]any{
				"enabled": true, "endpoint": "127.0.0.1:" + ports[0], "starttls": tlsprobe.SMTP,
			},
		},
		Endpoint: tlsprobe.Endpoint{Address: "127.0.0.1:" + ports[0], StartTLS: tlsprobe.SMTP},
		Others: []tlsprobe.Endpoint{
			{Address: "127.0.0.1:" + ports[1], StartTLS: tlsprobe.SMTP},
			{Address: "127.0.0.1:" + ports[2]},
		},
		CertPath: certPath,
		logFile:  filepath.Join(dir, "mail.log"),
	}
	master := exec.Command(filepath.Join(strings.TrimSpace(string(daemons)), "master"), "-c", conf, "-d")
	// master kills its whole process group at its end, so it must lead one.
	master.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.start(master); err != nil {
		return nil, err
	}
	return s, s.ready(ctx)
}

func writePostfixDirs(dir, conf, tlsParameters string, ports []string) error {
	data := filepath.Join(dir, "data")
	for _, path := range []string{conf, data, filepath.Join(dir, "queue")} {
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
	}
	owner, err := user.Lookup("postfix") // mail_owner
	if err != nil {
		return err
	}
	uid, err := strconv.Atoi(owner.Uid)
	if err != nil {
		return err
	}
	return errors.Join(
		os.Chown(data, uid, -1),
		os.WriteFile(filepath.Join(conf, "main.cf"), fmt.Appendf(nil, postfixMain+tlsParameters, dir), 0o644),
		os.WriteFile(filepath.Join(conf, "master.cf"), fmt.Appendf(nil, postfixMaster, ports[0], ports[1], ports[2]), 0o644))
}
