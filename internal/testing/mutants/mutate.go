package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A mutant is one change of one file.
type mutant struct {
	start, end token.Position // of the code that text replaces
	text       string
	change     string // for people
}

func (m *mutant) id() string {
	return fmt.Sprintf("%s:%d: %s", m.start.Filename, m.start.Line, m.change)
}

// A target is a package that is parsed and type-checked.
type target struct {
	dir        string // below the module, as are the names of its files
	importPath string
	set        *token.FileSet
	files      map[string]*ast.File
	text       map[string][]byte
	config     *types.Config
	info       *types.Info
}

// load parses and type-checks the package in dir, against the export data of its imports.
func load(ctx context.Context, root, dir string) (*target, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-export", "-deps", "-json=ImportPath,GoFiles,Export", "./"+dir)
	cmd.Dir, cmd.Stderr = root, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var listed struct {
		ImportPath, Export string
		GoFiles            []string
	}
	exports := make(map[string]string)
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; { // the package itself comes last
		if err := decoder.Decode(&listed); err == io.EOF {
			break
		} else if err != nil {
			return nil, err
		}
		exports[listed.ImportPath] = listed.Export
	}
	p := &target{dir: dir, importPath: listed.ImportPath, set: token.NewFileSet(), files: make(map[string]*ast.File), text: make(map[string][]byte)}
	for _, name := range listed.GoFiles {
		name = path.Join(dir, name)
		if p.text[name], err = os.ReadFile(filepath.Join(root, name)); err != nil {
			return nil, err
		}
		if p.files[name], err = parser.ParseFile(p.set, name, p.text[name], parser.SkipObjectResolution); err != nil {
			return nil, err
		}
	}
	p.config = &types.Config{Importer: importer.ForCompiler(p.set, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })}
	p.info = &types.Info{Types: make(map[ast.Expr]types.TypeAndValue), Uses: make(map[*ast.Ident]types.Object)}
	_, err = p.config.Check(p.importPath, p.set, slices.Collect(maps.Values(p.files)), p.info)
	return p, err
}

// mutated returns the text of the file that m changes, after the change.
func (p *target) mutated(m *mutant) []byte {
	text := p.text[m.start.Filename]
	return slices.Concat(text[:m.start.Offset], []byte(m.text), text[m.end.Offset:])
}

func (p *target) compiles(m *mutant) bool {
	file, err := parser.ParseFile(p.set, m.start.Filename, p.mutated(m), parser.SkipObjectResolution)
	if err != nil {
		return false
	}
	files := maps.Clone(p.files)
	files[m.start.Filename] = file
	_, err = p.config.Check(p.importPath, p.set, slices.Collect(maps.Values(files)), nil)
	return err == nil
}

// mutants returns all changes of the package that are worth a run, in the order of the text. Some
// may not compile.
func (p *target) mutants() []*mutant {
	var all []*mutant
	for _, name := range slices.Sorted(maps.Keys(p.files)) {
		f := finder{target: p, file: name}
		for _, d := range p.files[name].Decls {
			// The wording of errors is not tested.
			if function, ok := d.(*ast.FuncDecl); ok && function.Body != nil && !slices.Contains([]string{"Error", "String"}, function.Name.Name) {
				ast.Inspect(function.Body, f.visit)
			}
		}
		all = append(all, f.found...)
	}
	times := make(map[string]int)
	for _, m := range all {
		if times[m.id()]++; times[m.id()] > 1 {
			m.change += fmt.Sprintf(" (%d)", times[m.id()]) // on this line
		}
	}
	return all
}

// A finder walks a file and collects its mutants.
type finder struct {
	*target
	file  string
	stack []ast.Node // from the function's body to the parent of the visited node
	found []*mutant
}

func (f *finder) visit(n ast.Node) bool {
	if n == nil {
		f.stack = f.stack[:len(f.stack)-1]
		return true
	}
	expression := n
	if statement, ok := n.(*ast.ExprStmt); ok {
		expression = statement.X
	}
	if call, ok := expression.(*ast.CallExpr); ok && f.talks(call) {
		return false
	}
	f.mutate(n)
	f.stack = append(f.stack, n)
	return true
}

func (f *finder) mutate(n ast.Node) {
	switch n := n.(type) {
	case *ast.ExprStmt, *ast.DeferStmt, *ast.GoStmt:
		f.remove(n)
	case *ast.AssignStmt:
		blank, ok := n.Lhs[0].(*ast.Ident)
		if n.Tok != token.DEFINE && !(ok && blank.Name == "_") {
			f.remove(n)
		}
	case *ast.BranchStmt:
		if n.Tok != token.GOTO && n.Tok != token.FALLTHROUGH {
			f.add(n, "remove", "{}")
		}
	case *ast.IfStmt:
		f.decide(n.Cond)
	case *ast.SwitchStmt:
		for _, clause := range n.Body.List {
			for _, condition := range clause.(*ast.CaseClause).List {
				if n.Tag == nil {
					f.decide(condition)
				} else if isString(f.info.Types[condition].Type) {
					f.add(condition, "no such case", f.source(condition)+` + "\x00"`)
				}
			}
		}
	case *ast.BinaryExpr:
		f.operator(n)
	case *ast.CallExpr:
		// A sync, a close or a check is left out, with its error.
		if _, statement := f.parent().(*ast.ExprStmt); !statement && f.isError(n) {
			f.add(n, "skip", "func() error { return nil; return "+f.source(n)+" }()")
		}
	case *ast.ReturnStmt:
		if len(n.Results) > 0 {
			if last := n.Results[len(n.Results)-1]; f.isError(last) {
				f.add(last, "return no error", "func(error) error { return nil }("+f.source(last)+")")
			}
		}
	case *ast.BasicLit:
		f.number(n)
	case *ast.CompositeLit:
		f.fields(n)
	}
}

// remove removes a statement, but keeps its variables and imports in use.
func (f *finder) remove(n ast.Node) {
	f.add(n, "remove", "_ = func() { "+f.source(n)+" }")
}

// decide makes a condition, which is still evaluated, never or always true. "Always" is left out for
// err != nil: every test would notice.
func (f *finder) decide(condition ast.Expr) {
	f.add(condition, "never", "("+f.source(condition)+") && false")
	if comparison, ok := condition.(*ast.BinaryExpr); !ok || comparison.Op != token.NEQ || !f.isError(comparison.X) {
		f.add(condition, "always", "("+f.source(condition)+") || true")
	}
}

func (f *finder) operator(n *ast.BinaryExpr) {
	other := map[token.Token]token.Token{
		token.LAND: token.LOR, token.LOR: token.LAND, token.EQL: token.NEQ, token.NEQ: token.EQL,
		token.LSS: token.LEQ, token.LEQ: token.LSS, token.GTR: token.GEQ, token.GEQ: token.GTR,
	}[n.Op]
	if other == 0 {
		return
	}
	if n.Op == token.EQL || n.Op == token.NEQ {
		if condition, ok := f.parent().(*ast.IfStmt); ok && condition.Cond == n {
			return // "never" and "always" cover it
		}
	}
	f.add(n, other.String()+" for "+n.Op.String(), "("+f.source(n.X)+" "+other.String()+" "+f.source(n.Y)+")")
}

// number makes a private file readable for others, and adds one to a small number.
func (f *finder) number(n *ast.BasicLit) {
	if n.Kind != token.INT {
		return
	}
	switch n.Value {
	case "0o600", "0o700":
		f.add(n, "readable", n.Value[:3]+"44")
	case "0", "1", "2", "3", "4", "5", "6", "7", "8", "9":
		parent, binary := f.parent().(*ast.BinaryExpr)
		if binary && (parent.Op == token.SHL || parent.Op == token.SHR) {
			return
		}
		value, _ := strconv.Atoi(n.Value)
		f.add(n, "one more", strconv.Itoa(value+1))
	}
}

// fields omits each field of a struct, such as an option.
func (f *finder) fields(n *ast.CompositeLit) {
	fields, ok := f.info.Types[n].Type.Underlying().(*types.Struct)
	if !ok {
		return
	}
	for _, element := range n.Elts {
		pair, ok := element.(*ast.KeyValueExpr)
		if !ok || f.info.Types[pair.Value].IsNil() {
			continue
		}
		for field := range fields.Fields() {
			if field.Name() == pair.Key.(*ast.Ident).Name {
				// The value stays in use, and with it variables and imports.
				f.add(pair, "leave out", fmt.Sprintf("%s: func() (zero %s) { return; return %s }()",
					field.Name(), types.TypeString(field.Type(), f.qualify), f.source(pair.Value)))
			}
		}
	}
}

func (f *finder) qualify(pkg *types.Package) string {
	if pkg.Path() == f.importPath {
		return ""
	}
	return pkg.Name()
}

// add adds a mutant that has text instead of n.
func (f *finder) add(n ast.Node, change, text string) {
	start, end := f.set.Position(n.Pos()), f.set.Position(n.End())
	change = strings.Join(strings.Fields(change+": "+f.source(n)), " ")
	if len(change) > 100 {
		change = change[:100] + "…"
	}
	f.found = append(f.found, &mutant{start: start, end: end, text: text, change: change})
}

func (f *finder) parent() ast.Node {
	if len(f.stack) == 0 {
		return nil
	}
	return f.stack[len(f.stack)-1]
}

func (f *finder) source(n ast.Node) string {
	return string(f.text[f.file][f.set.Position(n.Pos()).Offset:f.set.Position(n.End()).Offset])
}

func (f *finder) isError(e ast.Expr) bool {
	kind, ok := f.info.Types[e]
	return ok && !kind.IsNil() && types.Identical(kind.Type, types.Universe.Lookup("error").Type())
}

// talks reports whether a call writes a log line or makes the text of an error.
func (f *finder) talks(call *ast.CallExpr) bool {
	switch called := call.Fun.(type) {
	case *ast.Ident:
		return called.Name == "panic"
	case *ast.SelectorExpr:
		object := f.info.Uses[called.Sel]
		if object == nil || object.Pkg() == nil {
			return false
		}
		return object.Pkg().Path() == "log/slog" || object.Pkg().Path() == "errors" && object.Name() == "New" || object.Pkg().Path() == "fmt"
	}
	return false
}

func isString(kind types.Type) bool {
	basic, ok := kind.Underlying().(*types.Basic)
	return ok && basic.Info()&types.IsString != 0
}
