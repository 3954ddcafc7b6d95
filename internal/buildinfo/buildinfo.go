// Package buildinfo reports the agent's version and commit.
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

// unreleased is the version of a build that does not know its own.
const unreleased = "devel"

// Version returns the version set by the linker, else that of the module, else "devel".
func Version() string {
	info, _ := debug.ReadBuildInfo()
	return versionOf(version, info)
}

// Commit returns the commit that was built, or "" if it is not known. It ends with "-dirty" if the
// go command found changes in the working tree.
func Commit() string {
	info, _ := debug.ReadBuildInfo()
	return commitOf(commit, info)
}

// UserAgent returns the User-Agent of the agent's HTTP requests.
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
