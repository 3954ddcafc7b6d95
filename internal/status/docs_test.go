package status

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocsNameMetrics compares the table of metrics in docs/operations.md with what an agent that
// has done everything exports: it must have each metric, with labels that exist, and no other. The
// examples of all pages must name metrics and labels that exist.
func TestDocsNameMetrics(t *testing.T) {
	docs := filepath.Join("..", "..", "docs")
	runbook, err := os.ReadFile(filepath.Join(docs, "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	labels := make(map[string][]string) // by metric
	for line := range strings.Lines(metricsOf(t, busy())) {
		if match := familyLine.FindStringSubmatch(strings.TrimSpace(line)); match != nil {
			labels[strings.TrimPrefix(match[2], prefix)] = nil
		} else if match := sampleLine.FindStringSubmatch(strings.TrimSpace(line)); match != nil {
			name := strings.TrimPrefix(match[1], prefix)
			for _, label := range regexp.MustCompile(`([a-z_]+)="`).FindAllStringSubmatch(match[2], -1) {
				labels[name] = append(labels[name], label[1])
			}
		}
	}

	_, table, found := strings.Cut(string(runbook), "\n| metric |")
	table, _, _ = strings.Cut(table, "\n\n")
	if !found {
		t.Fatal("docs/operations.md has no table of metrics")
	}
	named := make(map[string]bool)
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 2 {
			continue
		}
		for _, match := range regexp.MustCompile("`([a-z_]+)(\\{[^`]*\\})?`").FindAllStringSubmatch(cells[1], -1) {
			named[match[1]] = true
			for _, label := range regexp.MustCompile(`[a-z_]+`).FindAllString(match[2], -1) {
				if !slices.Contains(labels[match[1]], label) {
					t.Errorf("docs/operations.md: %s has no label %s", match[1], label)
				}
			}
		}
	}
	for name := range named {
		if _, ok := labels[name]; !ok {
			t.Errorf("docs/operations.md has the metric %s, which does not exist", name)
		}
	}
	for name := range labels {
		// Histogram samples have additional suffixes.
		if family := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, ""); !named[family] {
			t.Errorf("docs/operations.md lacks the metric %s", name)
		}
	}

	pages, err := filepath.Glob(filepath.Join(docs, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	examples := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(prefix+`([a-z_]+)(?:\{([a-z_]+)=)?`).FindAllStringSubmatch(string(text), -1) {
			examples++
			if known, ok := labels[match[1]]; !ok || match[2] != "" && !slices.Contains(known, match[2]) {
				t.Errorf("%s: there is no metric %s", filepath.Base(page), match[0])
			}
		}
	}
	if examples < 4 {
		t.Errorf("the docs use metrics in %d places: the pattern no longer matches them", examples)
	}
}
