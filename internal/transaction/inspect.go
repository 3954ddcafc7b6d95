package transaction

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"slices"
	"strconv"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/pemutil"
)

// dest is one destination of a transaction that is under way. The first half
// is journalled; what follows are its handle and its bytes.
type dest struct {
	entry
	at   *dir
	data []byte      // new bytes; nil in recovery
	old  []byte      // old bytes, if there are any
	want attributes  // of the new file
	now  fs.FileInfo // what is in place, as far as this transaction knows; nil: nothing

	staged fs.FileInfo // the new file, once it exists
	placed bool        // what is in place may be the new file
}

// others are the mode bits that a file with a private key never has.
const others = 0o007

// open resolves a destination and asks the policy.
func (s *Store) open(file connector.File) (*dest, error) {
	at, name, err := resolve(file.Path)
	if _, missing := errors.AsType[*missingError](err); missing {
		// The advice to make a directory must not hide that it is of no use.
		err = cmp.Or(s.refusal(file), err)
	}
	if err != nil {
		return nil, err
	}
	f := &dest{at: at, data: file.Data}
	f.entry = entry{
		Path: file.Path, Dir: at.path, Name: name, Private: file.Kind == connector.StoreFile,
		Stage: temporary(), Restore: temporary(), New: digestOf(file.Data),
	}
	if !f.Private {
		if err := s.opts.Policy.CheckPath(at.join(name)); err != nil {
			at.Close()
			return nil, err
		}
	}
	return f, nil
}

// refusal asks the policy for a path whose directories are not all there.
func (s *Store) refusal(file connector.File) error {
	if file.Kind == connector.StoreFile {
		return nil
	}
	path, err := hostfile.Resolve(file.Path)
	if err != nil {
		return nil
	}
	return s.opts.Policy.CheckPath(path)
}

// distinct refuses two destinations that are one file. Both names can differ
// and mean the same on a file system that ignores case.
func distinct(files []*dest) error {
	for i, a := range files {
		for _, b := range files[:i] {
			if !os.SameFile(a.at.info, b.at.info) {
				continue
			}
			if a.Name == b.Name || a.now != nil && b.now != nil && a.now.Name() != b.now.Name() && os.SameFile(a.now, b.now) && links(a.now) == 1 {
				return fmt.Errorf("%s and %s are the same file: give each its own", b.Path, a.Path)
			}
		}
	}
	return nil
}

// inspect reads what is in place, and decides what the new file will look like.
func (f *dest) inspect(file connector.File, index int) (warning string, err error) {
	data, info, has, err := read(f.at, f.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !file.Keep:
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("%s: the agent's user cannot read the file that is there, so it could not put it back: %w", f.Path, reason(err))
	case err != nil:
		return "", fmt.Errorf("%s: %w", f.Path, reason(err))
	default:
		f.old, f.now = data, info
		if file.Keep {
			f.data, f.New = data, digestOf(data)
		}
		if file.KeepOthers {
			f.data = slices.Concat(f.data, pemutil.OtherBlocks(data))
			f.New = digestOf(f.data)
		}
		f.Old = &saved{Backup: backupName(index, f.Name), Digest: digestOf(data), attributes: has}
		if owner := has.UID; f.at.anyone() && !hostfile.Ours(info) {
			return "", fmt.Errorf("%s belongs to user %d, in a directory where every user can create files: anyone could have put it there to get at the new one", f.Path, owner)
		}
	}
	return f.decide(file)
}

// decide sets the attributes of the new file: those that are configured, else
// those of the file that is there, else the default.
func (f *dest) decide(file connector.File) (warning string, err error) {
	f.want = attributes{Mode: file.DefaultMode.Perm(), UID: -1, GID: -1}
	if f.want.Mode == 0 {
		f.want.Mode = privateFile
	}
	if f.Old != nil {
		f.want = f.Old.attributes
		f.want.Xattrs = maps.Clone(f.want.Xattrs)
	}
	if file.Mode != nil {
		f.want.Mode = *file.Mode
		// With an ACL the group bits of the mode would be its mask, which is
		// not what the configuration means.
		delete(f.want.Xattrs, accessACL)
	}
	if f.want.Mode != f.want.Mode.Perm() {
		return "", fmt.Errorf("%s: mode %v is more than permissions", f.Path, f.want.Mode)
	}
	if file.Kind.Secret() && f.want.Mode&others != 0 {
		if file.Mode != nil {
			return "", fmt.Errorf("%s: mode %04o would let every user at a private key: at most 0770", f.Path, f.want.Mode)
		}
		warning = fmt.Sprintf("%s had mode %04o, which let every user at a private key: tightened", f.Path, f.want.Mode)
		f.want.Mode &^= others
	}
	if file.Owner != "" {
		if f.want.UID, err = lookup(file.Owner, userNumber); err != nil {
			return "", fmt.Errorf("%s: owner: %w", f.Path, err)
		}
	}
	if file.Group != "" {
		if f.want.GID, err = lookup(file.Group, groupNumber); err != nil {
			return "", fmt.Errorf("%s: group: %w", f.Path, err)
		}
	}
	return warning, nil
}

// lookup takes a number as it is, and asks the system for a name.
func lookup(name string, number func(string) (string, error)) (int, error) {
	text := name
	if _, err := strconv.ParseUint(name, 10, 31); err != nil {
		if text, err = number(name); err != nil {
			return 0, err
		}
	}
	n, err := strconv.ParseUint(text, 10, 31)
	return int(n), err
}

func userNumber(name string) (string, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return "", err
	}
	return u.Uid, nil
}

func groupNumber(name string) (string, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return "", err
	}
	return g.Gid, nil
}

// upToDate reports whether the file is what it would be after the transaction.
func (f *dest) upToDate() bool {
	return f.Old != nil && f.Old.attributes.equal(f.want) && bytes.Equal(f.old, f.data)
}

// directories returns the distinct directories of files that are to be locked.
// The agent's own key directory is not: every target with a new key would wait
// for every other, and only this agent writes there, one transaction of a
// certificate at a time.
func directories(files []*dest) []*dir {
	var dirs []*dir
	for _, f := range files {
		if !f.Private && !slices.ContainsFunc(dirs, func(d *dir) bool { return os.SameFile(d.info, f.at.info) }) {
			dirs = append(dirs, f.at)
		}
	}
	return dirs
}

func closeAll(files []*dest) {
	for _, f := range files {
		f.at.Close()
		clear(f.old)
	}
}
