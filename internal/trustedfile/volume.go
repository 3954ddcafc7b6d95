package trustedfile

import (
	"slices"
	"strings"

	"certctl-agent/internal/hostfile"
)

// maxMounts bounds the size of the mount table, in bytes. On a Kubernetes node with hundreds of
// pods it has 1 MiB.
const maxMounts = 8 << 20

// isConfigMap reports whether dir is a Kubernetes ConfigMap mounted into this container. Kubernetes
// creates such a directory with mode 0777 and without the sticky bit, but mounts it read-only, and
// keeps it where only root of the node has access.
func isConfigMap(dir string) bool {
	table, _, err := hostfile.Read("/proc/self/mountinfo", maxMounts) // only Linux has it
	return err == nil && mountsConfigMap(string(table), dir)
}

// mountsConfigMap looks dir up in a mount table (proc_pid_mountinfo(5)). The last mount at a path
// hides the earlier ones.
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
