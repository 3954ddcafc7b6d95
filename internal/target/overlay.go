package target

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

const (
	defaultOverlay = "default.json"
	overlaySuffix  = ".json"

	// maxOverlay bounds an overlay file; it holds a handful of keys.
	maxOverlay = 64 << 10
)

// Overlays is the directory where this host's owner has the last word on
// targets: default.json for all of them, <target-id>.json for one. It is read
// at each use. A nil Overlays, and a directory that is not there, hold
// nothing.
type Overlays struct {
	dir string
}

// OpenOverlays returns the overlays in dir.
func OpenOverlays(dir string) *Overlays { return &Overlays{dir: dir} }

// path is the file that would supply a value for one target alone.
func (o *Overlays) path(targetID string) string {
	if o == nil || o.dir == "" {
		return targetID + overlaySuffix + " in the directory of CERTCTL_TARGETS_DIR"
	}
	return filepath.Join(o.dir, targetID+overlaySuffix)
}

// read parses one overlay; no file is no values.
func (o *Overlays) read(name string) (map[string]*value, error) {
	if o == nil || o.dir == "" {
		return nil, nil
	}
	data, err := o.readFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("overlay %s: %w", filepath.Join(o.dir, name), err)
	}
	values, err := parseObject(bytes.TrimPrefix(data, []byte("\ufeff"))) // some editors put a byte order mark first
	if err != nil {
		return nil, fmt.Errorf("overlay %s: %w", filepath.Join(o.dir, name), err)
	}
	return values, nil
}

func (o *Overlays) readFile(name string) ([]byte, error) {
	root, err := os.OpenRoot(o.dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	info, err := root.Stat(".")
	if err != nil {
		return nil, err
	}
	if err := trusted(info, o.dir); err != nil {
		return nil, err
	}
	// Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
	file, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if info, err = file.Stat(); err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("is no regular file")
	}
	if err := trusted(info, filepath.Join(o.dir, name)); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(file, maxOverlay+1))
	if err == nil && len(data) > maxOverlay {
		err = fmt.Errorf("is larger than %d KiB", maxOverlay>>10)
	}
	return data, err
}

// trusted reports whether only root and the agent's own user can have written
// a file or directory. Whoever else can change an overlay decides where keys
// go.
func trusted(info fs.FileInfo, path string) error {
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is writable by its group or by others (mode %#o), so its content cannot be trusted: chmod go-w %s",
			path, info.Mode().Perm(), path)
	}
	if uid, ok := owner(info); ok && uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, so its content cannot be trusted: chown root %s", path, uid, path)
	}
	return nil
}
