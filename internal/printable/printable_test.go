package printable_test

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"certctl-agent/internal/printable"
)

func TestLine(t *testing.T) {
	tests := []struct {
		name  string
		text  string
		limit int
		want  string
	}{
		{"plain", "reload failed", 100, "reload failed"},
		{"empty", "", 100, ""},
		{"only white space", " \r\n\t ", 100, ""},
		{"trimmed", "  a\n", 100, "a"},
		{"lines become one", "nginx: [emerg] x\r\n\tnginx: test failed\n", 100, "nginx: [emerg] x nginx: test failed"},
		{"exactly the limit", "abcdef", 6, "abcdef"},
		{"trailing white space does not count", "abcdef\n\n", 6, "abcdef"},
		{"cut", "abcdefg", 6, "abc…"},
		{"cut after a space", "ab cdefg", 6, "ab…"},
		{"cut never splits a character", "ééééé", 8, "éé…"},
		{"no room for the ellipsis", "abcd", 2, ""},
		{"no room at all", "abcd", 0, ""},
		{"negative limit", "abcd", -1, ""},
		{"terminal escape", "\x1b[31mred\x1b]0;title\x07", 100, "\ufffd[31mred\ufffd]0;title\ufffd"},
		{"C1 control", "a\u009b31m", 100, "a\ufffd31m"},
		{"NUL and DEL", "a\x00b\x7f", 100, "a\ufffdb\ufffd"},
		{"invalid UTF-8", "a\xff\xfeb", 100, "a\ufffd\ufffdb"},
		{"bidirectional override", "a\u202egnp.exe\u2066", 100, "a\ufffdgnp.exe\ufffd"},
		{"zero width", "pay\u200bpal\ufeff", 100, "pay\ufffdpal\ufffd"},
		{"line separator", "a\u2028b\u0085c", 100, "a b c"},
		{"other scripts stay", "證書 сертификат ✓", 100, "證書 сертификат ✓"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := printable.Line(test.text, test.limit); got != test.want {
				t.Errorf("Line(%q, %d) = %q, want %q", test.text, test.limit, got, test.want)
			}
			if got := printable.Line([]byte(test.text), test.limit); got != test.want {
				t.Errorf("Line([]byte(%q), %d) = %q, want %q", test.text, test.limit, got, test.want)
			}
		})
	}
}

func TestWriter(t *testing.T) {
	for text, want := range map[string]string{
		"a\n\tb  c\n":                      "a\n\tb  c\n",
		"\x1b[31mred\x1b[0m\r\x07\x00\x7f": "\ufffd[31mred\ufffd[0m\ufffd\ufffd\ufffd\ufffd",
		"a\u202eb\u009bc\u2028d\u200b":     "a\ufffdb\ufffdc\ufffdd\ufffd",
		"\xff證書 →":                         "\ufffd證書 →",
		"":                                 "",
	} {
		var out strings.Builder
		n, err := printable.Writer{Out: &out}.Write([]byte(text))
		if out.String() != want || n != len(text) || err != nil {
			t.Errorf("of %q came %q, %d, %v; want %q", text, out.String(), n, err, want)
		}
	}
}

func FuzzLine(f *testing.F) {
	f.Add("plain text", 100)
	f.Add("\x1b[2J\x1b[H \u202e é\xff\n", 7)
	f.Add(strings.Repeat("é ", 50), 20)
	f.Fuzz(func(t *testing.T, text string, limit int) {
		got := printable.Line(text, limit)
		if len(got) > max(limit, 0) {
			t.Errorf("Line(%q, %d) has %d bytes", text, limit, len(got))
		}
		if !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("Line(%q, %d) = %q does not print", text, limit, got)
		}
		if strings.TrimSpace(got) != got || strings.Contains(got, "  ") {
			t.Errorf("Line(%q, %d) = %q has white space left", text, limit, got)
		}
		if again := printable.Line(got, limit); again != got {
			t.Errorf("Line(%q, %d) = %q, and of that %q", text, limit, got, again)
		}
	})
}

// TestQuote checks that quoted text is short and has nothing that a terminal would act on.
func TestQuote(t *testing.T) {
	got := printable.Quote("\x1b[31m\u202e" + strings.Repeat("é", 200))
	if len(got) > 900 || strings.ContainsAny(got, "\x1b\u202e") || !strings.Contains(got, "...") {
		t.Errorf("got %s", got)
	}
}
