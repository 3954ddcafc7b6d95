package trustedfile

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"certctl-agent/internal/testing/needs"
)

// TestTrustOfACL checks an ACL that lets another user write to a directory of root's. In the mode
// it looks as if only root's group could write.
func TestTrustOfACL(t *testing.T) {
	needs.Root(t, "creating directories of root's group")
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600))
	for acl, want := range map[string]string{"user:4242:rwx": "which others can write to (mode 0775)", "user:4242:r-x": ""} {
		must(t, os.Chmod(dir, 0o755))
		if out, err := exec.Command(needs.Need(t, "setfacl"), "--modify", acl, dir).CombinedOutput(); err != nil {
			needs.Missing(t, fmt.Sprintf("no access control lists in %s: %v, %s", dir, err, out))
		}
		_, _, _, err := Read(filepath.Join(dir, "file"), 100)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: error %v, want %q", acl, err, want)
		}
	}
}
