package architecture_test

import (
	"go/ast"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// setByLinker are variables that only the linker sets.
var setByLinker = []string{"internal/buildinfo.commit", "internal/buildinfo.version"}

// TestNoMutablePackageVariables: package variables outside of _test.go files never change, not even
// in tests.
func TestNoMutablePackageVariables(t *testing.T) {
	all := sources(t)
	variables := make(map[string]bool) // "dir.name" of each variable
	for _, s := range all {
		if s.test {
			continue
		}
		for _, spec := range variableSpecs(s.file) {
			for _, name := range spec.Names {
				variables[s.dir+"."+name.Name] = true
			}
			if state := stateful(spec); state != "" {
				t.Errorf("%s has a package variable %s with the type or value %s, which changes", s.name, spec.Names[0].Name, state)
			}
		}
	}
	if len(variables) < 50 {
		t.Fatalf("found %d package variables, want more", len(variables))
	}
	for _, s := range all {
		for _, change := range changes(s) {
			if variables[change] {
				t.Errorf("%s changes %s, or takes its address: pass a value instead", s.name, change)
			}
		}
	}
	for _, name := range setByLinker {
		if !variables[name] {
			t.Errorf("there is no variable %s for the linker", name)
		}
	}
}

func variableSpecs(file *ast.File) (specs []*ast.ValueSpec) {
	for _, declaration := range file.Decls {
		if d, ok := declaration.(*ast.GenDecl); ok && d.Tok == token.VAR {
			for _, spec := range d.Specs {
				specs = append(specs, spec.(*ast.ValueSpec))
			}
		}
	}
	return specs
}

// stateful returns the type or constructor in a declaration that lets a variable change without an
// assignment, such as sync.Mutex or new, or "" if there is none. It skips function literals.
func stateful(spec *ast.ValueSpec) (state string) {
	harmless := []string{"OnceFunc", "OnceValue", "OnceValues"} // results that do not change
	ast.Inspect(spec, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			return false
		case *ast.SelectorExpr:
			if pkg, ok := n.X.(*ast.Ident); ok && (pkg.Name == "sync" || pkg.Name == "atomic") && !slices.Contains(harmless, n.Sel.Name) {
				state = pkg.Name + "." + n.Sel.Name
			}
		case *ast.CallExpr:
			if f, ok := n.Fun.(*ast.Ident); ok && (f.Name == "make" || f.Name == "new") {
				state = f.Name
			}
		}
		return true
	})
	return state
}

// changes returns the package variables, of this module, that a file assigns to, modifies or takes
// the address of.
func changes(s source) (names []string) {
	imports := make(map[string]string) // from the name in this file to the directory
	for i, spec := range s.file.Imports {
		if dir, ours := strings.CutPrefix(s.imports[i], module+"/"); ours {
			name := dir[strings.LastIndexByte(dir, '/')+1:]
			if spec.Name != nil {
				name = spec.Name.Name
			}
			imports[name] = dir
		}
	}
	here := variableSpecs(s.file)
	changed := func(e ast.Expr) {
		for {
			switch x := e.(type) {
			case *ast.ParenExpr:
				e = x.X
				continue
			case *ast.IndexExpr:
				e = x.X
				continue
			case *ast.StarExpr:
				e = x.X
				continue
			case *ast.SliceExpr:
				e = x.X
				continue
			case *ast.SelectorExpr:
				if pkg, ok := x.X.(*ast.Ident); ok && pkg.Obj == nil && imports[pkg.Name] != "" {
					names = append(names, imports[pkg.Name]+"."+x.Sel.Name)
					return
				}
				e = x.X
				continue
			case *ast.Ident:
				// The parser resolves what the file itself declares; other files' variables have no
				// object.
				if x.Obj != nil {
					spec, ok := x.Obj.Decl.(*ast.ValueSpec)
					if !ok || !slices.Contains(here, spec) {
						return
					}
				}
				names = append(names, s.dir+"."+x.Name)
			}
			return
		}
	}
	ast.Inspect(s.file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for _, e := range n.Lhs {
				if n.Tok != token.DEFINE {
					changed(e)
				}
			}
		case *ast.IncDecStmt:
			changed(n.X)
		case *ast.RangeStmt:
			if n.Tok == token.ASSIGN {
				changed(n.Key)
				changed(n.Value)
			}
		case *ast.UnaryExpr:
			if n.Op == token.AND {
				changed(n.X)
			}
		case *ast.CallExpr:
			if f, ok := n.Fun.(*ast.Ident); ok && len(n.Args) > 0 && slices.Contains([]string{"delete", "clear", "copy"}, f.Name) {
				changed(n.Args[0])
			}
		}
		return true
	})
	return names
}
