package transaction

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"unsafe"
)

const accessACL = "system.posix_acl_access"

// maxXattrs bounds what is carried over from one file, in bytes: whoever may
// write to the file chooses them.
const maxXattrs = 256 << 10

// kept reports whether an attribute goes with a file's place rather than with
// its bytes. Signatures of the bytes (security.ima) and capabilities do not.
func kept(name string) bool {
	return name == "security.selinux" || name == "security.SMACK64" || name == accessACL || strings.HasPrefix(name, "user.")
}

// readXattrs returns the attributes of f that are kept. A file system without
// attributes has none.
func readXattrs(f *os.File) (map[string][]byte, error) {
	list, err := xattrBytes(func(buf []byte) (int, error) { return xattrCall(syscall.SYS_FLISTXATTR, f, nil, buf) })
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list its extended attributes: %w", err)
	}
	var kepts map[string][]byte
	total := 0
	for raw := range bytes.SplitSeq(list, []byte{0}) {
		name := string(raw)
		if !kept(name) {
			continue
		}
		value, err := xattrBytes(func(buf []byte) (int, error) { return xattrCall(syscall.SYS_FGETXATTR, f, &name, buf) })
		if errors.Is(err, syscall.ENODATA) || errors.Is(err, errors.ErrUnsupported) {
			continue // removed since it was listed, or listed without being there
		}
		if err != nil {
			return nil, fmt.Errorf("read its extended attribute %s: %w", name, err)
		}
		if total += len(value); total > maxXattrs {
			return nil, fmt.Errorf("its extended attributes hold more than %d KiB", maxXattrs>>10)
		}
		if kepts == nil {
			kepts = make(map[string][]byte)
		}
		kepts[name] = value
	}
	return kepts, nil
}

func setXattr(f *os.File, name string, value []byte) error {
	_, err := xattrCall(syscall.SYS_FSETXATTR, f, &name, value)
	return err
}

func removeXattr(f *os.File, name string) error {
	_, err := xattrCall(syscall.SYS_FREMOVEXATTR, f, &name, nil)
	return err
}

// xattrBytes reads into a buffer that grows until the answer fits. The kernel
// bounds a list and a value to 64 KiB.
func xattrBytes(call func([]byte) (int, error)) ([]byte, error) {
	for size := 1 << 10; ; size *= 8 {
		buf := make([]byte, size)
		n, err := call(buf)
		if errors.Is(err, syscall.ERANGE) && size < 1<<16 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

// xattrCall makes one of the four calls on a file's handle: package syscall
// has only those that take a path, which could lead elsewhere.
func xattrCall(number uintptr, f *os.File, name *string, buf []byte) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var nameArg *byte
	if name != nil {
		if nameArg, err = syscall.BytePtrFromString(*name); err != nil {
			return 0, err
		}
	}
	data := unsafe.Pointer(unsafe.SliceData(buf))
	var errno syscall.Errno
	err = raw.Control(func(fd uintptr) {
		var result uintptr
		if name == nil { // flistxattr(fd, list, size)
			result, _, errno = syscall.Syscall(number, fd, uintptr(data), uintptr(len(buf)))
		} else { // f*xattr(fd, name, value, size, flags)
			result, _, errno = syscall.Syscall6(number, fd, uintptr(unsafe.Pointer(nameArg)), uintptr(data), uintptr(len(buf)), 0, 0)
		}
		n = int(result)
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return n, err
}
