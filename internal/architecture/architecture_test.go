// Package architecture_test checks the code against docs/architecture.md: which packages may import
// which, and which may use the process's environment.
package architecture_test

import (
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const module = "certctl-agent"

// layers lists the packages from the top down. Packages import only from lower layers. A star
// matches one element of a path.
var layers = [][]string{
	{"cmd/*"},
	{"internal/app"},
	{"internal/agent"},
	{"internal/deploy", "internal/enroll", "internal/connector/all"},
	{"internal/connector/*"},
	{"internal/transaction"},
	{"internal/connector"},
	{"internal/serverconf"},
	{"internal/config", "internal/controlplane", "internal/discovery", "internal/installed", "internal/keystore", "internal/ledger", "internal/statedir", "internal/status",
		"internal/targetconf", "internal/winrm"},
	{"internal/discovery/certfile", "internal/discovery/index", "internal/policy", "internal/tlsprobe", "internal/vendorapi"},
	{"internal/api", "internal/askpass", "internal/atomicfile", "internal/ber", "internal/budget", "internal/buildinfo", "internal/command", "internal/csr", "internal/discovery/record", "internal/filelock",
		"internal/hostfile", "internal/jks", "internal/keyentry", "internal/kubeconfig", "internal/lazyregexp", "internal/namelock", "internal/ntlm", "internal/pace", "internal/peer", "internal/pemutil", "internal/pkcs12", "internal/printable", "internal/proxy",
		"internal/sdnotify", "internal/secret", "internal/sftp", "internal/sigv4", "internal/trustedfile"},
}

// leafLayer is the only layer whose packages may import each other.
const leafLayer = 10

// testOnly reports whether a package is only for tests and the demo.
func testOnly(pkg string) bool {
	return strings.HasPrefix(pkg, "internal/testing/") || pkg == "internal/connector/conformance"
}

// mayTouchProcess are the packages that may read the environment or exit the process.
var mayTouchProcess = []string{"cmd/certctl-agent", "cmd/certctl-demo", "internal/testing/mutants", "internal/testing/needs"}

type source struct {
	dir     string // of the package, relative to the module
	name    string
	test    bool
	file    *ast.File
	imports []string
}

// sources returns the Go files of the module.
func sources(t *testing.T) []source {
	t.Helper()
	all, err := parseSources()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 20 {
		t.Fatalf("found %d Go files: the test looks at the wrong tree", len(all))
	}
	return all
}

var parseSources = sync.OnceValues(func() (all []source, err error) {
	root := filepath.Join("..", "..")
	set := token.NewFileSet()
	err = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && name != root {
			if _, err := os.Stat(filepath.Join(name, "go.mod")); err == nil {
				return filepath.SkipDir // another module, which only CI builds
			}
		}
		if err != nil || entry.IsDir() || !strings.HasSuffix(name, ".go") {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(set, name, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		s := source{dir: filepath.ToSlash(filepath.Dir(rel)), name: filepath.ToSlash(rel), test: strings.HasSuffix(rel, "_test.go"), file: file}
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			s.imports = append(s.imports, imported)
		}
		all = append(all, s)
		return nil
	})
	return all, err
})

// layerOf returns the index of a package's layer, or -1. Names take precedence over patterns.
func layerOf(pkg string) int {
	byPattern := -1
	for i, layer := range layers {
		if slices.Contains(layer, pkg) {
			return i
		}
		for _, pattern := range layer {
			if ok, _ := path.Match(pattern, pkg); ok {
				byPattern = i
			}
		}
	}
	return byPattern
}

func TestImportsPointDown(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || testOnly(s.dir) {
			continue
		}
		from := layerOf(s.dir)
		if from < 0 {
			t.Errorf("%s: package %s is in no layer: add it to docs/architecture.md and to this test", s.name, s.dir)
			continue
		}
		for _, imported := range s.imports {
			pkg, ours := strings.CutPrefix(imported, module+"/")
			if !ours {
				continue
			}
			if testOnly(pkg) {
				if s.dir != "cmd/certctl-demo" {
					t.Errorf("%s imports %s, which is for tests and the demo", s.name, pkg)
				}
				continue
			}
			to := layerOf(pkg)
			if to < from || to == from && from != leafLayer {
				t.Errorf("%s (layer of %s) imports %s, which is not in a lower layer", s.name, layers[from][0], pkg)
			}
		}
	}
}

// TestTableOfLayers: docs/architecture.md lists exactly the packages that exist, in their layers.
// Layers are numbered from the leaves, which are 0; packages for tests have none.
func TestTableOfLayers(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "| layer | package |")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := make(map[string]string) // layer by package or pattern
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 || !strings.Contains(cells[2], "`") {
			continue
		}
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[2], -1) {
			rows[strings.ReplaceAll(name[1], "<name>", "*")] = strings.TrimSpace(cells[1])
		}
	}
	used := make(map[string]bool)
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		row := s.dir
		if _, named := rows[row]; !named {
			row = path.Dir(s.dir) + "/*"
		}
		want := strconv.Itoa(leafLayer - layerOf(s.dir))
		if testOnly(s.dir) {
			want = "–"
		}
		if used[row] = true; rows[row] != want {
			t.Errorf("the table has package %s in layer %q, want %q", s.dir, rows[row], want)
		}
	}
	for row := range rows {
		if !used[row] {
			t.Errorf("the table has %s, which does not exist", row)
		}
	}
	for _, layer := range layers {
		for _, pkg := range layer {
			if rows[pkg] == "" && pkg != "cmd/*" {
				t.Errorf("the layers of this test have %s, but the table does not", pkg)
			}
		}
	}
}

func TestStandardLibraryOnly(t *testing.T) {
	for _, s := range sources(t) {
		for _, imported := range s.imports {
			first, _, _ := strings.Cut(imported, "/")
			if strings.Contains(first, ".") || imported == "C" {
				t.Errorf("%s imports %s: only the standard library and this module", s.name, imported)
			}
		}
	}
}

func TestProcessIsTouchedInOnePlace(t *testing.T) {
	forbidden := map[string][]string{
		"os":      {"Exit", "Getenv", "LookupEnv", "Environ", "Setenv", "Unsetenv", "ExpandEnv"},
		"log":     {"Fatal", "Fatalf", "Fatalln", "Panic", "Panicf"},
		"syscall": {"Exit", "Getenv", "Environ", "Setenv"},
	}
	for _, s := range sources(t) {
		if s.test || slices.Contains(mayTouchProcess, s.dir) {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			selector, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if pkg, ok := selector.X.(*ast.Ident); ok && slices.Contains(forbidden[pkg.Name], selector.Sel.Name) {
				t.Errorf("%s uses %s.%s: only cmd/ touches the environment or ends the process", s.name, pkg.Name, selector.Sel.Name)
			}
			return true
		})
	}
}

// TestIDsAreParsed: no code converts an unchecked string to an api.ID.
func TestIDsAreParsed(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || testOnly(s.dir) || s.dir == "internal/api" {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if f, ok := call.Fun.(*ast.SelectorExpr); ok && f.Sel.Name == "ID" {
				if pkg, ok := f.X.(*ast.Ident); ok && pkg.Name == "api" {
					t.Errorf("%s converts to api.ID: use api.ParseID or decode it", s.name)
				}
			}
			return true
		})
	}
}

func TestOnePackageComment(t *testing.T) {
	comments := make(map[string][]string)
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		if _, seen := comments[s.dir]; !seen {
			comments[s.dir] = nil
		}
		if s.file.Doc != nil {
			comments[s.dir] = append(comments[s.dir], s.name)
		}
	}
	for _, dir := range slices.Sorted(maps.Keys(comments)) {
		if n := len(comments[dir]); n != 1 {
			t.Errorf("package %s has %d package comments, want exactly one (%s)", dir, n, strings.Join(comments[dir], ", "))
		}
	}
}

// TestNoInit: importing a package has no effects. Regular expressions are compiled when they are
// used.
func TestNoInit(t *testing.T) {
	for _, s := range sources(t) {
		for _, declaration := range s.file.Decls {
			variables, ok := declaration.(*ast.GenDecl)
			if ok && !s.test && !testOnly(s.dir) {
				ast.Inspect(variables, func(n ast.Node) bool {
					if selector, ok := n.(*ast.SelectorExpr); ok && selector.Sel.Name == "MustCompile" {
						t.Errorf("%s compiles a regular expression at each start: use lazyregexp.New", s.name)
					}
					return true
				})
			}
			if function, ok := declaration.(*ast.FuncDecl); ok && function.Recv == nil && function.Name.Name == "init" {
				t.Errorf("%s has an init function", s.name)
			}
		}
	}
}

// TestModuleRequiresNothing: the module has no dependencies, not even tools.
func TestModuleRequiresNothing(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("..", "..", "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(data), "require") {
		t.Errorf("go.mod has requirements:\n%s", data)
	}
}

// TestDocsNameTests: every test and benchmark that the docs name exists. In `package.TestName`,
// package is the last element of its path; a name without a package may be in any.
func TestDocsNameTests(t *testing.T) {
	exists := make(map[string]bool)
	for _, s := range sources(t) {
		for _, declaration := range s.file.Decls {
			if function, ok := declaration.(*ast.FuncDecl); ok && s.test {
				exists[function.Name.Name] = true
				exists[path.Base(s.dir)+"."+function.Name.Name] = true
			}
		}
	}
	docs, err := filepath.Glob(filepath.Join("..", "..", "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`(?:[a-z/]*/)?((?:[a-z0-9-]+\\.)?(?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9]*)`")
	found := 0
	for _, doc := range docs {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range named.FindAllStringSubmatch(string(text), -1) {
			found++
			if !exists[match[1]] {
				t.Errorf("%s names the test %s, which does not exist", filepath.Base(doc), match[1])
			}
		}
	}
	if found < 50 {
		t.Errorf("found only %d names of tests in the docs", found)
	}
}

// othersWords are texts of the runbook's tables that come from other programs.
var othersWords = map[string]string{
	"no space left on device":                       "the kernel's",
	"read-only file system":                         "the kernel's",
	"permission denied":                             "the kernel's",
	"connection refused":                            "the kernel's",
	"key values mismatch":                           "OpenSSL's",
	"Syntax error on line":                          "httpd's",
	"unable to load":                                "HAProxy's",
	`open() ".../nginx.pid" failed`:                 "nginx's",
	"disabling TLS support":                         "Postfix's",
	"403 Forbidden: host not allowed":               "Caddy's",
	"client is not allowed":                         "Caddy's",
	"412 Precondition Failed":                       "Caddy's",
	"loading new config":                            "Caddy's",
	"401 Unauthorized":                              "of RFC 9110",
	"403 Forbidden":                                 "of RFC 9110",
	"x509: certificate signed by unknown authority": "crypto/x509's",
}

// TestRunbookQuotesMessages checks that the program can say each text that the tables of
// docs/operations.md, docs/upgrade-to-tls.md and the targets' pages say to look for: in an error,
// or, for the table of log messages, in either. An ellipsis in the docs stands for a value that the
// message contains. A configuration key that leads a text varies too.
func TestRunbookQuotesMessages(t *testing.T) {
	var logged, errors []string
	for _, s := range sources(t) {
		if s.test || testOnly(s.dir) || s.dir == "cmd/certctl-demo" {
			continue
		}
		all := literals(s.file, nil)
		logged = append(logged, all...)
		if !strings.HasPrefix(s.dir, "cmd/") {
			errors = append(errors, literals(s.file, notAnError)...)
		}
	}
	standard := standardLibrary(t, "crypto/tls", "crypto/x509")
	key := regexp.MustCompile(`^[a-z_]+: `)
	found, passedOn := 0, make(map[string]bool)
	for _, page := range docPages(t) {
		for _, heading := range messageTables {
			for _, quoted := range quotedMessages(page.text, heading) {
				found++
				pool := errors
				switch heading {
				case "| message |":
					pool = logged
				case "| message contains |":
					pool = standard
				}
				text := regexp.QuoteMeta(key.ReplaceAllString(quoted, ""))
				pattern := regexp.MustCompile(strings.ReplaceAll(text, "…", `.*%[-+# 0-9.]*[a-z].*`))
				switch {
				case othersWords[quoted] != "":
					passedOn[quoted] = true
				case !slices.ContainsFunc(pool, pattern.MatchString):
					t.Errorf("%s: the program never says %q", page.name, quoted)
				}
			}
		}
	}
	if found < 80 {
		t.Errorf("the tables have %d texts: the test no longer finds them", found)
	}
	for text := range othersWords {
		if !passedOn[text] {
			t.Errorf("no table has %q: remove it from othersWords", text)
		}
	}
}

// messageTables are the headings of the tables whose first column has texts to look for.
var messageTables = []string{"| message |", "| message contains |", "| error contains |", "| the error says |", "| error | what to do |"}

// notAnError reports whether the strings below a node are in no error: arguments of a logger and
// of `certctl-agent check`, and the help texts of settings.
func notAnError(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CallExpr:
		method, ok := n.Fun.(*ast.SelectorExpr)
		return ok && slices.Contains([]string{"Debug", "Info", "Warn", "Error", "warn"}, method.Sel.Name) && len(n.Args) > 0
	case *ast.KeyValueExpr:
		field, ok := n.Key.(*ast.Ident)
		return ok && slices.Contains([]string{"doc", "defaults"}, field.Name)
	}
	return false
}

// standardLibrary returns the strings of packages whose errors the program passes on.
func standardLibrary(t *testing.T, packages ...string) (all []string) {
	t.Helper()
	for _, pkg := range packages {
		files, err := filepath.Glob(filepath.Join(build.Default.GOROOT, "src", filepath.FromSlash(pkg), "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no sources of %s (%v)", pkg, err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, literals(file, nil)...)
		}
	}
	return all
}

// quotedMessages returns the texts in the first column of a page's tables with this heading.
func quotedMessages(page, heading string) (texts []string) {
	tables := strings.Split(page, "\n"+heading)
	for _, table := range tables[1:] {
		table, _, _ = strings.Cut(table, "\n\n")
		for line := range strings.Lines(table) {
			cell, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
			for _, quoted := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
				texts = append(texts, quoted[1])
			}
		}
	}
	return texts
}

// literals returns the strings of a file, those that are added up as one, without those below a
// node that skip reports.
func literals(file *ast.File, skip func(ast.Node) bool) []string {
	var all []string
	ast.Inspect(file, func(n ast.Node) bool {
		if skip != nil && skip(n) {
			return false
		}
		switch n := n.(type) {
		case *ast.BinaryExpr:
			if text := sum(n); text != "" {
				all = append(all, text)
				return false
			}
		case *ast.BasicLit:
			all = append(all, sum(n))
		}
		return true
	})
	return all
}

// sum returns what an expression of strings is, with %v for each part that is not written out. It
// returns "" if no part is.
func sum(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BinaryExpr:
		left, right := sum(e.X), sum(e.Y)
		switch {
		case e.Op != token.ADD || left == "" && right == "":
			return left + right
		case left == "":
			return "%v" + right
		case right == "":
			return left + "%v"
		}
		return left + right
	case *ast.BasicLit:
		text, _ := strconv.Unquote(e.Value)
		return text
	}
	return ""
}
