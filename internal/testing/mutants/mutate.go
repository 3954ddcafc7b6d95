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
	file       string // of the package
	path       string // file, below the module
	line       int
	start, end int            // the bytes that are replaced
	text       string         // what replaces them
	change     string         // for people
	reached    token.Position // coverage tells of this position whether a test comes here
	sum        string         // of the file
}

func (m *mutant) id() string { return fmt.Sprintf("%s:%d: %s", m.path, m.line, m.change) }

// A target is a package that is parsed and checked.
type target struct {
	root, dir  string
	importPath string
	set        *token.FileSet
	files      map[string]*ast.File
	text       map[string][]byte
	config     *types.Config
	info       *types.Info
}

// load parses and checks the package in dir, against the export data of what it
// imports.
func load(ctx context.Context, root, dir string) (*target, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-export", "-deps", "-json=ImportPath,Dir,GoFiles,Export", "./"+dir)
	cmd.Dir, cmd.Stderr = root, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var listed struct {
		ImportPath, Dir, Export string
		GoFiles                 []string
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
	p := &target{root: root, dir: dir, importPath: listed.ImportPath, set: token.NewFileSet(), files: make(map[string]*ast.File), text: make(map[string][]byte)}
	for _, name := range listed.GoFiles {
		if p.text[name], err = os.ReadFile(filepath.Join(listed.Dir, name)); err != nil {
			return nil, err
		}
		if p.files[name], err = parser.ParseFile(p.set, name, p.text[name], parser.SkipObjectResolution); err != nil {
			return nil, err
		}
	}
	p.config = &types.Config{Importer: importer.ForCompiler(p.set, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })}
	p.info = &types.Info{Types: make(map[ast.Expr]types.TypeAndValue), Uses: make(map[*ast.Ident]types.Object)}
	_, err = p.config.Check(p.importPath, p.set, p.sources("", nil), p.info)
	return p, err
}

// sources returns the files of the package, one of them replaced.
func (p *target) sources(name string, by *ast.File) (files []*ast.File) {
	for other, file := range p.files {
		if other == name {
			file = by
		}
		files = append(files, file)
	}
	return files
}

// mutated returns the text of the file that m changes, after the change.
func (p *target) mutated(m *mutant) []byte {
	text := p.text[m.file]
	return slices.Concat(text[:m.start], []byte(m.text), text[m.end:])
}

func (p *target) compiles(m *mutant) bool {
	file, err := parser.ParseFile(p.set, m.file, p.mutated(m), parser.SkipObjectResolution)
	if err != nil {
		return false
	}
	_, err = p.config.Check(p.importPath, p.set, p.sources(m.file, file), nil)
	return err == nil
}

// mutants returns all changes of the package that are worth a run, in the order
// of the text. Some may not compile.
func (p *target) mutants() []*mutant {
	var all []*mutant
	var names []string
	for name := range p.files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		f := finder{target: p, file: name}
		for _, d := range p.files[name].Decls {
			// What an error says is not a promise.
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

// A finder walks a file and notes what could be changed.
type finder struct {
	*target
	file  string
	stack []ast.Node // from the function's body to the parent of what is visited
	found []*mutant
}

func (f *finder) visit(n ast.Node) bool {
	if n == nil {
		f.stack = f.stack[:len(f.stack)-1]
		return true
	}
	if call, ok := n.(*ast.CallExpr); ok && f.talks(call) {
		return false
	}
	if statement, ok := n.(*ast.ExprStmt); ok {
		if call, ok := statement.X.(*ast.CallExpr); ok && f.talks(call) {
			return false
		}
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
		// A sync, a close, a check: what the call reports is not looked at
		// either.
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

// remove takes out a statement whose variables and imports stay in use.
func (f *finder) remove(n ast.Node) {
	f.add(n, "remove", "_ = func() { "+f.source(n)+" }")
}

// decide fixes a condition, which is evaluated as before. If an error always
// counted as one, every test would notice.
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
			return // decide has it
		}
	}
	f.add(n, other.String()+" for "+n.Op.String(), "("+f.source(n.X)+" "+other.String()+" "+f.source(n.Y)+")")
}

// number makes a small number one greater and lets others read a private file.
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

// fields leaves out each field of a struct: an option that is not passed on.
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

// add notes that n can be replaced by text.
func (f *finder) add(n ast.Node, change, text string) {
	start, end := f.set.Position(n.Pos()), f.set.Position(n.End())
	m := &mutant{file: f.file, path: path.Join(f.dir, f.file), line: start.Line, start: start.Offset, end: end.Offset, text: text, reached: start}
	m.change = strings.Join(strings.Fields(change+": "+f.source(n)), " ")
	if len(m.change) > 100 {
		m.change = m.change[:100] + "…"
	}
	var around token.Position
	for _, outer := range f.stack {
		switch outer := outer.(type) {
		case *ast.SwitchStmt:
			around = f.set.Position(outer.Pos())
		case *ast.CaseClause:
			// Coverage counts what a case does, not its conditions.
			if m.reached = start; n.Pos() < outer.Colon {
				m.reached = around
			}
		}
	}
	f.found = append(f.found, m)
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

// talks reports whether a call writes to the log or makes an error's text.
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
