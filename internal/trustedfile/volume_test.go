package trustedfile

import "testing"

func TestMountsConfigMap(t *testing.T) {
	const kubelet = "/var/lib/kubelet/pods/3f2a/volumes/kubernetes.io~configmap/nodes"
	line := func(root, options string) string {
		return "1180 1160 8:1 " + root + " /etc/nodes " + options + " - ext4 /dev/sda1 rw\n"
	}
	others := "1160 900 0:321 / / rw,relatime - overlay overlay rw\n"
	tests := []struct {
		name, table string
		want        bool
	}{
		{"none", others, false},
		{"empty", "", false},
		{"cut", "1180 1160 8:1 " + kubelet + " /etc/nodes", false},
		{"read-only", others + line(kubelet, "ro,relatime"), true},
		{"kubelet's own file system", line("/pods/3f2a/volumes/kubernetes.io~configmap/nodes", "ro"), true},
		{"writable", line(kubelet, "rw,relatime"), false},
		{"an option that is not ro", line(kubelet, "rw,errors=ro"), false},
		{"another volume", line("/var/lib/kubelet/pods/3f2a/volumes/kubernetes.io~empty-dir/x", "ro"), false},
		{"directory of the node", line("/etc/nodes", "ro"), false},
		{"hidden by another", line(kubelet, "ro") + line("/etc/nodes", "ro"), false},
		{"hides another", line("/etc/nodes", "rw") + line(kubelet, "ro"), true},
	}
	for _, test := range tests {
		if got := mountsConfigMap(test.table, "/etc/nodes"); got != test.want {
			t.Errorf("%s: %t", test.name, got)
		}
	}
	if mountsConfigMap(line(kubelet, "ro"), "/etc") {
		t.Error("a directory above it counts too")
	}
}
