package transaction

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/hostfile"
)

// maxLinks is the number of symlinks that Linux follows in one path.
const maxLinks = 40

// resolve walks to the directory that really holds a file, one path element at a time, and returns
// the open directory and the file's name in it. The file need not exist.
//
// The kernel never follows a symlink on this walk, because the owner of a directory on the path
// could point one elsewhere between a check and its use. The walk reads symlinks itself, and
// follows those that only root and the agent's own user can have created.
func resolve(path string) (*dir, string, error) {
	at, name, err := (&walk{}).run(path)
	if err == nil && name == "" {
		at.Close()
		err = fmt.Errorf("%s is a directory, not a file", path)
	}
	return at, name, err
}

// resolveDir is like resolve, for the path of a directory.
func resolveDir(path string) (*dir, error) {
	at, _, err := (&walk{whole: true}).run(path)
	return at, err
}

func (w *walk) run(path string) (*dir, string, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return nil, "", fmt.Errorf("%q is not an absolute path", path)
	}
	defer w.close()
	if err := w.fromTop(); err != nil {
		return nil, "", err
	}
	for w.rest = elements(path); len(w.rest) > 0; {
		name := w.rest[0]
		w.rest = w.rest[1:]
		found, err := w.advance(name)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", path, err)
		}
		if found {
			return w.take(), name, nil
		}
	}
	return w.take(), "", nil
}

// walk is the state of resolve.
type walk struct {
	at    []*dir   // from / to the present directory; never empty during the walk
	rest  []string // remaining elements
	links int      // symlinks followed

	// untrusted is the first directory so far in which others can replace entries, or "". A
	// symlink that leads out of it does not reset it.
	untrusted string
	whole     bool // enter the last element too, as a directory
}

func (w *walk) top() *dir { return w.at[len(w.at)-1] }

// take removes the last handle from the walk and returns it.
func (w *walk) take() *dir {
	d := w.top()
	w.at = w.at[:len(w.at)-1]
	return d
}

func (w *walk) close() {
	for _, d := range w.at {
		d.Close()
	}
	w.at = nil
}

func (w *walk) fromTop() error {
	w.close()
	root, err := os.OpenRoot("/")
	if err != nil {
		return err
	}
	info, err := root.Stat(".")
	if err != nil {
		root.Close()
		return err
	}
	w.push(&dir{Root: root, path: "/", info: info})
	return nil
}

func (w *walk) push(d *dir) {
	if w.untrusted == "" && !d.trusted() {
		w.untrusted = d.path
	}
	d.untrusted = w.untrusted
	w.at = append(w.at, d)
}

// advance goes one element further. It returns true if name is the file at the end of the path,
// which it does not open.
func (w *walk) advance(name string) (found bool, err error) {
	if name == ".." {
		if len(w.at) > 1 {
			w.take().Close()
		}
		return false, nil
	}
	at := w.top()
	info, err := at.Lstat(name)
	switch {
	case err == nil && info.Mode().Type() == fs.ModeSymlink:
		return false, w.follow(name, info)
	case !w.whole && len(w.rest) == 0 && (err == nil || errors.Is(err, fs.ErrNotExist)):
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, &missingError{at.join(name)}
	case err != nil:
		return false, fmt.Errorf("look at %s: %w", at.join(name), withoutPath(err))
	}
	sub, err := enter(at, name)
	if err != nil {
		return false, err
	}
	w.push(sub)
	return false, sub.refuseShared()
}

func (w *walk) follow(name string, info fs.FileInfo) error {
	at := w.top()
	if !hostfile.Ours(info) || !at.trusted() {
		return fmt.Errorf("%s is a symlink that others could change, so it is not followed: it and its directory must belong to root or to the agent's user, and nobody else may be able to write to them; or configure the path that it points to", at.join(name))
	}
	if w.links++; w.links > maxLinks {
		return errors.New("too many symlinks, perhaps in a loop")
	}
	link, err := at.Readlink(name)
	if err != nil {
		return fmt.Errorf("read symlink %s: %w", at.join(name), withoutPath(err))
	}
	w.rest = append(elements(link), w.rest...)
	if filepath.IsAbs(link) {
		return w.fromTop()
	}
	return nil
}

func elements(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(e string) bool { return e == "" || e == "." })
}

// enter opens the directory name in at, without following a symlink. The "/." makes the kernel
// insist on a directory, because opening a FIFO in its place would block forever.
func enter(at *dir, name string) (*dir, error) {
	path := at.join(name)
	seen, err := at.Lstat(name)
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, withoutPath(err))
	}
	if !seen.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", path)
	}
	root, err := at.OpenRoot(name + "/.")
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w (the agent's user must be able to list it)", path, withoutPath(err))
	}
	info, err := root.Stat(".")
	if err == nil && !os.SameFile(seen, info) {
		err = errReplaced
	}
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("open directory %s: %w", path, withoutPath(err))
	}
	return &dir{Root: root, path: path, info: info}, nil
}

// trusted reports whether only root and the agent's own user can replace the entries of d that
// belong to these two.
func (d *dir) trusted() bool {
	return hostfile.Ours(d.info) && (d.info.Mode().Perm()&0o022 == 0 || d.info.Mode()&fs.ModeSticky != 0)
}

// exposedBy returns the directory that lets users other than root and the agent's own create a
// file in d, directly or by replacing a directory above it. It returns "" if there is none. The
// sticky bit does not help here, unlike in trusted: it stops others from removing files, not from
// adding one.
func (d *dir) exposedBy() string {
	if d.untrusted == "" && d.info.Mode().Perm()&0o022 != 0 {
		return d.path
	}
	return d.untrusted
}

// worldWritable reports whether every user can create files in d.
func (d *dir) worldWritable() bool { return d.info.Mode().Perm()&0o002 != 0 }

// refuseShared returns an error if every user can replace every file in d.
func (d *dir) refuseShared() error {
	if d.worldWritable() && d.info.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("directory %s can be written by every user: remove that permission (chmod o-w)", d.path)
	}
	return nil
}

// missingError means that a directory on the path does not exist.
type missingError struct{ path string }

func (e *missingError) Error() string {
	return "directory " + e.path + " does not exist: create it, with the owner and mode that the server needs"
}

func (e *missingError) Is(err error) bool { return err == fs.ErrNotExist }
