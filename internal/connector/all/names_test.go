package all

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const root = "../../.."

// mentions are the product's files that may name a type, an alias or a key of a
// single type, and why.
var mentions = map[string]string{
	"cmd/certctl-agent/plan.go":  "examples in the help and in an error",
	"cmd/certctl-agent/winrm.go": "what it looks at on a Windows host",
	"internal/api/api.go":        "the address of a heartbeat, which has the name of a binding's",
}

// TestNamesStandInOneFolder: adding a connector changes only its own folder, one line
// of this package and one page. So nothing outside internal/connector knows a
// type's name, an alias, or a key that only one type has.
func TestNamesStandInOneFolder(t *testing.T) {
	names := make(map[string]string) // to what each is
	for _, typ := range Types() {
		names[typ.Name] = "a type"
		for alias := range typ.Aliases {
			names[alias] = "an alias of " + typ.Name
		}
	}
	folders := make(map[string][]string) // by key
	eachLiteral(t, filepath.Join(root, "internal/connector"), func(file string, tag bool, text string) {
		key := strings.TrimSuffix(reflect.StructTag(text).Get("json"), "*")
		folder := filepath.Dir(file)
		if tag && key != "" && !slices.Contains(folders[key], folder) {
			folders[key] = append(folders[key], folder)
		}
	})
	for key, in := range folders {
		if len(in) == 1 && filepath.Base(in[0]) != "connector" && strings.Contains(key, "_") {
			names[key] = "a key of " + filepath.Base(in[0])
		}
	}
	for _, name := range []string{"NGINX", "combined_pem_path", "sds_secret_name", "pem_file_"} {
		if names[name] == "" {
			t.Errorf("%s is not in the list of names", name)
		}
	}
	word := regexp.MustCompile(`[A-Za-z0-9]+(_[A-Za-z0-9]*)*`)
	found := make(map[string]bool)
	for _, dir := range []string{"cmd", "internal"} {
		eachLiteral(t, filepath.Join(root, dir), func(file string, _ bool, text string) {
			for _, name := range word.FindAllString(text, -1) {
				what, ours := names[name]
				if !ours || isOutside(file) {
					continue
				}
				if found[file] = true; mentions[file] == "" {
					t.Errorf("%s has %q in %.80q, which is %s: only its own folder may name it", file, name, text, what)
				}
			}
		})
	}
	for file := range mentions {
		if !found[file] {
			t.Errorf("%s does not name one any more: remove it from the list", file)
		}
	}
}

// isOutside reports whether a file is not part of the agent, or belongs to a connector.
func isOutside(file string) bool {
	for _, dir := range []string{"internal/connector/", "internal/testing/", "cmd/certctl-demo/"} {
		if strings.HasPrefix(file, dir) {
			return true
		}
	}
	return false
}

// eachLiteral calls visit with each string in the Go files below dir, except
// tests and imports.
func eachLiteral(t *testing.T, dir string, visit func(file string, tag bool, text string)) {
	t.Helper()
	set := token.NewFileSet()
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		tags := make(map[*ast.BasicLit]bool)
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ImportSpec:
				return false
			case *ast.Field:
				tags[n.Tag] = n.Tag != nil
			case *ast.BasicLit:
				if text, err := strconv.Unquote(n.Value); err == nil && n.Kind == token.STRING {
					visit(filepath.ToSlash(rel), tags[n], text)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
