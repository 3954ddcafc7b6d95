package transaction

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"

	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
)

// guard refuses to replace a file that is not the target's, and to give a key to other users.
func (a *attempt) guard(f *dest) error {
	if f.Old != nil {
		if err := a.mayReplace(f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	if f.secret() {
		if err := a.guardKey(f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	return nil
}

// mayReplace returns an error if the old file does not look like the target's own. Its content
// decides, because no list of protected paths is ever complete.
func (a *attempt) mayReplace(f *dest) error {
	was := pemutil.ContentOf(f.oldData)
	switch {
	case f.Private, f.keepOld, isEmpty(f.oldData), bytes.Equal(f.oldData, f.data):
		return nil
	case f.file.Written != nil && f.file.Written(f.oldData):
		return nil
	case pemutil.HoldsPrivateKey(f.oldData) && !pemutil.HoldsPrivateKey(f.data):
		return errors.New("the existing file holds a private key, and the new one would not, so a server that reads its key from it could not start again: " +
			"configure a separate file for the certificate, or one file for both as the server's page of the documentation says; if no server needs the key, remove the file")
	case was.Keys && was.Certificates && pemutil.ContentOf(f.data) == pemutil.Content{Keys: true}:
		return errors.New("the existing file holds certificates and the private key, and the new one would hold the key alone, so a server that reads both from it could not start again: " +
			"configure a separate file for the key; if no server needs the certificates, remove them from the file")
	case was == pemutil.Content{} && !a.ReplaceAny && !a.mayBeTorn(f):
		return fmt.Errorf(`the existing file holds neither a certificate nor a key, and this agent did not write it, so it is not replaced: `+
			`correct the path, or remove the file, or put {"replace_any_file": true} into %s.json of CERTCTL_TARGETS_DIR`, a.Target)
	}
	return nil
}

// mayBeTorn reports whether an interrupted deployment of this target, whose record was set aside,
// may have left f half-written.
func (a *attempt) mayBeTorn(f *dest) bool {
	if a.journal == nil {
		return false // a preview
	}
	data, _, _, err := read(a.journal, asideName(a.Target))
	if err != nil {
		return false
	}
	r, err := decode(bytes.TrimSpace(data))
	return err == nil && slices.ContainsFunc(r.Files, func(e fileRecord) bool { return e.Dir == f.at.path && e.Name == f.Name })
}

// isEmpty reports whether data is a placeholder, or what a power cut can leave of a file: only
// white space or zeros.
func isEmpty(data []byte) bool { return len(bytes.Trim(data, " \t\r\n\x00")) == 0 }

// guardKey refuses to give a new key to the owner or the group of the existing file if other users
// could have planted that file: anyone who can write to its directory, or to one above it, can put
// a file there just before a renewal. It permits users and groups that the configuration names, and
// those of a file that already holds a key of the same certificate: they have it anyway.
func (a *attempt) guardKey(f *dest) error {
	by := f.at.exposedBy()
	if by == "" {
		return nil
	}
	if f.Private {
		// Only the agent needs to read its key store.
		f.want.Mode &^= 0o077
		f.want.UID = os.Geteuid()
		delete(f.want.Xattrs, accessACL)
		return nil
	}
	if f.Old == nil {
		if f.want.Mode&0o070 != 0 && f.file.Group == "" {
			f.want.GID = os.Getegid() // not the group of a set-group-ID directory
		}
		return nil
	}
	var taken string
	_, acl := f.want.Xattrs[accessACL]
	switch {
	case f.file.Owner == "" && !hostfile.Ours(f.now):
		taken = fmt.Sprintf("its owner, user %d", f.Old.UID)
	case acl:
		taken = "its access control list"
	case f.want.Mode&0o070 == 0 || f.want.GID == os.Getegid():
		return nil
	case f.file.Group == "":
		taken = fmt.Sprintf("its group %d and mode %04o", f.want.GID, f.want.Mode)
	case f.file.Mode == nil:
		taken = fmt.Sprintf("group %d by its mode %04o", f.want.GID, f.want.Mode)
	default:
		return nil
	}
	held := f.oldData
	if f.file.HadKey != nil {
		held = f.file.HadKey
	}
	if a.holdsAgentKey(held) {
		return nil
	}
	return fmt.Errorf("the new key is not given to %s: other users can put files into %s, and the existing file does not hold the previous key of the certificate: "+
		"set owner, group and mode of the file in %s.json of CERTCTL_TARGETS_DIR; or check whose the file is, give directory %s to root, and let nobody else write to it",
		taken, f.at.path, a.Target, by)
}

// holdsAgentKey reports whether data holds a private key that the agent has for the certificate:
// the current, the previous or the new one.
func (a *attempt) holdsAgentKey(data []byte) bool {
	key, err := pemutil.ParseKey(data)
	if err != nil {
		return false
	}
	own := func(encoded []byte) bool {
		has, err := pemutil.ParseKey(encoded)
		return err == nil && pemutil.SamePrivateKey(has, key)
	}
	if slices.ContainsFunc(a.Promotion, func(c keystore.Change) bool { return own(c.Data) }) {
		return true
	}
	m := a.Material
	if m == nil {
		return false
	}
	if own(m.KeyPEM) {
		return true
	}
	if m.KeyPath == "" {
		return false
	}
	for _, path := range []string{m.KeyPath, keystore.PreviousPath(m.KeyPath)} {
		stored, err := readStored(path)
		held := err == nil && own(stored)
		clear(stored)
		if held {
			return true
		}
	}
	return false
}

// readStored reads a file of the key store. It fails if other users could have put it there.
func readStored(path string) ([]byte, error) {
	at, name, err := resolve(path)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	if by := at.exposedBy(); by != "" {
		return nil, fmt.Errorf("other users can put files into %s", by)
	}
	data, _, _, err := read(at, name)
	return data, err
}
