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

// TestTypes: each type has a page, and refuses an invalid configuration.
func TestTypes(t *testing.T) {
	names := make(map[string]bool)
	for _, typ := range Types() {
		if names[typ.Name] {
			t.Errorf("%s is listed twice", typ.Name)
		}
		names[typ.Name] = true
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
	if len(names) != 16 { // as many as control planes know
		t.Errorf("there are %d types", len(names))
	}
}
