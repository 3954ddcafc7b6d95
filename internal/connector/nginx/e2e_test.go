package nginx

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/testca"
)

// start starts nginx and returns its command line.
func start(t *testing.T) (l *conformance.Live, command string) {
	l = conformance.Start(t, liveserver.StartNGINX, Type())
	return l, strings.TrimSuffix(l.Config["reload_command"].(string), " -s reload")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLive(t *testing.T) {
	l, command := start(t)
	cert, key := l.Config["cert_path"].(string), l.Config["key_path"].(string)

	t.Run("first deployment, key path masked", func(t *testing.T) {
		l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
		if !strings.Contains(l.Log(), "where="+filepath.Join(l.Dir, "nginx.conf:")) || !strings.Contains(l.Log(), "key_path="+key) {
			t.Errorf("the log does not say where the key path came from:\n%s", l.Log())
		}
		l.MustDeploy(t, l.NewMaterial(t), "key_path", "********") // now nginx -T succeeds
	})
	t.Run("key path from the overlay", func(t *testing.T) { l.KeyPathFromOverlay(t, key) })
	t.Run("key path masked and not to be had", func(t *testing.T) {
		l.NoKeyPath(t)
		l.Query = nil
		defer func() { l.Query = conformance.QueryCommand }()
		l.Refuses(t, l.NewMaterial(t), filepath.Join(l.Overlays, conformance.TargetID+".json"), "key_path", "********")
	})
	t.Run("validation fails", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "open() ", "validate_command", command+".missing -t")
	})
	t.Run("another key than nginx reads", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "reads the key of", "key_path", filepath.Join(l.Watched, "other.key"))
		l.Refuses(t, l.NewMaterial(t), "reads the key of", "key_path", "")
	})
	t.Run("wrong key", func(t *testing.T) { l.WrongKey(t) })
	t.Run("reload fails", func(t *testing.T) { l.ReloadFails(t) })
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("mode and owner kept", func(t *testing.T) { l.KeepsMode(t, key) })
	t.Run("symlinked destination", func(t *testing.T) { l.KeepsSymlink(t, cert) })
	t.Run("the key store's own file", func(t *testing.T) {
		m := l.NewMaterial(t)
		must(t, os.Remove(key))
		must(t, os.Symlink(m.KeyPath, key))
		if _, err := l.Host.Deploy(t.Context(), Type(), l.Config, m, conformance.Promotion(m)); err != nil {
			t.Fatal(err)
		}
		conformance.Serves(t, l.Endpoint, pemutil.Fingerprint(m.Leaf))
		must(t, os.Remove(key))
		must(t, os.WriteFile(key, m.KeyPEM, 0o600))
	})
	t.Run("rotation under load", func(t *testing.T) { l.Rotate(t, 2*time.Second) })
}

// nginx accepts keys and certificates of two types in any order. With an EC key in
// place of the RSA key its configuration test passes, but RSA clients fail.
func TestKeysOfTwoTypes(t *testing.T) {
	l, _ := start(t)
	cert, key := l.Config["cert_path"].(string), l.Config["key_path"].(string)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	issued, err := testca.Must(t).Issue(testca.Template{Key: rsaKey})
	must(t, err)
	other := filepath.Join(l.Watched, "rsa")
	must(t, os.WriteFile(other+".crt", issued.LeafPEM(), 0o600))
	must(t, os.WriteFile(other+".key", issued.KeyPEM(), 0o600))
	conf := filepath.Join(l.Dir, "nginx.conf")
	text, err := os.ReadFile(conf)
	must(t, err)
	changed := strings.NewReplacer(
		"ssl_certificate_key "+key+";", "ssl_certificate_key "+key+"; ssl_certificate_key "+other+".key;",
		"ssl_certificate "+cert+";", "ssl_certificate "+other+".crt; ssl_certificate "+cert+";",
	).Replace(string(text))
	must(t, os.WriteFile(conf, []byte(changed), 0o644))

	// The server decides which of the two certificates a probe gets.
	unverified := []any{"post_deploy_verify", map[string]any{"enabled": false}}
	for _, given := range []string{key, "********"} {
		m := l.NewMaterial(t)
		_, err := l.Deploy(t.Context(), m, append(unverified, "key_path", given)...)
		must(t, err)
		offers(t, l.Endpoint.Address, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, func(leaf *x509.Certificate) bool { return leaf.Equal(m.Leaf) })
		offers(t, l.Endpoint.Address, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, func(leaf *x509.Certificate) bool { return leaf.PublicKeyAlgorithm == x509.RSA })
	}
	l.Refuses(t, l.NewMaterial(t), "reads the key of "+cert+" from "+key, append(unverified, "key_path", other+".key")...)
	if now, err := os.ReadFile(other + ".key"); err != nil || string(now) != string(issued.KeyPEM()) {
		t.Errorf("the RSA key is not the one that it was (%v)", err)
	}
}

// offers fails the test unless the server at address soon sends a client with only one
// cipher suite the wanted certificate.
func offers(t *testing.T, address string, suite uint16, wanted func(*x509.Certificate) bool) {
	t.Helper()
	var conn *tls.Conn
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		conn, err = tls.Dial("tcp", address, &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{suite}, InsecureSkipVerify: true}) // no CA of this test is anybody's
		if err != nil {
			continue
		}
		conn.Close()
		if wanted(conn.ConnectionState().PeerCertificates[0]) {
			return
		}
	}
	t.Errorf("no such certificate with %s: %v", tls.CipherSuiteName(suite), err)
}

// One file, which both settings name, holds certificate and key.
func TestOneFile(t *testing.T) {
	l, _ := start(t)
	all := filepath.Join(l.Watched, "all.pem")
	conf := filepath.Join(l.Dir, "nginx.conf")
	text, err := os.ReadFile(conf)
	must(t, err)
	one := strings.NewReplacer(l.Config["cert_path"].(string), all, l.Config["key_path"].(string), all).Replace(string(text))
	must(t, os.WriteFile(conf, []byte(one), 0o644))
	l.Config["cert_path"] = all
	l.MustDeploy(t, l.NewMaterial(t), "key_path", "********")
	l.MustDeploy(t, l.NewMaterial(t), "key_path", all)
	for _, path := range []string{"", l.Config["key_path"].(string)} {
		l.Refuses(t, l.NewMaterial(t), "set key_path to "+all, "key_path", path)
	}
}
