package javakeystore

import (
	"crypto/rand"
	"crypto/rsa"
	"os"
	"path/filepath"
	"testing"
	"time"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/liveserver"
	"certctl-agent/internal/testing/testca"
)

// TestLive: a Java server serves the certificate in the store, in each format.
func TestLive(t *testing.T) {
	if testing.Short() {
		t.Skip("Java takes seconds to start")
	}
	l := conformance.Start(t, liveserver.StartJava, Type())
	store := l.Config["keystore_path"].(string)

	t.Run("first deployment", func(t *testing.T) { l.MustDeploy(t, l.NewMaterial(t)) })
	t.Run("renewal", func(t *testing.T) { l.MustDeploy(t, l.NewMaterial(t)) })
	t.Run("RSA", func(t *testing.T) {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		issued, err := l.CA.Issue(testca.Template{Key: key})
		if err != nil {
			t.Fatal(err)
		}
		m := l.NewMaterial(t)
		m.Leaf, m.Chain, m.KeyPEM = issued.Leaf, nil, issued.KeyPEM()
		l.MustDeploy(t, m)
	})
	t.Run("reload fails", func(t *testing.T) { l.ReloadFails(t) })
	t.Run("verification fails", func(t *testing.T) { l.VerificationFails(t) })
	t.Run("a password that the server does not know", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "reload failed", "key_password", "another password")
	})
	t.Run("wrong password", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "keystore_password does not open it", "keystore_password", "another password")
	})
	t.Run("mode and owner kept", func(t *testing.T) { l.KeepsMode(t, store) })
	t.Run("password of the key", func(t *testing.T) {
		passwords := filepath.Join(l.Dir, "passwords")
		was, err := os.ReadFile(passwords)
		if err == nil {
			err = os.WriteFile(passwords, append(was, "another password\n"...), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		m := l.NewMaterial(t)
		l.MustDeploy(t, m, "key_password", "another password")
		l.Refuses(t, l.NewMaterial(t), "set key_password")
		if err := os.WriteFile(passwords, was, 0o600); err != nil {
			t.Fatal(err)
		}
		l.MustDeploy(t, m, "key_password", liveserver.StorePassword)
	})
	for what, set := range map[string][]any{"legacy": {"legacy_ciphers", true}, "JKS": {"keystore_type", "JKS"}} {
		t.Run(what, func(t *testing.T) {
			if err := os.Remove(store); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				l.MustDeploy(t, l.NewMaterial(t), set...)
			}
			if err := os.Remove(store); err != nil {
				t.Fatal(err)
			}
			l.MustDeploy(t, l.NewMaterial(t))
		})
	}
	t.Run("rotation under load", func(t *testing.T) { l.Rotate(t, time.Second) })
	t.Run("symlinked destination", func(t *testing.T) { l.KeepsSymlink(t, store) })
}

// TestLiveTomcat: Tomcat's manager makes it read the store again.
func TestLiveTomcat(t *testing.T) {
	if testing.Short() {
		t.Skip("Tomcat takes seconds to start")
	}
	l := conformance.Start(t, liveserver.StartTomcat, Type())
	t.Run("first deployment", func(t *testing.T) { l.MustDeploy(t, l.NewMaterial(t)) })
	t.Run("reload fails", func(t *testing.T) { l.ReloadFails(t) })
	t.Run("another alias", func(t *testing.T) {
		l.Refuses(t, l.NewMaterial(t), "it serves the certificate", "alias", "other", "post_deploy_verify_attempts", 1)
	})
	t.Run("rotation under load", func(t *testing.T) { l.Rotate(t, time.Second) })
}
