package deploy_test

import (
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
)

var exposure = regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`)

func TestUnitExposure(t *testing.T) {
	analyze := needs.Need(t, "systemd-analyze")
	for _, test := range []struct {
		unit string
		most float64
	}{
		{"certctl-agent.service", 3.0},
		{"certctl-agent-unprivileged.service", 1.5},
	} {
		t.Run(test.unit, func(t *testing.T) {
			report := output(t, analyze, "security", "--offline=yes", "--no-pager", filepath.Join("systemd", test.unit))
			match := exposure.FindStringSubmatch(report)
			if match == nil {
				t.Fatalf("no exposure level in:\n%s", report)
			}
			got, err := strconv.ParseFloat(match[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			if got > test.most {
				t.Errorf("exposure %.1f, want at most %.1f:\n%s", got, test.most, report)
			}
			t.Logf("exposure %.1f", got)
		})
	}
}

func TestUnitsAreValid(t *testing.T) {
	analyze := needs.Need(t, "systemd-analyze")
	for _, unit := range []string{"certctl-agent.service", "certctl-agent-unprivileged.service"} {
		// verify requires the program, and the agent is not installed here.
		text := strings.ReplaceAll(readFile(t, filepath.Join("systemd", unit)), "/usr/bin/certctl-agent", "/bin/true")
		file := filepath.Join(t.TempDir(), unit)
		writeFile(t, file, text, 0o644)
		if out := output(t, analyze, "verify", "--man=no", file); out != "" {
			t.Errorf("%s: %s", unit, out)
		}
	}
}

// TestUnitClosesWhatTheAgentRefuses checks that the agent also refuses the unit's read-only paths.
func TestUnitClosesWhatTheAgentRefuses(t *testing.T) {
	policy := new(policy.Policy)
	closed := 0
	for line := range strings.Lines(readFile(t, "systemd/certctl-agent.service")) {
		list, ok := strings.CutPrefix(strings.TrimSpace(line), "ReadOnlyPaths=")
		if !ok {
			continue
		}
		for path := range strings.FieldsSeq(list) {
			path = strings.TrimPrefix(path, "-")
			if closed++; policy.CheckPath(path) == nil || policy.CheckPath(path+"/x") == nil {
				t.Errorf("%s is accepted as a destination", path)
			}
		}
	}
	if closed < 40 {
		t.Errorf("found only %d paths", closed)
	}
}

// TestUnitsOutlastTheGrace checks that service managers wait longer than the agent's grace.
func TestUnitsOutlastTheGrace(t *testing.T) {
	for _, file := range []struct{ name, want string }{
		{"systemd/certctl-agent.service", "TimeoutStopSec=90s"},
		{"systemd/certctl-agent-unprivileged.service", "TimeoutStopSec=90s"},
		{"docker/compose.yaml", "stop_grace_period: 90s"},
		{"kubernetes/daemonset.yaml", "terminationGracePeriodSeconds: 90"},
		{"kubernetes/deployment.yaml", "terminationGracePeriodSeconds: 90"},
		{"launchd/net.certctl.agent.plist", "<key>ExitTimeOut</key>\n\t<integer>90</integer>"},
	} {
		if !strings.Contains(readFile(t, file.name), file.want) {
			t.Errorf("%s lacks %q", file.name, file.want)
		}
	}
}
