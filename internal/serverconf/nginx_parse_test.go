package serverconf

import (
	"fmt"
	"strings"
	"testing"
)

// tree formats directives with all words quoted, so that tests see where words end.
func tree(list []nginxDirective) string {
	var b strings.Builder
	for _, d := range list {
		fmt.Fprintf(&b, "%q", append([]string{d.name}, d.args...))
		if d.block != nil {
			b.WriteString("{" + tree(d.block) + "}")
		}
	}
	return b.String()
}

func TestNGINXParse(t *testing.T) {
	tests := []struct{ text, want string }{
		{"", ""},
		{"a b c;", `["a" "b" "c"]`},
		{"a\tb\r\n  c ; d{e;}", `["a" "b" "c"]["d"]{["e"]}`},
		{"# comment ; {\na #not#;", ""},
		{"a b#c; # d", `["a" "b#c"]`},
		{`a "b c;{}#" 'd "e'; f;`, `["a" "b c;{}#" "d \"e"]["f"]`},
		{`a "b\"c" d\;e \ff;`, `["a" "b\"c" "d\\;e" "\\ff"]`},
		{`a "x\\" b;`, `["a" "x\\" "b"]`},
		{"a ${b}c/$d;", `["a" "${b}c/$d"]`},
		{`if ($x ~ "a;b") { c; }`, `["if" "($x" "~" "a;b" ")"]{["c"]}`},
		{"a {} b;", `["a"]["b"]`},
		{"content_by_lua_block { local t = {a = '}'} -- }\n --[[ } ]] x = [[ } ]] s = \"\\\"}\" } b;", `["content_by_lua_block"]["b"]`},
	}
	for _, test := range tests {
		list, err := parseNGINX("f", test.text)
		if strings.Contains(test.text, "#not#") {
			if err == nil {
				t.Errorf("%q: got %s, want an error: the comment hides the semicolon", test.text, tree(list))
			}
			continue
		}
		if got := tree(list); err != nil || got != test.want {
			t.Errorf("%q: got %s, %v, want %s", test.text, got, err, test.want)
		}
	}
}

func TestNGINXParseErrors(t *testing.T) {
	for text, says := range map[string]string{
		"a":                      "f:1: unexpected end",
		"a b":                    "unexpected end",
		"a\n{b;":                 "f:2: unexpected end",
		"}":                      "unexpected '}'",
		";":                      "unexpected ';'",
		"{":                      "unexpected '{'",
		"a }":                    "unexpected '}'", // a brace does not end a word in nginx either
		`a "b`:                   "unexpected end",
		`a "b"c;`:                "closing quote",
		`a \`:                    "unexpected end",
		"x_by_lua_block { [[ }":  "unexpected end",
		"x_by_lua_block { -- }":  "unexpected end",
		"x_by_lua_block { ' }":   "unexpected end",
		strings.Repeat("a{", 50): "too deep",
	} {
		if list, err := parseNGINX("f", text); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: got %s, %v, want an error with %q", text, tree(list), err, says)
		}
	}
}

func FuzzNGINXParse(f *testing.F) {
	for _, seed := range []string{"a b;", `a "b\"" 'c' {d;}`, "#x\na${b};", "x_by_lua_block{[[}]]'}'--}\n}", "a{b{c{d;}}}", `\`, `"`, "include x;"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseNGINX("f", text)
		if err == nil && strings.TrimSpace(text) != "" && list == nil && !strings.Contains(text, "#") {
			t.Errorf("%q parses to no directives", text)
		}
	})
}

func FuzzNGINXPairs(f *testing.F) {
	f.Add("# configuration file /etc/nginx/nginx.conf:\nhttp{include *.d;server{ssl_certificate a;ssl_certificate_key b;}}\n# configuration file /etc/nginx/x.d:\nserver{}\n")
	f.Add("# configuration file /n:\ninclude n; include n;")
	f.Fuzz(func(t *testing.T, dump string) {
		pairs, err := nginxDumpPairs(dump)
		if err != nil && pairs != nil {
			t.Errorf("got pairs and an error: %v", err)
		}
	})
}
