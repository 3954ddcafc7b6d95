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

// maxXattrs bounds the extended attributes that are copied from one file, in bytes, because anyone
// who may write to the file chooses them.
const maxXattrs = 256 << 10

// preserved reports whether an extended attribute is copied to the new file. Those that depend on
// the content, such as signatures (security.ima) and capabilities, are not.
func preserved(name string) bool {
	return name == "security.selinux" || name == "security.SMACK64" || name == accessACL || strings.HasPrefix(name, "user.")
}

// readXattrs returns the extended attributes of f that are preserved. It returns nil on a file
// system without extended attributes.
func readXattrs(f *os.File) (map[string][]byte, error) {
	list, err := xattrBytes(func(buf []byte) (int, error) { return xattrCall(syscall.SYS_FLISTXATTR, f, nil, buf) })
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list its extended attributes: %w", err)
	}
	var attrs map[string][]byte
	total := 0
	for raw := range bytes.SplitSeq(list, []byte{0}) {
		name := string(raw)
		if !preserved(name) {
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
		if attrs == nil {
			attrs = make(map[string][]byte)
		}
		attrs[name] = value
	}
	return attrs, nil
}

func setXattr(f *os.File, name string, value []byte) error {
	_, err := xattrCall(syscall.SYS_FSETXATTR, f, &name, value)
	return err
}

func removeXattr(f *os.File, name string) error {
	_, err := xattrCall(syscall.SYS_FREMOVEXATTR, f, &name, nil)
	return err
}

// xattrBytes calls call with a growing buffer until the answer fits. The kernel limits a list and a
// value to 64 KiB (xattr(7)).
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

// xattrCall makes one of the f*xattr calls. Package syscall has only those that take a path, which
// may no longer lead to the same file.
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
