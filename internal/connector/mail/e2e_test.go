package mail

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/needs"
)

func TestPostfix(t *testing.T) {
	needs.Root(t, "starting Postfix")
	l := conformance.Start(t, liveserver.StartPostfix, Postfix())
	live(t, l, "where=\"main.cf, smtpd_tls_key_file\"")
}

// Only one file is rotated under load. Two would fail some handshakes: Postfix starts
// processes that read the pair at any time, and two files cannot be replaced at once.
func TestPostfixInOneFile(t *testing.T) {
	needs.Root(t, "starting Postfix")
	l := conformance.Start(t, liveserver.StartPostfixInOneFile, Postfix())
	oneFile(t, l)
	l.Rotate(t, time.Second)
}

// Postfix reads the key from the certificate's file by default, and
// postconf expands the settings in main.cf and master.cf.
func TestPostfixParameters(t *testing.T) {
	needs.Root(t, "starting Postfix")
	l := conformance.Start(t, liveserver.StartPostfix, Postfix())
	cert, key := l.Config["cert_path"].(string), l.Config["key_path"].(string)
	l.MustDeploy(t, l.NewMaterial(t))
	main, master := filepath.Join(l.Dir, "postfix", "main.cf"), filepath.Join(l.Dir, "postfix", "master.cf")
	text, err := os.ReadFile(main)
	must(t, err)
	services, err := os.ReadFile(master)
	must(t, err)
	common, _, _ := strings.Cut(string(text), "smtpd_tls_cert_file")
	tests := []struct{ main, overrides, refused string }{
		{"smtpd_tls_cert_file = $(pair_directory)/cert.pem\n", "", "set key_path to " + cert},
		{"smtpd_tls_cert_file = $(pair_directory)/cert.pem\nsmtpd_tls_key_file = ${pair_directory?{$pair_directory}:{/x}}/key.pem\n", "", ""},
		{"smtpd_tls_cert_file = $(pair_directory)/cert.pem\nsmtpd_tls_key_file = $(pair_directory)/$(name).pem\nname = key\n", "", ""},
		{"smtpd_tls_cert_file = $(pair_directory)/cert.pem\nsmtpd_tls_key_file = $(pair_directory)/$(name).pem\nname = key\n", "  -o name=other\n", "several keys"},
		{"", "  -o smtpd_tls_cert_file=$(pair_directory)/cert.pem\n", "set key_path to " + cert},
		{"", "  -o smtpd_tls_cert_file=$(pair_directory)/cert.pem -o smtpd_tls_key_file=$pair_directory/key.pem\n", ""},
	}
	for _, test := range tests {
		must(t, os.WriteFile(main, []byte(common+test.main), 0o644))
		must(t, os.WriteFile(master, []byte(string(services)+"127.0.0.1:1 inet n - n - 0 smtpd\n"+test.overrides), 0o644))
		connector, err := l.Connector(Postfix(), map[string]any{
			"cert_path": cert, "key_path": key, "validate_command": l.Config["validate_command"], "reload_command": l.Config["reload_command"],
		})
		must(t, err)
		found, asked := connector.(*mail).askServer(t.Context())
		warnings, err := connector.(*mail).Match(connector.(*mail).Config, connector.(*mail).Host, l.NewMaterial(t), postfix, found, asked)
		if test.refused == "" && (err != nil || len(warnings) > 0) || test.refused != "" && (err == nil || !strings.Contains(err.Error(), test.refused)) {
			t.Errorf("%q and %q: got %v, %q, want %q", test.main, test.overrides, err, warnings, test.refused)
		}
	}
}

// The table of tls_server_sni_maps contains the keys: postmap -F creates it again,
// smtpd notices, and no reload is needed.
func TestPostfixServerNames(t *testing.T) {
	needs.Root(t, "starting Postfix")
	l := conformance.Start(t, liveserver.StartPostfix, Postfix())
	l.MustDeploy(t, l.NewMaterial(t))
	table := filepath.Join(l.Dir, "postfix", "names")
	cert, key := filepath.Join(l.Watched, "named.pem"), filepath.Join(l.Watched, "named.key")
	for from, to := range map[string]string{l.Config["cert_path"].(string): cert, l.Config["key_path"].(string): key} {
		data, err := os.ReadFile(from)
		must(t, err)
		must(t, os.WriteFile(to, data, 0o600))
	}
	must(t, os.WriteFile(table, fmt.Appendf(nil, "localhost %s, %s\n", key, cert), 0o600))
	postmap := strings.Replace(strings.TrimSuffix(l.Config["reload_command"].(string), " reload"), "postfix ", "postmap ", 1) + " -F hash:" + table
	words := strings.Fields(postmap)
	if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", postmap, err, out)
	}
	main, err := os.OpenFile(filepath.Join(l.Dir, "postfix", "main.cf"), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = fmt.Fprintf(main, "tls_server_sni_maps = hash:%s\n", table)
	must(t, errors.Join(err, main.Close()))
	words = strings.Fields(l.Config["reload_command"].(string))
	must(t, exec.Command(words[0], words[1:]...).Run())

	l.MustDeploy(t, l.NewMaterial(t), "cert_path", cert, "key_path", key, "reload_command", postmap)
}

func TestDovecotInOneFile(t *testing.T) {
	oneFile(t, conformance.Start(t, liveserver.StartDovecotInOneFile, Dovecot()))
}

// oneFile deploys to a server that reads key and certificate from one file. A target with a
// separate key file would remove the key from it.
func oneFile(t *testing.T, l *conformance.Live) {
	all := l.Config["cert_path"].(string)
	l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
	l.MustDeploy(t, l.NewMaterial(t))
	l.Refuses(t, l.NewMaterial(t), "set key_path to "+all, "key_path", filepath.Join(l.Watched, "other.key"))
}

func TestDovecot(t *testing.T) {
	l := conformance.Start(t, liveserver.StartDovecot, Dovecot())
	live(t, l, "where=\"doveconf, ssl_key\"")
	t.Run("rotation under load", func(t *testing.T) { l.Rotate(t, time.Second) })
}

// live deploys to a server that starts without its certificate.
func live(t *testing.T, l *conformance.Live, where string) {
	cert, key := l.Config["cert_path"].(string), l.Config["key_path"].(string)
	validate := l.Config["validate_command"].(string)

	t.Run("first deployment, key path masked", func(t *testing.T) {
		m := l.NewMaterial(t)
		l.MustDeploy(t, m, "key_path", "********")
		if !strings.Contains(l.Log(), where) || !strings.Contains(l.Log(), "key_path="+key) {
			t.Errorf("the log does not say where the key path came from:\n%s", l.Log())
		}
		for _, endpoint := range l.Others {
			conformance.Serves(t, endpoint, pemutil.Fingerprint(m.Leaf))
		}
	})
	t.Run("key path from the overlay", func(t *testing.T) { l.KeyPathFromOverlay(t, key) })
	t.Run("key path masked and not to be had", func(t *testing.T) { l.NoKeyPath(t) })
	t.Run("another key than the server reads", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "reads the key of", "key_path", filepath.Join(l.Watched, "other.key"))
	})
	t.Run("validation fails", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "validate", "validate_command", strings.Replace(validate, l.Dir, l.Dir+"/missing", 1))
	})
	// Neither server's configuration check compares the two: only the verification does.
	t.Run("wrong key", func(t *testing.T) {
		m := l.NewMaterial(t)
		m.KeyPEM = l.NewMaterial(t).KeyPEM
		l.Refuses(t, m, "verify", "post_deploy_verify_attempts", 3)
	})
	t.Run("reload fails", func(t *testing.T) { l.ReloadFails(t) })
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("mode and owner kept", func(t *testing.T) { l.KeepsMode(t, key) })
	t.Run("symlinked destination", func(t *testing.T) { l.KeepsSymlink(t, cert) })
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
