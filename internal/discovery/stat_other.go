//go:build !linux || !(amd64 || arm64)

package discovery

import (
	"os"
	"syscall"
)

// lstatIn stats a name in a directory without following a link. name ends in a NUL.
func lstatIn(_ *os.File, dir string, name []byte, st *syscall.Stat_t) error {
	return syscall.Lstat(join(dir, string(name[:len(name)-1])), st)
}
