//go:build !linux

package status

import (
	"fmt"
	"path/filepath"
)

// address returns the socket's address in dir.
func address(dir string) (name string, release func(), err error) {
	path := filepath.Join(dir, SocketName)
	if len(path) > maxPath {
		return "", nil, fmt.Errorf("%s is longer than the %d bytes that the path of a socket may have: choose a shorter CERTCTL_STATE_DIR", path, maxPath)
	}
	return path, func() {}, nil
}
