package all

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// Each type that is supported has its page, and refuses a configuration that is
// none.
func TestTypes(t *testing.T) {
	supported := 0
	names := make(map[string]bool)
	for _, typ := range Types() {
		if names[typ.Name] {
			t.Errorf("%s is there twice", typ.Name)
		}
		if names[typ.Name] = true; typ.New == nil {
			continue
		}
		supported++
		if _, err := os.Stat(filepath.Join("../../../docs/targets", strings.ToLower(typ.Name)+".md")); err != nil {
			t.Errorf("%s has no page: %v", typ.Name, err)
		}
		config, err := targetconf.Merge([]byte(`{"cert_path":5,"key_path":5,"pem_path":5,"cert_dir":5,"admin_api":5}`), typ.Name, typ.Aliases, "t-1", targetconf.Overlays{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := typ.New(config, connector.Host{Policy: &policy.Policy{}, Log: slog.New(slog.DiscardHandler)}); err == nil {
			t.Errorf("%s: got no error", typ.Name)
		}
	}
	if supported < 8 {
		t.Errorf("%d types are supported", supported)
	}
}
