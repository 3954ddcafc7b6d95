package fileset

import (
	"fmt"
	"os"
	"path/filepath"
)

// enter opens a directory that lies in at, and makes sure that it is the one
// that was there under that name. The "/." makes the kernel insist on a
// directory: opening a FIFO that was put in its place would block for ever.
func enter(at *dir, name string) (*dir, error) {
	seen, err := at.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !seen.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", at.join(name))
	}
	root, err := at.OpenRoot(name + "/.")
	if err != nil {
		return nil, err
	}
	opened, err := root.Stat(".")
	if err == nil && !os.SameFile(seen, opened) {
		err = fmt.Errorf("%s was replaced while it was being opened", at.join(name))
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return &dir{Root: root, path: filepath.Join(at.path, name)}, nil
}
