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

// TestExample: the example connector in docs/architecture.md builds and installs in the suite, with
// the test on that page. The example Change passes the whole suite.
func TestExample(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllSubmatch(page, -1)
	if len(blocks) != 3 {
		t.Fatalf("the page has %d blocks of Go, want a connector, its test and a Change", len(blocks))
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
	const changeHeader = `package stunnel

import (
	"bytes"
	"context"
	"net/http"

	"certctl-agent/internal/vendorapi"
)

`
	// The Change joins the example connector, so that the plan has a file and a Change.
	const changeTest = `package stunnel

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/targetconf"
	"certctl-agent/internal/vendorapi"
)

type uploading struct {
	connector.Connector
	url string
}

func (c *uploading) Plan(ctx context.Context, m *connector.Material) (*connector.Plan, error) {
	plan, err := c.Connector.Plan(ctx, m)
	if err == nil {
		plan.Changes = []connector.Change{&upload{vendorapi.New(vendorapi.Options{}), c.url, conformance.PEM(m.Leaf)}}
	}
	return plan, err
}

func TestChange(t *testing.T) {
	var mu sync.Mutex
	content, writes := make(map[string]string), make(map[string]int)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		data, ok := content[r.URL.Path]
		switch {
		case r.Method == http.MethodPut:
			body, _ := io.ReadAll(r.Body)
			content[r.URL.Path] = string(body)
			writes[r.URL.Path]++
		case !ok:
			http.NotFound(w, r)
		case r.Method == http.MethodDelete:
			delete(content, r.URL.Path)
			writes[r.URL.Path]++
		default:
			io.WriteString(w, data)
		}
	}))
	defer server.Close()
	typ := Type()
	typ.New = func(c *targetconf.Config, host connector.Host) (connector.Connector, error) {
		inner, err := newConnector(c, host)
		if err != nil {
			return nil, err
		}
		return &uploading{inner, server.URL + filepath.Dir(string(inner.(*stunnel).config.PEMPath))}, nil
	}
	conformance.Run(t, conformance.Harness{
		Type: typ, Required: []string{"pem_path"},
		Config: func(dir string) map[string]any {
			return map[string]any{"pem_path": filepath.Join(dir, "stunnel.pem")}
		},
		State: func(dir string) map[string]string {
			state := conformance.Files(dir)
			mu.Lock()
			defer mu.Unlock()
			if data, ok := content[dir]; ok {
				state["uploaded"] = data
			}
			state["uploaded"+conformance.Written] = strconv.Itoa(writes[dir])
			return state
		},
		Want: func(m *connector.Material) map[string][]byte {
			return map[string][]byte{
				"stunnel.pem": slices.Concat(m.Key(), conformance.PEM(m.Leaf), conformance.PEM(m.Chain...)),
				"uploaded":    conformance.PEM(m.Leaf),
			}
		},
	})
}
`
	top, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	overlay := make(map[string]string)
	files := map[string]string{
		"stunnel.go": string(blocks[0][1]), "stunnel_test.go": header + string(blocks[1][1]),
		"upload.go": changeHeader + string(blocks[2][1]), "upload_test.go": changeTest,
	}
	for name, data := range files {
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
	for pattern, passed := range map[string]string{"^TestConformance$/^installs$": "--- PASS: TestConformance/installs", "^TestChange$": "--- PASS: TestChange"} {
		run := exec.CommandContext(t.Context(), binary, "-test.v", "-test.run", pattern)
		run.Dir = dir
		if out, err := run.CombinedOutput(); err != nil || !strings.Contains(string(out), passed) {
			t.Errorf("%s: %v\n%s", pattern, err, out)
		}
	}
}
