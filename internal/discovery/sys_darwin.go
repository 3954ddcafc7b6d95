package discovery

import (
	"bytes"
	"syscall"
	"time"
	"unsafe"
)

// mountTable returns the mounted file systems without waiting for any of them.
func mountTable() (mounts, error) {
	const (
		noWait = 2      // MNT_NOWAIT
		local  = 0x1000 // MNT_LOCAL
	)
	n, err := syscall.Getfsstat(nil, noWait)
	if err != nil {
		return nil, err
	}
	list := make([]syscall.Statfs_t, n)
	if n, err = syscall.Getfsstat(list, noWait); err != nil {
		return nil, err
	}
	table := make(mounts)
	for _, fs := range list[:n] {
		point, kind := fromC(fs.Mntonname[:]), fromC(fs.Fstypename[:])
		table[point] = mount{point, fs.Flags&local != 0 && kind != "devfs" && kind != "autofs"}
	}
	return table, nil
}

func fromC(name []int8) string {
	var b []byte
	for _, c := range name {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b)
}

func changeTimes(st *syscall.Stat_t) (modified, changed int64) {
	return st.Mtimespec.Nano(), st.Ctimespec.Nano()
}

// openWithoutAtime opens a file. macOS offers no way to preserve its access time. may decides
// whether to read a regular file once it is open.
func openWithoutAtime(path string, flags int, may func(fd int, st *syscall.Stat_t) error) (int, error) {
	fd, err := syscall.Open(path, flags, 0)
	if err != nil {
		return -1, err
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err == nil && st.Mode&syscall.S_IFMT == syscall.S_IFREG {
		if err := may(fd, &st); err != nil {
			syscall.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

// openIn opens a file in an open directory. Package syscall has openat but does not export it.
func openIn(dir int, name string, flags int) (int, error) {
	const openat = 463 // SYS_openat
	text, err := syscall.BytePtrFromString(name)
	if err != nil {
		return -1, err
	}
	fd, _, errno := syscall.Syscall6(openat, uintptr(dir), uintptr(unsafe.Pointer(text)), uintptr(flags), 0, 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// pathOf returns the path of an open file, without symbolic links.
func pathOf(fd int) (string, error) {
	var path [1024]byte // MAXPATHLEN
	_, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETPATH, uintptr(unsafe.Pointer(&path[0])))
	if errno != 0 {
		return "", errno
	}
	name, _, _ := bytes.Cut(path[:], []byte{0})
	return string(name), nil
}

// threadTime returns wall-clock time: the standard library offers no thread time here.
func threadTime() time.Duration { return time.Duration(time.Now().UnixNano()) }

// runAtIdlePriority runs f at normal priority.
func runAtIdlePriority(f func()) { f() }
