package apache

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/testing/testca"
)

func TestConformance(t *testing.T) {
	// The suite's httpd is fake, so do not wait until it has read its files.
	hasty := Type()
	hasty.New = func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		made, err := newConnector(c, host)
		return impatient{made}, err
	}
	conformance.Run(t, conformance.Harness{
		Type: hasty, Required: []string{"cert_path", "validate_command", "reload_command"},
		Config: func(dir string) map[string]any {
			return map[string]any{
				"cert_path":        filepath.Join(dir, "cert.pem"),
				"key_path":         filepath.Join(dir, "key.pem"),
				"validate_command": "apachectl configtest",
				"reload_command":   "apachectl graceful",
			}
		},
		Want: func(m *connector.Material) map[string][]byte {
			return map[string][]byte{"cert.pem": append(conformance.PEM(m.Leaf), conformance.PEM(m.Chain...)...), "key.pem": m.KeyPEM}
		},
	})
}

// impatient is a connector that does not wait for httpd.
type impatient struct{ connector.Connector }

func (i impatient) Plan(ctx context.Context, m *connector.Material) (*connector.Plan, error) {
	plan, err := i.Connector.Plan(ctx, m)
	if err == nil {
		plan.Reload.Wait = 0
	}
	return plan, err
}

// TestOtherBlocks: httpd reads DH PARAMETERS from the certificate's file.
func TestOtherBlocks(t *testing.T) {
	const parameters = "-----BEGIN DH PARAMETERS-----\nMAA=\n-----END DH PARAMETERS-----\n"
	host, ca := conformance.NewHost(t, func(context.Context, policy.Command) error { return nil }), testca.Must(t)
	path, old := filepath.Join(host.Dir, "cert.pem"), host.Material(t, ca)
	if err := os.WriteFile(path, slices.Concat([]byte(parameters), conformance.PEM(old.Leaf)), 0o644); err != nil {
		t.Fatal(err)
	}
	config := map[string]any{
		"cert_path": path, "key_path": filepath.Join(host.Dir, "key.pem"), "validate_command": "true", "reload_command": "true",
	}
	m := host.Material(t, ca)
	for _, unchanged := range []bool{false, true} {
		result, err := host.Deploy(t.Context(), Type(), config, m)
		if err != nil || result.Unchanged != unchanged {
			t.Fatalf("got %+v, %v, want it unchanged: %v", result, err, unchanged)
		}
		got, err := os.ReadFile(path)
		if want := slices.Concat(conformance.PEM(m.Leaf), conformance.PEM(m.Chain...), []byte(parameters)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("got\n%swant\n%s(%v)", got, want, err)
		}
	}
}
