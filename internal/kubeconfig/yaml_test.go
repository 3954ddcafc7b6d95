package kubeconfig

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

// plain converts a node to mappings, lists, strings and nil, as encoding/json would decode it.
func plain(n *node) any {
	switch {
	case n.isNull():
		return nil
	case n.kind == mapping:
		m := make(map[string]any)
		for _, f := range n.fields {
			m[f.key] = plain(f.value)
		}
		return m
	case n.kind == sequence:
		items := []any{}
		for _, item := range n.items {
			items = append(items, plain(item))
		}
		return items
	}
	return n.text
}

func TestYAML(t *testing.T) {
	for _, test := range []struct{ yaml, want string }{
		{"", `null`},
		{"# nothing\n\n", `null`},
		{"a: b", `{"a":"b"}`},
		{"\ufeffa: b\r\nc: d\r\n", `{"a":"b","c":"d"}`},
		{"---\na: b\n", `{"a":"b"}`},
		{"a:\nb: ~\nc: null\nd: \"null\"\ne: ''\n", `{"a":null,"b":null,"c":null,"d":"null","e":""}`},
		{"a: {}\nb: []\nc: {} # none\n", `{"a":{},"b":[],"c":{}}`},
		{"a:\n- b\n- c: d\n  e: f\n-\n  g: h\n- - i\n  - j\nk: l\n", `{"a":["b",{"c":"d","e":"f"},{"g":"h"},["i","j"]],"k":"l"}`},
		{"a:\n  - b\n  -   c: d\n      e:\n      - f\n", `{"a":["b",{"c":"d","e":["f"]}]}`},
		{"a:\n  b:\n    c: d\n  e: f\n", `{"a":{"b":{"c":"d"},"e":"f"}}`},
		{"a: https://h:6443/x#y # comment\nb: c#d\n# e\n", `{"a":"https://h:6443/x#y","b":"c#d"}`},
		{"a: one\n  two\n  three\nb: c\n", `{"a":"one two three","b":"c"}`},
		{"a: one\n\n  two\n", `{"a":"one\ntwo"}`},
		{"a:\n  one\n  two\n", `{"a":"one two"}`},
		{"- --flag=x\n- -y\n", `["--flag=x","-y"]`},
		{`"a b": 'it''s'` + "\n'c:d': \"e\\tf\\u00e9\\x41\\\"\" # g", `{"a b":"it's","c:d":"e\tféA\""}`},
		{"a: \"one\n  two\n\n  three \\\n   \\ four\"\n", `{"a":"one two\nthree  four"}`},
		{"a: \"abc\\\n  def\\\n  ghi\"\nb: c\n", `{"a":"abcdefghi","b":"c"}`},
		{"a: 'one\n  two'\n", `{"a":"one two"}`},
		{"a: |\n  one\n    two\n\n  # three\nb: |-\n  x\n  y\n\nc: |+\n  z\n\n", `{"a":"one\n  two\n\n# three\n","b":"x\ny","c":"z\n\n\n"}`},
		{"a: |2-\n    one\n   two\n", `{"a":"  one\n two"}`},
		{"- |-\n  one\n  \ttwo\n- x\n", `["one\n\ttwo","x"]`},
		{"a: true\nb: 17\nc: 1.5e3\n", `{"a":"true","b":"17","c":"1.5e3"}`},
	} {
		n, err := parse([]byte(test.yaml))
		if err != nil {
			t.Errorf("%q: %v", test.yaml, err)
			continue
		}
		var want any
		if err := json.Unmarshal([]byte(test.want), &want); err != nil {
			t.Fatal(err)
		}
		if got := plain(n); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %#v, want %#v", test.yaml, got, want)
		}
	}
}

// Unsupported YAML is rejected with its line.
func TestYAMLRefused(t *testing.T) {
	for _, test := range []struct {
		yaml string
		line int
		says string
	}{
		{"a: &anchor b", 1, "anchors"},
		{"a: b\nc: *anchor", 2, "aliases"},
		{"a: !!binary b", 1, "tags"},
		{"a: b\n<<: c", 2, "merges"},
		{"? a\n: b", 1, "neither"},
		{"a: {b: c}", 1, "braces"},
		{"a:\n- [b]", 2, "brackets"},
		{"a: >-\n  b", 1, "folded"},
		{"a: b: c", 1, "colon"},
		{"a: b\n  c: d", 2, "colon"},
		{"a: b\n c:", 2, "colon"},
		{"a:\n\tb: c", 2, "tab"},
		{"a: b\nA: c\na: d", 3, "repeats"},
		{"a: b\n---\nc: d", 2, "single"},
		{"a: b\n...\n", 2, "single"},
		{"%YAML 1.2\na: b", 1, "directive"},
		{"just text", 1, "neither"},
		{"a: b\ntext", 2, "neither"},
		{"a:\n  b: c\n d: e", 3, "indentation"},
		{"a: b\nc:\n- d: e\n   f: g", 4, "colon"},
		{"a: {}\n  b: c", 2, "indentation"},
		{"a: \"b", 1, "unterminated"},
		{"a: 'b'c", 1, "after the closing"},
		{`a: "\q"`, 1, "escape"},
		{`a: "\ud800"`, 1, "escape"},
		{"a: |x\n  b", 1, "literal"},
		{"a: - b", 1, "list"},
		{"a: \x1b[31m", 1, "not text"},
		{"a: \xff", 1, "not text"},
		{strings.Repeat("- ", 100) + "a", 1, "nested"},
	} {
		_, err := parse([]byte(test.yaml))
		syntax, ok := errors.AsType[*SyntaxError](err)
		if !ok || syntax.Line != test.line || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%q: got %v, want line %d with %q", test.yaml, err, test.line, test.says)
		}
	}
}

func TestJSON(t *testing.T) {
	n, err := parseJSON([]byte(`{"a": {"b": [1, true, null, "c"]}, "d": {}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"a": map[string]any{"b": []any{"1", "true", nil, "c"}}, "d": map[string]any{}}
	if got := plain(n); !reflect.DeepEqual(got, want) {
		t.Errorf("got %#v, want %#v", got, want)
	}
	for _, text := range []string{"{", "{}\n{}", "{\"a\":1,\n\"a\":2}", `{"a":` + strings.Repeat("[", 200), "{\n\"a\":"} {
		if _, err := parseJSON([]byte(text)); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

// The cost of parsing does not grow with the square of the size. Most of these files took minutes;
// together they take a second.
func TestCost(t *testing.T) {
	numbered := func(format string) string {
		var all strings.Builder
		for i := 0; all.Len() < MaxSize-100; i++ {
			fmt.Fprintf(&all, format, i)
		}
		return all.String()
	}
	begun := time.Now()
	for _, data := range []string{
		numbered("%06d:\n"),
		"{" + numbered("\"%06d\":1,\n") + `"":1}`,
		"a: b\n" + numbered(" %d\n"),
		strings.Repeat("- \""+strings.Repeat("x\n ", 900)+"\"\n", MaxSize/3600),
		"a: \"b\n" + strings.Repeat(strings.Repeat("x", MaxSize/maxQuoted)+"\n", maxQuoted),
	} {
		if _, err := Parse([]byte(data), "/", ""); err == nil {
			t.Errorf("%.20q…: no error", data)
		}
		if took := time.Since(begun); took > time.Minute {
			t.Fatalf("%.20q…: after %v", data, took)
		}
	}
}
