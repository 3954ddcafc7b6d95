//go:build !linux

package status

import (
	"fmt"
	"path/filepath"
)

// address names the socket in dir to the kernel.
func address(dir string) (name string, release func(), err error) {
	path := filepath.Join(dir, SocketName)
	if len(path) > maxPath {
		return "", nil, fmt.Errorf("%s is longer than the %d bytes that the name of a socket may have: choose a shorter CERTCTL_STATE_DIR", path, maxPath)
	}
	return path, func() {}, nil
}
