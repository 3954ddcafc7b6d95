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

// guard refuses what would destroy something else, or give a key away.
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

// mayReplace refuses to destroy what is not this target's to replace. No list
// of places is complete, so the content decides.
func (a *attempt) mayReplace(f *dest) error {
	was := pemutil.ContentOf(f.oldData)
	switch {
	case f.Private, f.kept, isEmpty(f.oldData), bytes.Equal(f.oldData, f.data):
		return nil
	case f.file.Written != nil && f.file.Written(f.oldData):
		return nil
	case pemutil.HoldsPrivateKey(f.oldData) && !pemutil.HoldsPrivateKey(f.data):
		return errors.New("the file that is there holds a private key, and the new one would not, so that a server which reads its key from it could not start again: " +
			"configure a file of its own for the certificate, or one for both as the server's page of the documentation says; if no server needs the key, remove the file")
	case was.Keys && was.Certificates && pemutil.ContentOf(f.data) == pemutil.Content{Keys: true}:
		return errors.New("the file that is there holds certificates beside the private key, and the new one would hold the key alone, so that a server which reads both from it could not start again: " +
			"configure a file of its own for the key; if no server needs the certificates, remove them from the file")
	case was == pemutil.Content{} && !a.ReplaceAny && !a.leftTorn(f):
		return fmt.Errorf(`the file that is there holds neither a certificate nor a key, and this agent did not write it, so it is not replaced: `+
			`correct the path, or remove the file, or put {"replace_any_file": true} into %s.json of CERTCTL_TARGETS_DIR`, a.Target)
	}
	return nil
}

// leftTorn reports whether an interrupted deployment of this target may have
// left anything at all in f: a person was asked, and the next deployment
// replaces it.
func (a *attempt) leftTorn(f *dest) bool {
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

// isEmpty reports whether data says nothing: a placeholder, or what a power cut
// made of a file.
func isEmpty(data []byte) bool { return len(bytes.Trim(data, " \t\r\n\x00")) == 0 }

// guardKey refuses to give a key to those to whom the file that is there
// belongs, where that could be anybody: users who can write a directory, or one
// above it, can put a file of their own there just before a renewal. It is in
// order where the configuration names them, and where that file holds a key of
// the same certificate: then they have had it already.
func (a *attempt) guardKey(f *dest) error {
	by := f.at.lentBy()
	if by == "" {
		return nil
	}
	if f.Private {
		// Nobody but the agent needs to read its key store.
		f.want.Mode &^= 0o077
		f.want.UID = os.Geteuid()
		delete(f.want.Xattrs, accessACL)
		return nil
	}
	if f.Old == nil {
		if f.want.Mode&0o070 != 0 && f.file.Group == "" {
			f.want.GID = os.Getegid() // not the one that the directory hands on
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
	if a.holdsOwnKey(held) {
		return nil
	}
	return fmt.Errorf("the new key is not given to %s: others can put files into %s, and this one does not hold the key that it had: "+
		"set owner, group and mode of the file in %s.json of CERTCTL_TARGETS_DIR; or check whose the file is, and let directory %s belong to root and be writable by nobody else",
		taken, f.at.path, a.Target, by)
}

// holdsOwnKey reports whether data holds a private key that the agent has for
// the certificate: the one that is current, or was before, or is becoming so.
func (a *attempt) holdsOwnKey(data []byte) bool {
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
	if m == nil || own(m.KeyPEM) {
		return m != nil
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

// readStored reads a file of the key store, if nobody else can have put it
// there.
func readStored(path string) ([]byte, error) {
	at, name, err := resolve(path)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	if by := at.lentBy(); by != "" {
		return nil, fmt.Errorf("others can put files into %s", by)
	}
	data, _, _, err := read(at, name)
	return data, err
}
