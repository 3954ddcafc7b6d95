package architecture_test

import (
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// page is one Markdown file of the documentation.
type page struct {
	name string // relative to the module
	text string
}

// docPages returns README.md and everything below docs.
func docPages(t *testing.T) []page {
	t.Helper()
	var pages []page
	for _, pattern := range []string{"README.md", "docs/*.md", "docs/targets/*.md"} {
		files, err := filepath.Glob(filepath.Join("..", "..", filepath.FromSlash(pattern)))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			name, err := filepath.Rel(filepath.Join("..", ".."), file)
			if err != nil {
				t.Fatal(err)
			}
			pages = append(pages, page{filepath.ToSlash(name), string(text)})
		}
	}
	if len(pages) < 20 {
		t.Fatalf("found %d pages: the test looks at the wrong tree", len(pages))
	}
	return pages
}

// prose returns the lines of a page by their number, without code blocks.
func (p page) prose() map[int]string {
	lines, code := make(map[int]string), false
	for i, line := range strings.Split(p.text, "\n") {
		switch {
		case strings.HasPrefix(strings.TrimSpace(line), "```"):
			code = !code
		case !code:
			lines[i+1] = line
		}
	}
	return lines
}

// anchors returns the fragments that GitHub gives to the page's headings.
func (p page) anchors() map[string]bool {
	anchors := make(map[string]bool)
	for _, line := range p.prose() {
		heading, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " ")
		if !ok || !strings.HasPrefix(line, "#") {
			continue
		}
		anchors[strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, heading)] = true
	}
	return anchors
}

// TestDocsLinks checks that each relative link leads to a file, and its fragment to a heading
// there.
func TestDocsLinks(t *testing.T) {
	pages := docPages(t)
	byName := make(map[string]page)
	for _, p := range pages {
		byName[p.name] = p
	}
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	found := 0
	for _, p := range pages {
		for number, line := range p.prose() {
			for _, match := range link.FindAllStringSubmatch(line, -1) {
				if strings.Contains(match[1], "://") {
					continue
				}
				found++
				file, fragment, _ := strings.Cut(match[1], "#")
				target := p.name
				if file != "" {
					target = path.Join(path.Dir(p.name), file)
				}
				if _, err := os.Stat(filepath.Join("..", "..", filepath.FromSlash(target))); err != nil {
					t.Errorf("%s:%d: %s: there is no %s", p.name, number, match[1], target)
				} else if fragment != "" && !byName[target].anchors()[fragment] {
					t.Errorf("%s:%d: %s has no heading #%s", p.name, number, target, fragment)
				}
			}
		}
	}
	if found < 60 {
		t.Errorf("the pages have %d relative links: the pattern no longer matches them", found)
	}
}

// TestDocsTables checks that each row of a table has as many cells as its heading: a row that is
// torn over two lines, or an unescaped |, loses text.
func TestDocsTables(t *testing.T) {
	rows := 0
	for _, p := range docPages(t) {
		lines, cells := p.prose(), 0
		for number := 1; number <= strings.Count(p.text, "\n")+1; number++ {
			line := strings.TrimSpace(lines[number])
			if !strings.HasPrefix(line, "|") {
				if cells > 0 && line != "" && !strings.HasPrefix(line, "<!--") {
					t.Errorf("%s:%d: a table ends without an empty line", p.name, number)
				}
				cells = 0
				continue
			}
			rows++
			n := strings.Count(line, "|") - strings.Count(line, `\|`) - 1
			if cells == 0 {
				cells = n
			}
			if n != cells || !strings.HasSuffix(line, "|") {
				t.Errorf("%s:%d: the row has %d cells, its table %d", p.name, number, n, cells)
			}
		}
	}
	if rows < 300 {
		t.Errorf("the pages have %d rows of tables: the test no longer finds them", rows)
	}
}

// TestDocsNameFiles checks that each file of the project that docs and messages name exists.
func TestDocsNameFiles(t *testing.T) {
	inDocs := regexp.MustCompile("`((?:cmd|internal|deploy|docs)/[A-Za-z0-9_./-]+)`")
	inMessages := regexp.MustCompile(`\b(docs/[a-z0-9/-]+\.md)\b`)
	exists := func(name string) bool {
		_, err := os.Stat(filepath.Join("..", "..", filepath.FromSlash(name)))
		return err == nil
	}
	found := 0
	for _, p := range docPages(t) {
		for number, line := range p.prose() {
			for _, match := range inDocs.FindAllStringSubmatch(line, -1) {
				name := match[1]
				// `cmd/certctl-agent.TestGateway` is a test, and docs/architecture.md adds a connector.
				if strings.Contains(name, ".Test") || strings.Contains(name, "/stunnel") {
					continue
				}
				found++
				if !exists(name) {
					t.Errorf("%s:%d: there is no %s", p.name, number, name)
				}
			}
		}
	}
	for _, s := range sources(t) {
		for _, text := range literals(s.file, nil) {
			if s.test || strings.Contains(text, "://") {
				continue
			}
			for _, name := range inMessages.FindAllString(text, -1) {
				found++
				if !exists(name) {
					t.Errorf("%s: a message names %s, which does not exist", s.name, name)
				}
			}
		}
	}
	if found < 50 {
		t.Errorf("found %d names of files: the patterns no longer match them", found)
	}
}

// TestDocsChangedMessages checks the log messages in the section "Changed messages" of
// docs/operations.md: the program must log one of the two texts of each change, and not both.
func TestDocsChangedMessages(t *testing.T) {
	var logged []string
	for _, s := range sources(t) {
		if !s.test && !testOnly(s.dir) {
			logged = append(logged, literals(s.file, nil)...)
		}
	}
	logs := func(message string) bool {
		pattern := regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(message), "…", ".*") + "$")
		return slices.ContainsFunc(logged, pattern.MatchString)
	}
	runbook, err := os.ReadFile(filepath.Join("..", "..", "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(runbook), "\n## Changed messages\n")
	changes := regexp.MustCompile(`(?m)^(\S.*)\n  → (.*)$`).FindAllStringSubmatch(section, -1)
	for _, change := range changes {
		before, now := logs(change[1]), logs(change[2])
		if before == now {
			t.Errorf("the program logs %q: %v, %q: %v; want one of them", change[1], before, change[2], now)
		}
	}
	if len(changes) < 10 {
		t.Errorf("the section has %d changes: the pattern no longer matches them", len(changes))
	}
}

// TestDocsWidth checks that prose fits into 100 columns. Tables and code blocks may be wider, and so
// may a line without a space.
func TestDocsWidth(t *testing.T) {
	const most = 100
	for _, p := range docPages(t) {
		for number, line := range p.prose() {
			text := strings.TrimSpace(line)
			if strings.HasPrefix(text, "|") || !strings.Contains(text, " ") {
				continue
			}
			if n := utf8.RuneCountInString(line); n > most {
				t.Errorf("%s:%d: %d columns, want at most %d", p.name, number, n, most)
			}
		}
	}
}
