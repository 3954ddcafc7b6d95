package ssh

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/lazyregexp"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/sftp"
	"certctl-agent/internal/targetconf"
)

// What a file is. The role is part of the names of its temporary and its copy.
const (
	roleCert  = "cert"
	roleChain = "chain"
	roleKey   = "key"
)

const (
	// maxFile bounds a public file that is looked at, in bytes.
	maxFile = 1 << 20

	// keyStep is how many bytes of a key are compared at once, and keySteps
	// bytes how many so: see sameKey.
	keyStep  = 4
	keySteps = 192

	// maxPath bounds a path that the server makes of ours, in bytes.
	maxPath = 4 << 10

	// maxOurs is how many files of ours are removed at once.
	maxOurs = 1000

	// maxErrors is how many of them may fail.
	maxErrors = 5

	// maxSlow is how many times the timeout of one request all requests of Read,
	// or of Write, may take together.
	maxSlow = 10

	// maxID bounds the ID of the change, in bytes.
	maxID = 500

	// patience bounds the tries of an undo whose connection is lost.
	patience = 45 * time.Second
)

// file is one destination.
type file struct {
	role string
	path string // as it is configured
	data []byte
	opts targetconf.FileOptions

	at    string      // path without symlinks
	now   *sftp.Attrs // of the file that is there; nil: none is
	sum   string      // of a public one, SHA-256
	mode  fs.FileMode // as it has to be
	owner *account    // as it has to be; nil: whoever makes it
	same  bool        // it is as it has to be
}

type account struct{ uid, gid *uint32 }

func (f *file) secret() bool { return f.role == roleKey }

// change replaces the files. Each is written beside its destination under a name
// of ours, gets its mode and its owner, and is renamed. The files before stay
// there too, as second names of what they are (hard links), until the deployment
// is decided: so mode, owner, labels and the old key stay where they were.
type change struct {
	*target
	leaf  string // fingerprint of the certificate
	files []*file
}

func (c *change) add(role string, p targetconf.Path, data []byte, opts targetconf.FileOptions) {
	c.files = append(c.files, &file{role: role, path: string(p), data: data, opts: opts})
}

// ID implements connector.Change.
func (c *change) ID() string {
	var paths []string
	for _, f := range c.files {
		paths = append(paths, f.path)
	}
	id := strings.Join(paths, ", ") + " on " + c.peer()
	if len(id) > maxID {
		id = fmt.Sprintf("%.200s… (%s) on %s", c.CertPath, digest([]byte(id)), c.peer())
	}
	return strings.ToValidUTF8(id, "�")
}

// manifest is what an undo needs. Of the old key it has what the file looks like
// from outside, and nothing of its content.
type manifest struct {
	Files []saved `json:"files"`
}

// saved is one file as it was.
type saved struct {
	Role string `json:"role"`
	At   string `json:"at"`
	Old  *looks `json:"old"`        // nil: there was none
	New  string `json:"new_sha256"` // of what the deployment puts there
}

// looks is what a file is recognized by.
type looks struct {
	Size     uint64      `json:"size"`
	Modified uint32      `json:"modified"`
	Mode     fs.FileMode `json:"mode"`
	UID      uint32      `json:"uid"`
	GID      uint32      `json:"gid"`
	SHA256   string      `json:"sha256,omitempty"` // of a public file
}

func looksOf(a sftp.Attrs, sum string) looks {
	return looks{a.Size, a.Modified, a.Mode, a.UID, a.GID, sum}
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Read implements connector.Change.
func (c *change) Read(ctx context.Context) (was []byte, same bool, err error) {
	s, err := c.open(ctx)
	if err != nil {
		return nil, false, err
	}
	ctx, cancel := c.within(ctx)
	defer cancel()
	var m manifest
	same, any := true, false
	for _, f := range c.files {
		if err := c.look(ctx, s, f); err != nil {
			return nil, false, fmt.Errorf("%s on %s: %w", f.path, c.Host, err)
		}
		if other := slices.IndexFunc(c.files, func(o *file) bool { return o != f && o.at == f.at }); other >= 0 {
			return nil, false, fmt.Errorf("%s and %s lead to the same file on %s, %s", c.files[other].path, f.path, c.Host, f.at)
		}
		entry := saved{Role: f.role, At: f.at, New: digest(f.data)}
		if f.now != nil {
			entry.Old = new(looksOf(*f.now, f.sum))
			any = true
		}
		m.Files = append(m.Files, entry)
		same = same && f.same
	}
	if !any {
		return nil, same, nil
	}
	was, err = json.Marshal(m)
	return was, same, err
}

// within bounds what a server that answers just in time, without an end, can make
// of one step.
func (c *change) within(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := maxSlow * c.timeout()
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s is too slow: not done after %v", c.Host, limit))
}

// look finds out what is at the destination, and what has to be there.
func (c *change) look(ctx context.Context, s *session, f *file) (err error) {
	f.now, f.sum, f.owner, f.same = nil, "", nil, false
	if err := c.resolvePath(ctx, s, f); err != nil {
		return err
	}
	if why := policy.Fatal(f.at); why != "" && !c.local[f.path] {
		return fmt.Errorf("%s is refused because it is in, or is, %s: to allow it all the same, name the path in the target's overlay", f.at, why)
	}
	dir, err := s.Lstat(ctx, path.Dir(f.at))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no directory %s", path.Dir(f.at))
	}
	if err != nil {
		return fmt.Errorf("directory %s: %w", path.Dir(f.at), err)
	}
	if dir.Mode.Perm()&0o002 != 0 && dir.Mode&fs.ModeSticky == 0 {
		return fmt.Errorf("every user there can write directory %s: chmod o-w", path.Dir(f.at))
	}
	now, err := s.Lstat(ctx, f.at)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case !now.Mode.IsRegular():
		return fmt.Errorf("%s is not a regular file", f.at)
	default:
		f.now = &now
	}
	// What others could have put there says nothing on who may have the key.
	ours := !f.secret() || dir.UID == 0 && dir.Mode.Perm()&0o022 == 0 || dir.Mode.Perm()&0o077 == 0
	if err := c.want(ctx, s, f, ours); err != nil {
		return err
	}
	if f.now == nil {
		return nil
	}
	equal, err := c.compare(ctx, s, f)
	f.same = equal && f.now.Mode.Perm() == f.mode && f.owner.has(f.now.UID, f.now.GID)
	return err
}

// resolvePath finds out where the destination is: a symlink is followed.
func (c *change) resolvePath(ctx context.Context, s *session, f *file) (err error) {
	if f.at, err = s.RealPath(ctx, f.path); errors.Is(err, fs.ErrNotExist) { // older servers want the file to be there
		if f.at, err = s.RealPath(ctx, path.Dir(f.path)); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("there is no directory %s", path.Dir(f.path))
		} else if err != nil {
			return err
		}
		f.at = path.Join(f.at, path.Base(f.path))
	}
	if err == nil && (!path.IsAbs(f.at) || path.Clean(f.at) != f.at || printable.Line(f.at, maxPath) != f.at) {
		err = fmt.Errorf("the server says that it leads to %.200q, which is no path", f.at)
	}
	return err
}

// has reports whether a file of this user and group is as it has to be.
func (a *account) has(uid, gid uint32) bool {
	return (a.uid == nil || *a.uid == uid) && (a.gid == nil || *a.gid == gid)
}

// want decides on mode and owner: as configured, else as the file there has
// them, if keep says so, else the default.
func (c *change) want(ctx context.Context, s *session, f *file, keep bool) (err error) {
	f.mode, f.owner = 0o644, new(account)
	if f.secret() {
		f.mode = 0o600
	}
	if f.now != nil && keep {
		f.mode = f.now.Mode.Perm()
		f.owner.uid, f.owner.gid = &f.now.UID, &f.now.GID
		if f.secret() {
			f.mode &^= 0o007
		}
	}
	if f.opts.Mode != 0 {
		f.mode = fs.FileMode(f.opts.Mode)
	}
	if f.opts.Owner != "" {
		if f.owner.uid, err = number(ctx, s, "/etc/passwd", string(f.opts.Owner)); err != nil {
			return targetconf.Invalid(f.role+"_owner", "%v", err)
		}
	}
	if f.opts.Group != "" {
		if f.owner.gid, err = number(ctx, s, "/etc/group", string(f.opts.Group)); err != nil {
			return targetconf.Invalid(f.role+"_group", "%v", err)
		}
	}
	return nil
}

// number is that of an account, by one of the databases there.
func number(ctx context.Context, s *session, database, name string) (*uint32, error) {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return new(uint32(n)), nil
	}
	data, err := read(ctx, s, database)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: give its number", database, err)
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) < 3 || fields[0] != name {
			continue
		}
		if n, err := strconv.ParseUint(fields[2], 10, 31); err == nil {
			return new(uint32(n)), nil
		}
	}
	return nil, fmt.Errorf("%q is not in %s there: give its number", name, database)
}

// read reads a public file.
func read(ctx context.Context, s *session, path string) (data []byte, err error) {
	file, err := s.OpenToRead(ctx, path)
	if err != nil {
		return nil, err
	}
	data, err = file.Read(ctx, 0, maxFile+1)
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("it is larger than %d MiB", maxFile>>20)
	}
	return data, cmp.Or(err, file.Close(ctx))
}

// compare reports whether the file there has the content that it should have. A
// file of something else is refused: it is not this target's to replace.
func (c *change) compare(ctx context.Context, s *session, f *file) (equal bool, err error) {
	if f.secret() {
		return c.compareKey(ctx, s, f)
	}
	data, err := read(ctx, s, f.at)
	if err != nil {
		return false, err
	}
	f.sum = digest(data)
	switch content := pemutil.ContentOf(data); {
	case bytes.Equal(data, f.data):
		return true, nil
	case pemutil.HoldsPrivateKey(data):
		return false, errors.New("the file that is there holds a private key, and the new one would not: configure a file of its own for the certificate")
	case !content.Certificates && len(bytes.TrimSpace(data)) > 0 && !c.common.ReplaceAny:
		return false, c.foreign("no certificate")
	}
	return false, nil
}

func (c *change) foreign(what string) error {
	return fmt.Errorf(`the file that is there holds %s, so it is not replaced: correct the path, or remove the file, or put {"replace_any_file": true} into %s.json of CERTCTL_TARGETS_DIR`, what, c.id)
}

// compareKey compares a key without taking it from its host: of one that is not
// ours, nothing is read behind the first bytes that differ. Keys in the same form
// begin alike, up to bytes that are random.
func (c *change) compareKey(ctx context.Context, s *session, f *file) (equal bool, err error) {
	file, err := s.OpenToRead(ctx, f.at)
	if errors.Is(err, fs.ErrPermission) {
		return false, nil // replacing it takes no right to read it
	}
	if err != nil {
		return false, err
	}
	defer func() { err = cmp.Or(err, file.Close(ctx)) }()
	const certificate, armour = "-----BEGIN CERTIFICATE-----", "-----BEGIN "
	head, err := file.Read(ctx, 0, len(certificate)) // not longer than the first line of any key
	switch {
	case err != nil:
		return false, err
	case string(head) == certificate:
		return false, errors.New("the file that is there begins with a certificate, and the new one would hold the key alone: configure a file of its own for the key")
	case len(bytes.TrimSpace(head)) > 0 && !bytes.HasPrefix(head, []byte(armour)) && !bytes.HasPrefix(head, []byte("Bag Attributes")) && !c.common.ReplaceAny:
		return false, c.foreign("no key as PEM")
	case f.now.Size != uint64(len(f.data)) || !bytes.HasPrefix(f.data, head):
		return false, nil
	}
	for at := len(head); at < len(f.data); {
		size := keyStep
		if at > keySteps {
			size = len(f.data) - at // a key that is alike so far is this one
		}
		got, err := file.Read(ctx, int64(at), min(size, len(f.data)-at))
		if err != nil || len(got) == 0 || !bytes.HasPrefix(f.data[at:], got) {
			return false, err
		}
		at += len(got)
	}
	return true, nil
}

// Names of ours begin with the mark of the target. Behind it is the leaf's
// fingerprint, the role, and something random: a request that a dead connection
// still delivers must not meet a file of the next.
const (
	markPrefix = ".certctl-"
	newSuffix  = ".new"
	oldSuffix  = ".old"
)

// ourName is what a name of ours is made of.
var ourName = lazyregexp.New(`^\.certctl-[A-Za-z0-9.-]{1,80}$`)

func (c *change) mark() string { return markPrefix + digest([]byte(c.id))[:12] + "-" }

func (c *change) name(f *file, suffix string) string {
	return path.Join(path.Dir(f.at), c.mark()+c.leaf[:12]+"-"+f.role+"-"+rand.Text()[:8]+suffix)
}

// ours lists the files with our mark in the directories of ats, by path.
func (c *change) ours(ctx context.Context, s *session, ats []string, keep func(name string) bool) (paths []string, err error) {
	var dirs []string
	for _, at := range ats {
		dirs = append(dirs, path.Dir(at))
	}
	slices.Sort(dirs)
	for _, dir := range slices.Compact(dirs) {
		found := 0
		names, err := s.Names(ctx, dir, func(name string) bool {
			is := found < maxOurs && strings.HasPrefix(name, c.mark()) && ourName().MatchString(name) && keep(name)
			if is {
				found++
			}
			return is
		})
		if err != nil {
			return nil, fmt.Errorf("list directory %s: %w", dir, err)
		}
		for _, name := range names {
			paths = append(paths, path.Join(dir, name))
		}
	}
	slices.Sort(paths)
	return paths, nil
}

// sweep removes the files with our mark for which which says true.
func (c *change) sweep(ctx context.Context, s *session, ats []string, which func(name string) bool) error {
	paths, err := c.ours(ctx, s, ats, which)
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range paths {
		if err := s.Remove(ctx, path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove %s: %w", path, err))
		}
		if len(errs) == maxErrors {
			break
		}
	}
	return errors.Join(errs...)
}

func isNew(name string) bool { return strings.HasSuffix(name, newSuffix) }
func isAny(string) bool      { return true }

func (c *change) ats() (ats []string) {
	for _, f := range c.files {
		ats = append(ats, f.at)
	}
	return ats
}

// Write implements connector.Change.
func (c *change) Write(ctx context.Context) error {
	s, err := c.open(ctx)
	if err != nil {
		return err
	}
	if err := c.replace(ctx, s); err != nil {
		return err
	}
	return c.validate(ctx)
}

func (c *change) replace(ctx context.Context, s *session) error {
	ctx, cancel := c.within(ctx)
	defer cancel()
	// What a killed run staged holds a key.
	if err := c.sweep(ctx, s, c.ats(), isNew); err != nil {
		return err
	}
	staged := make(map[*file]string)
	for _, f := range c.files {
		if f.same {
			continue
		}
		staged[f] = c.name(f, newSuffix)
		if err := c.stage(ctx, s, f, staged[f]); err != nil {
			return fmt.Errorf("write %s on %s: %w", staged[f], c.Host, err)
		}
	}
	linked := make(map[*file]bool)
	for _, f := range c.files {
		if staged[f] != "" && f.now != nil {
			linked[f] = s.Link(ctx, f.at, c.name(f, oldSuffix)) == nil
		}
	}
	if s.Err() != nil {
		return s.Err()
	}
	for _, f := range c.files {
		if staged[f] == "" {
			continue
		}
		if f.now != nil && !linked[f] {
			// The file system has no hard links, or the file is another user's
			// (protected_hardlinks): for a moment there is no file.
			if err := s.Rename(ctx, f.at, c.name(f, oldSuffix)); err != nil {
				return fmt.Errorf("keep %s on %s: %w", f.at, c.Host, err)
			}
		}
		if err := s.Rename(ctx, staged[f], f.at); err != nil {
			return fmt.Errorf("replace %s on %s: %w", f.at, c.Host, err)
		}
	}
	return nil
}

// stage writes a file under a name of ours.
func (c *change) stage(ctx context.Context, s *session, f *file, name string) (err error) {
	file, err := s.Create(ctx, name, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, file.Close(ctx)) }()
	made, err := file.Stat(ctx)
	if err != nil {
		return err
	}
	if !f.owner.has(made.UID, made.GID) {
		uid, gid := made.UID, made.GID
		if f.owner.uid != nil {
			uid = *f.owner.uid
		}
		if f.owner.gid != nil {
			gid = *f.owner.gid
		}
		if err := file.Chown(ctx, uid, gid); err != nil {
			return fmt.Errorf("give it to user %d and group %d, as %s has it or the configuration says: %w: only root can give files away; set %s_owner and %s_group to what %s can give",
				uid, gid, f.at, err, f.role, f.role, c.User)
		}
	}
	if err := file.Write(ctx, f.data); err != nil {
		return fmt.Errorf("%w (is the disk full?)", err)
	}
	if err := file.Chmod(ctx, f.mode); err != nil {
		return err
	}
	if f.now != nil && made.Modified <= f.now.Modified {
		// By its time the new key can be told from the old one.
		if err := file.SetModified(ctx, f.now.Modified+1); err != nil {
			return err
		}
	}
	if err := file.Sync(ctx); err != nil {
		return fmt.Errorf("sync it: %w", err)
	}
	return nil
}

// Restore implements connector.Change.
func (c *change) Restore(ctx context.Context, was []byte) error {
	var m manifest
	if was != nil {
		if err := json.Unmarshal(was, &m); err != nil {
			return fmt.Errorf("what was saved is damaged: %w", err)
		}
	}
	return c.persist(ctx, func(ctx context.Context, s *session) error { return c.restore(ctx, s, m, was == nil) })
}

// persist does what must not be left half done. A connection that is lost is made
// again: the server may be restarting.
func (c *change) persist(ctx context.Context, do func(context.Context, *session) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		s, err := c.open(ctx)
		if err == nil {
			err = do(ctx, s)
		}
		if err == nil || !transient(err) {
			return err
		}
		select {
		case <-time.After(pauses()[0]):
		case <-ctx.Done():
			return err
		}
	}
}

func (c *change) restore(ctx context.Context, s *session, m manifest, fresh bool) error {
	if fresh {
		m.Files = nil // of a try before
		for _, f := range c.files {
			if err := c.resolvePath(ctx, s, f); err != nil {
				return fmt.Errorf("%s on %s: %w", f.path, c.Host, err)
			}
			m.Files = append(m.Files, saved{Role: f.role, At: f.at})
		}
	}
	var ats []string
	for _, old := range m.Files {
		ats = append(ats, old.At)
	}
	// First of all: a rename that a dead connection still delivers finds nothing
	// to rename.
	if err := c.sweep(ctx, s, ats, isNew); err != nil {
		return err
	}
	// The files belong together: beside a certificate of someone else's, the old
	// key is as wrong as the new one.
	now := make([]*looks, len(m.Files))
	var errs []error
	for i, old := range m.Files {
		var err error
		if now[i], err = c.looksNow(ctx, s, old.At, old.Role == roleKey); err == nil && c.isForeign(old, now[i], fresh) {
			err = errors.New("someone else has changed it since, so it stays as it is, and what belongs to it")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s on %s: %w", old.At, c.Host, err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	for i, old := range m.Files {
		if err := c.restoreFile(ctx, s, old, now[i]); err != nil {
			errs = append(errs, fmt.Errorf("%s on %s: %w", old.At, c.Host, err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...) // and the copies stay
	}
	return c.sweep(ctx, s, ats, isAny)
}

// isForeign reports whether a public file is neither what was there nor what a
// deployment put there.
func (c *change) isForeign(old saved, now *looks, fresh bool) bool {
	return now != nil && now.SHA256 != "" && !fresh && now.SHA256 != old.New && !c.wants(now.SHA256) && (old.Old == nil || *now != *old.Old)
}

func (c *change) restoreFile(ctx context.Context, s *session, old saved, now *looks) error {
	switch {
	case old.Old == nil && now == nil, old.Old != nil && now != nil && *now == *old.Old:
		return nil
	case old.Old == nil:
		return s.Remove(ctx, old.At)
	}
	copies, err := c.ours(ctx, s, []string{old.At}, func(name string) bool {
		return strings.HasSuffix(name, oldSuffix) && strings.Contains(name, "-"+old.Role+"-")
	})
	if err != nil {
		return err
	}
	for _, copy := range copies {
		was, err := c.looksNow(ctx, s, copy, old.Role == roleKey)
		if err != nil {
			return err
		}
		if was != nil && *was == *old.Old {
			return s.Rename(ctx, copy, old.At)
		}
	}
	return fmt.Errorf("the copy of it that was kept there, %s…%s, is gone", c.mark(), oldSuffix)
}

// wants reports whether a public file with this digest is what this deployment
// would put there.
func (c *change) wants(sum string) bool {
	return slices.ContainsFunc(c.files, func(f *file) bool { return digest(f.data) == sum })
}

// looksNow describes a file, nil if there is none.
func (c *change) looksNow(ctx context.Context, s *session, path string, secret bool) (*looks, error) {
	attrs, err := s.Lstat(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !attrs.Mode.IsRegular() {
		return nil, errors.New("somebody has put something else in its place")
	}
	sum := ""
	if !secret {
		data, err := read(ctx, s, path)
		if err != nil {
			return nil, err
		}
		sum = digest(data)
	}
	return new(looksOf(attrs, sum)), nil
}

// Finish implements connector.Change.
func (c *change) Finish(ctx context.Context) error {
	return c.persist(ctx, func(ctx context.Context, s *session) error { return c.sweep(ctx, s, c.ats(), isAny) })
}
