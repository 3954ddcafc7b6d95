package hostfile

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

// others are the packages that open files for reading on their own, and what they do differently.
// All other packages use Read or ReadIn, or read no files.
var others = map[string]string{
	"cmd/certctl-agent":          "scan only tries to open what it was told to scan; /etc/machine-id is root's",
	"internal/atomicfile":        "opens directories, to sync them",
	"internal/connector/windows": "reads scripts that are part of the program",
	"internal/discovery":         "reads only the beginning of most files, without changing their access times, and checks them against the directory entry",
	"internal/filelock":          "opens a lock that may be another agent's without reading it; bounds the owner's name in a lock that it takes",
	"internal/installed":         "follows no symlink: one in place of its file is damage",
	"internal/keystore":          "opens its own directory, to list the names in it",
	"internal/ledger":            "a record that is too long is damaged, and its beginning is searched for the job's id",
	"internal/peer":              "reads tables in /proc, line by line",
	"internal/status":            "opens a directory, to get a short path for a socket in it",
	"internal/transaction":       "follows no symlink, reads only the file that it has inspected, together with its attributes, and finds the holders of locks in /proc",
}

// TestOthers finds the places that open files for reading.
func TestOthers(t *testing.T) {
	root := filepath.Join("..", "..")
	set := token.NewFileSet()
	found := 0
	err := filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && name != root && strings.HasPrefix(entry.Name(), ".") {
			return filepath.SkipDir // not a package of the module
		}
		if err != nil || entry.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(rel))
		if dir == "internal/hostfile" || dir == "cmd/certctl-demo" || strings.HasPrefix(dir, "internal/testing/") || dir == "internal/connector/conformance" {
			return nil // the demo and the tests read only their own files
		}
		file, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, at := range reads(file) {
			found++
			if others[dir] == "" && others[path.Dir(dir)] == "" {
				t.Errorf("%s: %s opens a file on its own: use package hostfile, or list it in this test with the reason", set.Position(at), dir)
			}
		}
		return nil
	})
	if err != nil || found < 5 {
		t.Errorf("found %d places: %v", found, err)
	}
}

// reads are the calls that open a file for reading: of package os and of methods
// such as those of *os.Root.
func reads(file *ast.File) []token.Pos {
	ours := make(map[string]bool) // names of packages of this module
	for _, spec := range file.Imports {
		if name := strings.Trim(spec.Path.Value, `"`); strings.HasPrefix(name, "certctl-agent/") {
			ours[path.Base(name)] = true
		}
	}
	var all []token.Pos
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
		switch name := selector.Sel.Name; {
		case pkg != nil && ours[pkg.Name]:
		case name == "Open", name == "ReadFile", name == "OpenFile" && !writes(call):
			all = append(all, call.Pos())
		}
		return true
	})
	return all
}

// writes reports whether a call opens a file only for writing.
func writes(call *ast.CallExpr) bool {
	found := false
	for _, argument := range call.Args {
		ast.Inspect(argument, func(n ast.Node) bool {
			name, ok := n.(*ast.Ident)
			found = found || ok && name.Name == "O_WRONLY"
			return true
		})
	}
	return found
}
