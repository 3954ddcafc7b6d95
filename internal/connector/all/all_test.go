package all

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/targetconf"
)

// TestTypes: each type has a page, which README.md links to, and each page a type; and each type
// refuses an invalid configuration.
func TestTypes(t *testing.T) {
	pages, err := filepath.Glob("../../../docs/targets/*.md")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, typ := range Types() {
		if names[typ.Name] {
			t.Errorf("%s is listed twice", typ.Name)
		}
		names[typ.Name] = true
		page := filepath.Join("../../../docs/targets", strings.ToLower(typ.Name)+".md")
		if !slices.Contains(pages, page) {
			t.Errorf("%s has no page: there is no %s", typ.Name, page)
		}
		if link := fmt.Sprintf("[%s](docs/targets/%s)", typ.Name, filepath.Base(page)); !strings.Contains(string(readme), link) {
			t.Errorf("README.md lacks the link %s", link)
		}
		pages = slices.DeleteFunc(pages, func(other string) bool { return other == page })
		config, err := targetconf.Merge([]byte(`{"cert_path":5,"key_path":5,"pem_path":5,"cert_dir":5,"admin_api":5}`), typ.Name, typ.Aliases, "t-1", targetconf.Overlays{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := typ.New(config, connector.Host{Policy: &policy.Policy{}, Log: slog.New(slog.DiscardHandler)}); err == nil {
			t.Errorf("%s: got no error", typ.Name)
		}
	}
	for _, page := range pages {
		t.Errorf("%s describes no type in the table", page)
	}
}
