package deploy_test

import (
	"os/exec"
	"strings"
	"testing"

	"certctl-agent/internal/config"
	"certctl-agent/internal/testing/needs"
)

const manPage = "man/certctl-agent.8"

func TestManPageIsClean(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), needs.Need(t, "man"), "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", manPage)
	cmd.Env = append(cmd.Environ(), "LC_ALL=C.UTF-8", "MANWIDTH=80")
	var complaints strings.Builder
	cmd.Stderr = &complaints
	if err := cmd.Run(); err != nil || complaints.Len() > 0 {
		t.Errorf("man: %v\n%s", err, complaints.String())
	}
}

func TestManPageHasEverySetting(t *testing.T) {
	text := readFile(t, manPage)
	// Load returns the settings in spite of its error about missing ones.
	cfg, _ := config.Load(nil, func(string) string { return "" }, config.Options{DefaultFile: "none"})
	if cfg == nil || len(cfg.Values()) == 0 {
		t.Fatal("config.Load returned no settings")
	}
	for _, value := range cfg.Values() {
		if value.Flag == "" {
			continue // a variable of all programs, such as HTTPS_PROXY
		}
		if entry := ".It Fl " + value.Flag + " , Ev " + value.Variable + "\n"; !strings.Contains(text, entry) {
			t.Errorf("the man page lacks %q", entry)
		}
	}
}
