package windows

import (
	"encoding/json"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector/conformance"
	"certctl-agent/internal/testing/windowshost"
	"certctl-agent/internal/winrm"
)

// documents returns the members that the script's comment describes, by document,
// with the kind of the example value.
func documents(t *testing.T) map[string]map[string]reflect.Kind {
	t.Helper()
	text, err := scripts.ReadFile("scripts/1-contract.ps1")
	must(t, err)
	begins := regexp.MustCompile(`^# (\w+): \{$`)
	member := regexp.MustCompile(`^#   "(\w+)": ([^ ]+?),?(?: .*)?$`)
	found, at := make(map[string]map[string]reflect.Kind), ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if match := begins.FindStringSubmatch(line); match != nil {
			at = match[1]
			found[at] = make(map[string]reflect.Kind)
		}
		if match := member.FindStringSubmatch(line); match != nil {
			var value any
			must(t, json.Unmarshal([]byte(match[2]), &value))
			found[at][match[1]] = kindOf(value)
		}
	}
	return found
}

func kindOf(value any) reflect.Kind {
	switch value.(type) {
	case string:
		return reflect.String
	case float64:
		return reflect.Int
	case bool:
		return reflect.Bool
	case []any:
		return reflect.Slice
	}
	return reflect.Pointer // null
}

// members returns the members of a struct, with their kind in JSON.
func members(v any) map[string]reflect.Kind {
	found := make(map[string]reflect.Kind)
	for field := range reflect.TypeOf(v).Fields() {
		kind := field.Type.Kind()
		switch {
		case field.Type == reflect.TypeFor[json.RawMessage]():
			kind = reflect.Pointer
		case field.Type == reflect.TypeFor[[]byte]():
			kind = reflect.String
		case kind == reflect.Int32:
			kind = reflect.Int
		}
		found[field.Tag.Get("json")] = kind
	}
	return found
}

// TestContract: the script's comment, the connectors' structs, the model of the
// tests and the script itself have the same members.
func TestContract(t *testing.T) {
	described := documents(t)
	for name, sides := range map[string][]any{
		"request": {request{}, windowshost.Request{}},
		"answer":  {answer{}, windowshost.Answer{}},
		"state":   {state{}, windowshost.State{}},
		"host":    {hostState{}, windowshost.HostState{}},
	} {
		if len(described[name]) < 5 {
			t.Fatalf("the comment describes %d members of %s", len(described[name]), name)
		}
		for _, side := range sides {
			if got := members(side); !maps.Equal(got, described[name]) {
				t.Errorf("%s: %T has %v, the comment %v", name, side, got, described[name])
			}
		}
	}
	text, err := script()
	must(t, err)
	used := make(map[string]bool)
	for _, match := range regexp.MustCompile(`\$request\['(\w+)'\]`).FindAllStringSubmatch(string(text), -1) {
		used[match[1]] = true
	}
	if got, want := slices.Sorted(maps.Keys(used)), slices.Sorted(maps.Keys(described["request"])); !slices.Equal(without(got, "contract"), without(want, "contract")) {
		t.Errorf("the script uses %v of the request, which has %v", got, want)
	}
	for _, match := range regexp.MustCompile(`\$was\['(\w+)'\]`).FindAllStringSubmatch(string(text), -1) {
		if _, ok := described["state"][match[1]]; !ok {
			t.Errorf("the script uses %s of an earlier state", match[1])
		}
		if !strings.Contains(nothing, `"`+match[1]+`"`) {
			t.Errorf("the state of a host without anything of ours has no %s, which the script uses", match[1])
		}
	}
	for name, begins := range map[string]string{"answer": "$answer = @{", "state": "$state = @{", "host": "$seen = @{"} {
		_, rest, _ := strings.Cut(string(text), begins)
		literal, _, _ := strings.Cut(rest, "}")
		for member := range described[name] {
			if !regexp.MustCompile(`\b` + member + ` = `).MatchString(literal) {
				t.Errorf("the script makes no %s of %s", member, name)
			}
		}
	}
}

func without(names []string, name string) []string {
	return slices.DeleteFunc(names, func(other string) bool { return other == name })
}

// TestCodes: each code that the script fails with is explained.
func TestCodes(t *testing.T) {
	text, err := script()
	must(t, err)
	codes := map[string]bool{"access-denied": true}
	for _, match := range regexp.MustCompile(`Fail '([a-z-]+)'`).FindAllStringSubmatch(string(text), -1) {
		codes[match[1]] = true
	}
	if len(codes) < 10 {
		t.Fatalf("found %d codes", len(codes))
	}
	q := &request{Site: "www", Store: "My"}
	for code := range codes {
		unknown := q.explain(&answer{Code: "failed", Message: code}).Error()
		if got := q.explain(&answer{Code: code, Message: code}).Error(); got == unknown || got == "" {
			t.Errorf("%s is not explained: %s", code, got)
		}
		if listed := string(text[strings.Index(string(text), "# Codes of Fail"):]); !strings.Contains(listed[:300], code) {
			t.Errorf("the script's comment does not list %s", code)
		}
	}
}

// token is a token of PowerShell, as far as the tests need it.
type token struct {
	kind string // word, variable, string, type, punctuation, newline
	text string
}

// tokens splits a script. It knows the syntax that our scripts use and fails on anything
// else: double-quoted strings, which expand variables, here-strings,
// back-ticks, block comments.
func tokens(t *testing.T, text string) (all []token) {
	t.Helper()
	forms := []struct {
		kind string
		form *regexp.Regexp
	}{
		{"", regexp.MustCompile(`^[ \t]+`)},
		{"", regexp.MustCompile(`^#[^\n]*`)},
		{"newline", regexp.MustCompile(`^\n`)},
		{"string", regexp.MustCompile(`^'(?:[^'\n]|'')*'`)},
		{"variable", regexp.MustCompile(`^\$(?:\w+|_)`)},
		{"type", regexp.MustCompile(`^\[[A-Za-z][\w.]*(?:\[\])?\]`)},
		{"word", regexp.MustCompile(`^-?[A-Za-z_][\w.-]*`)},
		{"number", regexp.MustCompile(`^-?\d+`)},
		{"punctuation", regexp.MustCompile(`^(?:::|\+\+|[][(){}.,;=|&@!-])`)},
	}
	line := 1
next:
	for rest := text; rest != ""; {
		for _, f := range forms {
			if found := f.form.FindString(rest); found != "" {
				if f.kind != "" {
					all = append(all, token{f.kind, found})
				}
				rest = rest[len(found):]
				line += strings.Count(found, "\n")
				continue next
			}
		}
		t.Fatalf("line %d: what is %.40q?", line, rest)
	}
	return all
}

// cmdlets are the commands that the script runs. None of them evaluates text.
var cmdlets = []string{"Add-Type", "New-Object", "Remove-Item", "Where-Object", "Sort-Object", "ConvertTo-Json", "netsh.exe"}

// keywords are PowerShell's keywords that start a statement.
var keywords = []string{"function", "if", "else", "elseif", "foreach", "try", "catch", "finally", "switch", "return", "throw", "continue", "param", "default", "in"}

// TestScript: the script is balanced and ASCII, and never turns a value into
// a command or code.
func TestScript(t *testing.T) {
	whole, err := script()
	must(t, err)
	bootstrap, err := scripts.ReadFile("scripts/bootstrap.ps1")
	must(t, err)
	if strings.ContainsFunc(string(whole)+string(bootstrap), func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }) {
		t.Error("the script is not ASCII, without tabs")
	}
	lexed := tokens(t, string(whole))
	var functions []string
	for i, tok := range lexed[:len(lexed)-1] {
		if tok.text == "function" {
			functions = append(functions, lexed[i+1].text)
		}
	}
	if len(functions) < 20 {
		t.Fatalf("found %d functions", len(functions))
	}
	balanced(t, lexed)
	for i, tok := range lexed {
		before := token{kind: "newline"}
		if i > 0 {
			before = lexed[i-1]
		}
		forbidden := strings.ToLower(tok.text)
		for _, word := range []string{"invoke-expression", "iex", "invoke-command", "scriptblock", "start-process", "cmd", "invokescript", "addscript", "-f", "import-module", "set-variable", "new-alias", "set-alias", "convertto-securestring", "import-pfxcertificate", "convertfrom-json", "write-host", "write-verbose", "write-debug"} {
			if tok.kind != "string" && strings.Contains("."+strings.Trim(forbidden, "[]")+".", "."+word+".") {
				t.Errorf("%q has no place in the script", tok.text)
			}
		}
		if tok.text == "&" || tok.text == "." && (before.kind == "newline" || before.text == "{" || before.text == ";") {
			t.Errorf("%q runs a value as a command, before %q", tok.text, lexed[i+1].text)
		}
		// At the start of a statement or of a pipeline's element, a word is a command.
		starts := before.kind == "newline" || slices.Contains([]string{"{", "(", ";", "|", "=", "}"}, before.text)
		if starts && tok.kind == "word" && tok.text[0] != '-' && !isName(lexed, i) && !slices.Contains(cmdlets, tok.text) && !slices.Contains(functions, tok.text) && !slices.Contains(keywords, tok.text) {
			t.Errorf("%q is not a command that the script may run", tok.text)
		}
	}
	for _, name := range functions {
		if strings.Count(string(whole), name) < 2 {
			t.Errorf("function %s is not used", name)
		}
	}
}

// isName reports whether a word is a key of a hash table or the type of a catch.
func isName(all []token, i int) bool {
	return i+1 < len(all) && all[i+1].text == "=" || i > 0 && all[i-1].text == "."
}

// balanced fails the test unless brackets match.
func balanced(t *testing.T, all []token) {
	t.Helper()
	closes := map[string]string{")": "(", "}": "{", "]": "["}
	var open []string
	for i, tok := range all {
		switch {
		case tok.kind != "punctuation":
		case slices.Contains([]string{"(", "{", "["}, tok.text):
			open = append(open, tok.text)
		case closes[tok.text] != "":
			if len(open) == 0 || open[len(open)-1] != closes[tok.text] {
				t.Fatalf("%q at token %d (%v) closes nothing", tok.text, i, all[max(0, i-8):i])
			}
			open = open[:len(open)-1]
		}
	}
	if len(open) > 0 {
		t.Errorf("%v is not closed", open)
	}
}

// TestSecretsAreNoArguments: module logging records the arguments of cmdlets,
// so secrets are only passed to methods.
func TestSecretsAreNoArguments(t *testing.T) {
	text, err := script()
	must(t, err)
	found := 0
	for line := range strings.Lines(string(text)) {
		if !strings.Contains(line, "$request['pfx']") && !strings.Contains(line, "$request['password']") && !strings.Contains(line, "DeserializeObject") {
			continue
		}
		found++
		if regexp.MustCompile(`\b[A-Z][a-z]+-[A-Z]\w+`).MatchString(line) || strings.Contains(line, "|") {
			t.Errorf("a command is given a secret: %s", line)
		}
	}
	if found != 2 {
		t.Errorf("the secrets are used in %d lines, and the test knows two", found)
	}
	if strings.Contains(strings.ToLower(string(text)), "$input") {
		t.Error("a script that names $input has PowerShell read standard input, and log it")
	}
}

// TestPitfalls: code that looks right but behaves differently on Windows.
func TestPitfalls(t *testing.T) {
	text, err := script()
	must(t, err)
	for form, why := range map[string]string{
		`\.Certificate(Hash|StoreName) = `:        "does nothing to a binding without a certificate, and takes that of another away on its way",
		`(SHA\w*|MD5|Aes)\]::Create|\w+Managed\b`: "fails where Windows allows FIPS alone",
	} {
		if found := regexp.MustCompile(form).Find(text); found != nil {
			t.Errorf("%s: %s", found, why)
		}
	}
}

// TestReaders: a key is never accessible to a group that includes everyone.
func TestReaders(t *testing.T) {
	text, err := script()
	must(t, err)
	match := regexp.MustCompile(`\$readers = '(.*)'`).FindSubmatch(text)
	if match == nil {
		t.Fatal("the script does not say who may read a key")
	}
	readers := regexp.MustCompile(string(match[1]))
	const domain = "S-1-5-21-3623811015-3361044348-30300820-"
	for sid, want := range map[string]bool{
		"S-1-5-18": true, "S-1-5-20": true, "S-1-5-32-544": true, "S-1-5-32-568": true, domain + "500": true, domain + "1013": true,
		"S-1-5-80-3880718306-3832830129-1677859214-2598158968-1052248003": true, "S-1-5-82-3006700770-424185619-1745488364-794895919-4004696415": true,
		"S-1-1-0": false, "S-1-2-1": false, "S-1-5-4": false, "S-1-5-11": false, "S-1-5-32-545": false, "S-1-5-32-546": false, "S-1-5-113": false, "S-1-5-64-10": false,
		"S-1-5-80-0": false, "S-1-15-2-1": false, "S-1-18-1": false, "S-1-5-21-0-0-0-497": false, domain + "501": false, domain + "513": false, domain + "515": false,
	} {
		if got := readers.MatchString(sid); got != want {
			t.Errorf("%s may read: %v, want %v", sid, got, want)
		}
	}
}

// TestCommandLine: the command line fits cmd.exe, and is always the same.
func TestCommandLine(t *testing.T) {
	words, err := commandLine()
	must(t, err)
	if length := len(strings.Join(words, " ")); length > 2000 {
		t.Errorf("the command line has %d bytes", length)
	}
	again, err := commandLine()
	must(t, err)
	if !slices.Equal(words, again) {
		t.Error("the command line differs from run to run")
	}
}

func TestParseAnswer(t *testing.T) {
	const fine = `{"contract":1,"code":"","detail":"","message":"","hresult":0,"line":0,"state":null,"host":null}`
	for _, test := range []struct {
		name, stdout, stderr string
		says                 []string // nil: no error
	}{
		{"alone", fine + "\r\n", "", nil},
		{"behind what others say", "WARNING: x\r\n\r\n" + fine + "\r\n\r\n", "#< CLIXML\r\n<Objs></Objs>", nil},
		{"of another version", strings.Replace(fine, "1", "2", 1), "", []string{"without an answer"}},
		{"cut off", fine[:40], "", []string{"without an answer", "exited with code 1"}},
		{"nothing", "", "", []string{"without an answer"}},
		{"error", "", "#< CLIXML\r\n<Objs Version=\"1.1.0.1\"><Obj S=\"progress\"></Obj><S S=\"Error\">Die Ausf\u00fchrung_x000D__x000A_</S><S S=\"Error\">ist &lt;aus&gt;</S></Objs>", []string{"Die Ausf\u00fchrung ist <aus>"}},
		{"constrained", "", "#< CLIXML\r\n<Objs><S S=\"Error\">    + FullyQualifiedErrorId : MethodInvocationNotSupportedInConstrainedLanguage_x000D__x000A_</S></Objs>", []string{"constrained language mode", "AppLocker"}},
		{"escapes", "\x1b[31m", "", []string{"\uFFFD[31m"}},
	} {
		_, err := parseAnswer(&winrm.Result{Stdout: []byte(test.stdout), Stderr: []byte(test.stderr), ExitCode: 1})
		if test.says == nil {
			if err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
			continue
		}
		conformance.WantError(t, err, test.says...)
	}
}

// TestInput: names in any alphabet arrive, and the lines are ASCII.
func TestInput(t *testing.T) {
	want := &request{Contract: 1, Site: "Größe \"x\" 'y' \u2028 \U0001F600", Chain: [][]byte{}, KeyReaders: []string{}}
	in, err := input(want)
	must(t, err)
	lines := strings.Split(string(in), "\n")
	if len(lines) != 3 || strings.ContainsFunc(string(in), func(r rune) bool { return r > '~' }) {
		t.Fatalf("got %d lines", len(lines))
	}
	got := new(request)
	must(t, json.Unmarshal([]byte(lines[1]), got))
	if got.Site != want.Site {
		t.Errorf("got %q, want %q", got.Site, want.Site)
	}
}
