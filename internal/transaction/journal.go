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

// A phase is how far a deployment has come. It decides what recovery does.
type phase string

const (
	// staging: temporaries and backups may exist; every destination is old.
	staging phase = "staging"
	// swapping: each destination may be old or new, and the server may have loaded either.
	swapping phase = "swapping"
	// committed: every destination is new and stays so.
	committed phase = "committed"
	// restored: every destination is old again; the server must still reload.
	restored phase = "restored"
)

// A record with changes has changesVersion, any other journalVersion. An older agent, which does
// not know changes, would drop them and their undo data. So it sets a record of changesVersion
// aside for inspection.
const (
	journalVersion = 1
	changesVersion = 2
)

// maxRecord bounds a journal record, in bytes. Most of it are extended attributes (maxXattrs).
const maxRecord = 4 << 20

// record is the journal record of a deployment. It never holds the content of a file: that is in
// the backup set.
type record struct {
	Target api.ID       `json:"target"`
	Phase  phase        `json:"phase"`
	Files  []fileRecord `json:"files"`
	Set    string       `json:"set,omitempty"` // backup set; empty: there was nothing to back up
	Keep   int          `json:"keep"`          // sets to keep after a success; -1: none

	// Changes may have been made. The backup set has their old values.
	Changes []changeRecord `json:"changes,omitempty"`

	Reload *policy.Command `json:"reload,omitempty"`

	// Owed is the work left by an earlier deployment, whose record this one replaced.
	Owed *owed `json:"owed,omitempty"`
}

// owed is the work left by a deployment whose old files are back in place: a reload, and the undo
// of changes. If Command is nil, only the next deployment can reload, because the reload is more
// than a command.
type owed struct {
	Command *policy.Command `json:"command,omitempty"`
	Changes []changeRecord  `json:"changes,omitempty"`
	Set     string          `json:"set,omitempty"` // backup set with their old values
}

// changeRecord is the journal's entry for one Change.
type changeRecord struct {
	Name   string `json:"name"`             // its ID
	Backup string `json:"backup,omitempty"` // name in the backup set; "": there was no old value
	Digest digest `json:"sha256,omitempty"`
}

// fileRecord is the journal's entry for one destination.
type fileRecord struct {
	Path    string   `json:"path"` // as configured, for messages
	Dir     string   `json:"dir"`  // directory of the file, without symlinks
	Name    string   `json:"name"`
	Private bool     `json:"private,omitempty"` // a file of the agent's own key store
	Stage   string   `json:"stage"`             // temporary name of the new file
	Restore string   `json:"restore"`           // temporary name of the old file during a rollback
	New     digest   `json:"new"`
	Old     *oldFile `json:"old,omitempty"` // nil: there was no file

	// InPlace is set before the file is overwritten in place: after a crash it may be torn.
	InPlace bool `json:"in_place,omitempty"`
}

// oldFile is the journal's entry for the old file of a destination.
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

// envelope protects a record against bit rot and half-written files.
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
		return nil, fmt.Errorf("journal record has version %d, but this agent knows only %d and %d", e.Version, journalVersion, changesVersion)
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

// check refuses a record that encode cannot have written, so that no name in it leads outside its
// directory.
func (r *record) check() error {
	switch r.Phase {
	case staging, swapping, committed, restored:
	default:
		return fmt.Errorf("journal record has an unknown phase %q", r.Phase)
	}
	badName := r.Target == "" || r.Set != "" && !isSetName(r.Set) ||
		r.Owed != nil && r.Owed.Set != "" && !isSetName(r.Owed.Set) ||
		slices.ContainsFunc(r.allChanges(), func(c changeRecord) bool { return c.Backup != "" && !isPlainName(c.Backup) }) ||
		slices.ContainsFunc(r.Files, func(f fileRecord) bool {
			return !filepath.IsAbs(f.Dir) || !isPlainName(f.Name) || !isTemporaryName(f.Stage) || !isTemporaryName(f.Restore) ||
				f.Old != nil && !isPlainName(f.Old.Backup)
		})
	if badName {
		return errors.New("journal record contains an invalid name")
	}
	return nil
}

// allChanges returns the changes of the record and those that it owes.
func (r *record) allChanges() []changeRecord {
	if r.Owed == nil {
		return r.Changes
	}
	return slices.Concat(r.Changes, r.Owed.Changes)
}

// idsOf returns the IDs of changes, for messages.
func idsOf(changes []changeRecord) (ids []string) {
	for _, c := range changes {
		ids = append(ids, c.Name)
	}
	return ids
}

// isPlainName reports whether name stays within its directory.
func isPlainName(name string) bool {
	return name != "" && name != "." && name != ".." && !strings.ContainsAny(name, "/\x00")
}

// isTemporaryName reports whether name looks like one of temporaryName's.
func isTemporaryName(name string) bool {
	random, ok := strings.CutPrefix(name, ".certctl-")
	return ok && len(random) == 20 && strings.Trim(random, "abcdefghijklmnopqrstuvwxyz234567") == ""
}

// temporaryName returns a new name for a temporary file. Servers that load a whole directory skip
// it because of the dot.
func temporaryName() string { return ".certctl-" + strings.ToLower(rand.Text()[:20]) }

// save writes r durably as the record of its target.
func (e *Engine) save(r *record) error {
	data, err := encode(r)
	if err != nil {
		return err
	}
	temp := temporaryName()
	if _, err := e.disk.create(e.journal, temp, data, privateAttributes()); err != nil {
		return fmt.Errorf("write the journal in %s: %w", e.journal.path, withoutPath(err))
	}
	if err := e.disk.rename(e.journal, temp, recordName(r.Target)); err != nil {
		return errors.Join(fmt.Errorf("write the journal in %s: %w", e.journal.path, withoutPath(err)), e.disk.remove(e.journal, temp))
	}
	if err := e.disk.syncDir(e.journal); err != nil {
		return &unsyncedError{err}
	}
	return nil
}

// unsyncedError means that a record was written, but that a power cut may bring back the previous
// one.
type unsyncedError struct{ error }

func (e *unsyncedError) Unwrap() error { return e.error }

const (
	recordSuffix = ".json"
	asideSuffix  = ".aside"
)

func recordName(id api.ID) string { return string(id) + recordSuffix }

func asideName(id api.ID) string { return string(id) + asideSuffix }

// load returns the record of a target, or nil if there is none.
func (e *Engine) load(id string) (*record, error) {
	data, _, _, err := read(e.journal, id+recordSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", e.journal.join(id+recordSuffix), withoutPath(err))
	}
	r, err := decode(bytes.TrimSpace(data))
	if err == nil && string(r.Target) != id {
		err = fmt.Errorf("journal record belongs to target %s", r.Target)
	}
	if err != nil {
		return nil, &damagedError{err}
	}
	return r, nil
}

// damagedError means that a record cannot be followed, now or later.
type damagedError struct{ error }

func (e *damagedError) Unwrap() error { return e.error }

// removeRecord removes the record of a target durably.
func (e *Engine) removeRecord(id api.ID) error {
	err := e.disk.remove(e.journal, recordName(id))
	if err == nil {
		err = e.disk.syncDir(e.journal)
	}
	if err != nil {
		return fmt.Errorf("remove the journal record of target %s: %w", id, withoutPath(err))
	}
	return nil
}

// setAside renames a record that recovery cannot follow, for inspection. While it exists the
// target is not clean: the next successful deployment replaces every file and removes the record.
func (e *Engine) setAside(id api.ID) error {
	if err := e.disk.rename(e.journal, recordName(id), asideName(id)); err != nil {
		return fmt.Errorf("set the journal record of target %s aside: %w", id, withoutPath(err))
	}
	return e.disk.syncDir(e.journal)
}

func (e *Engine) isAside(id api.ID) bool {
	_, err := e.journal.Lstat(asideName(id))
	return err == nil
}
