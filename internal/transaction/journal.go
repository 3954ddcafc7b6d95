package transaction

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/api"
	"certctl-agent/internal/policy"
)

// A phase is how far a transaction has come, as far as a crash matters.
type phase string

const (
	// staging: temporaries and backups may exist, every destination is as it
	// was.
	staging phase = "staging"
	// swapping: any destination may be old or new, and the server may have
	// loaded either.
	swapping phase = "swapping"
	// committed: every destination is new, for good.
	committed phase = "committed"
	// restored: every destination is old again, and the server still has to be
	// told.
	restored phase = "restored"
)

// journalVersion is that of records without changes. A version of the agent that
// knows none would drop them, and what undoes them: it sets changesVersion aside
// instead, for a person.
const (
	journalVersion = 1
	changesVersion = 2
)

// maxRecord bounds a journal record, in bytes. Extended attributes are most of
// it, and bounded by themselves.
const maxRecord = 4 << 20

// record is what the journal holds of a transaction. It never holds bytes of a
// file: those that are needed again are in the backup set.
type record struct {
	Target api.ID       `json:"target"`
	Phase  phase        `json:"phase"`
	Files  []fileRecord `json:"files"`
	Set    string       `json:"set,omitempty"` // backup set; empty: there was nothing before
	Keep   int          `json:"keep"`          // sets to keep after success; -1: none

	// Changes may have been made, and what undoes them is in the set.
	Changes []changeRecord `json:"changes,omitempty"`

	Reload *policy.Command `json:"reload,omitempty"`

	// Owed is what an earlier record, which this one replaced, still asked for.
	Owed *owed `json:"owed,omitempty"`
}

// owed is what is still to be done of a deployment whose old files are back in
// place: the reload, and the undo of changes. A nil Command means that only the
// next deployment can reload, since it takes more than a command.
type owed struct {
	Command *policy.Command `json:"command,omitempty"`
	Changes []changeRecord  `json:"changes,omitempty"`
	Set     string          `json:"set,omitempty"` // where what undoes them is
}

// changeRecord is one Change.
type changeRecord struct {
	Name   string `json:"name"`             // its ID
	Backup string `json:"backup,omitempty"` // name in the backup set; "": there was nothing
	Digest digest `json:"sha256,omitempty"`
}

// fileRecord is one destination.
type fileRecord struct {
	Path    string   `json:"path"` // as configured, for messages
	Dir     string   `json:"dir"`  // directory in which the file really is
	Name    string   `json:"name"`
	Private bool     `json:"private,omitempty"` // a file of the agent's own key store
	Stage   string   `json:"stage"`             // temporary name of the new file
	Restore string   `json:"restore"`           // temporary name of the old file when it is put back
	New     digest   `json:"new"`
	Old     *oldFile `json:"old,omitempty"` // nil: there was no file

	// InPlace is set before the file is overwritten: what is there after a
	// crash may be torn.
	InPlace bool `json:"in_place,omitempty"`
}

// oldFile is an old file.
type oldFile struct {
	Backup string `json:"backup"` // name in the backup set
	Digest digest `json:"sha256"`
	attributes
}

// digest is a SHA-256 in hex.
type digest string

func digestOf(data []byte) digest {
	sum := sha256.Sum256(data)
	return digest(hex.EncodeToString(sum[:]))
}

// envelope guards a record against bit rot and half-written files.
type envelope struct {
	Version int             `json:"version"`
	SHA256  digest          `json:"sha256"` // of the bytes of Record
	Record  json.RawMessage `json:"record"`
}

func encode(r *record) ([]byte, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	version := journalVersion
	if len(r.allChanges()) > 0 {
		version = changesVersion
	}
	data, err := json.Marshal(envelope{version, digestOf(body), body})
	if err == nil && len(data) > maxRecord {
		err = fmt.Errorf("journal record of %d bytes is too long", len(data))
	}
	return data, err
}

func decode(data []byte) (*record, error) {
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, fmt.Errorf("journal record is damaged: %w", err)
	}
	if e.Version != journalVersion && e.Version != changesVersion {
		return nil, fmt.Errorf("journal record has version %d, this agent knows %d and %d", e.Version, journalVersion, changesVersion)
	}
	if digestOf(e.Record) != e.SHA256 {
		return nil, errors.New("journal record is damaged: its checksum is wrong")
	}
	r := new(record)
	if err := json.Unmarshal(e.Record, r); err != nil {
		return nil, fmt.Errorf("journal record is damaged: %w", err)
	}
	return r, r.check()
}

// check refuses what encode never wrote, so that a record cannot lead to names
// outside of its directories.
func (r *record) check() error {
	switch r.Phase {
	case staging, swapping, committed, restored:
	default:
		return fmt.Errorf("journal record has an unknown phase %q", r.Phase)
	}
	if r.Target == "" || r.Set != "" && !isSetName(r.Set) {
		return errors.New("journal record has a bad name in it")
	}
	if slices.ContainsFunc(r.allChanges(), func(c changeRecord) bool { return c.Backup != "" && !plain(c.Backup) }) ||
		r.Owed != nil && r.Owed.Set != "" && !isSetName(r.Owed.Set) {
		return errors.New("journal record has a bad name in it")
	}
	for _, f := range r.Files {
		if !filepath.IsAbs(f.Dir) || !plain(f.Name) || !isTemporaryName(f.Stage) || !isTemporaryName(f.Restore) ||
			f.Old != nil && !plain(f.Old.Backup) {
			return errors.New("journal record has a bad name in it")
		}
	}
	return nil
}

// allChanges are those of the record, and those of earlier ones.
func (r *record) allChanges() []changeRecord {
	if r.Owed == nil {
		return r.Changes
	}
	return slices.Concat(r.Changes, r.Owed.Changes)
}

// names are the IDs of changes, for messages.
func names(changes []changeRecord) (ids []string) {
	for _, c := range changes {
		ids = append(ids, c.Name)
	}
	return ids
}

func plain(name string) bool {
	return name != "" && name != "." && name != ".." && !strings.ContainsAny(name, "/\x00")
}

// isTemporaryName reports whether temporary made the name.
func isTemporaryName(name string) bool {
	random, ok := strings.CutPrefix(name, ".certctl-")
	return ok && len(random) == 20 && strings.Trim(random, "abcdefghijklmnopqrstuvwxyz234567") == ""
}

// temporary returns a new name for a temporary file. The dot makes servers
// that load a whole directory skip it.
func temporary() string { return ".certctl-" + strings.ToLower(rand.Text()[:20]) }

// save makes r the record of its target, durably.
func (e *Engine) save(r *record) error {
	data, err := encode(r)
	if err != nil {
		return err
	}
	temp := temporary()
	if _, err := e.disk.put(e.journal, temp, data, private()); err != nil {
		return fmt.Errorf("write the journal in %s: %w", e.journal.path, reason(err))
	}
	if err := e.disk.rename(e.journal, temp, recordName(r.Target)); err != nil {
		return errors.Join(fmt.Errorf("write the journal in %s: %w", e.journal.path, reason(err)), e.disk.remove(e.journal, temp))
	}
	if err := e.disk.syncDir(e.journal); err != nil {
		return &unsureError{err}
	}
	return nil
}

// unsureError means that a record was written, and that a power cut could
// bring back the one before it.
type unsureError struct{ error }

func (e *unsureError) Unwrap() error { return e.error }

const (
	recordSuffix = ".json"
	asideSuffix  = ".aside"
)

func recordName(id api.ID) string { return string(id) + recordSuffix }

func asideName(id api.ID) string { return string(id) + asideSuffix }

// load returns the record of a target, or nil when there is none.
func (e *Engine) load(id string) (*record, error) {
	data, _, _, err := read(e.journal, id+recordSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", e.journal.join(id+recordSuffix), reason(err))
	}
	r, err := decode(bytes.TrimSpace(data))
	if err == nil && string(r.Target) != id {
		err = fmt.Errorf("journal record is that of target %s", r.Target)
	}
	if err != nil {
		return nil, &damagedError{err}
	}
	return r, nil
}

// damagedError is a record that cannot be used, now or later.
type damagedError struct{ error }

func (e *damagedError) Unwrap() error { return e.error }

// forget removes the record of a target, durably.
func (e *Engine) forget(id api.ID) error {
	err := e.disk.remove(e.journal, recordName(id))
	if err == nil {
		err = e.disk.syncDir(e.journal)
	}
	if err != nil {
		return fmt.Errorf("remove the journal record of target %s: %w", id, reason(err))
	}
	return nil
}

// setAside keeps a record that cannot be followed, for a person. While it is
// there, the target counts as not clean; the next deployment that succeeds
// replaces every file, and removes it.
func (e *Engine) setAside(id api.ID) error {
	if err := e.disk.rename(e.journal, recordName(id), asideName(id)); err != nil {
		return fmt.Errorf("set the journal record of target %s aside: %w", id, reason(err))
	}
	return e.disk.syncDir(e.journal)
}

func (e *Engine) isAside(id api.ID) bool {
	_, err := e.journal.Lstat(asideName(id))
	return err == nil
}
