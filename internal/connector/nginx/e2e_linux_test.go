package nginx

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"certctl-agent/internal/testing/needs"
)

// tmpfs mounts a separate file system at dir.
func tmpfs(t *testing.T, dir, size string) {
	t.Helper()
	needs.Root(t, "mounting")
	must(t, os.Mkdir(dir, 0o755))
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		needs.Missing(t, "cannot mount a small file system: "+err.Error())
	}
	t.Cleanup(func() { must(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
}

// If the disk of the second file is full, the first file is not installed either.
func TestDiskFull(t *testing.T) {
	l, _ := start(t)
	small := filepath.Join(l.Dir, "small")
	tmpfs(t, small, "8k")
	l.MustDeploy(t, l.NewMaterial(t))
	must(t, os.WriteFile(filepath.Join(small, "ballast"), make([]byte, 8192), 0o644))
	l.Refuses(t, l.NewMaterial(t), "no space left", "chain_path", filepath.Join(small, "chain.pem"))
	if entries, err := os.ReadDir(small); err != nil || len(entries) != 1 {
		t.Errorf("left behind beside the ballast: %v, %v", entries, err)
	}
}

func TestReadOnlyDirectory(t *testing.T) {
	l, _ := start(t)
	fixed := filepath.Join(l.Dir, "fixed")
	tmpfs(t, fixed, "64k")
	l.MustDeploy(t, l.NewMaterial(t))
	must(t, syscall.Mount("tmpfs", fixed, "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	l.Refuses(t, l.NewMaterial(t), "read-only file system", "chain_path", filepath.Join(fixed, "chain.pem"))
}

// Even root's deployment must not leave the allowed directories through a
// symlink.
func TestLinkOutOfAllowed(t *testing.T) {
	l, _ := start(t)
	l.Policy.Paths = []string{l.Watched}
	l.MustDeploy(t, l.NewMaterial(t))
	link := filepath.Join(l.Watched, "link")
	must(t, os.Symlink(l.StateDir, link))
	defer os.Remove(link)
	m := l.NewMaterial(t)
	if _, err := l.Deploy(t.Context(), m, "chain_path", filepath.Join(link, "chain.pem")); err == nil || !strings.Contains(err.Error(), l.StateDir) {
		t.Errorf("a chain was written through a symlink: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(l.StateDir, "chain.pem")); err == nil {
		t.Error("the chain is in the state directory")
	}
}
