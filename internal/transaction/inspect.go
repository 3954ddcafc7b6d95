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

// dest is one destination of a deployment in progress. Its fileRecord goes to the journal.
type dest struct {
	fileRecord
	at      *dir
	file    connector.File // of the plan; zero during recovery
	data    []byte         // new bytes
	oldData []byte         // old bytes, if there was a file
	keepOld bool           // the new bytes are the old ones
	want    attributes     // of the new file
	now     fs.FileInfo    // what is in place, as far as this deployment knows; nil: nothing

	staged fs.FileInfo // the new file, once it is staged
	placed bool        // the new file may be in place
}

// worldBits are the mode bits that a file with a private key never has.
const worldBits = 0o007

// errStale means that a file has changed since the plan was made from it.
var errStale = errors.New("another program changed it while the deployment was being prepared")

// openFile resolves a destination and checks it against the policy.
func openFile(file connector.File, rules *policy.Look) (*dest, error) {
	at, name, err := resolve(file.Path)
	if _, missing := errors.AsType[*missingError](err); missing {
		// Do not advise to create a directory that the policy would refuse.
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
		Path: file.Path, Dir: at.path, Name: name, Stage: temporaryName(), Restore: temporaryName(), New: digestOf(file.Data),
	}}
}

// refusal checks a path, some of whose directories are missing, against the policy.
func refusal(path string, rules *policy.Look) error {
	real, err := hostfile.Resolve(path)
	if err != nil {
		return nil
	}
	return rules.CheckPath(real)
}

// checkDistinct returns an error if two destinations are the same file. Their names may differ on a
// file system that ignores case.
func checkDistinct(files []*dest) error {
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

// inspect reads the existing file and decides on the content and attributes of the new one. index is
// the file's number in the deployment.
func (f *dest) inspect(index int) (warning string, err error) {
	data, info, has, err := read(f.at, f.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("%s: the agent's user cannot read the existing file, so it could not be restored: %w", f.Path, withoutPath(err))
	case err != nil:
		return "", fmt.Errorf("%s: %w", f.Path, withoutPath(err))
	default:
		f.found(data, info, has, index)
		if f.at.worldWritable() && !hostfile.Ours(info) {
			return "", fmt.Errorf("%s belongs to user %d, in a directory where every user can create files: anyone could have put it there to get the new one", f.Path, has.UID)
		}
	}
	if f.file.From != nil && !bytes.Equal(f.file.From, f.oldData) {
		return "", fmt.Errorf("%s: %w", f.Path, errStale)
	}
	return f.decide()
}

// found records the existing file, and merges the parts of it that are kept into the new one.
func (f *dest) found(data []byte, info fs.FileInfo, has attributes, index int) {
	f.oldData, f.now = data, info
	if f.keepOld = f.file.Keep && !(f.file.Written != nil && f.file.Written(data)); f.keepOld {
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

// decide sets the attributes of the new file: the configured ones, or else those of the present
// file, or else the default.
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
		// If the file kept its ACL, the group bits of the mode would set the ACL's mask (acl(5)),
		// which is not what the configuration means.
		delete(f.want.Xattrs, accessACL)
	}
	if f.want.Mode != f.want.Mode.Perm() {
		return "", fmt.Errorf("%s: mode %v has more than permission bits", f.Path, f.want.Mode)
	}
	if f.secret() && f.want.Mode&worldBits != 0 {
		if file.Mode != nil {
			return "", fmt.Errorf("%s: mode %04o would let every user access a private key: at most 0770 is allowed", f.Path, f.want.Mode)
		}
		warning = fmt.Sprintf("%s had mode %04o, which let every user access a private key: tightened", f.Path, f.want.Mode)
		f.want.Mode &^= worldBits
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

// lookup returns the number of a user or group, which name may already be. Otherwise it calls
// number to look the name up.
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

// upToDate reports whether the existing file already equals the new one.
func (f *dest) upToDate() bool {
	return f.Old != nil && f.Old.attributes.equal(f.want) && bytes.Equal(f.oldData, f.data)
}

// directories returns the directories of files that must be locked, each once. The agent's key
// directory needs no lock, because only this agent writes there, and only one deployment of a
// certificate at a time. With a lock, every target with a new key would wait for every other.
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
