package policy

import (
	"strings"
	"testing"
)

// TestHostNames: the first and the last of what a name may hold, and its lengths.
func TestHostNames(t *testing.T) {
	label := strings.Repeat("a", 63)
	for name, want := range map[string]bool{
		"a0-z9_": true, "0a": true, "9z": true, "a-": true, "_a": true,
		"-a": false, "a.-b": false, "a/b": false, "a:b": false, "a`b": false, "a{b": false, "aB": false,
		"a.b": true, "a..b": false, ".a": false, "a.": false, "": false,
		label: true, label + "a": false,
		strings.Repeat(label+".", 3) + strings.Repeat("a", 61): true,
		strings.Repeat(label+".", 3) + strings.Repeat("a", 62): false,
	} {
		if got := isHostName(name); got != want {
			t.Errorf("%q is a host name: %v, want %v", name, got, want)
		}
	}
}
