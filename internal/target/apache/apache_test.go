package apache

import (
	"path/filepath"
	"testing"

	"certctl-agent/internal/target"
	"certctl-agent/internal/target/fileset"
	"certctl-agent/internal/target/targettest"
)

var build = targettest.Constructor(New)

func TestConformance(t *testing.T) {
	// The httpd of this suite reads no files, so nobody needs to wait for it.
	hasty := targettest.Constructor(func(p target.Params, files *fileset.Store) (*Connector, error) {
		c, err := New(p, files)
		if err == nil {
			c.settleTime = 0
		}
		return c, err
	})
	targettest.Run(t, targettest.Harness{
		Type: "Apache", New: hasty, Required: []string{"cert_path", "validate_command", "reload_command"},
		Config: func(dir string) map[string]any {
			return map[string]any{
				"cert_path":        filepath.Join(dir, "cert.pem"),
				"key_path":         filepath.Join(dir, "key.pem"),
				"validate_command": "apachectl configtest",
				"reload_command":   "apachectl graceful",
			}
		},
		Want: func(m *target.Material) map[string][]byte {
			return map[string][]byte{"cert.pem": append(targettest.PEM(m.Leaf), targettest.PEM(m.Chain...)...), "key.pem": m.KeyPEM}
		},
	})
}
