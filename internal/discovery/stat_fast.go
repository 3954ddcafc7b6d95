//go:build linux && (amd64 || arm64)

package discovery

import (
	"os"
	"syscall"
	"unsafe"
)

// lstatIn stats a name in an open directory without following a link. That is half the work of
// resolving a whole path, and a path that was replaced cannot mislead it. name ends in a NUL.
// Package syscall has fstatat with this Stat_t but does not export it.
func lstatIn(dir *os.File, _ string, name []byte, st *syscall.Stat_t) error {
	const noFollow = 0x100 // AT_SYMLINK_NOFOLLOW
	_, _, errno := syscall.Syscall6(sysStatAt, dir.Fd(), uintptr(unsafe.Pointer(&name[0])), uintptr(unsafe.Pointer(st)), noFollow, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
