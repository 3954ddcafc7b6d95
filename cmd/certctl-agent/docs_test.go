package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/config"
)

// daemonFlags in a subcommand's flags means all flags of the daemon.
const daemonFlags = "flags of the daemon"

// usageFlags returns the flags that the usage lines of a subcommand's help have.
func usageFlags(help string) []string {
	usage, _, _ := strings.Cut(help, "\n\n")
	var flags []string
	for _, match := range regexp.MustCompile(`[\[| ]-([a-z][a-z-]*)`).FindAllStringSubmatch(usage, -1) {
		flags = append(flags, match[1])
	}
	if strings.Contains(usage, daemonFlags) {
		flags = append(flags, daemonFlags)
	}
	slices.Sort(flags)
	return flags
}

// TestUsageHasFlags checks that each subcommand takes the flags of its usage: given one of them
// and an unknown flag, it complains of the unknown one.
func TestUsageHasFlags(t *testing.T) {
	for _, c := range subcommands() {
		for _, name := range usageFlags(c.help) {
			if name == daemonFlags {
				name = "agent-id"
			}
			if code, _, stderr := inProcess(t, nil, c.name, "-"+name+"=1", "-no-such-flag"); code != exitUsage || !strings.Contains(stderr, "no-such-flag") {
				t.Errorf("%s -%s: exit %d, %s", c.name, name, code, stderr)
			}
		}
	}
}

// TestManPageHasSubcommands compares the synopsis of the man page with the usage of each subcommand.
func TestManPageHasSubcommands(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "deploy", "man", "certctl-agent.8"))
	if err != nil {
		t.Fatal(err)
	}
	_, synopsis, _ := strings.Cut(string(page), "\n.Sh SYNOPSIS\n")
	synopsis, description, _ := strings.Cut(synopsis, "\n.Sh DESCRIPTION\n")
	got := make(map[string][]string)
	for form := range strings.SplitSeq(synopsis, ".Nm\n") {
		name := regexp.MustCompile(`(?m)^\.Cm (\S+)`).FindStringSubmatch(form)
		if name == nil {
			continue // the daemon
		}
		flags := []string{}
		for line := range strings.Lines(form) {
			if strings.TrimSpace(line) == ".Op Ar flags" {
				flags = append(flags, daemonFlags)
			} else if fields := strings.Fields(strings.TrimPrefix(line, ".")); slices.Contains(fields, "Fl") {
				// ".Fl a Ar value", ".Op Fl a Ar value", or ".Op Fl a | b | c"
				fields = fields[slices.Index(fields, "Fl")+1:]
				flags = append(flags, fields[0])
				for i, field := range fields {
					if field == "|" {
						flags = append(flags, fields[i+1])
					}
				}
			}
		}
		slices.Sort(flags)
		got[name[1]] = flags
		if !strings.Contains(description, "\n.It Cm "+name[1]+"\n") {
			t.Errorf("the man page does not describe %s", name[1])
		}
	}
	for _, c := range subcommands() {
		if want := usageFlags(c.help); !slices.Equal(got[c.name], want) {
			t.Errorf("the man page has %s with the flags %q, its usage %q", c.name, got[c.name], want)
		}
		delete(got, c.name)
	}
	for name := range got {
		t.Errorf("the man page has %s, which does not exist", name)
	}
}

// TestDocsNameCommands checks that the command lines of the docs, the man page, the unit files and
// the like name subcommands and flags that exist.
func TestDocsNameCommands(t *testing.T) {
	daemon := []string{"h"}
	cfg, _ := config.Load(nil, func(string) string { return "" }, config.Options{DefaultFile: "none"})
	for _, value := range cfg.Values() {
		daemon = append(daemon, value.Flag)
	}
	takes := map[string][]string{"": daemon}
	for _, c := range subcommands() {
		takes[c.name] = append(usageFlags(c.help), "h")
		if slices.Contains(takes[c.name], daemonFlags) {
			takes[c.name] = append(takes[c.name], daemon...)
		}
	}

	// Words up to whatever ends a command, with quotes and continued lines.
	command := regexp.MustCompile("certctl-agent((?:(?: +\\\\\n)? +(?:\"[^\"]*\"|[^\\s`|;&)>,.\"\\\\][^\\s`|;&)>\"\\\\]*))*)")
	code := regexp.MustCompile("(?s)```.*?```|`[^`]+`")
	found := 0
	check := func(file, text string) {
		for _, match := range command.FindAllStringSubmatch(text, -1) {
			words := strings.Fields(strings.ReplaceAll(match[1], "\\\n", " "))
			name := ""
			if len(words) > 0 && regexp.MustCompile(`^[a-z][a-z-]+$`).MatchString(words[0]) {
				name = words[0]
			}
			flags, ok := takes[name]
			if !ok {
				t.Errorf("%s: there is no subcommand %q: %s", file, name, match[0])
				continue
			}
			found++
			for _, word := range words {
				if flag := regexp.MustCompile(`^-([a-z][a-z-]*)`).FindStringSubmatch(word); flag != nil && !slices.Contains(flags, flag[1]) {
					t.Errorf("%s: %q does not take -%s: %s", file, name, flag[1], match[0])
				}
			}
		}
	}
	for _, root := range []string{"README.md", "docs", "deploy"} {
		err := filepath.WalkDir(filepath.Join("..", "..", root), func(file string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			data, err := os.ReadFile(file)
			text := string(data)
			switch filepath.Ext(file) {
			case ".md":
				for _, part := range code.FindAllString(text, -1) {
					if !strings.ContainsAny(part, "─│") && !strings.HasPrefix(part, "```text") { // not a picture or messages
						check(file, part)
					}
				}
			case ".8":
				_, examples, _ := strings.Cut(text, "\n.Sh EXAMPLES\n")
				check(file, examples)
			case ".service", ".yaml", ".plist":
				// Elsewhere the name is that of a unit, a user or an image.
				for line := range strings.Lines(text) {
					if strings.Contains(line, "bin/certctl-agent ") || strings.Contains(line, "certctl-agent register") {
						check(file, line)
					}
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 40 {
		t.Errorf("found %d command lines: the pattern no longer matches them", found)
	}
}
