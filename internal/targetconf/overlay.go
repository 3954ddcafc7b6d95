package targetconf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"certctl-agent/internal/api"
	"certctl-agent/internal/hostfile"
)

const (
	defaultOverlay = "default.json"
	overlaySuffix  = ".json"

	// maxOverlay bounds an overlay, in bytes. It holds a handful of keys.
	maxOverlay = 64 << 10
)

// Overlays is the directory in which the owner of this host can override the configuration of
// targets: default.json for all of them, <target-id>.json for one. It is read at each use. If
// Required is set and the directory does not exist, every use is an error: what an overlay would
// have forbidden must not become possible.
type Overlays struct {
	Dir      string
	Required bool
}

// path returns the overlay file of a target.
func (o Overlays) path(targetID api.ID) string { return o.file(string(targetID) + overlaySuffix) }

func (o Overlays) file(name string) string { return filepath.Join(o.Dir, name) }

// readOverlay parses an overlay. It returns nil if the file does not exist.
func (c *Config) readOverlay(name string) (map[string]*value, error) {
	data, err := c.overlays.readFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var values map[string]*value
	if err == nil {
		values, err = c.parseObject(bytes.TrimPrefix(data, []byte(hostfile.ByteOrderMark)))
	}
	if err != nil {
		return nil, fmt.Errorf("overlay %s: %w", c.overlays.file(name), err)
	}
	return values, nil
}

// readFile reads an overlay. It returns fs.ErrNotExist only if the overlay is not expected to
// exist.
func (o Overlays) readFile(name string) ([]byte, error) {
	root, err := os.OpenRoot(o.Dir)
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
	if err := trusted(info, o.Dir); err != nil {
		return nil, err
	}
	if err := trustedPath(o.file(name)); err != nil {
		return nil, err
	}
	data, info, err := readIn(root, name)
	if err != nil {
		return nil, err
	}
	return data, trusted(info, o.file(name))
}

// readIn reads a file. It returns fs.ErrNotExist only if name does not exist, not even as a
// dangling link.
func readIn(root *os.Root, name string) ([]byte, fs.FileInfo, error) {
	for again := true; ; again = false {
		data, info, err := hostfile.ReadIn(root, name, maxOverlay)
		if !errors.Is(err, fs.ErrNotExist) {
			return data, info, err
		}
		if _, err := root.Lstat(name); err != nil {
			return nil, nil, err
		}
		// A Kubernetes volume may just have replaced the targets of its links.
		if !again {
			return nil, nil, errors.New("is a symlink that leads nowhere")
		}
	}
}

// missing returns fs.ErrNotExist if the directory does not exist and need not, and otherwise an
// error that says why it must.
func (o Overlays) missing() error {
	for at := o.Dir; ; at = filepath.Dir(at) {
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
		if o.Required {
			return fmt.Errorf("directory %s does not exist, and CERTCTL_TARGETS_DIR names it: create it, or remove the setting", o.Dir)
		}
		return fs.ErrNotExist
	}
}

// trustedPath returns an error unless only root and the agent's own user can replace path or a
// directory or link on the way to it.
func trustedPath(path string) error {
	_, err := hostfile.Follow(path, func(at string, info fs.FileInfo) error {
		switch {
		case !info.IsDir():
			return hostfile.TrustedLink(at, info)
		case info.Mode()&fs.ModeSticky != 0: // users cannot rename each other's files
			return trustedOwner(info, at)
		}
		return trusted(info, at)
	})
	return err
}

// trusted returns an error unless only root and the agent's own user can have written a file or
// directory. Anyone else who can change an overlay could decide where keys go.
func trusted(info fs.FileInfo, path string) error {
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is writable by its group or by others (mode %#o), so its content cannot be trusted: chmod go-w %s",
			path, info.Mode().Perm(), path)
	}
	return trustedOwner(info, path)
}

func trustedOwner(info fs.FileInfo, path string) error {
	if uid, _ := hostfile.Owner(info); !hostfile.Ours(info) {
		return fmt.Errorf("%s belongs to user %d, so its content cannot be trusted: chown root %s", path, uid, path)
	}
	return nil
}
