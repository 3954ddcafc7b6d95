package all

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// configs are the structs that hold the configuration of a type, by page. A struct of the package
// connector has the prefix "connector.".
var configs = map[string]struct {
	dir     string
	structs []string
	local   []string // keys of structs without a name
}{
	"nginx":             {"nginx", []string{"connector.Pair"}, nil},
	"apache":            {"apache", []string{"connector.Pair"}, nil},
	"postfix":           {"mail", []string{"connector.Pair"}, []string{"mode"}},
	"dovecot":           {"mail", []string{"connector.Pair"}, []string{"mode"}},
	"haproxy":           {"haproxy", []string{"config"}, nil},
	"traefik":           {"traefik", []string{"config"}, nil},
	"caddy":             {"caddy", []string{"config", "fileConfig"}, nil},
	"envoy":             {"envoy", []string{"config"}, nil},
	"javakeystore":      {"javakeystore", []string{"config"}, nil},
	"ssh":               {"ssh", []string{"config"}, nil},
	"f5":                {"f5", []string{"config"}, nil},
	"kubernetessecrets": {"kubernetes", []string{"config"}, nil},
	"awsacm":            {"awsacm", []string{"config"}, nil},
	"azurekeyvault":     {"keyvault", []string{"config"}, nil},
	"iis":               {"windows", []string{"iisConfig"}, nil},
	"wincertstore":      {"windows", []string{"storeConfig"}, nil},
}

// notInTable are keys that are refused or ignored: their page explains them in its text.
var notInTable = []string{"post_script", "keytool_path", "backup_dir"}

// setting is what a struct says of a key.
type setting struct {
	byDefault string
	required  bool
}

// structsOf returns the struct types of a package by name.
func structsOf(t *testing.T, dir string) map[string]*ast.StructType {
	t.Helper()
	found := make(map[string]*ast.StructType)
	files, err := filepath.Glob(filepath.Join(root, "internal/connector", dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if spec, ok := n.(*ast.TypeSpec); ok {
				if s, ok := spec.Type.(*ast.StructType); ok {
					found[spec.Name.Name] = s
				}
			}
			return true
		})
	}
	return found
}

// settingsOf adds the settings of a struct, including embedded and nested ones, to all.
func settingsOf(t *testing.T, dir, name string, all map[string]setting) {
	t.Helper()
	if inner, ok := strings.CutPrefix(name, "connector."); ok {
		dir, name = "", inner
	}
	s := structsOf(t, dir)[name]
	if s == nil {
		t.Fatalf("%s has no struct %s", dir, name)
	}
	for _, field := range s.Fields.List {
		typ := ""
		switch expr := field.Type.(type) {
		case *ast.Ident:
			typ = expr.Name
		case *ast.SelectorExpr:
			typ = expr.X.(*ast.Ident).Name + "." + expr.Sel.Name
		}
		var tag reflect.StructTag
		if field.Tag != nil {
			text, err := strconv.Unquote(field.Tag.Value)
			if err != nil {
				t.Fatal(err)
			}
			tag = reflect.StructTag(text)
		}
		key := tag.Get("json")
		if prefix, isFile := strings.CutSuffix(key, "*"); isFile {
			for _, attribute := range []string{"mode", "owner", "group"} {
				all[prefix+attribute] = setting{}
			}
			continue
		}
		if key != "" {
			all[key] = setting{tag.Get("default"), tag.Get("config") == "required"}
		}
		if isEmbedded := len(field.Names) == 0 && key == ""; isEmbedded || typ == "settings" {
			settingsOf(t, dir, typ, all)
		}
	}
}

// TestPagesHaveSettings: the table of each page has exactly the keys of the configuration, with
// their defaults. Defaults that the code computes are checked by TestPlanShowsDefaults.
func TestPagesHaveSettings(t *testing.T) {
	common := make(map[string]setting)
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, "internal/targetconf/common.go"), nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if field, ok := n.(*ast.Field); ok && field.Tag != nil {
			common[reflect.StructTag(strings.Trim(field.Tag.Value, "`")).Get("json")] = setting{}
		}
		return true
	})
	code := regexp.MustCompile("`([a-z0-9_]+)`")
	for _, typ := range Types() {
		name := strings.ToLower(typ.Name)
		page, err := os.ReadFile(filepath.Join(root, "docs/targets", name+".md"))
		if err != nil {
			t.Fatal(err)
		}
		want := make(map[string]setting)
		for _, s := range configs[name].structs {
			settingsOf(t, configs[name].dir, s, want)
		}
		for _, key := range configs[name].local {
			want[key] = setting{}
		}
		if len(want) == 0 {
			t.Errorf("%s: no settings found: add the struct of its configuration to configs, under %q", typ.Name, name)
		}
		cells := make(map[string]string) // the default of each key in the table
		_, table, _ := strings.Cut(string(page), "| key | meaning | default |\n")
		table, _, _ = strings.Cut(table, "\n\n")
		for row := range strings.Lines(table) {
			parts := strings.Split(row, "|")
			if len(parts) != 5 {
				t.Errorf("%s: the row %q does not have three cells", typ.Name, row)
				continue
			}
			for _, match := range code.FindAllStringSubmatch(parts[1], -1) {
				cells[match[1]] = parts[3]
			}
		}
		for key, s := range want {
			cell, ok := cells[key]
			switch {
			case !ok && slices.Contains(notInTable, key):
				if !strings.Contains(string(page), "`"+key+"`") {
					t.Errorf("%s: the page does not mention %s", typ.Name, key)
				}
			case !ok:
				t.Errorf("%s: the page's table lacks %s", typ.Name, key)
			case !strings.Contains(cell, s.byDefault):
				t.Errorf("%s: the page has the default%sof %s, the code has %s", typ.Name, cell, key, s.byDefault)
			case s.required && !strings.Contains(cell, "required"):
				t.Errorf("%s: the page does not say that %s is required", typ.Name, key)
			}
		}
		for key := range cells {
			_, isOurs := want[key]
			_, isCommon := common[key]
			if _, isAlias := typ.Aliases[key]; !isOurs && !isCommon && !isAlias {
				t.Errorf("%s: the page has %s, which is not a key of the configuration", typ.Name, key)
			}
		}
	}
}
