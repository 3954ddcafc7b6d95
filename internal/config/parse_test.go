package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
)

// writeBundle makes a CA bundle of one certificate, with text around it.
func writeBundle(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return write(t, "ca.pem", "# our CA\n"+string(block)+"\n")
}

func TestBundleWithoutUsableCertificate(t *testing.T) {
	for name, content := range map[string]string{
		"a key":             "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		"a bad certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"too long":          strings.Repeat("\n", maxBundle+1),
	} {
		if pool, err := parseBundle(write(t, "ca.pem", content)); err == nil || pool != nil {
			t.Errorf("%s: pool %v, error %v", name, pool, err)
		}
	}
}

func TestParseBool(t *testing.T) {
	for want, values := range map[bool][]string{
		true:  {"1", "t", "T", "true", "True", "TRUE", "yes", "on", "ON"},
		false: {"0", "f", "F", "false", "FALSE", "no", "No", "off"},
	} {
		for _, value := range values {
			if got, err := parseBool(value); err != nil || got != want {
				t.Errorf("parseBool(%q) = %v, %v, want %v", value, got, err, want)
			}
		}
	}
}
