package status

import (
	"fmt"
	"os"
	"path/filepath"
)

// address names the socket in dir to the kernel. A path that is too long for
// the name of a socket is taken through a handle of the directory, which must
// stay open until release.
func address(dir string) (name string, release func(), err error) {
	if path := filepath.Join(dir, SocketName); len(path) <= maxPath {
		return path, func() {}, nil
	}
	handle, err := os.Open(dir)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", handle.Fd(), SocketName), func() { handle.Close() }, nil
}
