package config

import (
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"certctl-agent/internal/testing/needs"
)

// envFileTests are environment files with their values. Those with a $ come from systemd.exec(5);
// the others are also compared with systemd's own parser, if it is installed.
var envFileTests = []struct {
	name, file string
	want       map[string]string
}{
	{"empty", "", map[string]string{}},
	{"plain", "A=b\nC=d\n", map[string]string{"A": "b", "C": "d"}},
	{"no final line end", "A=b", map[string]string{"A": "b"}},
	{"comments", "# A=1\n; B=2\n  # C=3\nD=4 # no comment\n", map[string]string{"D": "4 # no comment"}},
	{"blanks around", "  A =  b c  \n\tB\t=\td\t\n", map[string]string{"A": "b c", "B": "d"}},
	{"empty value", "A=\nB=\"\"\nC=x\n", map[string]string{"A": "", "B": "", "C": "x"}},
	{"the last one counts", "A=1\nA=2\n", map[string]string{"A": "2"}},
	{"carriage returns", "A=b\r\nC=\"d\"\r\n", map[string]string{"A": "b", "C": "d"}},
	{"equals signs", "A=b=c==\n", map[string]string{"A": "b=c=="}},
	{"single quotes", `A='a\b "c" '` + "\n", map[string]string{"A": `a\b "c" `}},
	{"double quotes", `A="a\b \"c\" \\ "` + "\n", map[string]string{"A": `a\b "c" \ `}},
	{"parts are joined", `A="b" 'c'  d e ` + "\n", map[string]string{"A": "bcd e"}},
	{"no quote after text", `A=b"c" 'd'` + "\n", map[string]string{"A": `b"c" 'd'`}},
	{"escapes without quotes", `A=a\ \"b\n\\` + "\n", map[string]string{"A": `a "bn\`}},
	{"escaped blank at the end", "A=b \\ \n", map[string]string{"A": "b  "}},
	{"continued without quotes", "A=b\\\nc\\\n  d\nE=f\n", map[string]string{"A": "bc  d", "E": "f"}},
	{"continued at once", "A=\\\n  b\n", map[string]string{"A": "  b"}},
	{"continued in double quotes", "A=\"b\\\nc\"\n", map[string]string{"A": "bc"}},
	{"lines in quotes", "A='b\nc'\nD=\"e\nf\"\n", map[string]string{"A": "b\nc", "D": "e\nf"}},
	{"backslash at the end", "A=b\\", map[string]string{"A": "b"}},
	{"blanks before a continuation", "A=b  \\\n\nC=d\n", map[string]string{"A": "b  ", "C": "d"}},
	{"continued with a carriage return", "A=b\\\r\nC=d\r\n", map[string]string{"A": "b", "C": "d"}},
	{"carriage return in double quotes", "A=\"b\\\rc\"\n", map[string]string{"A": "b\\\rc"}},
	{"lines that are none", "A\n=b\n1=c\nB C=d\nD=e\n", map[string]string{"D": "e"}},
	{"semicolons", "A=nginx -t; systemctl reload nginx\n", map[string]string{"A": "nginx -t; systemctl reload nginx"}},
	{"dollars stay", "A=$b ${c}\nD=\"\\$e $f\"\n", map[string]string{"A": "$b ${c}", "D": "$e $f"}},
	{"backquotes", "A=\"\\`b\\` `c`\"\n", map[string]string{"A": "`b` `c`"}},
	{"other letters", "A=ä\"ö\n", map[string]string{"A": "ä\"ö"}},
}

func values(f *envFile) map[string]string {
	all := make(map[string]string)
	for _, a := range f.assignments {
		all[a.key] = a.value
	}
	return all
}

func TestParseEnvFile(t *testing.T) {
	for _, test := range envFileTests {
		t.Run(test.name, func(t *testing.T) {
			got, err := parseEnvFile([]byte(test.file))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(values(got), test.want) {
				t.Errorf("parseEnvFile(%q) = %q, want %q", test.file, values(got), test.want)
			}
		})
	}
}

// TestParseEnvFileLikeSystemd compares with the only program of systemd that parses such files
// without a running manager. It expands dollars, which EnvironmentFile= does not, so files with
// dollars are skipped.
func TestParseEnvFileLikeSystemd(t *testing.T) {
	for _, test := range envFileTests {
		if strings.ContainsRune(test.file, '$') {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			want := maps.Clone(test.want)
			maps.DeleteFunc(want, func(_, value string) bool { return value == "" }) // the program does not print those
			if got := systemdReads(t, test.file); !maps.Equal(got, want) {
				t.Errorf("systemd reads %q as %q, want %q", test.file, got, want)
			}
		})
	}
}

// TestParseEnvFileLikeSystemdAtRandom does the same with random files of special characters.
func TestParseEnvFileLikeSystemdAtRandom(t *testing.T) {
	pieces := []string{"A", "B", "C=", "D=\"", "=", "\"", "'", "\\", "\\\n", "\n", "\n", "\r", " ", "\t", "x", "y z", "#", ";"}
	rnd := rand.New(rand.NewPCG(1, 1))
	compared := 0
	for range 200 {
		var file strings.Builder
		for range 3 + rnd.IntN(25) {
			file.WriteString(pieces[rnd.IntN(len(pieces))])
		}
		f, err := parseEnvFile([]byte(file.String()))
		if err != nil || len(f.assignments) == 0 || slices.ContainsFunc(f.assignments, func(a assignment) bool { return a.value == "" }) ||
			strings.Contains(strings.Join(f.warnings, ""), "backslash") {
			continue // intended differences from systemd, or of the program from EnvironmentFile=
		}
		compared++
		if got, want := systemdReads(t, file.String()), values(f); !maps.Equal(got, want) {
			t.Errorf("systemd reads %q as %q, want %q", file.String(), got, want)
		}
	}
	if compared < 20 {
		t.Errorf("only %d files were compared", compared)
	}
}

func systemdReads(t testing.TB, file string) map[string]string {
	t.Helper()
	generator := needs.Need(t, "/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator")
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, "environment.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	read := func(file string) []string {
		if err := os.WriteFile(filepath.Join(home, "environment.d", "zz.conf"), []byte(file), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), generator)
		cmd.Env = []string{"XDG_CONFIG_HOME=" + home, "HOME=" + home}
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	}
	others := read("") // from this machine's environment.d
	got := make(map[string]string)
	for _, line := range read(file) {
		key, value, _ := strings.Cut(line, "=")
		ours := line != ""
		for _, other := range others {
			ours = ours && line != other
		}
		if !ours {
			continue
		}
		if strings.HasPrefix(value, `"`) {
			// The program escapes as in C, and also dollars and backquotes.
			unquoted, err := strconv.Unquote(strings.NewReplacer("\\`", "`", `\$`, `$`).Replace(value))
			if err != nil {
				t.Fatalf("%s: %v", value, err)
			}
			value = unquoted
		}
		got[key] = value
	}
	return got
}

func TestParseEnvFileErrors(t *testing.T) {
	for _, test := range []struct{ file, want string }{
		{"A=b\nC=\"d\nE=f\n", "line 2 opens a quote that is never closed"},
		{"A='b", "line 1 opens a quote"},
		{"A=b\nexport C=d\n", "line 2 begins with export"},
		{"A=b\nC=\x00\n", "line 2 contains a NUL"},
		{"A=b\n\nC=\xff\n", "line 3 is not UTF-8"},
	} {
		if _, err := parseEnvFile([]byte(test.file)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("parseEnvFile(%q): error %v, want one with %q", test.file, err, test.want)
		}
	}
}

func TestParseEnvFileWarnings(t *testing.T) {
	for _, test := range []struct{ file, want string }{
		{"A=b\nC\n", "line 2 is ignored: it has no equals sign"},
		{"A-B=c\n", `line 1 is ignored: "A-B" is not a valid variable name`},
		{"# a \\\nA=b\n", "line 1 is a comment that ends in a backslash"},
	} {
		f, err := parseEnvFile([]byte(test.file))
		if err != nil {
			t.Fatal(err)
		}
		if len(f.warnings) != 1 || !strings.Contains(f.warnings[0], test.want) {
			t.Errorf("parseEnvFile(%q) warns %q, want %q", test.file, f.warnings, test.want)
		}
	}
}

func FuzzParseEnvFile(f *testing.F) {
	for _, test := range envFileTests {
		f.Add([]byte(test.file))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := parseEnvFile(data)
		if err != nil {
			return
		}
		end := 0
		for _, a := range file.assignments {
			if a.start < end || a.end <= a.start || a.end > len(data) || !utf8.ValidString(a.value) {
				t.Fatalf("assignment %+v after %d of %d bytes", a, end, len(data))
			}
			end = a.end
			// An assignment alone parses to the same value.
			alone, err := parseEnvFile(data[a.start:a.end])
			if err != nil || len(alone.assignments) != 1 || alone.assignments[0].value != a.value {
				t.Fatalf("%q alone is read as %+v, %v", data[a.start:a.end], alone, err)
			}
		}
	})
}

// FuzzSetKey: the new value is read back, and nothing else changes. setKey checks that itself; this
// test compares its result with the old file.
func FuzzSetKey(f *testing.F) {
	for _, test := range envFileTests {
		f.Add([]byte(test.file), "value of `all` \"$kinds\" \\")
	}
	f.Fuzz(func(t *testing.T, data []byte, value string) {
		edited, err := setKey(data, "A", value)
		if err != nil {
			return
		}
		want, err := parseEnvFile(data)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseEnvFile(edited)
		if err != nil {
			t.Fatalf("%q cannot be read: %v", edited, err)
		}
		all := values(want)
		all["A"] = value
		if !reflect.DeepEqual(values(got), all) {
			t.Fatalf("setting A=%q in %q makes %q, which is read as %q", value, data, edited, values(got))
		}
		if again, err := setKey(edited, "A", value); err != nil || string(again) != string(edited) {
			t.Fatalf("setting A=%q again in %q makes %q, %v", value, edited, again, err)
		}
	})
}
