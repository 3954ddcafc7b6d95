// Package buildinfo says which version of the agent this is.
package buildinfo

import (
	"cmp"
	"runtime"
	"runtime/debug"
)

// Set by the linker: -X certctl-agent/internal/buildinfo.version=1.2.3.
var (
	version string
	commit  string
)

// unreleased is the version of a build that says nothing better of itself.
const unreleased = "devel"

// Version is the version that the build was given, else that of the module,
// else "devel".
func Version() string {
	info, _ := debug.ReadBuildInfo()
	return versionOf(version, info)
}

// Commit is the commit that was built, "" where that is not known. A build by
// the go command alone marks a changed tree with "-dirty".
func Commit() string {
	info, _ := debug.ReadBuildInfo()
	return commitOf(commit, info)
}

// UserAgent is what the agent calls itself in HTTP requests.
func UserAgent() string {
	return "certctl-agent/" + Version() + " (" + runtime.GOOS + "/" + runtime.GOARCH + ")"
}

func versionOf(stamped string, info *debug.BuildInfo) string {
	if stamped == "" && info != nil && info.Main.Version != "(devel)" {
		stamped = info.Main.Version
	}
	return cmp.Or(stamped, unreleased)
}

func commitOf(stamped string, info *debug.BuildInfo) string {
	if stamped != "" || info == nil {
		return stamped
	}
	settings := make(map[string]string)
	for _, setting := range info.Settings {
		settings[setting.Key] = setting.Value
	}
	revision := settings["vcs.revision"]
	revision = revision[:min(12, len(revision))]
	if revision != "" && settings["vcs.modified"] == "true" {
		revision += "-dirty"
	}
	return revision
}
