package discovery

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// localFileSystems are entered where they are mounted below a root. All others are not: network
// file systems, FUSE, automounts and virtual file systems.
var localFileSystems = map[string]bool{
	"aufs": true, "bcachefs": true, "btrfs": true, "cramfs": true, "ecryptfs": true, "erofs": true,
	"exfat": true, "ext2": true, "ext3": true, "ext4": true, "f2fs": true, "hfs": true, "hfsplus": true,
	"iso9660": true, "jffs2": true, "jfs": true, "minix": true, "msdos": true, "nilfs2": true, "ntfs": true,
	"ntfs3": true, "overlay": true, "ramfs": true, "reiserfs": true, "rootfs": true, "romfs": true,
	"squashfs": true, "tmpfs": true, "ubifs": true, "udf": true, "ufs": true, "vfat": true, "xfs": true, "zfs": true,
}

// mountTable returns the mounted file systems. It touches none of them, so it cannot hang on a dead
// server.
func mountTable() (mounts, error) {
	// proc(5): id parent device root MOUNT-POINT options [tags ...] - TYPE source options
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	table := make(mounts)
	for line := range strings.Lines(string(data)) {
		before, after, _ := strings.Cut(line, " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if len(fields) < 5 || len(kind) == 0 {
			continue
		}
		point := unescapeMount(fields[4])
		table[point] = mount{point, localFileSystems[kind[0]] && point != "/dev"}
	}
	return table, nil
}

// unescapeMount replaces the octal escapes \NNN that mountinfo uses for blanks and backslashes.
func unescapeMount(s string) string {
	for i := 0; i+3 < len(s); i++ {
		if s[i] != '\\' {
			continue
		}
		if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
			s = s[:i] + string([]byte{byte(n)}) + s[i+4:]
		}
	}
	return s
}

func changeTimes(st *syscall.Stat_t) (modified, changed int64) { return st.Mtim.Nano(), st.Ctim.Nano() }

// openWithoutAtime opens a regular file without updating its access time, if the user is allowed
// to. If path leads to anything else, it returns only a handle for fstat and does not open the
// file: the owner of a directory on the path can link to /dev at any moment, and opening a watchdog
// starts it. may decides whether to open a regular file.
func openWithoutAtime(path string, flags int, may func(handle int, st *syscall.Stat_t) error) (int, error) {
	const pathOnly = 0x200000 // O_PATH, open(2)
	handle, err := syscall.Open(path, pathOnly|flags&(syscall.O_NOFOLLOW|syscall.O_CLOEXEC), 0)
	if err != nil {
		return -1, err
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(handle, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return handle, nil
	}
	defer syscall.Close(handle)
	if err := may(handle, &st); err != nil {
		return -1, err
	}
	same := "/proc/self/fd/" + strconv.Itoa(handle)
	fd, err := syscall.Open(same, flags&^syscall.O_NOFOLLOW|syscall.O_NOATIME, 0)
	switch err {
	case syscall.EPERM:
		return syscall.Open(same, flags&^syscall.O_NOFOLLOW, 0)
	case syscall.ENOENT: // /proc is not mounted
		if fd, err = syscall.Open(path, flags, 0); err != nil {
			return -1, err
		}
		var opened syscall.Stat_t
		if err := syscall.Fstat(fd, &opened); err != nil || opened.Dev != st.Dev || opened.Ino != st.Ino {
			syscall.Close(fd)
			return -1, syscall.ENOENT
		}
	}
	return fd, err
}

// openIn opens a file in an open directory, without updating its access time if the user is allowed
// to.
func openIn(dir int, name string, flags int) (int, error) {
	fd, err := syscall.Openat(dir, name, flags|syscall.O_NOATIME, 0)
	if err == syscall.EPERM {
		return syscall.Openat(dir, name, flags, 0)
	}
	return fd, err
}

// pathOf returns the path of an open file, without symbolic links. The kernel appends " (deleted)"
// if the file was deleted.
func pathOf(fd int) (string, error) { return os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)) }

// threadTime returns the processor time that this thread has used.
func threadTime() time.Duration {
	const thisThread = 1 // RUSAGE_THREAD
	var usage syscall.Rusage
	if syscall.Getrusage(thisThread, &usage) != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// runAtIdlePriority runs f on a dedicated thread that gets a processor and the disk only when
// hardly anyone else wants them. The lowest nice value alone is not enough: it costs a busy server
// some percent of its throughput. The thread ends with f. If a priority cannot be set, f runs
// without it.
func runAtIdlePriority(f func()) {
	const (
		idlePolicy = 5       // SCHED_IDLE
		whoProcess = 1       // IOPRIO_WHO_PROCESS; id 0 is this thread
		idleDisk   = 3 << 13 // IOPRIO_CLASS_IDLE
	)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the priority must not stay on a shared thread
		if syscall.Gettid() == os.Getpid() {
			// The main thread cannot end, and ps shows its priority. While this goroutine holds it,
			// the next one gets another thread.
			defer runtime.UnlockOSThread()
			runAtIdlePriority(f)
			return
		}
		_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, 19)
		var none int32 // struct sched_param
		_, _, _ = syscall.RawSyscall(syscall.SYS_SCHED_SETSCHEDULER, 0, idlePolicy, uintptr(unsafe.Pointer(&none)))
		_, _, _ = syscall.RawSyscall(syscall.SYS_IOPRIO_SET, whoProcess, 0, idleDisk)
		f()
	}()
	<-ended
}
