package config

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the reference in docs/configuration.md anew")

// reference is the table of docs/configuration.md.
func reference() string {
	var table strings.Builder
	table.WriteString("| flag | variable | default | meaning |\n| --- | --- | --- | --- |\n")
	for _, s := range settings(new(Config)) {
		shown := s.defaults
		if shown == "" {
			shown = "`" + s.value + "`"
		}
		shown = strings.Replace(shown, defaultFile, "`"+defaultFile+"`", 1)
		fmt.Fprintf(&table, "| `-%s` | `%s` | %s | %s |\n", s.flag, s.variable, shown, s.doc)
	}
	return table.String()
}

func TestReferenceIsUpToDate(t *testing.T) {
	const begin, end = "<!-- The table is made from the code: go test ./internal/config -update -->\n", "<!-- end of the table -->\n"
	path := filepath.Join("..", "..", "docs", "configuration.md")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), begin)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no marked table", path)
	}
	if *update {
		if err := os.WriteFile(path, []byte(before+begin+reference()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if old != reference() {
		t.Errorf("the table in %s differs from the code: go test ./internal/config -update", path)
	}
	for name := range strings.FieldsSeq(strings.NewReplacer("`", " ", "|", " ", ",", " ", ".", " ", "(", " ", ")", " ", "=", " ", ";", " ", ":", " ").Replace(before + after)) {
		if strings.HasPrefix(name, "CERTCTL_") && !strings.Contains(reference(), "`"+name+"`") && name != "CERTCTL_" {
			t.Errorf("%s names %s, which is not a setting", path, name)
		}
	}
}

// TestNamesFollowTheRule: a flag has the name of its variable without the prefix, except for names
// that existing fleets use.
func TestNamesFollowTheRule(t *testing.T) {
	old := map[string]string{"server": "CERTCTL_SERVER_URL", "name": "CERTCTL_AGENT_NAME",
		"ca-bundle": "CERTCTL_SERVER_CA_BUNDLE_PATH", "insecure-skip-verify": "CERTCTL_SERVER_TLS_INSECURE_SKIP_VERIFY"}
	for _, s := range settings(new(Config)) {
		want, known := old[s.flag]
		if !known {
			want = "CERTCTL_" + strings.ToUpper(strings.ReplaceAll(s.flag, "-", "_"))
		}
		if s.variable != want {
			t.Errorf("-%s has the variable %s, want %s", s.flag, s.variable, want)
		}
	}
}

func TestUsageNamesEverySetting(t *testing.T) {
	var text strings.Builder
	Usage(&text)
	for _, s := range settings(new(Config)) {
		if !strings.Contains(text.String(), "  -"+s.flag+" ("+s.variable+")\n") {
			t.Errorf("the help text does not name -%s", s.flag)
		}
	}
}
