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

// Roles of files. The role is part of the names of a file's temporary and its copy.
const (
	roleCert  = "cert"
	roleChain = "chain"
	roleKey   = "key"
)

const (
	// maxFile bounds a public file on the server, in bytes.
	maxFile = 1 << 20

	// keyStep is how many bytes of a key are compared at a time in its first keySteps bytes, see
	// compareKey.
	keyStep  = 4
	keySteps = 192

	// maxPath bounds a path that the server resolves, in bytes.
	maxPath = 4 << 10

	// maxOurs bounds how many of our files are removed at once.
	maxOurs = 1000

	// maxErrors is how many removals may fail before sweep stops.
	maxErrors = 5

	// maxSlow times the timeout of one request bounds all requests of Read, or of Write.
	maxSlow = 10

	// maxID bounds the ID of the change, in bytes.
	maxID = 500

	// patience bounds the retries of an undo that loses its connection.
	patience = 45 * time.Second
)

// file is one destination.
type file struct {
	role string
	path string // as configured
	data []byte
	opts targetconf.FileOptions

	at    string      // path without symlinks
	now   *sftp.Attrs // of the existing file; nil: none
	sum   string      // SHA-256 of the existing file, if public
	mode  fs.FileMode // wanted
	owner *account    // wanted
	same  bool        // the existing file is as wanted
}

// account is a user and group. Nil means any.
type account struct{ uid, gid *uint32 }

func (f *file) secret() bool { return f.role == roleKey }

// change replaces the files. It writes each file to its destination's directory under a temporary
// name, sets its mode and owner, and renames it. It keeps the old files there too, as hard links,
// until the deployment succeeded or is undone. So the old key never leaves the server, and an undo
// also restores mode, owner and labels.
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

// manifest is the state that Restore needs. It has the old key file's attributes but not its
// content.
type manifest struct {
	Files []saved `json:"files"`
}

// saved is the old state of one file.
type saved struct {
	Role string `json:"role"`
	At   string `json:"at"`
	Old  *looks `json:"old"`        // nil: there was no file
	New  string `json:"new_sha256"` // of the new content
}

// looks identifies a version of a file.
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
			return nil, false, fmt.Errorf("%s and %s are the same file on %s, %s", c.files[other].path, f.path, c.Host, f.at)
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

// within bounds one step, in case a server answers every request just before its timeout.
func (c *change) within(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := maxSlow * c.timeout()
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s is too slow: not done after %v", c.Host, limit))
}

// look sets the current state of the destination in f, and the wanted mode and owner.
func (c *change) look(ctx context.Context, s *session, f *file) (err error) {
	f.now, f.sum, f.owner, f.same = nil, "", nil, false
	if err := c.resolvePath(ctx, s, f); err != nil {
		return err
	}
	if why := policy.Fatal(f.at); why != "" && !c.local[f.path] {
		return fmt.Errorf("%s is refused because it is, or is in, %s: to allow it anyway, set the path in the target's overlay", f.at, why)
	}
	dir, err := s.Lstat(ctx, path.Dir(f.at))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the directory %s does not exist", path.Dir(f.at))
	}
	if err != nil {
		return fmt.Errorf("directory %s: %w", path.Dir(f.at), err)
	}
	if dir.Mode.Perm()&0o002 != 0 && dir.Mode&fs.ModeSticky == 0 {
		return fmt.Errorf("every user on the server can write to directory %s: chmod o-w", path.Dir(f.at))
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
	// Keep the mode and owner of a key file only if no other user can have put it there.
	trusted := !f.secret() || dir.UID == 0 && dir.Mode.Perm()&0o022 == 0 || dir.Mode.Perm()&0o077 == 0
	if err := c.want(ctx, s, f, trusted); err != nil {
		return err
	}
	if f.now == nil {
		return nil
	}
	equal, err := c.compare(ctx, s, f)
	f.same = equal && f.now.Mode.Perm() == f.mode && f.owner.has(f.now.UID, f.now.GID)
	return err
}

// resolvePath sets f.at. It follows symlinks.
func (c *change) resolvePath(ctx context.Context, s *session, f *file) (err error) {
	if f.at, err = s.RealPath(ctx, f.path); errors.Is(err, fs.ErrNotExist) { // older servers require that the file exists
		if f.at, err = s.RealPath(ctx, path.Dir(f.path)); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the directory %s does not exist", path.Dir(f.path))
		} else if err != nil {
			return err
		}
		f.at = path.Join(f.at, path.Base(f.path))
	}
	if err == nil && (!path.IsAbs(f.at) || path.Clean(f.at) != f.at || printable.Line(f.at, maxPath) != f.at) {
		err = fmt.Errorf("the server resolves it to %.200q, which is not a valid path", f.at)
	}
	return err
}

// has reports whether the account includes this user and group.
func (a *account) has(uid, gid uint32) bool {
	return (a.uid == nil || *a.uid == uid) && (a.gid == nil || *a.gid == gid)
}

// want sets the wanted mode and owner: the configured ones, else those of the existing file if keep
// is set, else the default.
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

// number returns the number of a user or group from the server's database.
func number(ctx context.Context, s *session, database, name string) (*uint32, error) {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return new(uint32(n)), nil
	}
	data, err := read(ctx, s, database)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: configure its number", database, err)
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
	return nil, fmt.Errorf("%q is not in %s on the server: configure its number", name, database)
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

// compare reports whether the existing file already has the new content. It returns an error if the
// file is of another kind, which must not be replaced.
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
		return false, errors.New("the existing file holds a private key, but the new one would not: configure a separate file for the certificate")
	case !content.Certificates && len(bytes.TrimSpace(data)) > 0 && !c.common.ReplaceAny:
		return false, c.foreign("no certificate")
	}
	return false, nil
}

func (c *change) foreign(what string) error {
	return fmt.Errorf(`the existing file holds %s, so it is not replaced: correct the path, remove the file, or put {"replace_any_file": true} into %s.json in CERTCTL_TARGETS_DIR`, what, c.id)
}

// compareKey compares a key without copying another key from the server: it stops reading at the
// first bytes that differ. Keys in the same format differ where their random bytes start.
func (c *change) compareKey(ctx context.Context, s *session, f *file) (equal bool, err error) {
	file, err := s.OpenToRead(ctx, f.at)
	if errors.Is(err, fs.ErrPermission) {
		return false, nil // replacing it does not need permission to read it
	}
	if err != nil {
		return false, err
	}
	defer func() { err = cmp.Or(err, file.Close(ctx)) }()
	const certificate, armour = "-----BEGIN CERTIFICATE-----", "-----BEGIN "
	head, err := file.Read(ctx, 0, len(certificate)) // at most as long as the first line of any key
	switch {
	case err != nil:
		return false, err
	case string(head) == certificate:
		return false, errors.New("the existing file starts with a certificate, but the new one would hold only the key: configure a separate file for the key")
	case len(bytes.TrimSpace(head)) > 0 && !bytes.HasPrefix(head, []byte(armour)) && !bytes.HasPrefix(head, []byte("Bag Attributes")) && !c.common.ReplaceAny:
		return false, c.foreign("no key as PEM")
	case f.now.Size != uint64(len(f.data)) || !bytes.HasPrefix(f.data, head):
		return false, nil
	}
	for at := len(head); at < len(f.data); {
		size := keyStep
		if at > keySteps {
			size = len(f.data) - at // it is the same key
		}
		got, err := file.Read(ctx, int64(at), min(size, len(f.data)-at))
		if err != nil || len(got) == 0 || !bytes.HasPrefix(f.data[at:], got) {
			return false, err
		}
		at += len(got)
	}
	return true, nil
}

// Names of temporary files and copies start with the mark of the target, followed by the leaf's
// fingerprint, the role and random characters. They are random because the server may still process
// a request of a lost connection, which must not affect files of the next one.
const (
	markPrefix = ".certctl-"
	newSuffix  = ".new"
	oldSuffix  = ".old"
)

// ourName matches names of temporary files and copies.
var ourName = lazyregexp.New(`^\.certctl-[A-Za-z0-9.-]{1,80}$`)

func (c *change) mark() string { return markPrefix + digest([]byte(c.id))[:12] + "-" }

func (c *change) name(f *file, suffix string) string {
	return path.Join(path.Dir(f.at), c.mark()+c.leaf[:12]+"-"+f.role+"-"+rand.Text()[:8]+suffix)
}

// ours returns the paths of the files with our mark in the directories of ats.
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

// sweep removes the files with our mark whose name matches.
func (c *change) sweep(ctx context.Context, s *session, ats []string, match func(name string) bool) error {
	paths, err := c.ours(ctx, s, ats, match)
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
	// Files that a killed run staged may hold a key.
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
			// The file system has no hard links, or another user owns the file
			// (protected_hardlinks). With a rename, the file is missing for a moment.
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

// stage writes the new content of f to a temporary file.
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
			return fmt.Errorf("chown it to user %d and group %d, like %s or as configured: %w: only root can do this; set %s_owner and %s_group to values that %s may set",
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
		// Restore tells the new key file from the old one by its time.
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
			return fmt.Errorf("its backup cannot be read: %w", err)
		}
	}
	return c.persist(ctx, func(ctx context.Context, s *session) error { return c.restore(ctx, s, m, was == nil) })
}

// persist calls do until it succeeds or fails permanently. It reconnects if the connection is lost,
// since the server may be restarting.
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
		m.Files = nil // from an earlier try
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
	// Do this first, so that a pending rename of a lost connection finds no file.
	if err := c.sweep(ctx, s, ats, isNew); err != nil {
		return err
	}
	// The files belong together: neither the old nor the new key matches someone else's
	// certificate.
	now := make([]*looks, len(m.Files))
	var errs []error
	for i, old := range m.Files {
		var err error
		if now[i], err = c.looksNow(ctx, s, old.At, old.Role == roleKey); err == nil && c.isForeign(old, now[i], fresh) {
			err = errors.New("someone else has changed it since, so it and the files that belong to it were left alone")
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
		return errors.Join(errs...) // keep the copies
	}
	return c.sweep(ctx, s, ats, isAny)
}

// isForeign reports whether a public file is neither the old one nor written by a deployment.
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
	return fmt.Errorf("its copy on the server, %s…%s, is missing", c.mark(), oldSuffix)
}

// wants reports whether this deployment writes a file with this digest.
func (c *change) wants(sum string) bool {
	return slices.ContainsFunc(c.files, func(f *file) bool { return digest(f.data) == sum })
}

// looksNow returns the current version of a file, or nil if it does not exist.
func (c *change) looksNow(ctx context.Context, s *session, path string, secret bool) (*looks, error) {
	attrs, err := s.Lstat(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !attrs.Mode.IsRegular() {
		return nil, errors.New("it is not a regular file any more")
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
