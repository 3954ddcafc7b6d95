package haproxy

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/target"
	"certctl-agent/internal/target/targettest"
)

var build = targettest.Constructor(New)

func config(dir string) map[string]any {
	return map[string]any{
		"pem_path":         filepath.Join(dir, "site.pem"),
		"validate_command": "haproxy -c -f /etc/haproxy/haproxy.cfg",
		"reload_command":   "systemctl reload haproxy",
	}
}

func want(m *target.Material) map[string][]byte {
	return map[string][]byte{"site.pem": slices.Concat(targettest.PEM(m.Leaf), targettest.PEM(m.Chain...), m.KeyPEM)}
}

func TestConformance(t *testing.T) {
	targettest.Run(t, targettest.Harness{
		Type: "HAProxy", New: build, Required: []string{"pem_path", "reload_command"}, Config: config, Want: want,
	})
}

func TestConformanceOfAlias(t *testing.T) {
	targettest.Run(t, targettest.Harness{
		Type: "HAProxy", New: build, Required: []string{"reload_command"}, Want: want,
		Config: func(dir string) map[string]any {
			c := config(dir)
			c["combined_pem_path"] = c["pem_path"]
			delete(c, "pem_path")
			delete(c, "validate_command")
			return c
		},
	})
}

// The file holds the key, so its mode is a key file's.
func TestMode(t *testing.T) {
	host := targettest.NewHost(t, nil)
	c := config(host.Dir)
	c["pem_file_mode"] = "0644"
	if _, err := host.Connector("HAProxy", build, c); err == nil || !strings.Contains(err.Error(), "pem_file_mode") || !strings.Contains(err.Error(), "0770") {
		t.Errorf("a mode that lets others read: got %v", err)
	}
}
