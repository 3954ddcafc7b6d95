package nginx

import (
	"path/filepath"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
)

func TestConformance(t *testing.T) {
	config := func(dir string) map[string]any {
		return map[string]any{
			"cert_path":        filepath.Join(dir, "cert.pem"),
			"key_path":         filepath.Join(dir, "key.pem"),
			"chain_path":       filepath.Join(dir, "chain.pem"),
			"validate_command": "nginx -t",
			"reload_command":   "nginx -s reload",
		}
	}
	required := []string{"cert_path", "validate_command", "reload_command"}
	t.Run("chain apart", func(t *testing.T) {
		conformance.Run(t, conformance.Harness{
			Type: Type(), Required: required, Config: config,
			Want: func(m *connector.Material) map[string][]byte {
				return map[string][]byte{"cert.pem": conformance.PEM(m.Leaf), "chain.pem": conformance.PEM(m.Chain...), "key.pem": m.KeyPEM}
			},
		})
	})
	t.Run("full chain", func(t *testing.T) {
		conformance.Run(t, conformance.Harness{
			Type: Type(), Required: required,
			Config: func(dir string) map[string]any {
				c := config(dir)
				delete(c, "chain_path")
				return c
			},
			Want: func(m *connector.Material) map[string][]byte {
				return map[string][]byte{"cert.pem": append(conformance.PEM(m.Leaf), conformance.PEM(m.Chain...)...), "key.pem": m.KeyPEM}
			},
		})
	})
}
