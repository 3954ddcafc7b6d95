package haproxy

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/testca"
)

func configIn(dir string) map[string]any {
	return map[string]any{
		"pem_path":         filepath.Join(dir, "site.pem"),
		"validate_command": "haproxy -c -f /etc/haproxy/haproxy.cfg",
		"reload_command":   "systemctl reload haproxy",
	}
}

func want(m *connector.Material) map[string][]byte {
	return map[string][]byte{"site.pem": slices.Concat(conformance.PEM(m.Leaf), conformance.PEM(m.Chain...), m.KeyPEM)}
}

func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{
		Type: Type(), Required: []string{"pem_path", "reload_command"}, Config: configIn, Want: want,
	})
}

func TestConformanceOfAlias(t *testing.T) {
	conformance.Run(t, conformance.Harness{
		Type: Type(), Required: []string{"reload_command"}, Want: want,
		Config: func(dir string) map[string]any {
			c := configIn(dir)
			c["combined_pem_path"] = c["pem_path"]
			delete(c, "pem_path")
			delete(c, "validate_command")
			return c
		},
	})
}

// A renewal keeps other PEM blocks in the file.
func TestOtherBlocks(t *testing.T) {
	const parameters = "-----BEGIN DH PARAMETERS-----\nMAA=\n-----END DH PARAMETERS-----\n"
	host, ca := conformance.NewHost(t, func(context.Context, policy.Command) error { return nil }), testca.Must(t)
	path := filepath.Join(host.Dir, "site.pem")
	old := host.Material(t, ca)
	if err := os.WriteFile(path, slices.Concat(old.KeyPEM, []byte("# by hand\n"+parameters), conformance.PEM(old.Leaf)), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		m := host.Material(t, ca)
		for _, unchanged := range []bool{false, true} {
			result, err := host.Deploy(t.Context(), Type(), configIn(host.Dir), m)
			if err != nil || result.Unchanged != unchanged {
				t.Fatalf("got %+v, %v, want it unchanged: %v", result, err, unchanged)
			}
			got, err := os.ReadFile(path)
			if want := append(want(m)["site.pem"], parameters...); err != nil || !bytes.Equal(got, want) {
				t.Errorf("got\n%swant\n%s(%v)", got, want, err)
			}
		}
	}
}

// The file holds the key, so it must have the mode of a key file.
func TestMode(t *testing.T) {
	host := conformance.NewHost(t, nil)
	c := configIn(host.Dir)
	c["pem_file_mode"] = "0644"
	if _, err := host.Connector(Type(), c); err == nil || !strings.Contains(err.Error(), "pem_file_mode") || !strings.Contains(err.Error(), "0770") {
		t.Errorf("a mode that lets others read: got %v", err)
	}
}
