package trustedfile

import (
	"slices"
	"strings"

	"certctl-agent/internal/hostfile"
)

// maxMounts bounds what is read of the table of mounts, in bytes. A node of
// Kubernetes with hundreds of pods has 1 MiB.
const maxMounts = 8 << 20

// isConfigMap reports whether dir is a Kubernetes ConfigMap that is mounted into
// this container. Kubernetes makes such a directory with mode 0777 and without
// the sticky bit, but mounts it read-only, and keeps it where only root of the
// node can enter.
func isConfigMap(dir string) bool {
	table, _, err := hostfile.Read("/proc/self/mountinfo", maxMounts) // only Linux has it
	return err == nil && mountsConfigMap(string(table), dir)
}

// mountsConfigMap looks dir up in a table of mounts (proc_pid_mountinfo(5)). The
// last mount at a place hides earlier ones.
func mountsConfigMap(table, dir string) bool {
	const (
		rootField  = 3 // the directory of the mounted file system
		placeField = 4
		optsField  = 5
		minFields  = 6
	)
	found := false
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		if len(fields) < minFields || fields[placeField] != dir {
			continue
		}
		found = strings.Contains(fields[rootField], "/volumes/kubernetes.io~configmap/") &&
			slices.Contains(strings.Split(fields[optsField], ","), "ro")
	}
	return found
}
