package status

import (
	"fmt"
	"os"
	"path/filepath"
)

// address returns the socket's address in dir. If the path is too long for the kernel, the address
// goes through an open handle of the directory, which release closes.
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
