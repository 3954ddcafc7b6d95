package all

import (
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// Each type has its page, and refuses an empty configuration without making a
// connector that is nil and looks as if it were not.
func TestConnectors(t *testing.T) {
	connectors := Connectors(nil)
	if len(connectors) < 3 {
		t.Errorf("got the types %q", slices.Sorted(maps.Keys(connectors)))
	}
	for typ, build := range connectors {
		if _, err := os.Stat(filepath.Join("../../../docs/targets", strings.ToLower(typ)+".md")); err != nil {
			t.Errorf("%s has no page: %v", typ, err)
		}
		config, err := targetconf.Merge([]byte(`{"cert_path":5,"key_path":5,"pem_path":5,"cert_dir":5,"admin_api":5}`), typ, "t-1", nil)
		if err != nil {
			t.Fatal(err)
		}
		c, err := build(connector.Params{TargetID: "t-1", Config: config, Policy: &policy.Policy{}, Log: slog.New(slog.DiscardHandler)})
		if c != nil || err == nil {
			t.Errorf("%s: got %v, %v, want nil and an error", typ, c, err)
		}
	}
}
