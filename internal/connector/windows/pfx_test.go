package windows

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/testca"
)

// TestPFX: OpenSSL reads the key, the certificate and the friendly name, with the
// ciphers that each Windows supports.
func TestPFX(t *testing.T) {
	openssl := needs.Need(t, "openssl")
	host, ca := conformance.NewHost(t, nil), testca.Must(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	issued, err := ca.Issue(testca.Template{Names: []string{"rsa.example.org"}, Key: key})
	must(t, err)
	for name, m := range map[string]*connector.Material{
		"ECDSA": host.Material(t, ca),
		"RSA":   {Leaf: issued.Leaf, KeyPEM: issued.KeyPEM()},
	} {
		for _, legacy := range []bool{false, true} {
			pfx, password, err := newPFX(m, "größe", legacy)
			must(t, err)
			again, other, err := newPFX(m, "größe", legacy)
			must(t, err)
			if len(password) < 20 || password == other || string(pfx) == string(again) {
				t.Errorf("%s: the password has %d letters, or is always the same", name, len(password))
			}
			path := filepath.Join(t.TempDir(), "a.pfx")
			must(t, os.WriteFile(path, pfx, 0o600))
			cmd := exec.CommandContext(t.Context(), openssl, "pkcs12", "-in", path, "-nodes", "-info", "-passin", "env:PASSWORD")
			cmd.Env = append(os.Environ(), "PASSWORD="+password)
			if legacy {
				cmd.Args = append(cmd.Args, "-legacy")
			}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%s, legacy %v: %v\n%s", name, legacy, err, out)
			}
			var certificate, private *pem.Block
			for rest := out; ; {
				block, after := pem.Decode(rest)
				if block == nil {
					break
				}
				if rest = after; block.Type == "CERTIFICATE" {
					certificate = block
				} else {
					private = block
				}
			}
			if certificate == nil || !bytes.Equal(certificate.Bytes, m.Leaf.Raw) {
				t.Errorf("%s, legacy %v: the certificate is another one", name, legacy)
			}
			if private == nil || !keyentry.SameKey(private.Bytes, pkcs8(t, m)) {
				t.Errorf("%s, legacy %v: the key is another one", name, legacy)
			}
			for text, want := range map[string]bool{"AES-256-CBC": !legacy, "MAC: sha256": !legacy, "3-KeyTripleDES": legacy, "MAC: sha1": legacy, "friendlyName": true, "teration 2000": true, "teration 10000": false} {
				if strings.Contains(string(out), text) != want {
					t.Errorf("%s, legacy %v: %q shows: %v\n%.600s", name, legacy, text, !want, out)
				}
			}
		}
	}
}
