package buildinfo

import (
	"regexp"
	"runtime/debug"
	"testing"
)

func TestVersion(t *testing.T) {
	module := func(version string) *debug.BuildInfo {
		return &debug.BuildInfo{Main: debug.Module{Version: version}}
	}
	for _, test := range []struct {
		stamped string
		info    *debug.BuildInfo
		want    string
	}{
		{"1.2.3", module("v9.9.9"), "1.2.3"},
		{"", module("v1.0.1-0.20260102030405-abcdef123456"), "v1.0.1-0.20260102030405-abcdef123456"},
		{"", module("(devel)"), "devel"},
		{"", module(""), "devel"},
		{"", nil, "devel"},
	} {
		if got := versionOf(test.stamped, test.info); got != test.want {
			t.Errorf("versionOf(%q, %v) = %q, want %q", test.stamped, test.info, got, test.want)
		}
	}
}

func TestCommit(t *testing.T) {
	vcs := func(revision, modified string) *debug.BuildInfo {
		return &debug.BuildInfo{Settings: []debug.BuildSetting{{Key: "vcs.revision", Value: revision}, {Key: "vcs.modified", Value: modified}}}
	}
	const full = "0123456789abcdef0123456789abcdef01234567"
	for _, test := range []struct {
		stamped string
		info    *debug.BuildInfo
		want    string
	}{
		{"abc", vcs(full, "true"), "abc"},
		{"", vcs(full, "false"), "0123456789ab"},
		{"", vcs(full, "true"), "0123456789ab-dirty"},
		{"", vcs("", "true"), ""},
		{"", &debug.BuildInfo{}, ""},
		{"", nil, ""},
	} {
		if got := commitOf(test.stamped, test.info); got != test.want {
			t.Errorf("commitOf(%q, %v) = %q, want %q", test.stamped, test.info, got, test.want)
		}
	}
}

// TestUserAgent holds the format that control planes expect.
func TestUserAgent(t *testing.T) {
	if got := UserAgent(); !regexp.MustCompile(`^certctl-agent/\S+ \([a-z0-9]+/[a-z0-9]+\)$`).MatchString(got) {
		t.Errorf("UserAgent = %q", got)
	}
}
