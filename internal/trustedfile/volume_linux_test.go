package trustedfile

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/testing/needs"
)

// TestConfigMap reads a file from a directory that is created and mounted like a Kubernetes
// ConfigMap.
func TestConfigMap(t *testing.T) {
	base := t.TempDir()
	volume, place := filepath.Join(base, "pods/3f2a/volumes/kubernetes.io~configmap/nodes"), filepath.Join(base, "etc")
	must(t, os.MkdirAll(filepath.Join(volume, "..2026_01"), 0o755))
	must(t, os.WriteFile(filepath.Join(volume, "..2026_01", "ca.pem"), []byte("x"), 0o644))
	must(t, os.Symlink("..2026_01", filepath.Join(volume, "..data")))
	must(t, os.Symlink("..data/ca.pem", filepath.Join(volume, "ca.pem")))
	must(t, os.Chmod(volume, 0o777))
	must(t, os.Mkdir(place, 0o755))
	if err := syscall.Mount(volume, place, "", syscall.MS_BIND, ""); err != nil {
		needs.Missing(t, "cannot mount a directory: "+err.Error())
	}
	t.Cleanup(func() { syscall.Unmount(place, syscall.MNT_DETACH) })
	file := filepath.Join(place, "ca.pem")
	if _, _, _, err := Read(file, 100); err == nil || !strings.Contains(err.Error(), "which others can write to") {
		t.Errorf("writable: got error %v", err)
	}
	must(t, syscall.Mount("", place, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	if data, _, _, err := Read(file, 100); err != nil || string(data) != "x" {
		t.Errorf("read-only: got %q, %v", data, err)
	}
}
