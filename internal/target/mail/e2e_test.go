package mail

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/liveserver"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/target/targettest"
)

func TestPostfix(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can start Postfix")
	}
	l := targettest.Start(t, liveserver.StartPostfix, buildPostfix)
	live(t, l, "where=\"main.cf, smtpd_tls_key_file\"")
}

// Rotated under load is what Postfix can take without a failed handshake, see
// oneFile.
func TestPostfixInOneFile(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can start Postfix")
	}
	targettest.Start(t, liveserver.StartPostfixInOneFile, buildPostfix).Rotate(t, time.Second)
}

func TestDovecot(t *testing.T) {
	l := targettest.Start(t, liveserver.StartDovecot, buildDovecot)
	live(t, l, "where=\"doveconf, ssl_key\"")
	t.Run("rotation under load", func(t *testing.T) { l.Rotate(t, time.Second) })
}

// live deploys to a server that runs without its certificate at first.
func live(t *testing.T, l *targettest.Live, where string) {
	cert, key := l.Config["cert_path"].(string), l.Config["key_path"].(string)
	validate := l.Config["validate_command"].(string)

	t.Run("first deployment, key path masked", func(t *testing.T) {
		m := l.NewMaterial(t)
		l.MustDeploy(t, m, "key_path", "********")
		if !strings.Contains(l.Log(), where) || !strings.Contains(l.Log(), "key_path="+key) {
			t.Errorf("the log does not say where the key path came from:\n%s", l.Log())
		}
		for _, endpoint := range l.Others {
			targettest.Serves(t, endpoint, pemutil.Fingerprint(m.Leaf))
		}
	})
	t.Run("key path from the overlay", func(t *testing.T) {
		overlay := filepath.Join(l.Overlays, targettest.TargetID+".json")
		must(t, os.WriteFile(overlay, fmt.Appendf(nil, `{"key_path": %q}`, key), 0o600))
		defer os.Remove(overlay)
		l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
	})
	t.Run("key path masked and not to be had", func(t *testing.T) {
		other := filepath.Join(l.Watched, "other.pem")
		l.Refuses(t, l.NewMaterial(t), "names no key for "+other, "key_path", "********", "cert_path", other)
	})
	t.Run("another key than the server reads", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "reads the key of", "key_path", filepath.Join(l.Watched, "other.key"))
	})
	t.Run("validation fails", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "validate", "validate_command", strings.Replace(validate, l.Dir, l.Dir+"/missing", 1))
	})
	// Neither server's own check compares the two: only the verification does.
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
