package reliability_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/testing/netfault"
	"certctl-agent/internal/testing/testca"
)

// TestKeyMaterialStays runs the real binary with umask 0 and the debug log through issuance,
// renewals and deployments. Throughout, it searches the disk for key material in its usual
// encodings; afterwards it searches the log and every request. TestNetworkFaults does the same with
// crashes.
func TestKeyMaterialStays(t *testing.T) {
	t.Parallel()
	base := filepath.Join(needs.MemoryDir(t), "host")
	if err := os.Mkdir(base, 0o700); err != nil {
		t.Fatal(err)
	}
	servers := []server{{id: "web", cert: "cert"}, {id: "mail", cert: "cert", chain: true}, {id: "solo", cert: "solo", shared: true}}
	h, err := newHost(base, 1, servers, func(int) netfault.Fault { return netfault.Fault{} })
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	h.rand = rand.New(rand.NewPCG(7, 7))
	f, err := h.run(true)
	if err != nil {
		t.Fatal(err)
	}
	h.site.mu.Lock()
	keys := len(h.site.secrets)
	h.site.mu.Unlock()
	if keys < 2 || f.jobs < 5 || h.plane.Count("") < 20 {
		t.Errorf("%d keys, %d jobs, %d requests: the test looked at nothing", keys, f.jobs, h.plane.Count(""))
	}
	t.Logf("looked for %d keys on disk, in %d requests and in %d bytes of log", keys, h.plane.Count(""), h.output.len())
}

// TestSearchFinds checks that the search of the other tests finds key material.
func TestSearchFinds(t *testing.T) {
	issued, err := testca.Must(t).Issue(testca.Template{})
	if err != nil {
		t.Fatal(err)
	}
	key := string(issued.KeyPEM())
	lines := strings.Split(strings.TrimSpace(key), "\n")
	body := strings.Join(lines[1:len(lines)-1], "")
	tests := []struct {
		name, file, data string
		mode             fs.FileMode
		want             string
	}{
		{"the key itself", "keys/cert.key", key, 0o600, ""},
		{"a key that others can read", "www/web/key.pem", key, 0o640, "has mode"},
		{"a temporary", "keys/.cert.key.ABC.tmp", key, 0o644, "has mode"},
		{"a backup", "keys/.state/0123/backups/web/00000001-20260101T000000Z/0-key.pem", key, 0o600, ""},
		{"a copy in a log", "log", "written: " + fmt.Sprintf("%q", key), 0o600, "holds key material"},
		{"without its header", "served.json", `{"x":"` + body + `"}`, 0o600, "holds key material"},
		{"in the journal", "keys/.state/0123/journal/web.json", body[:90], 0o600, "holds key material"},
		{"beside the certificate", "www/web/cert.pem", string(issued.PEM()) + key, 0o600, "holds key material"},
		{"a certificate", "www/web/cert.pem", string(issued.PEM()), 0o644, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, err := newSite(t.TempDir(), []server{{id: "web", cert: "cert"}})
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range []struct {
				name, data string
				mode       fs.FileMode
			}{{"keys/cert.key", key, 0o600}, {test.file, test.data, test.mode}} {
				name := s.path(file.name)
				if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, []byte(file.data), file.mode); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(name, file.mode); err != nil {
					t.Fatal(err)
				}
			}
			err = s.checkSecrets()
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("found %v, want %q", err, test.want)
			}
		})
	}
	if _, err := pemutil.ParseKey([]byte(key)); err != nil {
		t.Fatal(err)
	}
}

// TestFilesBeginPrivate checks in the source that the agent creates all files with mode 0600, so
// that neither the umask nor the time between creation and chmod exposes a key.
func TestFilesBeginPrivate(t *testing.T) {
	// These are for tests and the demo, which have no real keys.
	others := []string{"testing", "conformance"}
	// The directories of the status socket and of an ssh connection exist only while their process
	// runs.
	makesDirs := map[string]bool{"atomicfile": true, "status": true, "ssh": true}
	created := 0
	root := filepath.Join("..", "..")
	for _, top := range []string{"internal", "cmd/certctl-agent"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(name string, entry fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case entry.IsDir() && slices.Contains(others, entry.Name()):
				return fs.SkipDir
			case entry.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go"):
				return nil
			}
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, name, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				selector, ok := call.Fun.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				pkg, _ := selector.X.(*ast.Ident)
				switch {
				case selector.Sel.Name == "OpenFile" && len(call.Args) == 3 && mentions(call.Args[1], "O_CREATE"):
					created++
					if mode := call.Args[2]; !isPrivate(mode) {
						t.Errorf("%s: a file is created with a mode other than 0600", set.Position(call.Pos()))
					}
				case pkg != nil && pkg.Name == "os" && (selector.Sel.Name == "Create" || selector.Sel.Name == "WriteFile" || selector.Sel.Name == "CreateTemp"):
					t.Errorf("%s: os.%s: files are created by atomicfile and transaction", set.Position(call.Pos()), selector.Sel.Name)
				case pkg != nil && pkg.Name == "os" && strings.HasPrefix(selector.Sel.Name, "Mkdir") && !makesDirs[filepath.Base(filepath.Dir(name))]:
					t.Errorf("%s: os.%s: a directory that a power cut takes away takes its files along; atomicfile.MkdirAll", set.Position(call.Pos()), selector.Sel.Name)
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if created < 3 {
		t.Errorf("found %d places where files are created: the test looks at the wrong tree", created)
	}
}

func mentions(e ast.Expr, name string) bool {
	found := false
	ast.Inspect(e, func(n ast.Node) bool {
		id, ok := n.(*ast.Ident)
		found = found || ok && id.Name == name
		return true
	})
	return found
}

func isPrivate(mode ast.Expr) bool {
	switch m := mode.(type) {
	case *ast.BasicLit:
		return m.Value == "0o600"
	case *ast.Ident:
		return m.Name == "privateFile"
	}
	return false
}
