package all

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestExample: the example connector in docs/architecture.md
// builds and installs in the suite, with the test on that page.
func TestExample(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllSubmatch(page, -1)
	if len(blocks) != 2 {
		t.Fatalf("the page has %d blocks of Go, want a connector and its test", len(blocks))
	}
	const header = `package stunnel

import (
	"path/filepath"
	"slices"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
)

`
	top, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	overlay := make(map[string]string)
	for name, data := range map[string]string{"stunnel.go": string(blocks[0][1]), "stunnel_test.go": header + string(blocks[1][1])} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		overlay[filepath.Join(top, "internal/connector/stunnel", name)] = file
	}
	list, err := json.Marshal(map[string]any{"Replace": overlay})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "stunnel.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-vet=off", "-overlay", file, "-o", binary, "./internal/connector/stunnel")
	build.Dir = top
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	run := exec.CommandContext(t.Context(), binary, "-test.v", "-test.run", "/^installs$")
	run.Dir = dir
	if out, err := run.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestConformance/installs") {
		t.Errorf("%v\n%s", err, out)
	}
}
