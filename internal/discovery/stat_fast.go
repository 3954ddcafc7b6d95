//go:build linux && (amd64 || arm64)

package discovery

import (
	"os"
	"syscall"
	"unsafe"
)

// lstatIn is lstat of a name in an open directory: half the work of looking up a whole path, and it
// cannot be led astray by one that was replaced. name ends in a NUL. Package syscall has the call,
// and Stat_t is the one it takes here, but exports no function for it.
func lstatIn(dir *os.File, _ string, name []byte, st *syscall.Stat_t) error {
	const noFollow = 0x100 // AT_SYMLINK_NOFOLLOW
	_, _, errno := syscall.Syscall6(sysStatAt, dir.Fd(), uintptr(unsafe.Pointer(&name[0])), uintptr(unsafe.Pointer(st)), noFollow, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
