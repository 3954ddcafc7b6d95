package liveserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	_ "embed" // for the server's source
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/pkcs12"
	"certctl-agent/internal/tlsprobe"
)

//go:embed ServeKeystore.java
var serveKeystore []byte

// StorePassword is the password of StartJava's key store.
const StorePassword = "a password for the store"

// javaReload triggers a reload and waits for its end.
const javaReload = `#!/bin/sh
before=$(cat %[2]s)
kill -HUP %[1]d || exit 1
for i in $(seq 600); do
	now=$(cat %[2]s)
	if [ "$now" != "$before" ]; then
		case $now in *" ok") exit 0 ;; esac
		echo "$now"
		exit 1
	fi
	sleep 0.05
done
echo "the server has not reloaded within 30 seconds"
exit 1
`

// StartJava starts a TLS server in Java, from its source, with a PKCS#12 key store.
func StartJava(ctx context.Context, dir string, pair Pair) (*Server, error) {
	java, err := program("java")
	if err != nil {
		return nil, err
	}
	if _, err := program("javac"); err != nil {
		return nil, err // a JRE cannot run source files
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	store, err := newStore(pair)
	if err != nil {
		return nil, err
	}
	path, source := filepath.Join(dir, tlsDir, "server.p12"), filepath.Join(dir, "ServeKeystore.java")
	passwords, outcome, reload := filepath.Join(dir, "passwords"), filepath.Join(dir, "outcome"), filepath.Join(dir, "reload-java")
	err = errors.Join(
		os.Mkdir(filepath.Dir(path), 0o755),
		os.WriteFile(path, store, 0o600),
		os.WriteFile(source, serveKeystore, 0o644),
		os.WriteFile(passwords, []byte(StorePassword+"\n"), 0o600))
	if err != nil {
		return nil, err
	}
	s := &Server{
		Name: "Java",
		Type: "JavaKeystore",
		Config: map[string]any{
			"keystore_path":     path,
			"keystore_password": StorePassword,
			"reload_command":    reload,
			"host":              "127.0.0.1",
			"port":              port,
		},
		Endpoint: tlsprobe.Endpoint{Address: "127.0.0.1:" + port},
		CertPath: path,
	}
	// Use the fastest JVM settings for a start.
	if err := s.run(java, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m", source, path, passwords, outcome, port); err != nil {
		return nil, err
	}
	if err := os.WriteFile(reload, fmt.Appendf(nil, javaReload, s.commands[0].Process.Pid, outcome), 0o755); err != nil {
		s.Stop()
		return nil, err
	}
	return s, s.ready(ctx)
}

// newStore returns a key store with a pair.
func newStore(pair Pair) ([]byte, error) {
	loaded, err := tls.X509KeyPair(pair.Certificate, pair.Key)
	if err != nil {
		return nil, fmt.Errorf("the first pair does not match: %w", err)
	}
	key := keyentry.PrivateKey{Alias: "server", Created: time.Now(), Password: StorePassword}
	if key.PKCS8, err = x509.MarshalPKCS8PrivateKey(loaded.PrivateKey); err != nil {
		return nil, err
	}
	for _, der := range loaded.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		key.Chain = append(key.Chain, cert)
	}
	store := pkcs12.New(StorePassword, false)
	if _, err := store.Put(key, false); err != nil {
		return nil, err
	}
	return store.Encode()
}

// storedCertificate returns the certificate of the key under StartJava's alias.
func storedCertificate(data []byte) (*x509.Certificate, error) {
	const work = 1 << 30
	store, err := pkcs12.Open(data, StorePassword, work)
	if err != nil {
		return nil, err
	}
	key, err := store.Find("server", StorePassword)
	if err != nil {
		return nil, err
	}
	if key == nil || len(key.Chain) == 0 {
		return nil, errors.New("it contains no certificate under the alias")
	}
	return key.Chain[0], nil
}
