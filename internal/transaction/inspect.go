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
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
)

// dest is one destination of a transaction that is under way. The first half
// is journalled; what follows are its handle and its bytes.
type dest struct {
	fileRecord
	at      *dir
	file    connector.File // as it was proposed; nothing in recovery
	data    []byte         // new bytes
	oldData []byte         // old bytes, if there are any
	kept    bool           // the new bytes are the old ones, whatever they are
	want    attributes     // of the new file
	now     fs.FileInfo    // what is in place, as far as this deployment knows; nil: nothing

	staged fs.FileInfo // the new file, once it exists
	placed bool        // what is in place may be the new file
}

// others are the mode bits that a file with a private key never has.
const others = 0o007

// errStale is a plan that was made from what is no longer there.
var errStale = errors.New("it was changed by someone else while the deployment was prepared")

// openFile resolves a destination and asks the policy.
func openFile(file connector.File, rules *policy.Look) (*dest, error) {
	at, name, err := resolve(file.Path)
	if _, missing := errors.AsType[*missingError](err); missing {
		// The advice to make a directory must not hide that it is of no use.
		err = cmp.Or(refusal(file.Path, rules), err)
	}
	if err != nil {
		return nil, err
	}
	if err := rules.CheckPath(at.join(name)); err != nil {
		at.Close()
		return nil, err
	}
	return newDest(at, name, file), nil
}

// openPrivate resolves a file of the agent's own key store.
func openPrivate(promoted keystore.Change) (*dest, error) {
	at, name, err := resolve(promoted.Path)
	if err != nil {
		return nil, err
	}
	f := newDest(at, name, connector.File{Path: promoted.Path, Kind: connector.KeyFile, Data: promoted.Data, Mode: new(fs.FileMode(keystore.FileMode))})
	f.Private = true
	return f, nil
}

func newDest(at *dir, name string, file connector.File) *dest {
	return &dest{at: at, file: file, data: file.Data, fileRecord: fileRecord{
		Path: file.Path, Dir: at.path, Name: name, Stage: temporary(), Restore: temporary(), New: digestOf(file.Data),
	}}
}

// refusal asks the policy for a path whose directories are not all there.
func refusal(path string, rules *policy.Look) error {
	real, err := hostfile.Resolve(path)
	if err != nil {
		return nil
	}
	return rules.CheckPath(real)
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
// Index is the file's number in the deployment.
func (f *dest) inspect(index int) (warning string, err error) {
	data, info, has, err := read(f.at, f.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("%s: the agent's user cannot read the file that is there, so it could not put it back: %w", f.Path, reason(err))
	case err != nil:
		return "", fmt.Errorf("%s: %w", f.Path, reason(err))
	default:
		f.found(data, info, has, index)
		if f.at.anyone() && !hostfile.Ours(info) {
			return "", fmt.Errorf("%s belongs to user %d, in a directory where every user can create files: anyone could have put it there to get at the new one", f.Path, has.UID)
		}
	}
	if f.file.From != nil && !bytes.Equal(f.file.From, f.oldData) {
		return "", fmt.Errorf("%s: %w", f.Path, errStale)
	}
	return f.decide()
}

// found takes the file that is there.
func (f *dest) found(data []byte, info fs.FileInfo, has attributes, index int) {
	f.oldData, f.now = data, info
	if f.kept = f.file.Keep && !(f.file.Written != nil && f.file.Written(data)); f.kept {
		f.data = data
	}
	if f.file.KeepOthers {
		f.data = slices.Concat(f.data, pemutil.OtherBlocks(data))
	}
	f.New = digestOf(f.data)
	f.Old = &oldFile{Backup: backupName(index, f.Name), Digest: digestOf(data), attributes: has}
}

// secret reports whether the file holds a private key.
func (f *dest) secret() bool { return f.file.Kind.Secret() }

// decide sets the attributes of the new file: those that are configured, else
// those of the file that is there, else the default.
func (f *dest) decide() (warning string, err error) {
	file := f.file
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
	if f.secret() && f.want.Mode&others != 0 {
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
	return f.Old != nil && f.Old.attributes.equal(f.want) && bytes.Equal(f.oldData, f.data)
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
		clear(f.oldData)
	}
}
