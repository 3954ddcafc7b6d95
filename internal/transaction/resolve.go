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

// maxLinks is where Linux gives up too.
const maxLinks = 40

// resolve walks to the directory in which a file really is, one element at a
// time, and returns the directory's handle and the file's name in it. The file
// need not exist.
//
// The kernel follows no symlink in this: whoever owns a directory on the way
// could point one anywhere between a check and its use. A symlink is followed
// here, by its text, and only if nobody but root and the agent's own user can
// have put it there.
func resolve(path string) (*dir, string, error) {
	at, name, err := (&walk{}).run(path)
	if err == nil && name == "" {
		at.Close()
		err = fmt.Errorf("%s is a directory, not a file", path)
	}
	return at, name, err
}

// resolveDir does the same for a directory.
func resolveDir(path string) (*dir, error) {
	at, _, err := (&walk{whole: true}).run(path)
	return at, err
}

func (w *walk) run(path string) (*dir, string, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return nil, "", fmt.Errorf("%q is no absolute path", path)
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

// walk is how far resolve has come.
type walk struct {
	at    []*dir   // the handles from / to where the walk is; never empty
	rest  []string // elements still to go
	links int      // followed so far

	// foreign is the first directory so far in which others can replace what
	// the path goes on with, "" for none. It stays after a link out of it.
	foreign string
	whole   bool // the last element is a directory to enter like the others
}

func (w *walk) top() *dir { return w.at[len(w.at)-1] }

// take hands the last handle to the caller.
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
	if w.foreign == "" && !d.trusted() {
		w.foreign = d.path
	}
	d.foreign = w.foreign
	w.at = append(w.at, d)
}

// advance goes one element further. It reports true when name is the file that
// the path ends in, which stays for the caller to open.
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
		return false, fmt.Errorf("look at %s: %w", at.join(name), reason(err))
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
		return fmt.Errorf("%s is a symlink that others could change, so it is not followed: it and its directory must belong to root or to the agent's user, and be writable by nobody else; or name the file itself", at.join(name))
	}
	if w.links++; w.links > maxLinks {
		return errors.New("too many symlinks, perhaps in a circle")
	}
	link, err := at.Readlink(name)
	if err != nil {
		return fmt.Errorf("read symlink %s: %w", at.join(name), reason(err))
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

// enter opens a directory that lies in at, and makes sure that it is the one
// that was there under that name. The "/." makes the kernel insist on a
// directory: opening a FIFO that was put in its place would block for ever.
func enter(at *dir, name string) (*dir, error) {
	path := at.join(name)
	seen, err := at.Lstat(name)
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, reason(err))
	}
	if !seen.IsDir() {
		return nil, fmt.Errorf("%s is no directory", path)
	}
	root, err := at.OpenRoot(name + "/.")
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w (the agent's user must be able to list it)", path, reason(err))
	}
	info, err := root.Stat(".")
	if err == nil && !os.SameFile(seen, info) {
		err = errReplaced
	}
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("open directory %s: %w", path, reason(err))
	}
	return &dir{Root: root, path: path, info: info}, nil
}

// trusted reports whether nobody but root and the agent's own user can replace
// what these two have put in d.
func (d *dir) trusted() bool {
	return hostfile.Ours(d.info) && (d.info.Mode().Perm()&0o022 == 0 || d.info.Mode()&fs.ModeSticky != 0)
}

// lentBy returns the directory that lets others than root and the agent's own
// user put a file into d, be it by putting another directory in its place, or
// "" if there is none. Unlike in trusted the sticky bit does not help: it keeps
// others from taking files away, not from adding one.
func (d *dir) lentBy() string {
	if d.foreign == "" && d.info.Mode().Perm()&0o022 != 0 {
		return d.path
	}
	return d.foreign
}

// anyone reports whether every user can create files in d.
func (d *dir) anyone() bool { return d.info.Mode().Perm()&0o002 != 0 }

// refuseShared refuses a directory in which every user can replace every file.
func (d *dir) refuseShared() error {
	if d.anyone() && d.info.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("directory %s can be written by every user: take that away (chmod o-w)", d.path)
	}
	return nil
}

// missingError is a directory that is not there.
type missingError struct{ path string }

func (e *missingError) Error() string {
	return "directory " + e.path + " does not exist: create it, with the owner and mode that the server needs"
}

func (e *missingError) Is(err error) bool { return err == fs.ErrNotExist }
