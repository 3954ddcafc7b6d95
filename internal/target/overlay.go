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
// at each use. A nil Overlays holds nothing.
type Overlays struct {
	dir      string
	required bool // dir must be there
}

// OpenOverlays returns the overlays in dir, which need not exist.
func OpenOverlays(dir string) *Overlays { return &Overlays{dir: dir} }

// RequireOverlays returns the overlays in dir. If it does not exist, every use
// is an error: what they would have forbidden must not become possible.
func RequireOverlays(dir string) *Overlays { return &Overlays{dir: dir, required: true} }

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

// readFile fails with fs.ErrNotExist only where that means that nobody wanted
// an overlay.
func (o *Overlays) readFile(name string) ([]byte, error) {
	root, err := os.OpenRoot(o.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, o.missing()
	}
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
	if err := trustedWay(o.dir); err != nil {
		return nil, err
	}
	file, err := openOverlay(root, name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if err := trustedWay(filepath.Join(o.dir, name)); err != nil { // it may be a link
		return nil, err
	}
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

// openOverlay opens one file. fs.ErrNotExist means that not even a link is
// there.
func openOverlay(root *os.Root, name string) (*os.File, error) {
	for again := true; ; again = false {
		// Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
		file, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if !errors.Is(err, fs.ErrNotExist) {
			return file, err
		}
		if _, err := root.Lstat(name); err != nil {
			return nil, err
		}
		// A Kubernetes volume replaces what its links lead to.
		if !again {
			return nil, errors.New("is a symlink that leads nowhere")
		}
	}
}

// missing says why a directory that does not exist is not one that nobody
// wanted.
func (o *Overlays) missing() error {
	for at := o.dir; ; at = filepath.Dir(at) {
		_, err := os.Lstat(at)
		switch {
		case err == nil:
			if _, err := os.Stat(at); err != nil {
				return fmt.Errorf("%s is a symlink that leads nowhere", at)
			}
		case errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at):
			continue
		default:
			return err
		}
		if o.required {
			return fmt.Errorf("directory %s does not exist, and CERTCTL_TARGETS_DIR names it: create it, or take the setting away", o.dir)
		}
		return fs.ErrNotExist
	}
}

// trustedWay reports whether only root and the agent's own user can put
// something else in place of path, or of a directory or link on the way to it.
func trustedWay(path string) error {
	above := func(at string) error {
		for at != filepath.Dir(at) {
			at = filepath.Dir(at)
			info, err := os.Lstat(at)
			if err != nil {
				return err
			}
			check := trusted
			if info.Mode()&fs.ModeSticky != 0 {
				check = trustedOwner // there nobody can move what belongs to another
			}
			if err := check(info, at); err != nil {
				return err
			}
		}
		return nil
	}
	real, err := follow(path, func(link string) error {
		if err := trustedLink(link); err != nil {
			return err
		}
		return above(link)
	})
	if err != nil {
		return err
	}
	return above(real)
}

// trusted reports whether only root and the agent's own user can have written
// a file or directory. Whoever else can change an overlay decides where keys
// go.
func trusted(info fs.FileInfo, path string) error {
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is writable by its group or by others (mode %#o), so its content cannot be trusted: chmod go-w %s",
			path, info.Mode().Perm(), path)
	}
	return trustedOwner(info, path)
}

func trustedOwner(info fs.FileInfo, path string) error {
	if uid, ok := owner(info); ok && uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, so its content cannot be trusted: chown root %s", path, uid, path)
	}
	return nil
}
